"""Runs killed at any moment, by any signal, resume and end as if they had not been; a folder is one run's at a time."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from pion_hf import PionTrainer
from pion_hf.integrations.checkpoints import is_complete, last_complete_checkpoint
from pion_hf.integrations.trl import PionGRPOConfig
from tests.conftest import toy_llama, toy_tokenizer
from tests.distributed_worker import forkserver
from tests.test_faults import everything, same_bits, trainer_of


def adapters(folder: Path, steps: int, callbacks: tuple) -> Trainer:
    class Adapters(PionTrainer):
        def __init__(self, *args, model, **kwargs):
            config = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)
            super().__init__(*args, model=peft.get_peft_model(model, config), **kwargs)

    return trainer_of(folder, steps=steps, callbacks=callbacks, trainer_class=Adapters, save_total_limit=1)


def of_rewards(folder: Path, steps: int, callbacks: tuple, *, prompts: int = 10, **options: Any) -> Trainer:
    """Answers are drawn: from the same numbers as without a kill."""
    from pion_hf.integrations.trl import PionGRPOTrainer

    args = PionGRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        save_total_limit=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        learning_rate=1e-2,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    rows = [{"prompt": f"{i}+{i}="} for i in range(prompts)]
    return PionGRPOTrainer(
        model=toy_llama(),
        reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=toy_tokenizer(),
        callbacks=list(callbacks),
    )


def whole(optim: str) -> Callable[[Path, int, tuple], Trainer]:
    def make(folder: Path, steps: int, callbacks: tuple) -> Trainer:
        # One checkpoint kept: the one before goes as soon as the next is there.
        return trainer_of(folder, steps=steps, callbacks=callbacks, optim=optim, save_total_limit=1)

    return make


KINDS = {
    "pion": whole("pion"),
    "teon": whole("teon"),
    "adamw_routed": whole("adamw_routed"),
    "adapters": adapters,
    "rewards": of_rewards,
}
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def work(kind: str, folder: str, steps: int, connection: Any) -> None:
    """A training process: resumes if it can, tells when steps begin and end, and leaves the run's end in a file."""

    class Tell(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            connection.send(f"in step {state.global_step + 1}")

        def on_step_end(self, args, state, control, **kwargs):
            connection.send(f"after step {state.global_step}")

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which forkserver ignores
    trainer = KINDS[kind](Path(folder), steps, (Tell(),))
    connection.send("loading")
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    torch.save([*everything(trainer), torch.tensor(trainer.state.global_step)], Path(folder, "end.part"))
    os.replace(Path(folder, "end.part"), Path(folder, "end.pt"))


def run_once(kind: str, folder: Path, steps: int, *, messages: int, share: float, by: int) -> str | None:
    """Start a process and end it by a signal, after so many messages and this share of the time between the last two.

    Returns the last message, None if the process came to its end.
    """
    context = forkserver()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(kind, str(folder), steps, sender))
    process.start()
    sender.close()
    last, times = None, [0.0, 0.1]
    try:
        for _ in range(messages):
            last = receiver.recv()
            times = [times[-1], time.perf_counter()]
    except EOFError:  # the end of the process
        process.join()
        assert process.exitcode == 0
        return None
    time.sleep(share * min(0.5, times[1] - times[0]))
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
        os.kill(process.pid, by)
    process.join()
    return last if process.exitcode else None


def chain(kind: str, folder: Path, steps: int, kills: int, draw: random.Random, signals: list[int]) -> list[str]:
    """Where a run was killed, so many times, until it came to its end."""
    folder.mkdir()
    killed, broken = [], 0
    while len(killed) < kills:
        by = draw.choice(signals)
        at = run_once(kind, folder, steps, messages=draw.randint(1, 8), share=draw.random(), by=by)
        last = get_last_checkpoint(folder)
        broken += last is not None and not is_complete(last)
        killed += [f"{signal.Signals(by).name} {at}"] if at else []
        if at is None:  # it came to its end too soon: once more from the beginning
            shutil.rmtree(folder)
            folder.mkdir()
    assert run_once(kind, folder, steps, messages=10**6, share=0, by=0) is None
    print(f"{kind}: {kills} kills, {broken} half-written checkpoints, killed by {', '.join(killed)}")
    return killed


def end_of(kind: str, folder: Path, steps: int) -> list[torch.Tensor]:
    """Of a run that nobody kills."""
    trainer = KINDS[kind](folder, steps, ())
    trainer.train()
    return [*everything(trainer), torch.tensor(trainer.state.global_step)]


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_ends_as_if_it_had_not_been(kills, tmp_path, monkeypatch, tried):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the other processes, which do not tidy up
    wanted = end_of("pion", tmp_path / "straight", kills + 5)
    chain("pion", tmp_path / "killed", kills + 5, kills, random.Random(kills), [signal.SIGKILL])
    assert same_bits(torch.load(tmp_path / "killed" / "end.pt"), wanted)
    tried("a process killed at random, resumed: bits of a run without", kills, "kills")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_chains_of_kills_and_signals(kind, tmp_path, monkeypatch, tried):
    """Eight of every kind."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    wanted = end_of(kind, tmp_path / "straight", 6)
    for seed in range(8):
        draw = random.Random(f"{kind} {seed}")
        killed = chain(kind, tmp_path / str(seed), 6, draw.randint(1, 3), draw, SIGNALS)
        assert same_bits(torch.load(tmp_path / str(seed) / "end.pt"), wanted), killed
    tried("chains of kills and signals: weights, state and steps of a run without", 8, "chains")


@pytest.mark.parametrize("accumulated", [1, 2])
def test_rewards_go_on_with_the_prompts_of_a_run_that_was_not_resumed(accumulated, tmp_path):
    """Beyond the first epoch: TRL permutes rows by a generator that no checkpoint holds."""
    straight, resumed = (
        of_rewards(tmp_path, 5, (), prompts=5, gradient_accumulation_steps=accumulated, save_strategy=strategy)
        for strategy in ("steps", "no")
    )
    straight.args.save_total_limit = None
    straight.train()
    assert straight.state.epoch > 2
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_bits(everything(resumed), everything(straight))


def hold(folder: str, connection: Any) -> None:
    class Hold(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            connection.send("training")
            time.sleep(60)

    trainer_of(folder, steps=1, callbacks=(Hold(),)).train()


def test_a_folder_is_one_runs_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("pion_hf.integrations.checkpoints.PATIENCE", 0)
    context = forkserver()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=hold, args=(str(tmp_path), sender))
    process.start()
    receiver.recv()
    said = (tmp_path / "run.json").read_bytes()
    trainer = trainer_of(tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"another run trains into '.*': let it end") as raised:
        trainer.train()
    assert "\n" not in str(raised.value)
    assert (tmp_path / "run.json").read_bytes() == said
    process.kill()
    process.join()
    assert trainer.train().global_step == 1
