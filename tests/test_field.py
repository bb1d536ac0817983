"""What tells the outcomes of `make test-field` apart, on inputs that behave badly on purpose; and that none is lost."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.field import page
from tests.field.inputs import INPUTS
from tests.field.trial import CLEAR, HANG, RIGHT, TRACEBACK, UNCLEAR, WRONG, Input, Outcome, attempt

SECONDS = 1.0


def become(do, *names: str, right=None, call: bool = False) -> Outcome:
    given = Input("kind", "name", lambda world, folder: do(), names, right, call)
    folder = Path(os.environ["HF_HOME"], f"field-{time.monotonic_ns()}")
    return attempt(given, None, folder, seconds=SECONDS)


def refuse(code):
    raise SystemExit(code)


def fail(error):
    raise error


def say(text: str):
    print(text)


@pytest.mark.parametrize(
    ("do", "verdict"),
    [
        (lambda: refuse("pion-hf sft: max_steps must be 1 or more"), CLEAR),
        (lambda: refuse("pion-hf sft: something is wrong"), UNCLEAR),
        (lambda: refuse("max_steps is wrong\nand more"), UNCLEAR),
        (lambda: refuse("pion-hf sft: TypeError: 'int' object is not iterable (reading max_steps)"), UNCLEAR),
        (lambda: refuse(""), UNCLEAR),
        (lambda: refuse(3), UNCLEAR),
        (lambda: fail(ValueError("max_steps")), TRACEBACK),
        (lambda: fail(RecursionError()), TRACEBACK),
        (lambda: fail(KeyboardInterrupt()), TRACEBACK),
        (lambda: os.kill(os.getpid(), 9), TRACEBACK),
        (lambda: os._exit(0), TRACEBACK),
        (lambda: time.sleep(60), HANG),
        (lambda: None, WRONG),
        (lambda: say("max_steps: 3"), WRONG),
        (lambda: say("Warning: max_steps is ignored"), CLEAR),
    ],
)
def test_what_became_of_a_command_is_told(do, verdict):
    assert become(do, "max_steps").verdict == verdict


def test_what_became_of_a_call_is_told():
    assert become(lambda: fail(ValueError("lr must be above 0")), "lr", call=True).verdict == CLEAR
    assert become(lambda: fail(ValueError("math domain error")), "lr", call=True).verdict == UNCLEAR
    assert become(lambda: fail(KeyError("lr")), "lr", call=True).verdict == TRACEBACK
    assert become(lambda: 3, right=lambda world, result: result == 3).verdict == RIGHT
    assert become(lambda: 4, right=lambda world, result: result == 3).verdict == WRONG


def test_no_input_is_lost():
    assert len(INPUTS) >= 1000
    names = Counter((given.kind, given.name) for given in INPUTS)
    assert max(names.values()) == 1
    kinds = Counter(given.kind for given in INPUTS)
    assert kinds["pickles that run code"] >= 8
    assert kinds["reports: text that would be code"] >= 183
    assert kinds["optimizers: gradients that are not finite"] >= 72


def test_a_page_keeps_the_rows_of_other_kinds(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("Before.\n<!-- field -->\n<!-- /field -->\nAfter.\n")
    page.write(path, "field", page.table({"a": page.Row("1", Counter({CLEAR: 1200, WRONG: 1}))}))
    old = page.rows_in(path, "field")
    page.write(path, "field", page.table({**old, "b": page.Row("2", Counter({HANG: 2}))}))
    assert page.rows_in(path, "field")["a"].count[CLEAR] == 1200
    text = path.read_text()
    assert text.startswith("Before.\n<!-- field -->\n| kind of input |")
    assert "| **all** |  | 1,203 | 1,200 | 0 | 0 | 0 | 2 | 1 |" in text
    with pytest.raises(ValueError, match="no place for 'gallery'"):
        page.write(path, "gallery", "")
