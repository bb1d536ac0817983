"""Several processes through the Trainer: DDP and FSDP2 end as one process on the joint batch, and go on from
checkpoints."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from pion_hf import PionTrainer, PionTrainingArguments, cli
from pion_hf.integrations.callbacks import unwrap
from pion_hf.optim import owners
from pion_hf.optim.sharding import whole
from tests.conftest import toy_llama
from tests.distributed_worker import launch

STEPS, BATCH = 20, 8
OPTIMIZERS = ["pion", "pion_ambient", "teon", "muon", "adamw_routed", "pion_lora", "teon_lora"]
OPTIMIZERS += ["pion keep", "muon keep", "adamw_routed keep"]
AS_ADAMW = ("pion_ambient", "pion_lora", "teon_lora")  # whose learning rates are on AdamW's scale
RECIPES = Path(__file__).parent.parent / "recipes" / "accelerate"


def build(optim: str, seed: int = 0) -> nn.Module:
    """In double precision: an orthogonalised step makes more of single's rounding than the tolerance.

    An MLP of 45 rows and factors of rank 5 do not divide evenly, and some shards of four processes are empty.
    """
    model = toy_llama(intermediate_size=45)
    if "lora" in optim:
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, peft.LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.double()


@contextlib.contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """accelerate knows FSDP on accelerators only; torch's runs on CPUs as well."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with mock.patch.object(AcceleratorState, "__init__", init):
        yield


FSDP2 = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "SHARDED_STATE_DICT"}


