"""Every file this package writes, and what it reads of a run: safe in a folder where others may have put something.

A file is written under a random name beside its place, flushed to the disk and put there by a rename: an interruption
leaves the old one or the new one, whole, and a link of that name is replaced, not followed. Logs grow by appending, and
refuse to be links. Parent folders may be links: people keep their runs on other disks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# "_": transformers uploads nothing that begins with it.
_PART = re.compile(r"_[0-9a-f]{16}\.part")


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` when all is written; its folder is made if need be.

    It keeps the permissions of the file that it replaces.
    """
    path = _with_folder(path)
    mode = _mode(path)
    part = path.with_name(f"_{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb", opener=_opener) as file:
            if mode is not None:
                os.chmod(part, mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text by `new_file`; what has no form in it, as in a file's name of another encoding, as \\udcff."""
    with new_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def append_text(path: str | os.PathLike, text: str) -> None:
    """Append UTF-8 text to a file that grows; its folder is made if need be."""
    path = _with_folder(path)
    with open(path, "ab", opener=_opener) as file:
        _check_regular(file.fileno(), path)
        file.write(text.encode("utf-8"))


def make_folder(path: str | os.PathLike) -> None:
    """Make a folder for files of ours, if it is not there yet."""
    path = _with_folder(path)
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a link, remove it", str(path))
    path.mkdir(exist_ok=True)


def read_bytes(path: str | os.PathLike) -> bytes:
    """What a regular file holds; nothing else is waited for."""
    with open(path, "rb", opener=lambda p, flags: os.open(p, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        _check_regular(file.fileno(), path)
        return file.read()


def fault_of_place(folder: str | os.PathLike) -> str | None:
    """Why nothing can be written to a folder, which need not be there yet; None if something can."""
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        return f"{str(there)!r} is no folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{str(there)!r} cannot be written to"


def is_part(path: Path) -> bool:
    """Whether an interruption left this of a file that was being written."""
    return _PART.fullmatch(path.name) is not None


def _with_folder(path: str | os.PathLike) -> Path:
    """The path, whose folder is made if need be."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(errno.ENOTDIR, "is no folder", str(path.parent)) from None
    return path


def _opener(path: str, flags: int) -> int:
    """O_NONBLOCK: a pipe that nobody reads is an error, not a wait."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def _check_regular(file: int, path: str | os.PathLike) -> None:
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))


def _mode(path: Path) -> int | None:
    """The permissions of the file at `path`; None of none, or a link."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:  # nothing, or a link to nothing
        return None
    if not stat.S_ISREG(mode):
        raise OSError(errno.EEXIST, "is no regular file", str(path))
    return None if path.is_symlink() else stat.S_IMODE(mode) & 0o777
