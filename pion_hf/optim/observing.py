"""What a step did to every matrix: for those who ask, at the steps they ask for, and once for the optimizer itself."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pion_hf.errors import listing

logger = logging.getLogger(__name__)


class Update(NamedTuple):
    """One step of a batch of matrices; tensors `(b, m, n)`, or `(b, K, m, n)` for stacks of K.

    names: of the matrices, in the order of the flattened leading dimensions; experts that share a tensor share a name.
    before: what the observer kept of the old weights. rotations: by side (`in`, `out`) the root mean square and the
    largest angle (radians) of every matrix, each `(b,)`, if the rule rotates.
    """

    names: list[str]
    group: dict
    before: Tensor
    after: Tensor
    grad: Tensor
    rotations: dict[str, tuple[Tensor, Tensor]]


class Observer(Protocol):
    """Put into `MatrixOptimizer.observers`; called within steps, for every batch of matrices."""

    def wants(self, group: dict) -> bool:
        """Whether this step of a group's matrices matters."""

    def before(self, weights: Tensor) -> Tensor:
        """A copy of what it needs of the old weights, which the rule may change in place."""

    def see(self, update: Update) -> None:
        """What became of them."""

    def step_done(self) -> bool:
        """Called after a step; whether it is to be called again."""


class SelfCheck:
    """Whether every matrix with a gradient is moved by its own rule, at the first step with a learning rate.

    What had no gradient there (a factor whose partner is zero, an expert without tokens), or could not move (a side
    that takes turns), is looked at once more. Then it says how many moved, names those that did not, and is done.
    """

    def __init__(self) -> None:
        self._rounds = 2
        self._seen: list[tuple[Update, Tensor]] = []
        self._found: dict[tuple[int, str], _Found] = {}  # by the group's identity and the matrix's name

    def wants(self, group: dict) -> bool:
        return bool(group["lr"] > 0)

    def before(self, weights: Tensor) -> Tensor:
        return weights.clone()

    def see(self, update: Update) -> None:
        if update.rotations:  # the product of factors is the weight to rounding only
            norm, change = (x.flatten(-2).norm(dim=-1) for x in (update.before, update.after - update.before))
            moved = change > 2 * torch.finfo(norm.dtype).eps * norm
        else:
            moved = (update.after != update.before).flatten(-2).any(-1)
        flags = [x.flatten() for x in (moved, (update.grad != 0).flatten(-2).any(-1))]
        none = update.before.new_empty(0)
        # Of the tensors, which would otherwise live until the end of the step, nothing stays.
        rotations = dict.fromkeys(update.rotations)
        seen = update._replace(before=none, after=none, grad=none, rotations=rotations)
        self._seen.append((seen, torch.stack(flags)))

    def step_done(self) -> bool:
        if not self._seen:
            return True
        now: dict[tuple[int, str], _Found] = {}
        for (update, _), (moved, due) in zip(self._seen, to_host([flags for _, flags in self._seen]), strict=True):
            doing = f"{update.group['rule']}: {{}} {'rotated' if update.rotations else 'moved'}"
            for name, m, d in zip(update.names, moved.tolist(), due.tolist(), strict=True):
                now.setdefault((id(update.group), name), _Found(doing, [], [])).add(m, d)
        for key, found in now.items():
            self._found[key] = found.since(self._found.get(key))
        self._seen.clear()
        self._rounds -= 1
        if self._rounds and not all(all(found.moved) for found in self._found.values()):
            return True
        self._conclude()
        return False

    def _conclude(self) -> None:
        total, moved, idle, still = Counter(), Counter(), Counter(), []
        for (_, name), found in self._found.items():
            total[found.doing] += len(found.moved)
            moved[found.doing] += sum(found.moved)
            idle[found.doing] += sum(not (m or d) for m, d in zip(found.moved, found.due, strict=True))
            if any(d and not m for m, d in zip(found.moved, found.due, strict=True)):
                still.append(name)
        for doing, count in total.items():
            without = f", {idle[doing]} had no gradient" if idle[doing] else ""
            logger.info(doing.format(f"{moved[doing]} of {count} matrices") + without)
        if still:
            warnings.warn(
                f"{len(still)} of {len(self._found)} matrices did not move, although they have a gradient and a "
                f"learning rate: {listing(still)}. Is it below what their precision resolves?",
                stacklevel=2,
            )


class _Found(NamedTuple):
    """Of the matrices of one name: what is said of them, with a gap for how many, which moved, which had a gradient."""

    doing: str
    moved: list[bool]
    due: list[bool]

    def add(self, moved: bool, due: bool) -> None:
        self.moved.append(moved)
        self.due.append(due)

    def since(self, earlier: _Found | None) -> _Found:
        if earlier is None:
            return self
        moved = [a or b for a, b in zip(self.moved, earlier.moved, strict=True)]
        return self._replace(moved=moved, due=[a or b for a, b in zip(self.due, earlier.due, strict=True)])


def to_host(tensors: list[Tensor]) -> list[Tensor]:
    """The same on the CPU, one transfer for a device; of one dtype, and of one shape but for the last dimension."""
    found: dict[int, Tensor] = {}
    for device in dict.fromkeys(t.device for t in tensors):
        there = [i for i, t in enumerate(tensors) if t.device == device]
        joined = torch.cat([tensors[i] for i in there], dim=-1).cpu()
        parts = joined.split([tensors[i].shape[-1] for i in there], dim=-1)
        found.update(zip(there, parts, strict=True))
    return [found[i] for i in range(len(tensors))]
