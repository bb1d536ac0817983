"""What single steps did: the size of updates and the angles of rotations, under any optimizer."""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pion_hf.integrations.optimizers import class_name
from pion_hf.optim import MatrixOptimizer
from pion_hf.optim.observing import Update, to_host

# Elements of a matrix whose change is looked at: whole rows, evenly spread. A root mean square of so many is good to
# half a percent.
SAMPLE = 2**16


class _Row(NamedTuple):
    """Values of a rule's matrices, in the order of the names: mean squares of updates, or angles."""

    rule: str
    names: list[str]
    what: str
    values: Tensor


class Meter:
    """Of one step: root mean square of the updates by matrix and by rule, and rotation angles by matrix.

    It is an `Observer` of this package's optimizers, from which it has the exact masters of half-precision weights; of
    other parameters it compares samples before and after.
    """

    def __init__(self, model: nn.Module, optimizer: Any, ours: MatrixOptimizer | None) -> None:
        self.on = False
        # In all, within the optimizer's steps, and for the last step.
        self.seconds = self.seconds_in_steps = self.last_seconds = 0.0
        names = {id(p): name for name, p in model.named_parameters()}
        self._others = [
            (class_name(optimizer) if ours is None else "adamw", names.get(id(p), f"parameter {i} of group {g}"), p)
            for g, group in enumerate(getattr(optimizer, "param_groups", ()))
            if ours is None or group["rule"] == "adamw"
            for i, p in enumerate(group["params"])
        ]
        self._old: list[tuple[str, str, Tensor, Tensor]] = []
        self._steps: list[list[_Row]] = []  # measured and not read yet
        self._fresh = False
        self._sizes: dict[str, int] = {}
        self.update_rms: dict[str, float] = {}
        self.rule_rms: dict[str, float] = {}
        self.angles: dict[str, dict[str, tuple[float, float]]] = {"in": {}, "out": {}}

    # -- a step of this package's optimizers ------------------------------------------------------

    def wants(self, group: dict) -> bool:
        return self.on

    def before(self, weights: Tensor) -> Tensor:
        with self._timed(in_step=True):
            return _sample(weights).clone()

    def see(self, update: Update) -> None:
        with self._timed(in_step=True):
            rule = "/".join(filter(None, (update.group["rule"], update.group.get("method"))))
            squares = (_sample(update.after) - update.before).square().mean((-2, -1)).flatten()
            self._sizes.update(dict.fromkeys(update.names, math.prod(update.after.shape[-2:])))
            self._steps[-1].append(_Row(rule, update.names, "update", squares.double()))
            for side, angles in update.rotations.items():
                for kind, values in zip(("mean", "max"), angles, strict=True):
                    self._steps[-1].append(_Row(rule, update.names, f"{side} {kind}", values.double()))

    def step_done(self) -> bool:
        return True

    # -- a step of any optimizer ------------------------------------------------------------------

    @torch.no_grad()
    def begin(self) -> None:
        """Before a step that is to be measured."""
        self.on, self.last_seconds = True, 0.0
        with self._timed():
            self._steps = [*self._steps[-1:], []]  # of rules that take turns, both sides
            self._old = [(rule, name, p, _few(p).clone()) for rule, name, p in self._others if p.grad is not None]

    @torch.no_grad()
    def end(self) -> None:
        """After it."""
        self.on = False
        with self._timed():
            for rule, name, p, old in self._old:
                self._sizes[name] = p.numel()
                square = (_few(p) - old).double().square().mean().reshape(1)
                self._steps[-1].append(_Row(rule, [name], "update", square))
            self._old = []

    @contextlib.contextmanager
    def _timed(self, *, in_step: bool = False) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.last_seconds += seconds
        self.seconds_in_steps += seconds if in_step else 0.0

    def read(self) -> None:
        """Take the values of measured steps from the device into the dictionaries."""
        if not self._steps:
            return
        with self._timed():
            values = iter(to_host([row.values for rows in self._steps for row in rows]))
            for rows in self._steps:
                self._take([row._replace(values=next(values)) for row in rows])
            self._steps = []
            self._fresh = True

    def _take(self, rows: list[_Row]) -> None:
        """The values of one step, which replace those of steps before."""
        squares: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        turned: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            target = squares[row.rule] if row.what == "update" else turned[row.what]
            for name, value in zip(row.names, row.values.tolist(), strict=True):
                target[name].append(value)  # several where experts share a name
        self.rule_rms = {rule: self._rms(found) for rule, found in squares.items()}
        self.update_rms = {
            name: math.sqrt(sum(values) / len(values)) for found in squares.values() for name, values in found.items()
        }
        for side, known in self.angles.items():
            for name, means in turned[f"{side} mean"].items():
                known[name] = (math.sqrt(sum(m * m for m in means) / len(means)), max(turned[f"{side} max"][name]))

    def _rms(self, found: dict[str, list[float]]) -> float:
        total = sum(self._sizes[name] * sum(values) for name, values in found.items())
        return math.sqrt(total / max(1, sum(self._sizes[name] * len(values) for name, values in found.items())))

    def columns(self, names: list[str]) -> dict[str, list[float | None]]:
        """The values of matrices, None where there are none: `update_rms`, and of rotations mean and largest angles."""
        if not self.update_rms:
            return {}
        # Of several matrices in one parameter of another optimizer, the parameter's.
        found = {"update_rms": [self.update_rms.get(n, self.update_rms.get(n.partition("[")[0])) for n in names]}
        for side, known in self.angles.items():
            if known:
                pairs = [known.get(name, (None, None)) for name in names]
                found[f"angle_{side}"], found[f"angle_{side}_max"] = map(list, zip(*pairs, strict=True))
        return found

    def news(self) -> dict[str, float]:
        """The values as log entries, if any were measured since the last time."""
        self.read()
        if not self._fresh:
            return {}
        self._fresh = False
        found = {f"update_rms/{rule}": value for rule, value in self.rule_rms.items()}
        for side, known in self.angles.items():
            if known:
                found[f"angle_{side}/mean"] = sum(mean for mean, _ in known.values()) / len(known)
                found[f"angle_{side}/max"] = max(largest for _, largest in known.values())
        return found


class Stopwatch:
    """Sums the time between `start` and `stop`; on a GPU by events, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def start(self) -> None:
        self._begin = self._now()

    def stop(self) -> None:
        if self._on_gpu:
            self._events.append((self._begin, self._now()))
        else:
            self._seconds += self._now() - self._begin

    def seconds(self) -> float:
        """So far; what the GPU has not yet finished will be counted later."""
        while self._events and self._events[0][1].query():
            begin, end = self._events.pop(0)
            self._seconds += begin.elapsed_time(end) / 1000
        return self._seconds

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _sample(weights: Tensor) -> Tensor:
    """Evenly spread rows of `(..., m, n)`."""
    return weights[..., :: max(1, math.prod(weights.shape[-2:]) // SAMPLE), :]


def _few(p: Tensor) -> Tensor:
    """Evenly spread elements of a parameter, in float32 at least; of a sharded one, of this process's part."""
    flat = getattr(p, "_local_tensor", p).detach().reshape(-1)
    few = flat[:: max(1, flat.numel() // (SAMPLE // 4))]
    return few if few.dtype == torch.float64 else few.float()
