"""Exact float32 masters of half-precision weights: the weight and what it drops, no second copy.

A bfloat16 weight rounds a step of less than 2^-9 of itself away. Kept beside it are the 16 bits that it drops, so that
both together are a float32 number: 2 bytes a parameter. A float16 weight, whose bits do not nest in a float32's, is
kept with its float32 rounding error: 4 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Odd numbers of 31 bits (those of xxHash and MurmurHash), whose multiples look random in the upper bits.
ROWS, COLUMNS, STEPS, MIXER = 374761393, 668265263, 1540483477, 461845907

HALF = (torch.bfloat16, torch.float16)
REST_DTYPES = {torch.bfloat16: torch.int16, torch.float16: torch.float32}


def join(weight: Tensor, rest: Tensor) -> Tensor:
    """The float32 master of a half-precision `weight` and its `rest`, of one shape."""
    if weight.dtype == torch.float16:
        return weight.float() + rest
    high = weight.contiguous().view(torch.int16).to(torch.int32) << 16
    return (high + rest).view(torch.float32)


def drop_impossible_(weight: Tensor, rest: Tensor) -> None:
    """Of a `rest` that may belong to another weight, what would make NaN of a zero; all else is below its rounding."""
    if weight.dtype == torch.bfloat16:
        rest.view(torch.int16).masked_fill_(weight == 0, 0)


def part(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(weight, rest)` of a float32 `master`, the weight rounded to nearest; `join` gives back every bit of it."""
    if dtype == torch.float16:
        weight = master.half()
        return weight, master - weight.float()
    bits = master.contiguous().view(torch.int32)
    # Half up in magnitude, so that the rest fits 16 bits; torch's own rounding, half to even, would miss by one.
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def rounded_on_average(x: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """`x`, `(..., m, n)`, in bfloat16, up or down by chance, so that nothing is lost on average.

    An average that moves by less than its rounding would stand still. Chance depends on the place in the matrix and on
    the number of the step, of every matrix its own (`numbers`), and on nothing else.
    """
    m, n = x.shape[-2:]
    rows, columns = (torch.arange(size, dtype=torch.int32, device=x.device) for size in (m, n))
    places = (rows * ROWS).unsqueeze(-1) + columns * COLUMNS
    if len(set(numbers)) == 1:
        steps = torch.tensor(numbers[0], dtype=torch.int32, device=x.device)
    else:
        steps = torch.tensor(numbers, dtype=torch.int32, device=x.device).view(*x.shape[:-2], 1, 1)
    noise = places + steps * STEPS
    noise = (noise ^ (noise >> 15)) * MIXER
    noise = (noise ^ (noise >> 13)) * ROWS
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + ((noise >> 8) & 0xFFFF)) & -0x10000).view(torch.float32).bfloat16()
