"""What only tells of a run never costs its weights: folders in the way, full disks, damage, failures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pion_hf.cli import main
from pion_hf.cli.before_after import ReportMixin
from pion_hf.integrations.checkpoints import is_complete
from pion_hf.runs.folder import read_run
from tests.test_faults import out_of_space, trainer_of


@pytest.mark.parametrize("names", [["run.json"], ["log.jsonl", "spectra.safetensors", "routing.json", "README.md"]])
def test_weights_are_saved_whatever_stands_in_the_place_of_the_record(names, tmp_path, caplog):
    """Folders, which no file replaces."""
    for name in names:
        (tmp_path / name / "in the way").mkdir(parents=True)
    trainer = trainer_of(tmp_path, steps=2)
    trainer.train()
    trainer.create_model_card()
    trainer.save_model()
    assert trainer.state.global_step == 2
    assert is_complete(tmp_path / "checkpoint-2")
    assert (tmp_path / "model.safetensors").is_file()
    for name in names:
        assert any(name in line and "cannot be written to" in line for line in caplog.messages), name


@pytest.mark.parametrize("method", ["step_begins", "before_update", "after_update", "step_ends", "additions", "end"])
def test_a_measurement_that_fails_ends_measuring_alone(method, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(f"pion_hf.integrations.callbacks._Run.{method}", fail)
    trainer = trainer_of(tmp_path, steps=3, logging_steps=1)
    trainer.train()
    assert trainer.state.global_step == 3
    assert read_run(tmp_path).status == "finished"
    assert "LinAlgError('did not converge')): nothing more is measured" in caplog.text


def test_a_run_whose_model_cannot_be_saved_has_not_finished(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, steps=1, save_strategy="no")
    trainer.train()
    assert read_run(tmp_path).status == "finished"
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", out_of_space)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model()
    assert read_run(tmp_path).status == "failed"
    assert read_run(tmp_path).record["error"].startswith("OSError: [Errno 28] No space left")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1, "matrices": 3}', b"\xff\xfe"])
def test_a_damaged_record_is_kept_aside_and_the_rest_goes_on(content, run, caplog):
    before = load_file(run / "spectra.safetensors")
    lines = (run / "log.jsonl").read_text().splitlines()
    (run / "run.json").write_bytes(content)
    (run / "log.jsonl").write_text("\n".join([lines[0], "{oops", *lines[1:], ""]))
    trainer_of(run, steps=6, logging_steps=1).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert (run / "_damaged-1-run.json").read_bytes() == content
    assert "{oops" in (run / "_damaged-1-log.jsonl").read_text()
    assert [entry["step"] for entry in read_run(run).logs] == [1, 2, 3, 4, 5, 6, 6]
    assert read_run(run).snapshots[0].step == 0
    after = load_file(run / "spectra.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("before/"))
    assert "run.json is damaged and kept as _damaged-1-run.json" in caplog.text


def test_empty_spectra_are_kept_aside(run, caplog):
    (run / "spectra.safetensors").write_bytes(b"")
    trainer_of(run, steps=4).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert "spectra.safetensors is damaged and kept as _damaged-1-spectra.safetensors" in caplog.text
    assert "drift counts from here" in caplog.text
    assert read_run(run).spectra


def test_a_run_that_is_over_keeps_what_it_measured(run):
    before = read_run(run)
    trainer_of(run, steps=4).train(resume_from_checkpoint=True)
    after = read_run(run)
    assert after.status == "finished"
    assert after.record["spectrum_drift"] == before.record["spectrum_drift"]
    assert [snapshot.step for snapshot in after.snapshots] == [snapshot.step for snapshot in before.snapshots]
    assert after.logs == before.logs


@pytest.mark.parametrize("blend", [1.0, 0.5])
def test_a_command_saves_before_it_measures(blend, recipe, tmp_path, monkeypatch, caplog):
    (tmp_path / "run" / "eval.json" / "in the way").mkdir(parents=True)
    main(["sft", "--config", recipe(blend=blend)])
    assert "eval.json' cannot be written to" in caplog.text
    assert read_run_status(tmp_path / "run") == "finished"
    kept = load_file(tmp_path / "run" / "model.safetensors")

    def fail(self, *args, **kwargs):
        if self.state.global_step:
            raise RuntimeError("no more memory")
        return {}

    monkeypatch.setattr(ReportMixin, "measure", fail)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(RuntimeError, match="no more memory"):
        main(["sft", "--config", recipe(blend=blend)])
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in kept.items())
    assert read_run(tmp_path / "run").record["error"] == "RuntimeError: no more memory"


def read_run_status(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["status"]


def test_a_trial_of_a_search_has_its_own_folder(tmp_path, monkeypatch):
    """A search itself needs optuna."""
    trainer = trainer_of(tmp_path, steps=2)
    for name in ("run-0", "run-1"):
        monkeypatch.setattr(trainer, "_get_output_dir", lambda trial, name=name: str(tmp_path / name))
        trainer.train()
        assert read_run(tmp_path / name).status == "finished"
        assert is_complete(tmp_path / name / "checkpoint-2")
    assert not (tmp_path / "run.json").exists()
