"""The process of a compared run: `pion-hf` that does not outlive whoever started it, however that ended.

Run as a file, so that the watch begins before the imports, which take seconds. Its stdin is a pipe that only the
starting process holds open: when that is gone, by SIGKILL too, this process and all it started end at once.
"""

import os
import signal
import sys
import threading
from pathlib import Path


def end_with_parent() -> None:
    """Wait for the end of stdin, then end the process group."""
    while os.read(0, 1):
        pass
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.path[:1] = []  # this file's folder, whose modules would pass for others'
    sys.path.append(str(Path(__file__).parents[2]))

    from pion_hf.cli import main

    main()
