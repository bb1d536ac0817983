"""Training in process: transformers' and TRL's own trainers with `optim="pion"`, and this package's."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from pion_hf import Pion, PionTrainer, PionTrainerMixin, PionTrainingArguments
from pion_hf.integrations.trl import PionSFTConfig, PionSFTTrainer
from tests.conftest import chat_rows, toy_llama

QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}


@pytest.fixture
def options(tmp_path) -> dict:
    """Two steps on a CPU, for any class of arguments."""
    return {"output_dir": str(tmp_path), "max_steps": 2, "learning_rate": 1e-2, "bf16": False, **QUIET}


def rotated(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}


def assert_rotated_only(before: dict[str, torch.Tensor], model) -> None:
    """Every hidden matrix moved and kept its singular values."""
    after = rotated(model)
    assert after.keys() == before.keys()
    for name, matrix in before.items():
        assert (after[name] - matrix).norm() > 1e-3 * matrix.norm(), f"{name} did not move"
        old, new = (torch.linalg.svdvals(m.double()) for m in (matrix, after[name]))
        torch.testing.assert_close(new, old, rtol=0, atol=2e-5 * old[0].item(), msg=f"spectrum of {name}")


def inner(trainer: Trainer) -> torch.optim.Optimizer:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def test_plain_trainer(model, token_rows, options):
    before = rotated(model)
    embedding = model.model.embed_tokens.weight.detach().clone()
    trainer = Trainer(model=model, args=TrainingArguments(optim="pion", **options), train_dataset=token_rows)
    trainer.train()
    assert type(inner(trainer)) is Pion
    assert_rotated_only(before, model)
    assert not torch.equal(model.model.embed_tokens.weight, embedding)


@pytest.mark.parametrize("classes", [(SFTTrainer, SFTConfig), (PionSFTTrainer, PionSFTConfig)], ids=["trl", "pion_hf"])
def test_sft_trainer(classes, model, tokenizer, options):
    trainer_class, config_class = classes
    before = rotated(model)
    trainer = trainer_class(
        model=model,
        args=config_class(optim="pion", **options),
        train_dataset=datasets.Dataset.from_list(chat_rows(16)),
        processing_class=tokenizer,
    )
    metrics = trainer.train().metrics
    assert type(inner(trainer)) is Pion
    assert_rotated_only(before, model)
    assert ("spectrum_drift" in metrics) == (trainer_class is PionSFTTrainer)


def test_dpo_trainer(model, tokenizer, options):
    before = rotated(model)
    rows = [{**r, "chosen": r["completion"], "rejected": [{"role": "assistant", "content": "?"}]} for r in chat_rows(8)]
    dataset = datasets.Dataset.from_list(rows).remove_columns("completion")
    trainer = DPOTrainer(
        model=model,
        ref_model=toy_llama(),
        args=DPOConfig(optim="pion", per_device_train_batch_size=4, **options),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    assert type(inner(trainer)) is Pion
    assert_rotated_only(before, model)


def test_pion_trainer_uses_typed_fields_and_reports(model, token_rows, options, tmp_path):
    before = rotated(model)
    args = PionTrainingArguments(optim_adamw_lr=1e-3, optim_rms=0.1, optim_exclude_modules=["q_proj"], **options)
    assert args.optim == "pion"
    trainer = PionTrainer(model=model, args=args, train_dataset=token_rows)
    metrics = trainer.train().metrics
    groups = inner(trainer).param_groups
    assert {g["initial_lr"] for g in groups if g["rule"] == "pion"} == {1e-2}
    assert {g["initial_lr"] for g in groups if g["rule"] == "adamw"} == {1e-3}
    assert {g["rms"] for g in groups if g["rule"] == "pion"} == {0.1}
    matrices = [name for name in before if "q_proj" not in name]
    assert metrics["rotated_matrices"] == len(matrices)
    assert 0 < metrics["spectrum_drift"] < 1e-5
    assert 0 < metrics["optimizer_share"] < 1
    assert any("spectrum_drift" in entry for entry in trainer.state.log_history)
    record = json.loads((tmp_path / "routing.json").read_text())
    assert [r["name"] for r in record["parameters"] if r["rule"] == "pion"] == matrices


def test_mixin_fits_any_trainer(model, token_rows, options):
    class Halved(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            self.halved = True
            loss = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
            return loss / 2

    class Mixed(PionTrainerMixin, Halved):
        pass

    trainer = Mixed(model=model, args=TrainingArguments(optim="pion", **options), train_dataset=token_rows)
    assert trainer.train().metrics["spectrum_drift"] < 1e-5
    assert trainer.halved


def test_other_optimizers_in_our_trainer(model, token_rows, options):
    args = PionTrainingArguments(optim="adamw_torch", **options)
    trainer = PionTrainer(model=model, args=args, train_dataset=token_rows)
    metrics = trainer.train().metrics
    assert type(inner(trainer)) is torch.optim.AdamW
    assert "spectrum_drift" not in metrics
    assert "optimizer_share" in metrics


def test_arguments_without_an_optimizer_of_ours_are_pointed_out(model, token_rows, options, caplog):
    said = "PionTrainer measures, its args choose the optimizer, and theirs is 'adamw_torch"
    PionTrainer(model=model, args=TrainingArguments(**options), train_dataset=token_rows)
    assert said in caplog.text
    caplog.clear()
    PionTrainer(model=model, args=TrainingArguments(optim="pion", **options), train_dataset=token_rows)
    PionTrainer(model=model, args=PionTrainingArguments(optim="adamw_torch", **options), train_dataset=token_rows)
    assert said not in caplog.text


def test_rates_by_which_spectra_do_change_are_pointed_out(model, token_rows, options, caplog):
    absurd = {**options, "learning_rate": 10.0, "max_steps": 2, "optim_adamw_lr": 0.0}
    args = PionTrainingArguments(**absurd, optim_preset="paper")
    PionTrainer(model=model, args=args, train_dataset=token_rows).train()
    assert "is the learning rate (10) right?" in caplog.text


def test_at_absurd_rates_spectra_stay_and_steps_are_clipped(model, token_rows, options, caplog):
    absurd = {**options, "learning_rate": 1e6, "max_steps": 2, "optim_adamw_lr": 0.0}
    trainer = PionTrainer(model=model, args=PionTrainingArguments(**absurd), train_dataset=token_rows)
    metrics = trainer.train().metrics
    assert metrics["spectrum_drift"] < 1e-4
    assert metrics["clipped_steps"] == 2 * metrics["rotated_matrices"]
    assert "is the learning rate" not in caplog.text


class StopAfter(TrainerCallback):
    """Ends training after `steps`, as an interruption would; the schedule still aims at `max_steps`."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def test_resumed_training_equals_uninterrupted(token_rows, tmp_path):
    def train(folder: str, *callbacks: TrainerCallback, resume: str | None = None) -> PionTrainer:
        args = PionTrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=10,
            save_steps=5,
            learning_rate=1e-2,
            lr_scheduler_type="linear",
            per_device_train_batch_size=4,
            optim_adamw_lr=1e-3,
            **{**QUIET, "save_strategy": "steps"},
        )
        trainer = PionTrainer(model=toy_llama(), args=args, train_dataset=token_rows, callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = train("straight")
    half = train("resumed", StopAfter(5))
    assert half.state.global_step == 5
    resumed = train("resumed", resume=str(tmp_path / "resumed" / "checkpoint-5"))
    assert resumed.state.global_step == 10
    weights, expected = resumed.model.state_dict(), straight.model.state_dict()
    assert not torch.equal(half.model.state_dict()["lm_head.weight"], expected["lm_head.weight"])
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    for kept, wanted in zip(inner(resumed).state.values(), inner(straight).state.values(), strict=True):
        assert kept.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(torch.as_tensor(kept[key]), torch.as_tensor(value)), key
