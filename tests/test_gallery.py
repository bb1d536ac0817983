"""The script gallery: other people's training scripts, unmodified, with toy models and data (`make test-gallery`).

`PION_HF_SCRIPTS` names a folder of transformers' `examples/pytorch`; TRL's scripts are those that are installed. Every
script trains under AdamW first, which tells whether it starts at all here, and then under this package's optimizer.
What stands in for a hub is in `tests/gallery`.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl

from pion_hf._version import __version__
from tests.field.page import markdown, write
from tests.gallery.scripts import CASES, Case, transformers_scripts, trl_scripts

pytestmark = [pytest.mark.gallery, pytest.mark.timeout(900)]  # each script starts twice

FOLDER = os.environ.get("PION_HF_SCRIPTS")
PAGE = os.environ.get("PION_HF_PAGE")  # of the docs, for the table
SCRIPTS = 24  # so many must be found that start at all
SECONDS = 400  # for one run
IN_LAYERS = re.compile(r"\.\d+\.")
NO_MAP = {"Embedding", "ConvNd"}


@pytest.fixture(scope="session")
def scripts() -> dict[str, Path]:
    return {**trl_scripts(), **(transformers_scripts(Path(FOLDER)) if FOLDER else {})}


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory) -> Path:
    from tests.gallery.stand_ins import make

    return make(tmp_path_factory.mktemp("stand-ins"))


@pytest.fixture(scope="session")
def rows() -> Iterator[list[list[str]]]:
    """Of the table, which is printed at the end, and put into `PAGE`."""
    rows: list[list[str]] = []
    yield rows
    table = markdown(["case", "script", "model", "optim", "tensors by rule", "hidden, by AdamW"], rows)
    told = f"With pion_hf {__version__}, transformers {transformers.__version__}, TRL {trl.__version__}:\n\n{table}"
    print(f"\n{told}")
    if PAGE:
        write(Path(PAGE), "gallery", told)


def run(script: Path, argv: list[str], folder: Path, home: Path) -> tuple[dict[str, Any] | None, str]:
    """Run a script in a process of its own: what became of every parameter (None: it failed), and what it printed."""
    from tests.gallery import worker

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([worker.__name__])
    folder.mkdir()
    process = context.Process(target=worker.work, args=(str(script), argv, str(folder), str(home)))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    printed = (folder / worker.OUTPUT).read_text(encoding="utf-8")
    record = folder / worker.RECORD
    return (json.loads(record.read_text()) if process.exitcode == 0 and record.is_file() else None), printed


def hidden(parameters: dict[str, dict[str, Any]]) -> set[str]:
    """Trained weights of a layer that map features to features: all that is to be rotated, by no rule of ours."""
    return {
        name
        for name, p in parameters.items()
        if p["trained"] and len(p["shape"]) >= 2 and IN_LAYERS.search(name) and p["kind"] not in NO_MAP and not p["end"]
    }


def test_no_script_is_left_out(scripts):
    with_cases = {case.script for case in CASES if not case.broken}
    assert set(trl_scripts()) <= with_cases, "TRL has new scripts: add them to tests/gallery/scripts.py"
    found = with_cases & set(scripts)
    assert len(found) >= SCRIPTS, "make test-gallery SCRIPTS=DIR, with a folder of transformers' examples/pytorch"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_script_trains_unmodified(case: Case, scripts, stand_ins, rows, tmp_path):
    if case.script not in scripts:
        pytest.skip(f"{case.script} is not among the scripts")

    def train(optim: str) -> tuple[dict[str, Any] | None, str]:
        argv = [*case.argv(stand_ins), f"--optim={optim}", f"--output_dir={tmp_path / 'out' / optim}"]
        return run(scripts[case.script], argv, tmp_path / optim, stand_ins)

    record, printed = train("adamw_torch")
    if case.broken:
        assert record is None
        assert case.broken in printed, "it fails otherwise than it did"
        return
    assert record, f"it does not start under AdamW:\n{printed[-3000:]}"
    moved = {name for name, p in record["parameters"].items() if p["moved"]}
    record, printed = train(case.optim)
    assert record, f"it trains under AdamW, but not under {case.optim}:\n{printed[-3000:]}"
    ours = record["parameters"]
    rules = Counter(p["rule"] for p in ours.values() if p["trained"])
    by_adamw = {name for name in hidden(ours) & moved if ours[name]["rule"] == "adamw"}
    told = ", ".join(f"{rule} {count}" for rule, count in sorted(rules.items()))
    rows.append(
        [str(case), case.script, record["model"], case.optim, told, ", ".join(sorted(set(map(kind, by_adamw))))]
    )
    assert record["steps"] == 2
    assert len(record["losses"]) == 2
    assert all(map(math.isfinite, record["losses"]))
    left = {name for name in moved if not ours[name]["moved"]}
    assert not left, f"AdamW trains what {case.optim} does not: {sorted(left)}"
    told_of = kind(printed)
    silent = {n for n in by_adamw if kind(n) not in told_of and not any(re.search(p, n) for p in case.by_adamw)}
    assert not silent, f"AdamW's without a word: {sorted(silent)}"
    ends = {name for name, p in ours.items() if p["end"] and p["rule"] not in (None, "adamw")}
    assert not ends, f"embeddings or heads under {case.optim}: {ends}"
    assert set(rules) - {"adamw"}, "nothing is under its rule"


def kind(name: str) -> str:
    """The same for a parameter of every layer: a warning may name one for all."""
    return re.sub(r"\.\d+\.", ".#.", name)
