"""What an optimizer step sends, keeps and takes on several processes: of shards (FSDP2), of copies they divide (DDP).

The matrices of SmolLM2-135M in bfloat16 (`--layers` of its 30), or LoRA factors of rank 16 beside them, random weights
and gradients, gloo on one CPU, one thread a process. Every collective is counted: its calls, and the bytes that all
processes together send for it (a ring's, of sums and broadcasts), by parameter of the matrices and step. What a process
keeps is the state of its own matrices and, of shards, the whole weights; beside it stands what the fullest process
keeps of an even share. The time is of the slowest process; processes that share cores show no gain of dividing.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import peft
import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from pion_hf import param_groups
from pion_hf.cli.configs import local_config
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES, resolve_options
from pion_hf.optim import MatrixOptimizer, owners

MODEL, RANK = "HuggingFaceTB/SmolLM2-135M", 16
# rule -> the optimizer's name and its options.
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "pion": ("pion", {}),
    "pion, paper": ("pion", {"preset": "paper"}),
    "pion_ambient": ("pion_ambient", {}),
    "teon": ("teon", {}),
    "muon": ("muon", {}),
    "adamw_routed": ("adamw_routed", {}),
    "pion_lora": ("pion_lora", {}),
    "teon_lora": ("teon_lora", {}),
}
WAYS = ("sharded", "copies")
WARMUP = 2  # steps, both sides of a rotation


class Sent(TorchDispatchMode):
    """Counts collectives and the bytes that this process sends for them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = Counter(), 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.__name__.partition(".")[0].strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        others = dist.get_world_size() - 1
        self.calls[name] += 1
        if name == "alltoall_base":
            splits = args[4]
            self.bytes += sum(splits) - splits[dist.get_rank()]
        elif name == "broadcast":
            self.bytes += sum(x.nbytes for x in args[0]) * others * (args[2] == dist.get_rank())
        elif name == "allgather":
            self.bytes += sum(x.nbytes for x in args[1]) * others
        elif name == "allreduce":
            self.bytes += sum(x.nbytes for x in args[0]) * 2 * others / (others + 1)
        else:
            raise NotImplementedError(f"the bytes of {name} are not known")


def build(rule: str, way: str, layers: int) -> tuple[torch.nn.Module, MatrixOptimizer]:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(local_config(MODEL), num_hidden_layers=layers, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    optim, given = RULES[rule]
    if optim.endswith("_lora"):
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear"))
        model = model.to(torch.bfloat16)
    own, routed = resolve_options(optim, given)
    groups = param_groups(model, optim, lr=1e-4, **routed)
    if way == "sharded":
        params = dict(model.named_parameters())
        fully_shard(model)
        sharded = dict(model.named_parameters())
        names = {id(p): name for name, p in params.items()}
        for group in groups:
            group["params"] = [_renamed(entry, names, sharded) for entry in group["params"]]
    optimizer = OPTIMIZER_CLASSES[optim](groups, lr=1e-4, **own)
    optimizer.divides_work, owners.WORTHWHILE = way == "copies", 0  # of factors too
    return model, optimizer


def _renamed(entry: Any, names: dict[int, str], sharded: dict[str, Any]) -> Any:
    return (entry[0], sharded[names[id(entry[1])]]) if isinstance(entry, tuple) else sharded[names[id(entry)]]


def set_gradients(optimizer: MatrixOptimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
            (p.grad.to_local() if isinstance(p, DTensor) else p.grad).normal_(0, 1e-3)


def matrices_of(optimizer: MatrixOptimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups if group["rule"] != "adamw" for p in group["params"]]


def kept(optimizer: MatrixOptimizer) -> int:
    """Bytes of the matrices' state, and of whole weights beside shards, in this process."""
    held = [x for p in matrices_of(optimizer) for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
    held += [w for division in optimizer._divisions.values() for w in division.homes()]
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in held)


def measure(rank: int, processes: int, rules: list[str], steps: int, layers: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    table = Table("rule", "way", "calls a step", "bytes sent, / parameter", "kept, MB a process", "of an even share")
    table.add_column("ms a step")
    table.title = f"{MODEL}, {layers} layers in bfloat16, {processes} processes"
    for rule in rules:
        for way in WAYS:
            _, optimizer = build(rule, way, layers)
            set_gradients(optimizer)
            times, sent = [], Sent()
            for number in range(WARMUP + steps):
                dist.barrier()
                start = time.perf_counter()
                if number < WARMUP:
                    optimizer.step()
                else:
                    with sent:
                        optimizer.step()
                times.append(time.perf_counter() - start)
            mine = torch.tensor([statistics.median(times[WARMUP:]), kept(optimizer), sent.bytes / steps])
            every = [torch.empty_like(mine) for _ in range(processes)]
            dist.all_gather(every, mine)
            seconds, held, sums = zip(*(x.tolist() for x in every), strict=True)
            weights = sum(p.numel() for p in matrices_of(optimizer))
            calls = ", ".join(f"{name} {count / steps:g}" for name, count in sorted(sent.calls.items()))
            cells = calls or "none", f"{sum(sums) / weights:.2f}", f"{sum(held) / processes / 1e6:.1f}"
            table.add_row(rule, way, *cells, f"{max(held) * processes / sum(held):.2f}", f"{1e3 * max(seconds):.0f}")
    if rank == 0:
        Console(width=150).print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    for processes in arguments.processes:
        with tempfile.TemporaryDirectory() as folder:
            given = processes, arguments.rules, arguments.steps, arguments.layers, folder
            torch.multiprocessing.spawn(measure, given, nprocs=processes)
