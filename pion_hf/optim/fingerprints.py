"""Whether a weight is still the one that its optimizer state describes: an integer of all its bits, on its device.

Others write weights between steps: pruning masks, averages, restarts, `load_state_dict`. Neither a tensor's version nor
its address knows of all of them, or ties saved state to loaded weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# 2^64 over the golden ratio, and a multiplier of David Stafford's; both odd, as signed integers.
GOLDEN, MIXER = -0x61C8864680B583EB, -0x40A7B892E31B1A47
# Entries that are summed at once: what a core's cache holds, or of a GPU the work of many; of a row or column so many.
PIECE, PIECE_DEFAULT = 2**18, 2**24
LINE = 2**15


# The state entry with that of the weight which the last step has left.
FINGERPRINT, FINGERPRINT_BYTES = "fingerprint", 8


class Part(NamedTuple):
    """What a process holds of a tensor of `shape`: all of it, or what begins at `start` along `dim`."""

    held: Tensor
    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0


def fingerprint(x: Tensor) -> Tensor:
    """An int64 of the bits of floating `x`, `(..., n)`, that is another with almost any other bits.

    Rows `i` and columns `j` count with numbers of their own, `sum_ij bits_ij (a_i + b_j)` modulo 2^64: swapped or
    transposed entries show as well as scaled or negated ones, and 0 differs from -0.
    """
    return fingerprints([Part(x, tuple(x.shape))])[0]


def fingerprints(parts: Sequence[Part]) -> Tensor:
    """`fingerprint` of every tensor, `(len(parts),)`; of parts of one, they add up to that of the whole."""
    alike: dict[tuple, list[int]] = defaultdict(list)
    for i, (held, *place) in enumerate(parts):
        alike[held.shape, held.dtype, held.device, *place].append(i)
    device = parts[0].held.device
    numbers = {d: _numbers(parts, d) for d in dict.fromkeys(part.held.device for part in parts)}
    found: list[Tensor] = [numbers[device]] * len(parts)
    for (shape, dtype, at, *place), members in alike.items():
        most = PIECE if at.type == "cpu" else PIECE_DEFAULT
        each = max(1, 2 * most // max(1, shape.numel() * dtype.itemsize))
        for first in range(0, len(members), each):
            some = members[first : first + each]
            of_some = _of_equal([parts[i].held for i in some], *place, numbers[at], most)
            for i, value in zip(some, of_some.to(device).unbind(), strict=True):
                found[i] = value
    return torch.stack(found)


def _of_equal(
    tensors: list[Tensor], shape: tuple[int, ...], dim: int, start: int, numbers: Tensor, most: int
) -> Tensor:
    """Of tensors of one form and place; `numbers` are those of rows and columns alike."""
    if not tensors[0].numel():
        return numbers.new_zeros(len(tensors))
    across, size = dim == len(shape) - 1, tensors[0].element_size()
    skipped = start * size % 4 // 2 if across else 0  # half an entry of 32 bits, before the first
    entries = [_entries(x, skipped) for x in tensors]
    bits = entries[0].unsqueeze(0) if len(entries) == 1 else torch.stack(entries)
    rows = numbers[: torch.Size(shape[:-1]).numel()].view(shape[:-1])
    rows = rows if across else rows.narrow(dim, start, tensors[0].shape[dim])
    columns = numbers.narrow(0, start * size // 4 if across else 0, bits.shape[-1]) * MIXER
    at_once = min(LINE, max(1, most // (len(tensors) * bits.shape[-1])))
    total = numbers.new_zeros(len(tensors))
    for some, weights in zip(bits.split(at_once, 1), rows.flatten().split(at_once), strict=True):
        for x, others in zip(some.split(LINE, 2), columns.split(LINE), strict=True):
            high = x >> 16 if x.device.type == "cpu" else None
            total += (_sums(x, high, -1) * weights).sum(-1) + (_sums(x, high, -2) * others).sum(-1)
    return total


def _sums(x: Tensor, high: Tensor | None, dim: int) -> Tensor:
    """Of int32, of which `high` are the upper halves, as int64.

    On a CPU without a copy of that size, as a sum would make one: of a line the upper halves sum up in 32 bits, and of
    the lower ones, which do too, the sum is known modulo 2^32.
    """
    if high is None:
        return x.sum(dim, dtype=torch.int64)
    upper = high.sum(dim, dtype=torch.int32).long() << 16
    return upper + ((x.sum(dim, dtype=torch.int32).long() - upper) & 0xFFFFFFFF)


def _entries(x: Tensor, skipped: int) -> Tensor:
    """The bits of `x` as rows of int32: two for a float64, one for two half-precision numbers."""
    x = x.detach().contiguous().reshape(-1, x.shape[-1] if x.ndim else 1)
    if x.element_size() == 2:
        missing = (skipped + x.shape[-1]) % 2
        x = pad(x.view(torch.int16), (skipped, missing)) if skipped or missing else x
    return x.view(torch.int32)


def _numbers(parts: Sequence[Part], device: torch.device) -> Tensor:
    """As many fixed, odd numbers as any of the tensors has rows, or columns of 32 bits."""
    count = max(max(part.held.element_size() * part.shape[-1], torch.Size(part.shape[:-1]).numel()) for part in parts)
    mixed = torch.arange(1, count + 1, device=device) * GOLDEN
    return (mixed ^ (mixed >> 31)) * MIXER | 1
