"""What a run survives: a kill at any moment, half-written checkpoints, a full disk, gradients that are not finite."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from pion_hf import Pion, PionLora, PionTrainer, PionTrainingArguments, RoutedAdamW, Teon, TeonLora
from pion_hf.integrations.callbacks import unwrap
from pion_hf.integrations.checkpoints import is_complete, last_complete_checkpoint, resolve_resume
from pion_hf.optim.gradients import LARGEST
from tests.conftest import toy_llama

# In the order in which the Trainer writes them.
FILES = ["config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def trainer_of(
    folder: str | Path,
    *,
    steps: int,
    callbacks: tuple = (),
    trainer_class=PionTrainer,
    eval_dataset: list[dict] | None = None,
    **options,
):
    """On the toy Llama with dropout: what is random must resume as well. Saves at every second step."""
    ids = torch.randint(5, 105, (18, 12), generator=torch.Generator().manual_seed(0)).tolist()
    options = {"optim": "pion", "learning_rate": 1e-2, "lr_scheduler_type": "pion_cosine", "save_steps": 2, **options}
    args = PionTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    model = toy_llama(attention_dropout=0.1).to(torch.bfloat16)
    return trainer_class(
        model=model, args=args, train_dataset=data, eval_dataset=eval_dataset, callbacks=list(callbacks)
    )


def everything(trainer: Trainer) -> list[Tensor]:
    """All tensors that a run consists of."""
    state = unwrap(trainer.optimizer).state.values()
    return [*trainer.model.state_dict().values(), *(v for s in state for v in s.values() if isinstance(v, Tensor))]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))
        for a, b in zip(one, other, strict=True)
    )


# -- half-written checkpoints and full disks --------------------------------------------------------------------------


def test_the_trainer_state_is_the_last_file_of_a_checkpoint(tmp_path, monkeypatch):
    """All that tells a complete checkpoint from others here depends on it."""
    written, save = {}, TrainerState.save_to_json

    def spy(state, path):
        written[Path(path).parent] = set(os.listdir(Path(path).parent))
        save(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", spy)
    trainer_of(tmp_path, steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert set(os.listdir(checkpoint)) - written[checkpoint] == {"trainer_state.json", "manifest.json"}
    assert set(FILES) < set(os.listdir(checkpoint))


@pytest.mark.parametrize("cut", range(len(FILES)), ids=FILES)
def test_a_checkpoint_cut_off_at_any_file_is_passed_over(cut, run, caplog):
    first, last = run / "checkpoint-2", run / "checkpoint-4"
    assert resolve_resume(True, run) == str(last)
    for name in FILES[cut + 1 :]:
        (last / name).unlink()
    os.truncate(last / FILES[cut], (last / FILES[cut]).stat().st_size // 2)
    assert get_last_checkpoint(run) == str(last), (
        "transformers passes it over by itself: checkpoints.py has done its job"
    )
    assert not is_complete(last)
    assert resolve_resume("true", run) == last_complete_checkpoint(run) == str(first)
    assert "checkpoint-4 was not saved to its end" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-4' is no complete checkpoint: .*The last .* is '.*checkpoint-2'"):
        resolve_resume(str(last), run)
    resumed = trainer_of(run, steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(everything(resumed), torch.load(run / "end.pt"))


def test_what_resume_from_checkpoint_means(run, tmp_path):
    assert resolve_resume(None, run) is resolve_resume(False, run) is None
    (run / "checkpoint-old").mkdir()
    (run / "checkpoint-9").touch()
    assert resolve_resume(True, run) == resolve_resume("True", run) == str(run / "checkpoint-4")
    assert resolve_resume(str(run / "checkpoint-2"), tmp_path) == str(run / "checkpoint-2")
    assert resolve_resume(run / "checkpoint-2", tmp_path) == str(run / "checkpoint-2")
    with pytest.raises(ValueError, match=r"true: there is no complete checkpoint in '.*/none': leave it out"):
        resolve_resume(True, tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no folder 'out/checkpoint-2'"):
        resolve_resume("out/checkpoint-2", run)


def test_a_checkpoint_that_is_written_again_is_incomplete_meanwhile(run, monkeypatch):
    """As an earlier run's is, where training resumes from one before it: weights of one, moments of the other."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    trainer = trainer_of(run, steps=4)
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert set(FILES) - set(os.listdir(run / "checkpoint-4")) == {"trainer_state.json"}
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")