def train(
    optim: str,
    folder: str,
    *,
    fsdp: dict | None = None,
    model: nn.Module | None = None,
    resume: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train to the last step on all processes; what the run is then."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # launched, there is no group before the Trainer makes it
    args = PionTrainingArguments(
        output_dir=folder,
        optim=optim.removesuffix(" keep"),
        optim_keep=4 if optim.endswith("keep") else None,
        optim_adamw_lr=1e-3,
        learning_rate=1e-3 if optim in AS_ADAMW else 1e-2,  # at larger ones rounding grows with every step
        lr_scheduler_type="pion_cosine",
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=5,
        weight_decay=0.1,
        per_device_train_batch_size=BATCH // processes,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        fsdp=True if fsdp else None,
        fsdp_config=dict(fsdp) if fsdp else None,
        **options,
    )
    ids = torch.randint(5, 105, (STEPS * BATCH, 12), generator=torch.Generator().manual_seed(0)).tolist()
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = PionTrainer(model=build(optim) if model is None else model, args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    optimizer = unwrap(trainer.optimizer)
    optimizer.consolidate_state_dict(to=None)
    saved = optimizer.state_dict()["state"]
    entries = [v for s in saved.values() for v in s.values() if isinstance(v, Tensor) and v.ndim]
    names = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    return {
        "weights": {n.removeprefix("module."): whole(p.detach()).clone() for n, p in names.items()},
        "sharded": [isinstance(x, DTensor) and x.placements == (Shard(0),) for x in names.values()],
        "state sharded": [isinstance(x, DTensor) and isinstance(x.placements[0], Shard) for x in entries],
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def train_all(
    optims: list[str], folder: str, options: dict[str, Any], worthwhile: int = owners.WORTHWHILE
) -> dict[str, Any]:
    """In a process: every optimizer to its end. `{optim}` in an option is its name. worthwhile: what divides copies."""
    with fsdp_on_cpu(), mock.patch.object(owners, "WORTHWHILE", worthwhile):
        return {
            optim: train(optim, str(Path(folder, optim)), **{k: _named(v, optim) for k, v in options.items()})
            for optim in optims
        }


def _named(value: Any, optim: str) -> Any:
    return value.format(optim=optim) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Any]:
    """What one process ends with, by optimizer."""
    return Ends(tmp_path_factory.mktemp("alone"))


class Ends(dict):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, optim: str) -> dict[str, Any]:
        self[optim] = train(optim, str(self.folder / optim))
        return self[optim]


def check(results: list[dict], alone: dict, optims: list[str], subtests: Any, *, sharded: bool = False) -> None:
    for optim, (rank, result) in itertools.product(optims, enumerate(results)):
        with subtests.test(f"{optim}, process {rank}"):
            weights, expected = result[optim]["weights"], alone[optim]["weights"]
            assert weights.keys() == expected.keys()
            off = {name: (weights[name] - value).abs().max().item() for name, value in expected.items()}
            assert max(off.values()) < 1e-5, f"off by {max(off.values()):.1e}"
            assert all(torch.equal(value, results[0][optim]["weights"][name]) for name, value in weights.items())
            assert all(result[optim]["sharded"]) == all(result[optim]["state sharded"]) == sharded
            assert [e["loss"] for e in results[0][optim]["log"]] == pytest.approx(
                [e["loss"] for e in alone[optim]["log"]][-len(results[0][optim]["log"]) :], rel=1e-3
            )


# -- DDP --------------------------------------------------------------------------------------------------------------


def test_ddp_ends_as_one_process(alone, tmp_path, subtests):
    optims = ["pion"]
    check(launch(train_all, 2, optims, str(tmp_path), {}), alone, optims, subtests)


@pytest.mark.distributed
@pytest.mark.parametrize("divided", [False, True], ids=["", "divided"])
def test_ddp_of_every_optimizer(divided, alone, tmp_path, subtests, tried):
    """What two processes have saved goes on on one, two and four."""
    optims = [optim for optim in OPTIMIZERS if not (divided and "adamw" in optim)]
    worthwhile = 0 if divided else owners.WORTHWHILE
    check(launch(train_all, 2, optims, str(tmp_path / "2"), {}, worthwhile), alone, optims, subtests)
    tried(f"DDP, 2 processes{', divided' if divided else ''}: end as one process", len(optims), "optimizers")
    for processes in (1, 2, 4) if divided else ():
        options = {"resume": str(tmp_path / "2" / "{optim}" / f"checkpoint-{STEPS // 2}")}
        folder = str(tmp_path / f"from-2-to-{processes}")
        check(launch(train_all, processes, optims, folder, options, 0), alone, optims, subtests)
        tried(f"DDP, saved by 2, divided, resumed by {processes}: end as one process", len(optims), "optimizers")


def start_apart(folder: str) -> dict[str, Any]:
    """In a process: adapters that every process has drawn anew; DDP makes them those of the first."""
    result = train("pion_lora", folder, model=build("pion_lora", seed=dist.get_rank()))
    return {"pion_lora": result}


@pytest.mark.distributed
def test_adapters_that_differ_at_first_end_the_same(tmp_path):
    first, second = launch(start_apart, 2, str(tmp_path))
    weights, others = (result["pion_lora"]["weights"] for result in (first, second))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


# -- FSDP2 ------------------------------------------------------------------------------------------------------------


def test_fsdp2_ends_as_one_process(alone, tmp_path, subtests):
    optims = ["pion"]
    check(launch(train_all, 2, optims, str(tmp_path), {"fsdp": FSDP2}), alone, optims, subtests, sharded=True)


@pytest.mark.distributed
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
def test_fsdp2_of_every_optimizer_and_its_checkpoints(full, alone, tmp_path, subtests, tried):
    """On two and four processes; what two have saved goes on on one, two and four."""
    fsdp = {**FSDP2, "state_dict_type": "FULL_STATE_DICT"} if full else FSDP2
    optims = ["pion", "teon_lora"] if full else OPTIMIZERS
    for processes in (2,) if full else (2, 4):
        folder = str(tmp_path / f"{processes}")
        check(launch(train_all, processes, optims, folder, {"fsdp": fsdp}), alone, optims, subtests, sharded=True)
        tried(f"FSDP2, {processes} processes: end as one process", len(optims), "optimizers")
    kind = "full" if full else "sharded"
    for processes in (1, 2, 4):
        resume = str(tmp_path / "2" / "{optim}" / f"checkpoint-{STEPS // 2}")
        options = {"fsdp": fsdp, "resume": resume}
        results = launch(train_all, processes, optims, str(tmp_path / f"from-2-to-{processes}"), options)
        check(results, alone, optims, subtests, sharded=True)
        tried(f"FSDP2, saved by 2 ({kind}), resumed by {processes}: end as one process", len(optims), "optimizers")


def efficiently(checkpoint: str, folder: str) -> dict[str, Any]:
    """In a process: weights that only the first one reads."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    config = {**FSDP2, "cpu_ram_efficient_loading": True}
    found = {}
    with fsdp_on_cpu():
        for optim in ("pion", "pion_lora"):
            model = type(toy_llama()).from_pretrained(checkpoint, dtype=torch.float64)
            if optim == "pion_lora":
                torch.manual_seed(dist.get_rank())
                model = peft.get_peft_model(model, peft.LoraConfig(r=5, target_modules="all-linear"))
            found[optim] = train(optim, str(Path(folder, optim)), fsdp=config, model=model.double())
    return found


@pytest.mark.distributed
def test_weights_read_by_the_first_process_only(alone, tmp_path):
    toy_llama(intermediate_size=45).double().save_pretrained(tmp_path / "model")
    first, second = launch(efficiently, 2, str(tmp_path / "model"), str(tmp_path / "runs"))
    for optim in first:
        for name, value in first[optim]["weights"].items():
            assert torch.equal(value, second[optim]["weights"][name])
    for name, value in alone["pion"]["weights"].items():
        assert (first["pion"]["weights"][name] - value).abs().max() < 1e-5


# -- launched ---------------------------------------------------------------------------------------------------------


def launch_by_accelerate(recipe: str, folder: Path, *argv: str) -> None:
    """This module's `main` with `argv` in two processes, with a recipe of this project."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(RECIPES / f"{recipe}.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    command += ["--main_process_port", port, "-m", "tests.test_distributed", *argv]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.distributed
@pytest.mark.parametrize("recipe", ["ddp", "fsdp2"])
def test_accelerate_launches_the_recipe(recipe, alone, tmp_path, tried):
    launch_by_accelerate(recipe, tmp_path, str(tmp_path))
    result = torch.load(tmp_path / "end.pt")
    assert all(result["sharded"]) == (recipe == "fsdp2")
    for name, value in alone["pion"]["weights"].items():
        assert (result["weights"][name] - value).abs().max() < 1e-5
    tried(f"accelerate launch --config_file recipes/accelerate/{recipe}.yaml", 1, "run")


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_accelerate_launches_the_command(how, recipe_file, tmp_path, tried):
    """With evaluation, chats and text of another domain before training and after it, and on from a checkpoint."""
    launch_by_accelerate(how, tmp_path, "sft", "--config", recipe_file)
    first = json.loads((tmp_path / "run" / "eval.json").read_text())
    for moment in ("before", "after"):
        assert set(first[moment]) == {"task", "other_text", "other_dataset"}
        assert set(first[moment]["task"]) == {"loss", "perplexity", "exact_match"}
    assert first["learnt"] > 0
    launch_by_accelerate(how, tmp_path, "sft", "--config", recipe_file, "--resume_from_checkpoint", "true")
    again = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert again["before"] == first["before"]
    assert again["after"]["task"]["loss"] == pytest.approx(first["after"]["task"]["loss"], abs=1e-6)
    tried(f"accelerate launch --config_file recipes/accelerate/{how}.yaml -m pion_hf.cli sft", 2, "runs")


@pytest.fixture
def recipe_file(recipe, chat_data, tmp_path):
    (tmp_path / "other.txt").write_text("Sphinx of black quartz, judge my vow. " * 40, encoding="utf-8")
    other = {"other_text_file": str(tmp_path / "other.txt"), "other_dataset": str(chat_data)}
    measured = {"exact_match_samples": 2, "max_new_tokens": 4, **other}
    return recipe(max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=2, **measured)


@pytest.mark.distributed
def test_a_stream_is_read_by_several(recipe, tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40, encoding="utf-8")
    keys = {"dataset_name": str(tmp_path), "dataset_streaming": True, "eval_strategy": "no", "max_length": 32}
    launch_by_accelerate("ddp", tmp_path, "cpt", "--config", recipe(**keys))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def without_wrapper(destroy: Callable[..., None]) -> Callable[..., None]:
    """`destroy`, which raises where DDP's wrapper is alive: it would take the group down itself, and may hang."""

    def checked(*args: Any) -> None:
        assert not any(type(found) is DistributedDataParallel for found in gc.get_objects())
        destroy(*args)

    return checked


def main(*argv: str) -> None:
    """In a process that accelerate has launched: train as `alone` does into a folder, or run a command."""
    with fsdp_on_cpu():
        if len(argv) > 1:
            with mock.patch.object(dist, "destroy_process_group", without_wrapper(dist.destroy_process_group)):
                cli.main(list(argv))
            assert not dist.is_initialized()
            return
        result = train("pion", str(Path(argv[0], "run")))
    if dist.get_rank() == 0:
        torch.save(result, Path(argv[0], "end.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
