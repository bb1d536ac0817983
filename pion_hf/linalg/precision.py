"""Which precision a product runs in: true float32 where it says so, bfloat16 where that is faster and cannot hurt."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Run float32 products in true float32, and put the caller's setting back afterwards.

    With TF32 products Cayley's orthogonality error is 4e-3 instead of 4e-6.
    """
    # Not torch.get_float32_matmul_precision, which fails after the newer settings (as of transformers' --tf32).
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def halves_product(a: Tensor, b: Tensor) -> Tensor:
    """`a b` of float32 batches: where splitting pays with both cut in two bfloat16 numbers, 16 of
    their 24 bits, else exact.

    To a relative 2^-16, as fast as three bfloat16 products: that of the two rests is left out.
    """
    if a.dtype != torch.float32 or a.ndim != 3 or not splitting_pays(a.device):
        return a @ b
    return _summed_in_float32(_halves(a, -1, "hhr"), _halves(b, -2, "hrh"))


def gram(y: Tensor) -> Tensor:
    """`y y^T` of float32 batches; where splitting pays to a relative 2^-16, by two bfloat16 products, else exact."""
    if y.dtype != torch.float32 or y.ndim != 3 or not splitting_pays(y.device):
        return y @ y.mT
    high = y.to(torch.bfloat16)
    across = _summed_in_float32(high, (y - high).to(torch.bfloat16).mT)
    return _summed_in_float32(high, high.mT).add_(across).add_(across.mT)


def _halves(x: Tensor, dim: int, order: str) -> Tensor:
    """High half (h) and rest (r) of `x`, float32, whose sum it is, as bfloat16 and one after the other along `dim`."""
    shape = list(x.shape)
    shape[dim] *= len(order)
    out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    places = dict(zip(order, out.chunk(len(order), dim), strict=True))  # of two high ones the last
    high = places["h"].copy_(x)
    torch.sub(x, high, out=places["r"])
    if order.count("h") > 1:
        out.narrow(dim, 0, x.shape[dim]).copy_(high)
    return out


def _summed_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """`a b` of bfloat16 batches, in float32; CPU products would round it."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


@functools.cache
def splitting_pays(device: torch.device) -> bool:
    """Whether `halves_product` is faster than a float32 product: by 3 or more where bfloat16 has units of its own.

    On a CPU with such units (AMX) the memory that cutting `x` moves eats what is won.
    """
    return device.type == "cuda" and _multiplies_bfloat16(device) and _sums_in_float32(device)


def _sums_in_float32(device: torch.device) -> bool:
    """Whether torch has products of bfloat16 with float32 results there: not of every vendor, nor in every version."""
    x = torch.ones(1, 16, 16, dtype=torch.bfloat16, device=device)
    try:
        return torch.bmm(x, x, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):
        return False


@functools.cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device is faster in it than in float32: a CPU is timed, of NVIDIA's GPUs all are from Ampere on."""
    if device.type == "cpu":
        return bfloat16_speedup() > 1
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def bfloat16_speedup(side: int = 512, most_seconds: float = 0.1) -> float:
    """How many times faster this CPU multiplies bfloat16 than float32, `side` x `side`; measured once.

    AMX is 2 to 3 times as fast, AVX-512's instructions for bfloat16 twice; a processor without either emulates it and
    is 7 to 200 times slower. The fastest of some products counts, never the first alone, which makes its kernel, in
    seconds of the processor, which others that use it at the same time do not lengthen: a run that is resumed must
    find the same.
    """
    factors = [torch.ones(side, side, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.bfloat16)]
    fastest = [math.inf, math.inf]
    begun = time.process_time()
    with full_float32(), torch.autocast("cpu", enabled=False):
        for turn in range(8):
            for kind, x in enumerate(factors):
                start = time.process_time()
                torch.mm(x, x)
                fastest[kind] = min(fastest[kind], time.process_time() - start)
            if turn and time.process_time() - begun > most_seconds:
                break
    return fastest[0] / fastest[1]


def product_dtype(x: Tensor, choice: str) -> torch.dtype:
    """Of products of `x` that may be rounded: `choice`, or with `auto` bfloat16 where the hardware is faster in it."""
    if x.dtype == torch.float64 or choice == "float32":
        return x.dtype
    if choice == "bfloat16":
        return torch.bfloat16
    return torch.bfloat16 if _multiplies_bfloat16(x.device) else x.dtype
