"""What a step of one 4096 x 14336 matrix in bfloat16 would run and move on a GPU, as it is and with `compile=True`.

As it is: counted on fake CUDA tensors (fake_gpu.py). Compiled: what `torch.compile` fuses is counted by inductor,
which compiles the same part of the step for a CPU (kernels that it generates, products, and bytes that all of them read
and write), for a matrix of the same proportions and 1/16 of the sides, cut in halves as on a GPU; what lies outside of
that part is added from the fake one. Means of two steps, one on either side.

    python examples/benchmarks/compiled_estimate.py
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from fake_gpu import Kernel, fake_gpu
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._inductor import metrics
from torch._inductor.compile_fx import inductor_metrics_log

from pion_hf.linalg import products, rotation
from pion_hf.linalg.products import Halves
from pion_hf.optim import Muon, Pion, compiled

SHAPE, SMALL = (4096, 14336), (256, 896)
CONTENDERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch Muon": lambda p, **_: torch.optim.Muon(p, lr=1e-4, weight_decay=0.0),
    "muon": lambda p, **options: Muon(p, lr=1e-4, polar_dtype="bfloat16", **options),
    "pion": lambda p, **options: Pion(p, generator_dtype="bfloat16", **options),
    "pion, transported": lambda p, **options: Pion(
        p, generator_dtype="bfloat16", momentum_frame="transported", **options
    ),
    "pion_ambient": lambda p, **options: Pion(p, generator_dtype="bfloat16", preset="ambient", **options),
    "pion_ambient, not transported": lambda p, **options: Pion(
        p, generator_dtype="bfloat16", direction="natural", metric="ambient", **options
    ),
}
STEPS = 4


def outside_and_inside(build: Callable[..., torch.optim.Optimizer]) -> tuple[list[Kernel], list[Kernel]]:
    """Of two steps on a fake GPU, the kernels outside of what `compile` fuses, and those inside as they are."""
    inside, outside = [], []
    with fake_gpu() as counts:
        p = nn.Parameter(torch.empty(SHAPE, dtype=torch.bfloat16, device="cuda"))
        optimizer = build([p])

        def apart(kernel: Callable, *args: object, compiled: bool, **choices: object) -> object:
            before = len(counts.kernels)
            found = kernel(*args, **choices)
            inside.extend(counts.kernels[before:])
            del counts.kernels[before:]
            return found

        with mock.patch.object(compiled, "run", apart):
            for step in range(STEPS):
                p.grad = torch.empty_like(p)
                counts.reset()
                if step == STEPS - 2:
                    inside.clear()
                optimizer.step()
                outside += counts.kernels if step >= STEPS - 2 else []
    return outside, inside


@contextmanager
def halves_on_a_cpu() -> Iterator[None]:
    """Products in halves as on a GPU; what has float32 results is one operation, as there."""

    def halves_product(a: Tensor, b: Tensor) -> Tensor:
        left, right = Halves.of(a), Halves.of(b)
        small = torch.baddbmm(left.high @ right.rest, left.rest, right.high)
        return torch.ops.benchmark.wide(left.high, right.high).add_(small)

    with (
        mock.patch.object(products, "splitting_pays", _yes),
        mock.patch.object(products, "product", torch.matmul),
        mock.patch.object(rotation, "product", torch.matmul),
        mock.patch.object(rotation, "halves_product", halves_product),
    ):
        yield


def _yes(device: torch.device) -> bool:
    return True


def _wide(a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float()


torch.library.custom_op("benchmark::wide", _wide, mutates_args=()).register_fake(
    lambda a, b: a.new_empty(len(a), a.shape[-2], b.shape[-1], dtype=torch.float32)
)


def fused(build: Callable[..., torch.optim.Optimizer]) -> tuple[int, float]:
    """Of two steps, the kernels that inductor generates, and the bytes a parameter of all that it runs."""
    inductor_metrics_log.setLevel(logging.INFO)  # else it counts no bytes
    p = nn.Parameter(torch.randn(SMALL, dtype=torch.bfloat16))
    kernels = moved = 0
    with halves_on_a_cpu(), torch._inductor.config.patch(force_disable_caches=True):
        torch._dynamo.reset()
        optimizer = build([p], compile=True)
        for _ in range(2):  # every side is compiled at its first step
            metrics.reset()
            p.grad = torch.randn_like(p)
            optimizer.step()
            kernels += metrics.generated_kernel_count
            moved += metrics.num_bytes_accessed
    return kernels, moved / p.numel()


def main() -> None:
    size = SHAPE[0] * SHAPE[1]
    made = Table(title=f"A step of a matrix of {SHAPE[0]} x {SHAPE[1]} in bfloat16", box=box.MARKDOWN)
    for column in ("optimizer", "kernels", "bytes a parameter", "compiled: kernels", "bytes a parameter "):
        made.add_column(column, justify="left" if column == "optimizer" else "right")
    for name, build in CONTENDERS.items():
        outside, inside = outside_and_inside(build)
        row = [len(outside + inside) / 2, sum(k.bytes for k in outside + inside) / size / 2]
        if inside:
            kernels, moved = fused(build)
            products = sum(bool(k.flops) for k in inside)
            row += [
                (len(outside) + products + kernels) / 2,
                (sum(k.bytes for k in outside) / size + moved) / 2,
            ]
        made.add_row(name, *(f"{figure:.0f}" for figure in row))
    Console(width=120).print(made)


if __name__ == "__main__":
    main()
