"""Which matrices of a group are updated together, and how they and their state come into one tensor and back.

Equal shapes form batches. After a batch's first step its state lives in one tensor per entry, of which the parameters'
own entries are views: it is not copied again until some of them have a gradient and others none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pion_hf.optim import blocks, masters
from pion_hf.optim.fingerprints import FINGERPRINT

# Elements of the matrices updated together, where a group's `batch_elements` does not say: bounds the extra memory of a
# step (a few times as many floats). A batch saves calls; on a CPU, where large products are made one by one, gathering
# larger matrices costs more than that.
BATCH_ELEMENTS = {"cpu": 2**19}
BATCH_ELEMENTS_DEFAULT = 2**25

# The state entry with what a half-precision parameter drops of its master (see `precision`).
REST = "rest"
# That with the directions of a layer's inputs whose outputs stay as they are, `(E, n, keep)`.
KEPT = "kept"


class Block(NamedTuple):
    """The `index`-th matrix of `param` (see `blocks.split`) as a view `(E, h, d, n)`, of `experts` only.

    home: what the view is of and the gradient is beside: `param`, or the whole of one that is sharded.
    """

    param: Tensor
    name: str
    index: int
    view: Tensor
    home: Tensor
    experts: slice = slice(None)

    def of(self, tensor: Tensor, layout: blocks.Layout) -> Tensor:
        """The block of another tensor of the shape of `param`."""
        return blocks.split(tensor, layout)[self.index][self.experts]

    def some(self, experts: slice) -> Block:
        """The part of a whole block with these experts."""
        return self._replace(view=self.view[experts], experts=experts)


Unit = tuple[Block, ...]
"""Blocks that are updated as one: the matrices of a stack, or a single one."""


class Step(NamedTuple):
    """The step that the matrices of a batch take. How it is made is the same of all; its number need not be."""

    numbers: tuple[int, ...]
    """From 1, of every matrix, in the order of the leading dimensions."""
    turn: Hashable = None
    """See `MatrixOptimizer.turn_of`."""

    @property
    def first(self) -> bool:
        return self.numbers[0] == 1

    @property
    def mixed(self) -> bool:
        return len(set(self.numbers)) > 1

    def weight(self, beta: float, like: Tensor, *, ahead: int = 0) -> float | Tensor:
        """`1 - beta^t`: of what it averages, the part that an average has which began at zero.

        At step `t`, or so many ahead; `(..., 1, 1)`, one for every matrix of `like`, where they are at different steps.
        """
        if not self.mixed:
            return 1 - beta ** (self.numbers[0] + ahead)
        weights = torch.tensor([1 - beta ** (number + ahead) for number in self.numbers], dtype=like.dtype)
        return weights.to(like.device, non_blocking=True).view(*like.shape[:-2], 1, 1)


class Plan:
    """Which matrices of a group are updated together, whichever of its parameters have a gradient.

    What had one in the last step and what has one now may differ at every step, as of experts: `arrange` says it. A
    batch that is there again finds its state as it has left it, if none of its matrices was in another one since.
    """

    def __init__(
        self, stacks: Iterable[list[Block]], layout: blocks.Layout, params: list[Tensor], elements: int | None
    ) -> None:
        """stacks: what is updated as one. params: the group's. elements: as for `batches_of`."""
        self._stacks, self._layout, self._elements = list(stacks), layout, elements
        self._seen = _signature(params)
        self._arranged: list[tuple[int, int]] | None = None
        self._kept: dict[tuple, Batch] = {}
        self.ready: set[Tensor] = set()
        """Parameters whose state is known to fit."""
        self.params: list[Tensor] = []
        """Those with a gradient, as far as arranged."""

    def fits(self, params: list[Tensor]) -> bool:
        """Whether these are still the same parameters, in the same memory."""
        return self._seen == _signature(params)

    def arrange(self, kinds: dict[Tensor, Hashable], state: dict) -> None:
        """For a step of the parameters in `kinds`, of which those of one kind are updated together.

        Blocks of a stack that are not of one kind, or without a gradient, are apart for this step.
        """
        labels: dict[Hashable, int] = {}
        found = {id(p): labels.setdefault(kind, len(labels)) for p, kind in kinds.items()}
        self.params = list(kinds)
        if self._arranged == (arranged := list(found.items())):
            return
        units: dict[tuple[int, int], list[Block]] = defaultdict(list)
        for i, stack in enumerate(self._stacks):
            for block in stack:
                if (label := found.get(id(block.param))) is not None:
                    units[i, label].append(block)
        self._arrange([(tuple(unit), label) for (_, label), unit in units.items()], state)
        self._arranged = arranged

    def rounds(self, state: dict) -> Iterator[tuple[list[Batch], dict]]:
        """What is updated one after the other: batches, and the state of their parameters."""
        yield self._batches, state

    def _arrange(self, units: list[tuple[Unit, int]], state: dict) -> None:
        (self._batches,) = self._known([batches_of(units, self._layout, self._elements)], state)

    def _known(self, rounds: list[list[Batch]], state: dict) -> list[list[Batch]]:
        """The batches of before where they are the same. What leaves one takes its state along, in its own memory."""
        now = {batch.key: self._kept.get(batch.key, batch) for batches in rounds for batch in batches}
        new = [batch for key, batch in now.items() if key not in self._kept]
        moving = {block.param for batch in new for block in batch.blocks}
        alone = {batch.first.param for batch in new if len(batch.blocks) == 1}  # its state is not gathered
        for key, batch in list(self._kept.items()):
            params = {block.param for block in batch.blocks}
            if key not in now and not moving.isdisjoint(params):
                del self._kept[key]
                state.update({p: unshared(state[p]) for p in params - (moving - alone)})
        self._kept |= now
        return [[now[batch.key] for batch in batches] for batches in rounds]


