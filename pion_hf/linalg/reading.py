"""Values that decide what is computed next, read on the host.

On a CPU reading costs nothing. On a GPU it waits for all that has been launched, and the GPU then waits for what comes
next: a step that reads a few norms of every batch of matrices is idle for a good part of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# What is read late may have grown since, by as much for every power of the step size in it.
GROWTH = 2.0


def reading_waits(x: Tensor) -> bool:
    """Whether to read a value on the host is to wait for the device of `x`."""
    return x.device.type != "cpu"


class Reader:
    """Reads values at once. Pure functions that need one take a reader, which is this where no other is given."""

    def read(self, key: str, value: Tensor, *, order: int = 1, growth: float = GROWTH) -> float:
        """`value`, of one element, as a number; 0 of one without memory. The rest is for `LateReader`."""
        return 0.0 if value.is_meta else value.item()


READER = Reader()


class LateReader(Reader):
    """Where reading waits, a value read is the one of the last time, which has arrived long since.

    It is for values that bound something from above and change little from one step to the next but for the step size
    `lr`: a value of order `k` is proportional to `lr^k`. What is given is the last one at today's `lr`, times
    `growth^k`. The first of a key is waited for, and what comes after zero.
    """

    def __init__(self) -> None:
        self.lr = 1.0
        self.waited = 0  # how often
        self._last: dict[str, _Sent] = {}

    def read(self, key: str, value: Tensor, *, order: int = 1, growth: float = GROWTH) -> float:
        if not reading_waits(value) or value.is_meta:
            return super().read(key, value)
        last = self._last.get(key)
        self._last[key] = _send(value, self.lr)
        before = 0.0 if last is None else last.arrive()
        if last is None or (order and not (before and last.lr)):  # nothing bounds what comes after zero
            self.waited += 1
            return self._last[key].arrive()
        return before * (growth * self.lr / last.lr) ** order if order else before


class _Sent(NamedTuple):
    """A value on its way to the host, and the step size it belongs to."""

    value: Tensor
    event: torch.cuda.Event | None
    lr: float

    def arrive(self) -> float:
        if self.event is not None:
            self.event.synchronize()
        return self.value.item()


def _send(value: Tensor, lr: float) -> _Sent:
    if not value.is_cuda:
        return _Sent(value.detach().clone(), None, lr)
    kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    kept.copy_(value, non_blocking=True)
    return _Sent(kept, torch.cuda.current_stream(value.device).record_event(), lr)
