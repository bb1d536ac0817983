"""Gradient accumulation and clipping: four batches of one are a batch of four, and one norm for all groups."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from pion_hf import PionTrainer, PionTrainingArguments
from pion_hf.integrations.callbacks import unwrap
from tests.conftest import toy_llama

# A full model or adapters, and the optimizer that it gets.
KINDS = ["pion", "pion_ambient", "teon", "pion_lora"]
STEPS, ROWS = 3, 4


def rows(count: int) -> list[dict]:
    """Of unequal lengths of loss, so that a mean of means would show.

    None is asked for its first token, which nothing predicts and transformers of 5.0 counts in the mean.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 105, (count, 12), generator=draw).tolist()
    dropped = [1 + 2 * (i % 4) for i in range(count)]
    return [{"input_ids": row, "labels": [-100] * n + row[n:]} for n, row in zip(dropped, ids, strict=True)]


def build(optim: str) -> nn.Module:
    """In float64: `natural` divides by the square of the gradient, which makes much of the rounding of small ones."""
    model = toy_llama().double()
    if optim != "pion_lora":
        return model
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    for name, p in adapted.named_parameters():  # B = 0 leaves A without a gradient
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return adapted


class Gradients(TrainerCallback):
    """The gradients that every step takes, clipped as they are, by name."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None})


def train(
    optim: str, folder, data: list[dict], *, batch: int, accumulate: int, **options
) -> tuple[PionTrainer, Gradients]:
    given = {"max_steps": STEPS, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, **options}
    args = PionTrainingArguments(
        output_dir=str(folder),
        optim=optim,
        optim_adamw_lr=1e-3,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **given,
    )
    gradients = Gradients()
    trainer = PionTrainer(model=build(optim), args=args, train_dataset=data, callbacks=[gradients])
    trainer.train()
    return trainer, gradients


def logged(trainer: PionTrainer, key: str) -> list[float]:
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


def norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))


def rules(trainer: PionTrainer) -> dict[str, str]:
    """The rule of every trained parameter, by name."""
    groups = unwrap(trainer.optimizer).param_groups
    return {name: group["rule"] for group in groups for name in group["param_names"]}


@pytest.mark.parametrize("optim", KINDS)
def test_four_batches_of_one_are_a_batch_of_four(optim, tmp_path):
    data = rows(STEPS * ROWS)
    whole, _ = train(optim, tmp_path / "whole", data, batch=ROWS, accumulate=1)
    parts, _ = train(optim, tmp_path / "parts", data, batch=1, accumulate=ROWS)
    assert whole.state.global_step == parts.state.global_step == STEPS
    torch.testing.assert_close(logged(parts, "grad_norm"), logged(whole, "grad_norm"), rtol=1e-5, atol=0)
    torch.testing.assert_close(logged(parts, "loss"), logged(whole, "loss"), rtol=1e-5, atol=0)
    before, after = dict(build(optim).named_parameters()), dict(parts.model.named_parameters())
    for name, p in whole.model.named_parameters():
        if p.requires_grad:
            moved, apart = (p - before[name]).norm(), (p - after[name]).norm()
            assert moved > 0, name
            assert apart <= 1e-8 * moved, f"{name}: {apart / moved:.1e} of what it moved"


@pytest.mark.parametrize(("optim", "accumulate"), [("pion", 1), *((optim, 4) for optim in KINDS)])
def test_one_norm_sees_and_clips_all_groups(optim, accumulate, tmp_path):
    model = build(optim)
    batch = rows(ROWS)
    # One epoch of one step: whatever the order of its rows, the gradient is that of their mean token.
    ids, labels = (torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels"))
    model(input_ids=ids, labels=labels).loss.backward()
    by_hand = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    limit = norm(by_hand) / 3

    options = {"max_steps": 1, "max_grad_norm": limit}
    trainer, gradients = train(optim, tmp_path, batch, batch=ROWS // accumulate, accumulate=accumulate, **options)
    (clipped,) = gradients.steps
    assert clipped.keys() == by_hand.keys() == rules(trainer).keys()
    assert set(rules(trainer).values()) > {"adamw"}
    (seen,) = logged(trainer, "grad_norm")
    torch.testing.assert_close(seen, norm(by_hand), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm(clipped), limit, rtol=1e-4, atol=0)  # torch divides by the norm + 1e-6
    of_matrices = {n: g for n, g in by_hand.items() if rules(trainer)[n] != "adamw"}
    assert 0 < norm(of_matrices) < 0.99 * norm(by_hand), "one kind of group has no part in the norm"
    for name, g in by_hand.items():
        torch.testing.assert_close(clipped[name], g / 3, rtol=1e-4, atol=1e-6 * g.abs().max().item(), msg=name)