def expect_a_failed_save(run: Path) -> None:
    """At step 4, after which nothing is left of it; checkpoint 2 is as it was."""
    before = {path.name: path.read_bytes() for path in (run / "checkpoint-2").iterdir()}
    wanted = r"checkpoint-4 could not be saved, with [\d,.]+ MB free there \(.+\)\. The run can be resumed from .*-2\.$"
    with pytest.raises(OSError, match=wanted):
        trainer_of(run, steps=4).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert not (run / "checkpoint-4").exists()
    assert {path.name: path.read_bytes() for path in (run / "checkpoint-2").iterdir()} == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux")
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_full_disk_says_so_and_leaves_the_checkpoint_before(name, run, tried):
    """Of which torch.save says no more than `unexpected pos 69120 vs 69008`."""
    shutil.rmtree(run / "checkpoint-4")
    (run / "checkpoint-4").mkdir()
    os.symlink("/dev/full", run / "checkpoint-4" / name)
    expect_a_failed_save(run)
    resumed = trainer_of(run, steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(everything(resumed), torch.load(run / "end.pt"))
    tried("a full disk while saving: the checkpoint before is whole", 1, "files")


def out_of_space(instance: Any, path: str, **kwargs: Any) -> None:
    """Saves a model or a trainer's state as far as the disk lets it."""
    Path(path, "model.safetensors" if os.path.isdir(path) else "").write_text("{")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("owner", "method"), [(PreTrainedModel, "save_pretrained"), (TrainerState, "save_to_json")])
def test_no_space_for_the_other_files(owner, method, run, tmp_path, monkeypatch):
    monkeypatch.setattr(owner, method, out_of_space)
    expect_a_failed_save(run)
    with pytest.raises(OSError, match=r"checkpoint-2 could not .* There is no earlier checkpoint\.$"):
        trainer_of(tmp_path / "new", steps=2).train()


def test_what_fails_after_a_checkpoint_leaves_it(run, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no such luck")

    of_module = hasattr(transformers.trainer, "rotate_checkpoints")  # a method in early releases of transformers 5
    owner, name = (transformers.trainer, "rotate_checkpoints") if of_module else (Trainer, "_rotate_checkpoints")
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match=r"^no such luck$"):
        trainer_of(run, steps=4).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert is_complete(run / "checkpoint-4")


class TooLarge(PionTrainer):
    """On a machine with memory for two rows."""

    def training_step(self, model, inputs, *args):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args)


def test_a_run_whose_batch_size_was_found_goes_on_with_it(tmp_path):
    found, resumed = (trainer_of(tmp_path, steps=4, trainer_class=TooLarge, auto_find_batch_size=True) for _ in "12")
    for trainer, checkpoint in ((found, None), (resumed, str(tmp_path / "checkpoint-2"))):
        trainer._train_batch_size = 4  # what was asked for
        assert trainer.train(resume_from_checkpoint=checkpoint).global_step == 4
        assert trainer._train_batch_size < 3
        assert not unwrap(trainer.optimizer).observers
    assert same_bits(everything(resumed), everything(found))


# -- gradients that are not finite ------------------------------------------------------------------------------------


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Two matrices of one shape, a fused one and two that are none."""
    shapes = {"a": (6, 9), "b": (6, 9), "fused": (10, 9), "bias": (6,), "scale": ()}
    return {name: nn.Parameter(draw(*shape, seed=i).to(dtype)) for i, (name, shape) in enumerate(shapes.items())}


def groups_of(params: dict[str, nn.Parameter], first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """The two matrices, the fused one, and what is AdamW's."""
    pairs = list(params.items())
    return [
        {"params": pairs[:2], **first},
        {"params": pairs[2:3], "layout": "rows=4,6", **second},
        {"params": pairs[3:], "rule": "adamw"},
    ]


