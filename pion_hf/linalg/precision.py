"""Which precision a product runs in: true float32 where it says so, bfloat16 where that is faster and cannot hurt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

PRODUCT_DTYPES = ("auto", "float32", "bfloat16")


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Run float32 products in true float32, and put the caller's setting back afterwards.

    With TF32 products Cayley's orthogonality error is 4e-3 instead of 4e-6.
    """
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product_dtype(x: Tensor, choice: str) -> torch.dtype:
    """Of products of `x` that may be rounded: `choice`, or with `auto` bfloat16 where the hardware is faster in it."""
    if x.dtype == torch.float64 or choice == "float32":
        return x.dtype
    if choice == "bfloat16" or x.device.type == "cuda":
        return torch.bfloat16
    fast = x.device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else x.dtype
