"""Which precision a product runs in: true float32 where it says so, bfloat16 where that is faster and cannot hurt."""

from __future__ import annotations

import contextlib
import functools
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


def split_product(x: Tensor, low: Tensor, *, left: bool = False) -> Tensor:
    """`x a`, or `a x` with `left`, of batches `(b, ., .)`, in float32, with `a` given in bfloat16 as `low`.

    Only `x` is rounded, to two bfloat16 numbers, 16 of its 24 bits: the result has a relative error of 2^-17, for two
    bfloat16 products instead of one in float32.
    """
    high = x.to(low.dtype)
    rest = (x - high).to(low.dtype)
    if left:
        return _summed_in_float32(low, high).add_(_summed_in_float32(low, rest))
    return _summed_in_float32(high, low).add_(_summed_in_float32(rest, low))


def _summed_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """`a b` of bfloat16 batches, in float32; CPU products would round it."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


def splitting_pays(device: torch.device) -> bool:
    """Whether `split_product` is faster than a float32 product: by 5 or more where bfloat16 has units of its own.

    On a CPU with such units (AMX) the memory that cutting `x` moves eats what is won.
    """
    return device.type == "cuda" and _multiplies_bfloat16(device)


@functools.cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it; others emulate it.

    On CPUs those are AMX (a product is 3 times as fast) or AVX-512's (twice), on NVIDIA's GPUs all from Ampere on.
    """
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def product_dtype(x: Tensor, choice: str) -> torch.dtype:
    """Of products of `x` that may be rounded: `choice`, or with `auto` bfloat16 where the hardware is faster in it."""
    if x.dtype == torch.float64 or choice == "float32":
        return x.dtype
    if choice == "bfloat16":
        return torch.bfloat16
    return torch.bfloat16 if _multiplies_bfloat16(x.device) else x.dtype
