"""Which precision a product runs in: true float32 where it says so, bfloat16 where that is faster and cannot hurt."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Matrices of a smaller side are multiplied as they are: in batches, and not in halves.
LARGE = 128
# Of the Gram matrix of one with so many rows on a CPU only what is on and below the diagonal is multiplied, in thirds.
LARGE_GRAM, THIRDS = 512, 3
# The setting is the process's: of several threads the first one in changes it, and the last one out puts it back.
_lock = threading.Lock()
_inside, _before = 0, []


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Run float32 products in true float32, and put the caller's setting back afterwards.

    With TF32 products what should be orthogonal is off by 4e-3 instead of 4e-6.
    """
    global _inside
    # Not torch.get_float32_matmul_precision, which fails after the newer settings (as of transformers' --tf32).
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    with _lock:
        if not _inside:
            _before[:] = [place.fp32_precision for place in places]
            for place in places:
                place.fp32_precision = "ieee"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for place, precision in zip(places, _before, strict=True):
                    place.fp32_precision = precision


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a b` of batches `(b, ., .)`, which for every one of them is what it would be alone.

    On a CPU half-precision products of a batch round otherwise than those of a matrix, and large ones are slower with
    several threads: they are made one by one.
    """
    alone = a.dtype == torch.bfloat16 or min(*a.shape[-2:], b.shape[-1]) >= LARGE
    if not alone or a.device.type != "cpu" or a.ndim != 3:
        return a @ b
    # To a compiler it is one operation, whatever the number of matrices.
    return torch.ops.pion_hf.one_by_one(a, b) if torch.compiler.is_compiling() else _one_by_one(a, b)


def _one_by_one(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(len(a), a.shape[-2], b.shape[-1])
    for x, y, to in zip(a, b, out, strict=True):
        torch.mm(x, y, out=to)
    return out


torch.library.custom_op("pion_hf::one_by_one", _one_by_one, mutates_args=()).register_fake(
    lambda a, b: a.new_empty(len(a), a.shape[-2], b.shape[-1])
)


def gram_matrix(x: Tensor) -> Tensor:
    """`x x^T` of a matrix or a batch of them, `(b, ., .)`: as `product`, with two thirds of its work if that pays."""
    if x.device.type != "cpu" or x.ndim > 3 or x.shape[-2] < LARGE_GRAM:
        return product(x, x.mT)
    batch = x.view(-1, *x.shape[-2:])
    found = torch.ops.pion_hf.gram_matrices(batch) if torch.compiler.is_compiling() else _gram_matrices(batch)
    return found.view(*x.shape[:-1], x.shape[-2])


def _gram_matrices(batch: Tensor) -> Tensor:
    count, k, _ = batch.shape
    found, cuts = batch.new_empty(count, k, k), [k * third // THIRDS for third in range(THIRDS + 1)]
    for x, to in zip(batch, found, strict=True):
        for begin, end in pairwise(cuts):
            torch.mm(x[begin:end], x[:end].mT, out=to[begin:end, :end])
            to[:begin, begin:end] = to[begin:end, :begin].mT
    return found


torch.library.custom_op("pion_hf::gram_matrices", _gram_matrices, mutates_args=()).register_fake(
    lambda batch: batch.new_empty(*batch.shape[:-1], batch.shape[-2])
)


class Halves(NamedTuple):
    """A float32 matrix as two bfloat16 ones, whose sum is within a relative 2^-16 of it."""

    high: Tensor
    rest: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Halves | None:
        """None where products of `x` as it is are as fast."""
        if x.ndim != 3 or min(x.shape[-2:]) < LARGE or x.dtype != torch.float32 or not splitting_pays(x.device):
            return None
        high = x.bfloat16()
        return cls(high, (x - high).bfloat16())


def halves_product(a: Tensor, b: Tensor) -> Tensor:
    """`a b` of float32 batches: where splitting pays by three products of halves, that of the two rests left out."""
    left = Halves.of(a)
    right = None if left is None else Halves.of(b)
    if right is None:
        return product(a, b)
    small = torch.baddbmm(left.high @ right.rest, left.rest, right.high)
    return torch.bmm(left.high, right.high, out_dtype=torch.float32).add_(small)


def gram_error(y: Tensor, halves: Halves | None) -> Tensor:
    """`y y^T - I` of batches whose rows are nearly orthonormal, to float32 rounding of the identity.

    From `halves`, if there are any: what is not on the diagonal is small, and comes from two bfloat16 products.
    """
    if halves is None:
        error = gram_matrix(y)
    else:
        across = halves.high @ halves.rest.mT
        error = (halves.high @ halves.high.mT).float().add_(across.add_(across.mT.clone()))
        error.diagonal(dim1=-2, dim2=-1).copy_(torch.linalg.vector_norm(y, dim=-1).square())
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    return error


def splitting_pays(device: torch.device) -> bool:
    """Whether products of halves are faster than a float32 product: by 3 or more where bfloat16 has units of its own.

    On a CPU with such units (AMX) the memory that cutting moves eats what is won.
    """
    return device.type == "cuda" and multiplies_bfloat16(device) and _sums_in_float32(device)


@functools.cache
def _sums_in_float32(device: torch.device) -> bool:
    """Whether torch has products of bfloat16 with float32 results there: not of every vendor, nor in every version."""
    x = torch.ones(1, 16, 16, dtype=torch.bfloat16, device=device)
    try:
        return torch.bmm(x, x, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):
        return False


def multiplies_bfloat16(device: torch.device) -> bool:
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
    return torch.bfloat16 if multiplies_bfloat16(x.device) else x.dtype
