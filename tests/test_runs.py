"""The run folder's format: what is written comes back, what is damaged is named."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from pion_hf.runs.folder import LOG, MATRICES, RECORD, SPECTRA, append_line, finite, keep_until, read_run, write_json


@pytest.fixture
def folder(tmp_path):
    write_json(tmp_path / RECORD, {"format": 1, "status": "finished", "matrices": [{"name": "w"}]})
    for step in (1, 2, 3):
        append_line(tmp_path / LOG, {"loss": 1.0 / step, "step": step})
    append_line(tmp_path / MATRICES, {"step": 3, "values": {"spectral_norm": [1.5, math.nan]}})
    return tmp_path


def test_what_is_written_comes_back(folder):
    save_file({"before/w": torch.ones(1, 2), "after/w": torch.zeros(1, 2), "before/x": torch.ones(1)}, folder / SPECTRA)
    write_json(folder / "eval.json", {"learnt": 1.0})
    run = read_run(folder)
    assert run.status == "finished"
    assert run.series("loss") == ([1, 2, 3], [1.0, 0.5, 1 / 3])
    assert run.series("nothing") == ([], [])
    assert run.snapshots[0].step == 3
    assert math.isnan(run.snapshots[0].values["spectral_norm"][1])
    assert run.spectra.keys() == {"w"}
    assert run.evaluation == {"learnt": 1.0}
    assert run.routing is None


def test_values_of_other_matrices_are_no_history(folder):
    append_line(folder / MATRICES, {"step": 4, "values": {"stable_rank": [2.0]}})
    assert read_run(folder).history("stable_rank") == ([4], [[2.0]])
    with pytest.raises(
        ValueError, match=r"matrices.jsonl' is damaged: step 3: spectral_norm holds 2 values, run.json 1 "
    ):
        read_run(folder).history("spectral_norm")


def test_numbers_that_are_none_are_null_on_disk(folder):
    append_line(folder / LOG, {"loss": math.inf, "step": 4})
    assert '"loss": null' in (folder / LOG).read_text().splitlines()[-1]
    assert math.isnan(read_run(folder).logs[-1]["loss"])
    assert finite({"a": (math.nan, [-math.inf, 1])}) == {"a": [None, [None, 1]]}


def test_a_last_line_that_was_cut_off_is_left_out(folder, caplog):
    with (folder / LOG).open("a") as file:
        file.write('{"loss": 0.1, "st')
    assert [entry["step"] for entry in read_run(folder).logs] == [1, 2, 3]
    assert [r.message for r in caplog.records] == [f"the last line of {folder / LOG} was cut off, and is left out"]


def test_null_is_not_nothing(folder):
    (folder / "eval.json").write_text("null")
    with pytest.raises(ValueError, match=r"cannot read '.*eval.json': it holds null"):
        read_run(folder)


def test_a_damaged_line_within_is_named(folder):
    text = (folder / LOG).read_text().splitlines()
    (folder / LOG).write_text("\n".join([text[0], "{oops", *text[1:]]))
    with pytest.raises(ValueError, match=r"line 2 of '.*log.jsonl' is damaged"):
        read_run(folder)


def test_later_lines_are_dropped(folder):
    with (folder / LOG).open("a") as file:
        file.write('{"loss": 0.1, "st')
    keep_until(folder, 2)
    assert [entry["step"] for entry in read_run(folder).logs] == [1, 2]
    assert read_run(folder).snapshots == []
    append_line(folder / LOG, {"loss": 0.0, "step": 3})
    assert [entry["step"] for entry in read_run(folder).logs] == [1, 2, 3]


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda f: f / "none", FileNotFoundError, "there is no folder"),
        (lambda f: (f / RECORD).unlink() or f, ValueError, "is no run: it holds no run.json"),
        (lambda f: (f / RECORD).write_text("{") and f, ValueError, "cannot read"),
        (lambda f: (f / RECORD).write_text("[]") and f, ValueError, "is not of format 1"),
        (lambda f: (f / RECORD).write_text('{"format": 2}') and f, ValueError, "is not of format 1"),
    ],
)
def test_what_is_no_run_is_refused(prepare, error, message, folder):
    with pytest.raises(error, match=message) as raised:
        read_run(prepare(folder))
    assert "\n" not in str(raised.value)


def test_a_file_is_replaced_whole(folder, monkeypatch):
    def fails(*args):
        raise OSError("no space")

    before = (folder / RECORD).read_text()
    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="no space"):
        write_json(folder / RECORD, {"format": 1, "status": "failed"})
    assert (folder / RECORD).read_text() == before
    assert json.loads(before)["status"] == "finished"
