"""`python -m pion_hf.run SCRIPT [ARGS...]`: run an unmodified Hugging Face script with `--optim pion` available.

Being a module, it also stands behind launchers: `accelerate launch -m pion_hf.run SCRIPT`, `torchrun -m pion_hf.run
SCRIPT`. As with python itself, `-m package.module` names a module instead of a file.
"""

from __future__ import annotations

import os
import runpy
import sys

import pion_hf  # noqa: F401  (importing registers the optimizers)

USAGE = "usage: pion-hf run SCRIPT [ARGS...]\n       pion-hf run -m package.module [ARGS...]"


def main(argv: list[str] | None = None) -> None:
    """Run `SCRIPT` as `__main__` with the remaining arguments as its own."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{__doc__}")
        return
    if argv[0] == "-m":
        if len(argv) < 2:
            raise SystemExit(USAGE)
        sys.argv = argv[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return
    if not os.path.isfile(argv[0]):
        own = f"; for our own commands: python -m pion_hf.cli {argv[0]}" if argv[0].isidentifier() else ""
        raise SystemExit(f"pion-hf run: there is no script {argv[0]!r} here ({os.getcwd()}){own}")
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
