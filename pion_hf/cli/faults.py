"""What went wrong, in one line: what it is, what was read, and the way out."""

from __future__ import annotations

import errno
import os
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

TRACEBACK = "PION_HF_TRACEBACK"  # the variable that asks for Python's own account
LONGEST = 1000  # letters of a line
# What the name of an exception says to those who know Python alone.
WORDS = {
    EOFError: "something ends too early",
    MemoryError: "the memory is full",
    RecursionError: "something is nested too deeply",
    StopIteration: "something is empty",
}
WAYS_OUT = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), ": ask for its permissions, or choose another place"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ": make room, or choose another place"),
    errno.EROFS: ": choose another place",
    errno.ENAMETOOLONG: ": choose a shorter name",
    errno.ELOOP: ": remove the link",
}
PACKAGE = Path(__file__).parent.parent


def is_of_user(error: BaseException) -> bool:
    """Whether code of the user's own (a reward, a model's) took part: then its place matters more than the words."""
    return not all(_is_of_library(frame.filename) for frame in traceback.extract_tb(error.__traceback__))


def one_line(error: Exception, argv: Sequence[str]) -> str:
    """The line for an exception that a command with these arguments ended with.

    What this package refuses says all itself. To anything else is added what was read: what the exception was told of
    it (`add_note`), or the files and folders that the arguments name.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)
    line = _words(error)
    clear = isinstance(error, ImportError) or (ours and isinstance(error, (ValueError, RuntimeError, OSError)))
    of_system = isinstance(error, OSError) and error.errno is not None
    if not clear or of_system:
        read = getattr(error, "__notes__", None) or [a for a in argv if not a.startswith("-") and os.path.exists(a)]
        if read:
            line += f" (reading {', '.join(read)})"
        if isinstance(error, OSError):
            line += WAYS_OUT.get(error.errno, "")
        elif not isinstance(error, ValueError):
            line += f"; {TRACEBACK}=1 shows where"
    line = " ".join(line.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


def in_words(error: Exception) -> str:
    """What an exception of a library says, where a sentence around it says of what; without its name if it can."""
    said = f"there is no {error.args[0]!r}" if isinstance(error, KeyError) and error.args else str(error)
    return WORDS.get(type(error)) or " ".join(said.split()) or type(error).__name__


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {str(error.filename)!r}" if error.filename is not None else "")
    if isinstance(error, KeyError) and len(error.args) == 1:
        return f"there is no {error.args[0]!r}"
    if type(error) in WORDS:
        return ": ".join(filter(None, (WORDS[type(error)], str(error))))
    if isinstance(error, (ValueError, ImportError, OSError)):
        return str(error) or type(error).__name__
    return ": ".join(filter(None, (type(error).__name__, str(error))))


def _is_of_library(file: str) -> bool:
    path = Path(file)
    if not path.is_file():  # "<string>", or a compiled module's source, which is not here
        return True
    homes = (PACKAGE, sysconfig.get_path("stdlib"))
    installed = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    return installed or any(path.is_relative_to(home) for home in homes)
