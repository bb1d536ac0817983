"""`resume_from_checkpoint` in a new process continues a run bit for bit: weights, masters, state, schedule, logs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback

from pion_hf import Pion, PionTrainer, PionTrainingArguments, param_groups
from pion_hf.integrations.callbacks import unwrap
from pion_hf.integrations.registry import OPTIMIZER_NAMES
from tests.conftest import toy_llama
from tests.distributed_worker import forkserver

STEPS, INTERRUPTED = 10, 5
# What training logs of itself; beside it stand times, and what was measured at snapshots that a shorter run has not.
LOGGED = ("loss", "grad_norm", "epoch", "step")


class Case(NamedTuple):
    """A run. metric: of rotations, if not the default."""

    optim: str
    schedule: str
    dtype: torch.dtype
    adapters: bool = False
    metric: str | None = None

    def __str__(self) -> str:
        kind = "lora" if self.adapters else "full"
        metric = f"-{self.metric}" if self.metric else ""
        return f"{self.optim}-{kind}-{str(self.dtype).removeprefix('torch.')}-{self.schedule}{metric}"


F32, BF16 = torch.float32, torch.bfloat16
COSINE, WSD = "pion_cosine", "teon_wsd"
CASES = [  # every rule of full models and adapters, and every two of kind, precision and schedule
    Case("pion", COSINE, F32),
    Case("pion", WSD, BF16),
    Case("pion_ambient", COSINE, BF16),
    Case("teon", WSD, BF16),
    Case("muon", WSD, F32),
    Case("adamw_routed", COSINE, BF16),
    Case("pion_lora", WSD, BF16, adapters=True),
    Case("pion_lora", COSINE, F32, adapters=True, metric="ambient"),
    Case("teon_lora", COSINE, F32, adapters=True),
    Case("muon", COSINE, BF16, adapters=True),
]


class CountSteps(TrainerCallback):
    """Counts the steps that this process takes."""

    taken = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.taken += 1


def rows() -> list[dict]:
    """An epoch of 13 batches of two, the last step of which accumulates one alone: it ends between 5 and 10 steps."""
    ids = torch.randint(5, 105, (26, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def build(case: Case) -> torch.nn.Module:
    model = toy_llama(attention_dropout=0.1).to(case.dtype)
    if not case.adapters:
        return model
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", modules_to_save=["embed_tokens"], task_type="CAUSAL_LM", lora_dropout=0.1
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def train(case: Case, folder: Path, *, resume: str | None = None) -> dict[str, Any]:
    """Train to the last step; what the run is then."""
    args = PionTrainingArguments(
        output_dir=str(folder),
        optim=case.optim,
        optim_adamw_lr=1e-3,
        optim_metric=case.metric,
        learning_rate=1e-2,
        lr_scheduler_type=case.schedule,
        warmup_steps=3,
        max_steps=STEPS,
        save_steps=INTERRUPTED,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    counter = CountSteps()
    trainer = PionTrainer(model=build(case), args=args, train_dataset=rows(), callbacks=[counter])
    trainer.train(resume_from_checkpoint=resume)
    assert counter.taken == (STEPS - INTERRUPTED if resume else STEPS)
    return {
        "weights": {n: p.detach() for n, p in trainer.model.named_parameters()},
        "optimizer": unwrap(trainer.optimizer).state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "log": [
            {key: value for key, value in entry.items() if key in LOGGED or key.startswith("learning_rate")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
    }


def resume_all(folder: Path) -> None:
    """In another process, which does not tidy up: every case from its checkpoint to the end."""
    tempfile.tempdir = str(folder)
    for case in CASES:
        checkpoint = folder / str(case) / f"checkpoint-{INTERRUPTED}"
        torch.save(train(case, folder / f"{case}-resumed", resume=str(checkpoint)), folder / f"{case}.pt")


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two trees of dicts, lists, tensors and values are not the same to the bit."""
    if type(one) is not type(other) and not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return [f"{path}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: keys {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [d for key in one for d in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)} entries"]
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    if isinstance(one, Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return [f"{path}: {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"]
        same = torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (one, other)))
        return [] if same else [f"{path}: bits"]
    return [] if one == other else [f"{path}: {one} and {other}"]


def masters(result: dict[str, Any]) -> list[Tensor]:
    """What half-precision weights drop, or the factors of which rotated ones are the product."""
    states = result["optimizer"]["state"].values()
    return [state[key] for state in states for key in ("rest", "v.0") if key in state]


def test_every_optimizer_is_resumed_below():
    assert {case.optim for case in CASES} == set(OPTIMIZER_NAMES)


def test_differences_are_seen():
    x = torch.tensor([0.0, 1.0])
    tree = {"a": [x, 1], "b": (x,)}
    assert differences(tree, {"a": [x.clone(), 1], "b": (x.clone(),)}) == []
    assert differences({"a": x}, {"a": torch.tensor([-0.0, 1.0])}) == ["/a: bits"]
    assert differences({"a": x}, {"a": x.double()}) == ["/a: torch.float32 (2,) and torch.float64 (2,)"]
    assert differences(tree, {"a": [x, 2], "b": ()}) == ["/a/1: 1 and 2", "/b: 1 and 0 entries"]
    assert differences({"a": x}, {"b": x}) == [": keys ['a', 'b']"]


def test_a_new_process_resumes_bit_for_bit(tmp_path, subtests, tried):
    straight = {case: train(case, tmp_path / str(case)) for case in CASES}
    other = forkserver().Process(target=resume_all, args=(tmp_path,))
    other.start()
    other.join()
    assert other.exitcode == 0
    for case, expected in straight.items():
        with subtests.test(str(case)):
            resumed = torch.load(tmp_path / f"{case}.pt", weights_only=True)
            assert differences(resumed, expected) == []
            assert len(expected["log"]) == STEPS
            rotates = case.optim.startswith("pion")
            assert bool(masters(expected)) == (rotates or (case.dtype == BF16 and case.optim != "adamw_routed"))
            assert all(kept.any() for kept in masters(expected))
    tried("resumed in a new process: bits of a run that was not", len(CASES), "runs")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_accelerates_own_states_are_the_same_to_the_bit(dtype, tmp_path):
    """`accelerate.save_state` and `load_state`, in a loop without a Trainer."""
    batches = [torch.randint(5, 40, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(6)]

    def train(steps: range, folder: Path | None = None) -> tuple[Accelerator, torch.nn.Module]:
        accelerator = Accelerator(cpu=True)
        model = toy_llama().to(dtype)
        model, optimizer = accelerator.prepare(model, Pion(param_groups(model, lr=1e-2)))
        if folder is not None:
            accelerator.load_state(folder)
        for i in steps:
            accelerator.backward(model(input_ids=batches[i], labels=batches[i]).loss)
            optimizer.step()
            optimizer.zero_grad()
        return accelerator, model

    _, straight = train(range(6))
    accelerator, _ = train(range(3))
    accelerator.save_state(tmp_path / "state")
    _, resumed = train(range(3, 6), tmp_path / "state")
    for (name, p), q in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
