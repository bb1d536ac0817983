"""Whether a weight is still the one that its optimizer state describes: an integer of all its bits, on its device.

Others write weights between steps: pruning masks, averages, restarts, `load_state_dict`. Neither a tensor's version nor
its address knows of all of them, or ties saved state to loaded weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# 2^64 over the golden ratio, and a multiplier of David Stafford's; both odd, as signed integers.
GOLDEN, MIXER = -0x61C8864680B583EB, -0x40A7B892E31B1A47
WORD = 8  # bytes that are summed as one number

# The state entry with that of the weight which the last step has left.
FINGERPRINT, FINGERPRINT_BYTES = "fingerprint", 8


class Part(NamedTuple):
    """A block of a tensor of `shape`: all of it, or what begins at `start`; nothing, where `held` is empty."""

    held: Tensor
    shape: tuple[int, ...]
    start: tuple[int, ...] = ()


def fingerprint(x: Tensor) -> Tensor:
    """An int64 of the bits of floating `x`, `(..., n)`, that is another with almost any other bits.

    Rows `i` and columns `j` of 64 bits, one or more entries, count with numbers of their own, `sum_ij (w_ij + c h_ij)
    (a_i + b_j)` modulo 2^64: swapped or transposed entries show as well as scaled or negated ones, and 0 differs from
    -0. `h`, the upper half of `w`, is there for signs, which `w` has at the end of what the sum can hold.
    """
    return fingerprints([[Part(x, tuple(x.shape))]])[0]


def fingerprints(tensors: Sequence[list[Part]]) -> Tensor:
    """`fingerprint` of every tensor, `(len(tensors),)`; of some of its parts, what they add to that of the whole."""
    parts = [part for own in tensors for part in own]
    device = parts[0].held.device
    numbers = {d: _numbers(parts, d) for d in dict.fromkeys(part.held.device for part in parts)}
    found = [[_of(part, numbers[part.held.device]).to(device) for part in own] for own in tensors]
    return torch.stack([own[0] if len(own) == 1 else torch.stack(own).sum() for own in found])


def _of(part: Part, numbers: Tensor) -> Tensor:
    """`numbers` are those of rows and columns alike."""
    held, shape, start = part
    if not held.numel():
        return numbers.new_zeros(())
    words, first = _words(held, start[-1] if start else 0)
    rows = numbers[: torch.Size(shape[:-1]).numel()].view(shape[:-1])
    for dim, begin in enumerate(start[:-1]):
        rows = rows.narrow(dim, begin, held.shape[dim])
    places = torch.cat((rows.flatten(), numbers.narrow(0, first, words.shape[1]) * MIXER))
    # A CPU sums numbers of 64 bits at once, others without a copy.
    upper = words >> 32 if words.device.type == "cpu" else words.view(torch.int32)[:, 1::2]
    lower, upper = (torch.cat([x.sum(dim, dtype=torch.int64) for dim in (1, 0)]) for x in (words, upper))
    return torch.add(lower, upper, alpha=MIXER).mul_(places).sum()


def _words(x: Tensor, start: int) -> tuple[Tensor, int]:
    """The bits of `x`, whose columns begin at `start` of the whole, as rows of int64, and which of its words is first.

    What another process holds of a word is zero.
    """
    each = WORD // x.element_size()
    x = x.detach().contiguous().reshape(-1, x.shape[-1] if x.ndim else 1)
    before = start % each
    after = -(before + x.shape[-1]) % each
    if before or after:
        x = pad(x, (before, after))
    elif x.storage_offset() % each:
        x = x.clone()
    return x.view(torch.int64), start // each


def _numbers(parts: Sequence[Part], device: torch.device) -> Tensor:
    """As many fixed, odd numbers as any of the tensors has rows or columns."""
    count = max(max(part.shape[-1] if part.shape else 1, torch.Size(part.shape[:-1]).numel()) for part in parts)
    mixed = torch.arange(1, count + 1, device=device) * GOLDEN
    return (mixed ^ (mixed >> 31)) * MIXER | 1
