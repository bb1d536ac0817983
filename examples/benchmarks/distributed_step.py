"""What an optimizer step costs on several processes: all of the work on each, shared (`share_work`), sharded (FSDP2).

Eight matrices of 576 x 1536, float32, random weights and gradients, gloo on one CPU, one thread a process. The ways
take turns, one step each in every round; the time is the median over the rounds, of the slowest process. The memory is
what a process keeps: weights and optimizer state.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from pion_hf import Muon, Pion
from pion_hf.optim import MatrixOptimizer
from pion_hf.optim.sharding import is_sharded, local

COUNT, SHAPE = 8, (576, 1536)
RULES: dict[str, Callable[..., MatrixOptimizer]] = {
    "pion": Pion,
    "pion_ambient": lambda params, **options: Pion(params, preset="ambient", **options),
    "muon": Muon,
}
WAYS = ("all on each", "shared", "sharded")


def build(rule: str, way: str) -> MatrixOptimizer:
    torch.manual_seed(0)
    model = nn.ParameterDict({f"w{i}": torch.randn(SHAPE) / SHAPE[1] ** 0.5 for i in range(COUNT)})
    if way == "sharded":
        fully_shard(model)
    for p in model.values():
        grad = torch.randn(SHAPE)
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if is_sharded(p) else grad
    return RULES[rule](model.values(), lr=1e-3, share_work=way == "shared")


def kept(optimizer: MatrixOptimizer) -> int:
    """Bytes of weights and state in this process."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(local(x).numel() * x.element_size() for x in tensors)


def measure(rank: int, processes: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    table = Table("rule", "way", "ms a step", "MB a process", title=f"{COUNT} of {SHAPE}, {processes} processes")
    for rule in RULES:
        optimizers = {way: build(rule, way) for way in WAYS}
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(rounds + 2):
            for way, optimizer in optimizers.items():
                dist.barrier()
                start = time.perf_counter()
                optimizer.step()
                slowest = torch.tensor(time.perf_counter() - start)
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                if number >= 2:  # both sides once before
                    times[way].append(slowest.item())
        for way, optimizer in optimizers.items():
            table.add_row(rule, way, f"{1000 * statistics.median(times[way]):.0f}", f"{kept(optimizer) / 1e6:.1f}")
    if rank == 0:
        Console().print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            measure, (arguments.processes, arguments.rounds, folder), nprocs=arguments.processes
        )