PION, MUON, TEON = {"rule": "pion"}, {"rule": "muon"}, {"rule": "teon", "stacks": [["a", "b"]]}
ROUTED = {"rule": "adamw_routed"}
ROTATE = {"rule": "pion_lora", "method": "rotate", "unit_step": [1.0, 1.0]}
GROW = {"rule": "pion_lora", "method": "orthogonal", "unit_step": [1.0]}
TEON_LORA = {"rule": "teon_lora", "unit_step": [1.0, 1.0], "stacks": [["a", "b"]], "method": "orthogonal"}
ALONE = {"rule": "teon_lora", "unit_step": [1.0], "stacks": [], "stack": 1, "method": "orthogonal"}
OPTIMIZERS = {
    "pion": (Pion, PION, PION, {}),
    "pion-paper": (Pion, PION, PION, {"preset": "paper"}),
    "pion-ambient": (Pion, PION, PION, {"direction": "natural", "metric": "ambient", "momentum_frame": "transported"}),
    "pion-polar": (Pion, PION, PION, {"direction": "polar", "side": "both"}),
    "muon": (Teon, MUON, MUON, {}),
    "teon": (Teon, TEON, MUON, {}),
    "pion_lora": (PionLora, ROTATE, GROW, {}),
    "teon_lora": (TeonLora, TEON_LORA, ALONE, {}),
    "adamw_routed": (RoutedAdamW, ROUTED, ROUTED, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_steps_with_gradients_that_are_not_finite_might_not_have_been(optim, dtype, tried):
    """At random steps, in a random entry of a random parameter."""
    cls, first, second, options = OPTIMIZERS[optim]
    chance = random.Random(0)
    poison = {step: chance.choice([math.nan, math.inf, -math.inf]) for step in chance.sample(range(1, 16), 6)}

    def run(poisoned: bool) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        params = parameters(dtype)
        optimizer = cls(groups_of(params, first, second), lr=1e-2, **options)
        for step in range(1, 16):
            if step in poison and not poisoned:
                continue
            for i, p in enumerate(params.values()):
                p.grad = draw(*p.shape, seed=100 * step + i).to(dtype)
            if step in poison:
                hit = chance.choice(list(params.values())).grad.view(-1)
                hit[chance.randrange(len(hit))] = poison[step]
            optimizer.step()
        return params, optimizer

    with pytest.warns(UserWarning, match="A gradient is not finite: this step is skipped") as warned:
        params, optimizer = run(poisoned=True)
    expected, clean = run(poisoned=False)
    assert len(warned) == 1
    assert (optimizer.skipped_steps, clean.skipped_steps) == (len(poison), 0)
    for name, p in params.items():
        kept, wanted = ({"p": q.detach(), **o.state[q]} for q, o in ((p, optimizer), (expected[name], clean)))
        assert kept.keys() == wanted.keys()
        for key, value in wanted.items():
            assert same_bits([torch.as_tensor(kept[key])], [torch.as_tensor(value)]), f"{key} of {name}"
            assert torch.as_tensor(value).isfinite().all(), f"{key} of {name}"
        assert not torch.equal(p, parameters(dtype)[name]), f"{name} did not move"
    tried("NaN or Inf in a gradient: bits of a run without the step", len(poison), "steps")


@pytest.mark.parametrize("optim", ["pion", "pion_ambient", "teon", "muon", "adamw_routed"])
def test_a_run_goes_on_after_a_gradient_that_is_not_finite(optim, tmp_path):
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step in (1, 2):
                next(itertools.islice(model.parameters(), state.global_step, None)).grad.view(-1)[0] = math.inf

    trainer = trainer_of(tmp_path, steps=6, callbacks=(Poison(),), optim=optim, save_strategy="no")
    with pytest.warns(UserWarning, match="this step is skipped"):
        metrics = trainer.train().metrics
    assert metrics["skipped_steps"] == 2
    assert all(x.isfinite().all() for x in everything(trainer))


class Hopeless(TrainerCallback):
    """No gradient is finite, as of a loss that is not."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for p in model.parameters():
            p.grad.fill_(math.nan)


def test_a_run_that_skips_every_step_says_so(tmp_path, caplog):
    trainer = trainer_of(tmp_path, steps=4, callbacks=(Hopeless(),), save_strategy="no", logging_steps=2)
    with pytest.warns(UserWarning, match="this step is skipped"):
        metrics = trainer.train().metrics
    assert metrics["skipped_steps"] == 4
    assert "All 4 steps were skipped: no gradient was finite, and nothing was trained." in caplog.text


@pytest.mark.filterwarnings("ignore:A gradient is not finite")
def test_steps_skipped_in_a_row_end_a_run(tmp_path):
    trainer = trainer_of(tmp_path, steps=9, callbacks=(Hopeless(),), save_strategy="no", max_skipped_steps=3)
    with pytest.raises(RuntimeError, match=r"^3 steps in a row were skipped \(max_skipped_steps\), .* step 3: "):
        trainer.train()
    assert trainer.state.global_step == 3
    never = trainer_of(tmp_path, steps=9, callbacks=(Hopeless(),), save_strategy="no", max_skipped_steps=0)
    never.train()
    with pytest.raises(ValueError, match="max_skipped_steps must be 0"):
        trainer_of(tmp_path, steps=9, max_skipped_steps=-1)


# -- gradients that vanish or overflow, and entries that never have one -----------------------------------------------


@pytest.mark.parametrize("size", [1e-12, 1e-18, 1e-22, 1e-30, 1e-38])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_vanishing_gradients_leave_everything_finite(optim, size):
    """As the momentum vanishes of an expert that sees no token for some hundred steps."""
    cls, first, second, options = OPTIMIZERS[optim]
    params = parameters(torch.float32)
    optimizer = cls(groups_of(params, first, second), lr=1e-2, **options)
    for step in range(4):
        for i, p in enumerate(params.values()):
            p.grad = draw(*p.shape, seed=i) * (0 if step else size)
        optimizer.step()
    assert optimizer.skipped_steps == 0
    for p, start in zip(params.values(), parameters(torch.float32).values(), strict=True):
        assert all(torch.as_tensor(x).isfinite().all() for x in (p, *optimizer.state[p].values()))
        assert (p - start).abs().max() < 0.5


@pytest.mark.parametrize("size", [1e15, 1e20, 1e30, 3e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_gradients_of_any_finite_size_train(optim, dtype, size):
    """Squares of the larger ones are infinite, and an infinite second moment would never be finite again."""
    cls, first, second, options = OPTIMIZERS[optim]
    params = parameters(dtype)
    optimizer = cls(groups_of(params, first, second), lr=1e-2, **options)
    for step in range(6):
        for i, p in enumerate(params.values()):
            p.grad = (draw(*p.shape, seed=10 * step + i) * size).to(dtype)
        large = [p.grad.abs().max() > LARGEST for p in params.values()]
        with pytest.warns(UserWarning, match="Gradients as large as") if any(large) else contextlib.nullcontext():
            optimizer.step()
    assert optimizer.skipped_steps == 0
    for p, start in zip(params.values(), parameters(dtype).values(), strict=True):
        assert all(torch.as_tensor(x).isfinite().all() for x in (p, *optimizer.state[p].values()))
        assert 0 < (p - start).abs().max() < 0.5


@pytest.mark.parametrize("direction", ["natural", "adam", "polar"])
def test_inputs_that_are_never_there_do_not_take_the_step(direction):
    """Rotated momentum reaches their columns as well, where a second moment of zero makes everything of it."""
    size, losses = 24, []
    for dead in (0, 2):
        start, turn = draw(size, size, seed=0) / size**0.5, draw(size, size, seed=1) / 10
        wanted = start @ torch.linalg.matrix_exp(turn - turn.T)
        w = nn.Parameter(start.clone())
        optimizer = Pion([("w", w)], lr=3e-2, direction=direction, metric="ambient")
        for step in range(150):
            x = draw(size, 64, seed=step)
            x[:dead] = 0
            loss = (w @ x - wanted @ x).square().mean() / 100
            (w.grad,) = torch.autograd.grad(loss, w)
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] < 3 * losses[0]