def batches_of(units: Iterable[tuple[Unit, int]], layout: blocks.Layout, elements: int | None) -> list[Batch]:
    """Batches of units of one shape; with every unit comes a number for what those of a batch share besides.

    elements: of a batch, at most, or of a unit of single matrices; None for what suits the device.
    """
    buckets: dict[tuple, list[Unit]] = defaultdict(list)
    for whole, label in units:
        view = whole[0].view
        most = elements or BATCH_ELEMENTS.get(view.device.type, BATCH_ELEMENTS_DEFAULT)
        for unit in _parts_of(whole, most):
            shape = len(unit), *unit[0].view.shape
            buckets[shape[:2], shape[2] * shape[3], shape[4], view.dtype, view.device, label, most].append(unit)
    found = []
    for (*_, most), members in buckets.items():
        size = max(1, most // _elements_of(members[0]))
        found += [Batch(members[start : start + size], layout) for start in range(0, len(members), size)]
    return found


def _parts_of(unit: Unit, most: int) -> list[Unit]:
    """The unit, or if it holds more than `most` elements, so many of its experts at a time as do not."""
    count = unit[0].view.shape[0]
    size = max(1, most * count // _elements_of(unit))
    if size >= count:
        return [unit]
    starts = range(0, count, size)
    return [tuple(block.some(slice(start, min(start + size, count))) for block in unit) for start in starts]


def _elements_of(unit: Unit) -> int:
    return len(unit) * unit[0].view.numel()


def _signature(params: list[Tensor]) -> list[tuple[int, int]]:
    return [(id(p), p.data_ptr()) for p in params]


class Batch:
    """Units of one shape: gathered as `(b, m, n)`, or `(b, K, m, n)` for stacks of `K`."""

    def __init__(self, units: list[Unit], layout: blocks.Layout) -> None:
        self.units, self.layout = units, layout
        self.blocks = [block for unit in units for block in unit]
        self.first = self.blocks[0]
        self.size = len(units[0])
        self.dtype = torch.float64 if self.first.view.dtype == torch.float64 else torch.float32
        # Every matrix a whole parameter: no views to cut, and the state can stay where the rule has left it.
        self.whole = all(b.param.ndim == 2 for b in self.blocks) and layout.pieces == 1
        # Some experts of parameters that hold more.
        self.partial = self.first.experts != slice(None)
        self.matrix_shape = blocks.merge_rows(self.first.view).shape[1:]
        self._packed: dict[str, tuple[Tensor, list[Tensor]]] = {}

    @cached_property
    def _by_matrix(self) -> list[Block]:
        """Of every matrix its block, in the order of the leading dimensions."""
        return [block for unit in self.units for _ in range(unit[0].view.shape[0]) for block in unit]

    @cached_property
    def names(self) -> list[str]:
        """Of every matrix: parameters that hold several are indexed."""
        return [blocks.name_of(block.name, block.index, self.layout.pieces) for block in self._by_matrix]

    @cached_property
    def key(self) -> tuple:
        """Tells it from other batches, of this step and later ones."""
        return tuple((block.name, block.index, block.experts.start) for block in self.blocks)

    def numbers(self, state: dict) -> tuple[int, ...]:
        """Of the step that each matrix is at."""
        return tuple(state[block.param]["step"] for block in self._by_matrix)

    def weights(self, state: dict) -> Tensor:
        """In full precision where they are stored in half; a lone matrix is its parameter's own memory."""
        stored = self._gather(_weight)
        if REST in state[self.first.param]:
            return masters.join(stored, self._gather(lambda b: state[b.param][REST]))
        return stored.to(self.dtype)

    def gradients(self) -> Tensor:
        return self._gather(lambda b: b.home.grad).to(self.dtype)

    def write(self, new: Tensor, state: dict) -> None:
        """Store the new weights, and with half precision what they drop."""
        if REST in state[self.first.param]:
            new, rest = masters.part(new, self.first.view.dtype)
            self._scatter(rest, lambda b: state[b.param][REST])
        self._scatter(new, _weight)

    def load(self, state: dict) -> dict[str, Tensor]:
        """The state of the batch. Buffers of the weight's shape are kept whole (`momentum`), others by block."""
        found = {}
        for key in state[self.first.param]:
            name, _, index = key.partition(".")
            if name in ("step", REST, FINGERPRINT) or (index and int(index) != self.first.index):
                continue
            packed, parts = self._packed.get(name, (None, ()))
            kept = [self._stored(b, state, name) if index else state[b.param][name] for b in self.blocks]
            if packed is not None and all(a is b for a, b in zip(kept, parts, strict=True)):
                found[name] = packed
            elif index:
                found[name] = self._join(kept)
            else:
                found[name] = self._gather(lambda b, of=name: state[b.param][of]).to(self.dtype)
        return found

    def store(self, found: dict[str, Tensor], state: dict, *, by_block: frozenset[str]) -> None:
        """Keep what `update` left in `found`; `by_block` names entries that are kept apart whatever their shape."""
        for name, tensor in found.items():
            if name in self._packed and tensor is self._packed[name][0]:
                continue
            apart = is_apart(name, tensor, self.matrix_shape, by_block)
            if apart or self.whole:
                parts = self._parts(tensor)
                if not apart:
                    parts = [part[0].mT if self.layout.transposed else part[0] for part in parts]
                if self.partial:
                    self._store_parts(name, parts, state)
                    continue
                for block, part in zip(self.blocks, parts, strict=True):
                    state[block.param][f"{name}.{block.index}" if apart else name] = part
                self._packed[name] = (tensor, parts)
                continue
            for block in self.blocks:
                if name not in state[block.param]:
                    state[block.param][name] = torch.zeros_like(block.home, dtype=tensor.dtype)
            self._scatter(tensor, lambda b, of=name: state[b.param][of])

    def _stored(self, block: Block, state: dict, name: str) -> Tensor:
        """What is kept by block, `(E, ...)`."""
        entry = state[block.param][f"{name}.{block.index}"]
        return entry[block.experts] if self.partial else entry

    def _store_parts(self, name: str, parts: list[Tensor], state: dict) -> None:
        """Into what is kept of all experts of a block."""
        for block, part in zip(self.blocks, parts, strict=True):
            key, experts = f"{name}.{block.index}", len(block.param)
            if key not in state[block.param]:
                state[block.param][key] = part.new_zeros(experts, *part.shape[1:])
            kept = self._stored(block, state, name)
            if kept.data_ptr() != part.data_ptr():  # it may have been changed in place
                kept.copy_(part)

    def _gather(self, of: Callable[[Block], Tensor]) -> Tensor:
        if not self.whole:
            return self._join([blocks.merge_rows(b.of(of(b), self.layout)) for b in self.blocks])
        if len(self.blocks) == 1:
            joined = of(self.first).unsqueeze(0)
        else:
            joined = torch.stack([of(b) for b in self.blocks])
            if self.size > 1:
                joined = joined.unflatten(0, (-1, self.size))
        return joined.mT if self.layout.transposed else joined

    def _join(self, parts: list[Tensor]) -> Tensor:
        """Of `(E, ...)` parts in the order of the blocks."""
        if len(parts) == 1:
            return parts[0]
        if self.size == 1:
            return torch.cat(parts)
        stacks = [torch.stack(parts[i : i + self.size], dim=1) for i in range(0, len(parts), self.size)]
        return stacks[0] if len(stacks) == 1 else torch.cat(stacks)

    def _parts(self, joined: Tensor) -> list[Tensor]:
        """The inverse of `_join`: views, one for every block."""
        sizes = [unit[0].view.shape[0] for unit in self.units]
        of_units = joined.split(sizes)
        return list(of_units) if self.size == 1 else [part for unit in of_units for part in unit.unbind(1)]

    def _scatter(self, joined: Tensor, of: Callable[[Block], Tensor]) -> None:
        """The inverse of `_gather`, into memory that exists."""
        if self.whole:
            rows = (joined.mT if self.layout.transposed else joined).flatten(0, -3).unbind(0)
            kept = [of(b) for b in self.blocks]
            if len(kept) > 1 or kept[0].data_ptr() != rows[0].data_ptr():  # a lone one may have been updated in place
                torch._foreach_copy_(kept, rows)
            return
        for block, part in zip(self.blocks, self._parts(joined), strict=True):
            view = block.of(of(block), self.layout)
            if view.data_ptr() != part.data_ptr():  # a lone view was updated in place
                view.copy_(part.reshape(view.shape))


def is_apart(name: str, entry: Tensor, matrix_shape: tuple[int, ...], by_block: frozenset[str]) -> bool:
    """Whether an entry of state is kept by block, and not whole, in the shape of its parameter."""
    return name == KEPT or name in by_block or entry.shape[-2:] != matrix_shape


def unshared(state: dict) -> dict:
    """The state of a parameter that leaves its batch, in memory of its own: the others' would live on with it."""
    return {key: _unshared(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def _unshared(x: Tensor) -> Tensor:
    if type(x) is not Tensor or x.untyped_storage().nbytes() <= x.nbytes:
        return x
    return x.clone()


def _weight(block: Block) -> Tensor:
    return block.home
