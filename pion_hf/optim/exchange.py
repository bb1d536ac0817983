"""Tensors between processes: many in one collective, which goes on while others are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Elements that one process takes at a time. A larger tensor is taken alone.
ROUND_ELEMENTS = 2**24

ALIGNMENT = 16  # bytes, of every tensor in a buffer


def in_rounds(wanted: list[tuple]) -> Iterator[list[tuple]]:
    """Tuples whose last is a tensor, as many at a time as a round may hold."""
    some, size = [], 0
    for entry in wanted:
        if some and size + entry[-1].numel() > ROUND_ELEMENTS:
            yield some
            some, size = [], 0
        some.append(entry)
        size += entry[-1].numel()
    if some:
        yield some


class _Underway(NamedTuple):
    """Buffers between processes. Called, it waits for them and writes what has come into its place."""

    works: list[dist.Work]
    sent: Tensor  # lives until it is
    parts: list[tuple[Tensor, list[Tensor]]]

    def __call__(self) -> None:
        for work in self.works:
            work.wait()
        for buffer, targets in self.parts:
            copy(targets, unpack(buffer, targets))


def exchange(
    outgoing: list[list[Tensor]], incoming: list[list[Tensor]], *, device: torch.device, group: dist.ProcessGroup | None
) -> Callable[[], None]:
    """Begin to send `outgoing`, by process, a collective; what is returned waits for `incoming` and writes into it.

    What a process sends to itself is copied.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    copy(incoming[rank], outgoing[rank])
    outgoing, incoming = ([*x[:rank], [], *x[rank + 1 :]] for x in (outgoing, incoming))
    if ranks == 1:
        return lambda: None
    sent, received = ([sum(map(bytes_of, tensors)) for tensors in x] for x in (outgoing, incoming))
    out, into = (torch.empty(sum(x), dtype=torch.uint8, device=device) for x in (sent, received))
    for tensors, part in zip(outgoing, out.split(sent), strict=True):
        pack(tensors, part)
    work = dist.all_to_all_single(into, out, received, sent, group=group, async_op=True)
    return _Underway([work], out, list(zip(into.split(received), incoming, strict=True)))


def spread(owned: list[list[Tensor]], *, device: torch.device, group: dist.ProcessGroup | None) -> Callable[[], None]:
    """Begin to give everyone what each process has in its own of these tensors, which all have; otherwise as above.

    One broadcast for each: one collective for all would send as much of everyone as the largest has.
    """
    rank = dist.get_rank(group)
    buffers = [torch.empty(sum(map(bytes_of, tensors)), dtype=torch.uint8, device=device) for tensors in owned]
    pack(owned[rank], buffers[rank])
    works = [
        dist.broadcast(buffer, group=group, group_src=r, async_op=True)
        for r, buffer in enumerate(buffers)
        if len(buffer)
    ]
    parts = zip(buffers, owned, strict=True)
    return _Underway(works, buffers[rank], [part for r, part in enumerate(parts) if r != rank])


def bytes_of(x: Tensor) -> int:
    """What it takes of a buffer."""
    return math.ceil(x.numel() * x.element_size() / ALIGNMENT) * ALIGNMENT


def pack(tensors: Sequence[Tensor], buffer: Tensor) -> None:
    """Write tensors into a buffer of bytes, one after the other."""
    copy(unpack(buffer, tensors), tensors)


def unpack(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the tensors in a buffer, of the shapes and dtypes of others."""
    found, start = [], 0
    for x in like:
        found.append(buffer[start : start + x.numel() * x.element_size()].view(x.dtype).view(x.shape))
        start += bytes_of(x)
    return found


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """In one call, which on a GPU is one kernel for many small tensors."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
