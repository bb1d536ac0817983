"""One input, tried in a process of its own, and what became of it.

What an input does is one of these:

    clear line   refused, with one line that names the field or the file; or taken, with such a line about it
    as it should taken, and what came of it is what comes of the undamaged input (each kind says how that is seen)
    unclear      refused without a line, with several, or with one that names neither
    traceback    any other exception, or the end of the process
    hang         no end within `SECONDS`
    wrong        taken, nothing said, and something else came of it

A refusal of a command is `SystemExit` with text, which makes an exit status of 1; of a call in Python it is a
`ValueError`, `TypeError`, `OSError` or `RuntimeError` whose text says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLEAR, RIGHT, UNCLEAR, TRACEBACK, HANG, WRONG = "clear line", "as it should", "unclear", "traceback", "hang", "wrong"
VERDICTS = (CLEAR, RIGHT, UNCLEAR, TRACEBACK, HANG, WRONG)
FAULTS = (UNCLEAR, TRACEBACK, HANG, WRONG)
SECONDS = 120.0  # on a loaded machine
REFUSALS = (ValueError, OSError, RuntimeError, TypeError)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# What speaks of code: who reads it cannot tell what was wrong with the input.
OF_CODE = re.compile(r"pion-hf \w+: (Assertion|Attribute|Index|Key|Name|Type|UnboundLocal|ZeroDivision)Error\b")
# What a line about an input says that is taken all the same; a line of a log or of a table says none of it.
SAID = re.compile(r"warn|cannot|ignor|left out|damaged|missing|without|not |no |instead|wins|skip|never|is used", re.I)


@dataclass(frozen=True)
class Input:
    """attempt: does it, in a new folder, and returns what came of it; `right` says whether that is as it should be.

    names: what a clear line names, one of them. right: None where the input must be refused, or something said of it.
    call: a call in Python rather than a command. alone: needs nothing of the world.
    """

    kind: str
    name: str
    attempt: Callable[[Any, Path], Any]
    names: tuple[str, ...] = ()
    right: Callable[[Any, Any], bool] | None = None
    call: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Outcome:
    """said: the line, or what went wrong."""

    verdict: str
    said: str
    seconds: float = 0.0


def judge(given: Input, world: Any, folder: Path, printed: Callable[[], str]) -> Outcome:
    """Try an input in this process. printed: what it has printed so far."""
    try:
        result = given.attempt(world, folder)
    except SystemExit as error:
        if not given.call and error.code not in (None, 0):
            return _refused(error.code if isinstance(error.code, str) else _last_error(printed()), given)
        result = None
    except REFUSALS as error:
        if not given.call:
            return Outcome(TRACEBACK, _told(error))
        return _refused(str(error), given)
    except BaseException as error:
        return Outcome(TRACEBACK, _told(error))
    if given.right is not None and given.right(world, result):
        return Outcome(RIGHT, "")
    lines = (COLOURS.sub("", line).strip() for line in printed().splitlines())
    about = [line for line in lines if SAID.search(line) and any(name in line for name in given.names)]
    return Outcome(CLEAR, about[0]) if about else Outcome(WRONG, f"result: {str(result)[:200]}")


def _refused(line: str, given: Input) -> Outcome:
    line = line.strip()
    if not line or "\n" in line:
        return Outcome(UNCLEAR, f"not one line: {line[:300]!r}")
    if OF_CODE.match(line):
        return Outcome(UNCLEAR, f"speaks of code: {line[:300]}")
    if not any(name in line for name in given.names):
        return Outcome(UNCLEAR, f"names none of {given.names}: {line[:300]}")
    return Outcome(CLEAR, line)


def _last_error(printed: str) -> str:
    """What argparse prints before it exits with a number."""
    return next((line for line in reversed(printed.splitlines()) if "error:" in line), "")


def _told(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:200]!r} in {Path(place.filename).name}:{place.lineno}"


def attempt(given: Input, world: Any, folder: Path, *, seconds: float = SECONDS) -> Outcome:
    """Try an input in a fork of this process, in a new folder."""
    folder.mkdir(parents=True)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(given, world, folder)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > seconds:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Outcome(HANG, f"no end after {seconds:.0f} s", seconds)
        time.sleep(0.01)
    passed = time.monotonic() - began
    try:
        verdict, said = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Outcome(TRACEBACK, f"the process ended with status {ended[1]}", passed)
    return Outcome(verdict, said, passed)


def _child(given: Input, world: Any, folder: Path) -> None:
    """Never returns. Group of its own, output to a file, working folder `folder/here`."""
    os.setpgid(0, 0)
    output = os.open(folder / "printed.txt", os.O_CREAT | os.O_RDWR)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, encoding="utf-8", errors="replace") for fd in (1, 2))
    here = folder / "here"
    here.mkdir()
    os.chdir(here)
    os.environ["TMPDIR"] = str(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def printed() -> str:
        sys.stdout.flush()
        sys.stderr.flush()
        return (folder / "printed.txt").read_text(encoding="utf-8", errors="replace")

    found = Outcome(TRACEBACK, "judging it failed")
    try:
        found = judge(given, world, here, printed)
    except BaseException as error:
        found = Outcome(TRACEBACK, f"judging it: {_told(error)}")
    finally:
        part = folder / "outcome.part"
        part.write_text(json.dumps([found.verdict, found.said]), encoding="utf-8")
        part.rename(folder / "outcome.json")
        os._exit(0)


def refused(kind: str, cases: Iterable[tuple[str, Callable[[Any, Path], Any], tuple[str, ...]]]) -> list[Input]:
    """Inputs that must not be taken silently."""
    return [Input(kind, name, attempt, names) for name, attempt, names in cases]
