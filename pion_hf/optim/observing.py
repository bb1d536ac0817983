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
        # Of batches: the group's identity, how it is said of how many, names, and which moved and had a gradient.
        self._seen: list[tuple[int, str, list[str], Tensor]] = []
        # By the group's identity, the name, and which of the matrices of that name it is.
        self._found: dict[tuple[int, str, int], _Found] = {}

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
        flags = torch.stack([x.flatten() for x in (moved, (update.grad != 0).flatten(-2).any(-1))])
        doing = f"{update.group['rule']}: {{}} {'rotated' if update.rotations else 'moved'}"
        # Not the update, whose tensors would live until the end of the step.
        self._seen.append((id(update.group), doing, update.names, flags))

    def step_done(self) -> bool:
        if not self._seen:
            return True
        counts: Counter[tuple[int, str]] = Counter()
        for (group, doing, names, _), flags in zip(self._seen, to_host([seen[-1] for seen in self._seen]), strict=True):
            for name, moved, due in zip(names, *flags.tolist(), strict=True):
                key = group, name, counts[group, name]
                earlier = self._found.get(key, _Found(doing, False, False))
                self._found[key] = _Found(doing, moved or earlier.moved, due or earlier.due)
                counts[group, name] += 1
        self._seen.clear()
        self._rounds -= 1
        if self._rounds and not all(found.moved for found in self._found.values()):
            return True
        self._conclude()
        return False

    def _conclude(self) -> None:
        total, moved, idle = Counter(), Counter(), Counter()
        for found in self._found.values():
            total[found.doing] += 1
            moved[found.doing] += found.moved
            idle[found.doing] += not (found.moved or found.due)
        for doing, count in total.items():
            without = f", {idle[doing]} had no gradient" if idle[doing] else ""
            logger.info(doing.format(f"{moved[doing]} of {count} matrices") + without)
        named = {(group, name) for group, name, _ in self._found}
        still = dict.fromkeys(key[:2] for key, found in self._found.items() if found.due and not found.moved)
        if still:
            warnings.warn(
                f"{len(still)} of {len(named)} matrices did not move, although they have a gradient and a "
                f"learning rate: {listing([name for _, name in still])}. Is it below what their precision resolves?",
                stacklevel=2,
            )


class _Found(NamedTuple):
    """Of a matrix: what is said of its like, with a gap for how many, and whether it has moved and had a gradient."""

    doing: str
    moved: bool
    due: bool


def to_host(tensors: list[Tensor]) -> list[Tensor]:
    """The same on the CPU, one transfer for a device; of one dtype, and of one shape but for the last dimension."""
    found: dict[int, Tensor] = {}
    for device in dict.fromkeys(t.device for t in tensors):
        there = [i for i, t in enumerate(tensors) if t.device == device]
        joined = torch.cat([tensors[i] for i in there], dim=-1).cpu()
        parts = joined.split([tensors[i].shape[-1] for i in there], dim=-1)
        found.update(zip(there, parts, strict=True))
    return [found[i] for i in range(len(tensors))]
