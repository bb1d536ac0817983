"""What a process holds of a parameter, and what processes tell each other of it: the room that knows DTensors.

A DTensor may be cut along any of its dimensions, by the dimensions of its mesh one after the other: FSDP2's rows, the
columns of tensor parallelism, both, and copies of all that (HSDP). What a process holds of it is a few blocks of the
whole, one as a rule.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pion_hf.optim.batches import REST
from pion_hf.optim.fingerprints import Part, fingerprints
from pion_hf.optim.masters import REST_DTYPES

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Collectives carry no 16-bit integers (neither gloo nor NCCL), and checkpoints gather state by collectives: what a
# bfloat16 weight drops of its master is saved as the bfloat16 number of the same bits.
CARRIED = {torch.int16: torch.bfloat16}


def is_sharded(p: Tensor) -> bool:
    """Whether `p` is a DTensor. Their module takes as long to import as torch; before it is, nothing can be one."""
    return isinstance(p, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def local(p: Tensor) -> Tensor:
    """What this process holds of `p`: its memory, not a copy."""
    return p.to_local() if is_sharded(p) else p


def whole(p: Tensor) -> Tensor:
    """All of `p`. Of a DTensor it is a collective: all processes must ask."""
    return p.full_tensor() if is_sharded(p) else p


def stand_in(p: Tensor) -> Tensor:
    """A tensor of the shape, dtype and device of the whole of `p`, for what only asks for these."""
    return torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape) if is_sharded(p) else p


def is_whole_experts(p: Tensor) -> bool:
    """Whether every process holds some matrices of `p`, a stack of them, as many as any other and each alone."""
    return (
        is_sharded(p)
        and p.ndim == 3
        and p.shape[0] % p.device_mesh.size() == 0
        and all(placement.is_shard(0) for placement in p.placements)
    )


def check(name: str, p: Tensor) -> None:
    """Raises ValueError for a DTensor whose values no process holds, or that is on another device than its mesh."""
    if not is_sharded(p):
        return
    if any(placement.is_partial() for placement in p.placements):
        placements = ", ".join(map(str, p.placements))
        raise ValueError(
            f"{name} is a DTensor with the placements ({placements}), of which every process holds an addend: no "
            "weight can be gathered from that. Shard or replicate it."
        )
    mesh = p.device_mesh
    if p.device.type not in ("meta", mesh.device_type):
        raise ValueError(
            f"{name} is offloaded to the {p.device.type.upper()} by FSDP2, where updating whole matrices would stop "
            f"the {mesh.device_type} at every step: set fsdp_offload_params: false (without a policy: "
            "offload_policy=OffloadPolicy())."
        )


# -- where what lies --------------------------------------------------------------------------------------------------

Spans = tuple[tuple[int, int], ...]
"""Of one dimension, in order: where each begins, and how long it is."""


class Piece(NamedTuple):
    """A block of a tensor that a process holds: where it begins in the whole and in what is held, and its shape."""

    start: tuple[int, ...]
    at: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        return _block(whole, self.start, self.shape)

    def of_held(self, held: Tensor) -> Tensor:
        return _block(held, self.at, self.shape)


def pieces(x: DTensor) -> list[tuple[Piece, ...]]:
    """What each process of a DTensor's mesh holds of it, in the order of `group_of`."""
    return _pieces_of(*_kind(x))


def nearest(x: DTensor, rank: int) -> list[int]:
    """The processes from which `rank` takes `x`: of those that hold the same, the one nearest to it in the mesh."""
    return _nearest(*_kind(x), rank)


def group_of(x: DTensor) -> dist.ProcessGroup | None:
    """The processes of a DTensor's mesh; None for all."""
    mesh = x.device_mesh
    if mesh.size() == dist.get_world_size():
        return None
    return (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()


def _kind(x: DTensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple]:
    return tuple(x.shape), tuple(x.device_mesh.shape), tuple(x.placements)


@functools.lru_cache(4096)
def _held(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple) -> list[tuple[Spans, ...]]:
    """By process, the spans of every dimension."""
    found = []
    for place in _places(mesh):
        spans: list[Spans] = [((0, size),) for size in shape]
        for index, size, placement in zip(place, mesh, placements, strict=True):
            if not placement.is_replicate():
                parts = _cut(spans[placement.dim], getattr(placement, "split_factor", 1))
                spans[placement.dim] = tuple(span for part in parts for span in _cut(part, size)[index])
        found.append(tuple(spans))
    return found


@functools.lru_cache(4096)
def _pieces_of(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple) -> list[tuple[Piece, ...]]:
    return [_pieces(spans) for spans in _held(shape, mesh, placements)]


@functools.lru_cache(4096)
def _nearest(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple, rank: int) -> list[int]:
    places, held, found = _places(mesh), _held(shape, mesh, placements), {}
    for other in sorted(range(len(places)), key=lambda r: sum(map(operator.ne, places[r], places[rank]))):
        found.setdefault(held[other], other)
    return sorted(found.values())


@functools.cache
def _places(mesh: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The coordinates of every process of a mesh."""
    return list(itertools.product(*map(range, mesh)))


def _cut(spans: Spans, parts: int) -> list[Spans]:
    """So many parts as `torch.chunk` and FSDP2 make: equal ones, then what is left, then nothing."""
    each = math.ceil(sum(size for _, size in spans) / parts)
    found: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    done = 0
    for start, size in spans:
        while size:
            taken = min(size, each - done % each)
            found[done // each].append((start, taken))
            start, size, done = start + taken, size - taken, done + taken
    return [tuple(part) for part in found]


def _pieces(spans: tuple[Spans, ...]) -> tuple[Piece, ...]:
    """Those that are cut out by the spans of all dimensions."""
    placed = []
    for of_dim in spans:
        ends = list(itertools.accumulate(size for _, size in of_dim))
        placed.append([(start, end - size, size) for (start, size), end in zip(of_dim, ends, strict=True)])
    return tuple(Piece(*zip(*block, strict=True)) for block in itertools.product(*placed))


def _block(x: Tensor, start: Sequence[int], shape: Sequence[int]) -> Tensor:
    for dim, (begin, size) in enumerate(zip(start, shape, strict=True)):
        x = x if size == x.shape[dim] else x.narrow(dim, begin, size)
    return x


# -- entries of state, as checkpoints have them -----------------------------------------------------------------------


def zeros(form: Tensor, p: Tensor) -> Tensor:
    """An entry of a parameter's state, of the shape and dtype of `form`.

    Sharded as the parameter, or, if it has another shape, along its own longest dimension; that of whole experts with
    them.
    """
    if not is_sharded(p):
        return torch.zeros(form.shape, dtype=form.dtype, device=p.device)
    from torch.distributed.tensor import DTensor, Shard

    shape, placements = tuple(form.shape), tuple(p.placements)
    if form.shape != p.shape and not is_whole_experts(p):
        longest = Shard(max(range(form.ndim), key=lambda d: form.shape[d]))
        placements = tuple(placement if placement.is_replicate() else longest for placement in placements)
    held = _held(shape, tuple(p.device_mesh.shape), placements)[dist.get_rank(group_of(p))]
    sizes = [sum(size for _, size in spans) for spans in held]
    value = torch.zeros(sizes, dtype=CARRIED.get(form.dtype, form.dtype), device=p.device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(value, p.device_mesh, placements, run_check=False, shape=form.shape, stride=stride)


def placed(value: Tensor, p: Tensor, key: str) -> Tensor:
    """`value`, the entry `key` of a parameter's state as every process holds it, as checkpoints of the parameter do."""
    if is_sharded(p) and not is_sharded(value) and value.ndim:
        entry = zeros(value, p)
        for piece in pieces(entry)[dist.get_rank(group_of(p))]:
            piece.of_held(entry.to_local()).copy_(piece.of(value.view(entry.dtype)))
        return entry
    if key == REST and not is_sharded(p):  # it may come from where the parameter was sharded
        return value.view(REST_DTYPES[p.dtype])
    return value


def by_rows(of_rows: Callable[[Tensor], Tensor], x: Tensor, *, transposed: bool) -> Tensor:
    """What this process holds of `of_rows(x)`, rows becoming others of their length, or columns where `transposed`.

    A collective, where a DTensor's rows are cut.
    """

    def of(whole: Tensor) -> Tensor:
        return of_rows(whole.mT).mT if transposed else of_rows(whole)

    dim = x.ndim - (2 if transposed else 1)
    if not is_sharded(x) or all(cut.is_replicate() or cut.dim != dim for cut in x.placements):
        return of(local(x))
    everything, held = of(whole(x)), torch.empty_like(local(x))
    for piece in pieces(x)[dist.get_rank(group_of(x))]:
        piece.of_held(held).copy_(piece.of(everything))
    return held


# -- what processes tell each other -----------------------------------------------------------------------------------


def several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def of_first(value: list) -> list:
    """What the first of all processes has in the place of `value`: a collective, where there are several."""
    if value and several():
        dist.broadcast_object_list(value := list(value), src=0)
    return value


def summed(x: Tensor) -> Tensor:
    """The sum of what all processes have in the place of `x`: a collective, where there are several."""
    if several():
        dist.all_reduce(x := x.clone())
    return x


def fingerprints_of(params: list[Tensor]) -> Tensor:
    """The fingerprints of all of each parameter, `(len(params),)`: a collective, where some are sharded."""
    return _over_shards(fingerprints([_parts(p) for p in params]), params, "SUM")


def _parts(p: Tensor) -> list[Part]:
    """What this process holds, if no process before it holds the same."""
    if not is_sharded(p):
        return [Part(p, tuple(p.shape))]
    held, rank, mine = pieces(p), dist.get_rank(group_of(p)), p.to_local()
    if held.index(held[rank]) < rank or not mine.numel():
        return [Part(mine.new_empty(0), tuple(p.shape))]
    return [Part(piece.of_held(mine), tuple(p.shape), piece.start) for piece in held[rank]]


def largest(values: Tensor, params: list[Tensor]) -> Tensor:
    """`values`, one of each parameter, the largest of all processes that share it: a collective, as above."""
    return _over_shards(values, params, "MAX")


def _over_shards(values: Tensor, params: list[Tensor], op: str) -> Tensor:
    """`values` of what processes hold of these parameters, reduced to those of the whole."""
    meshes: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        if is_sharded(p):
            meshes.setdefault(p.device_mesh, []).append(i)
    for own in meshes.values():
        dist.all_reduce(of_mesh := values[own], getattr(dist.ReduceOp, op), group=group_of(params[own[0]]))
        values[own] = of_mesh
    return values


def agree(yes: Tensor, params: list[Tensor], *, shared: bool) -> list[bool]:
    """To which questions all processes that update these parameters together say yes; alone, the answers `yes`, `(k,)`.

    It waits for the device once. shared: they divide the work without sharding.

    Raises:
        ValueError: a parameter has a gradient on some of them only.
    """
    sharded = max((p for p in params if is_sharded(p)), key=lambda p: p.device_mesh.size(), default=None)
    if sharded is None and not shared:
        return [True] * len(yes) if yes.all().item() else yes.tolist()
    pattern = zlib.crc32(bytes(p.grad is not None for p in params))
    answers = torch.cat((yes.long(), torch.tensor([pattern, -pattern], device=yes.device)))
    dist.all_reduce(answers, dist.ReduceOp.MIN, group=None if sharded is None else group_of(sharded))
    *everyone, least, most = answers.tolist()
    if least != -most:
        raise ValueError(
            "parameters have a gradient on some processes and none on others: a matrix that only some use in a step (a "
            "branch that depends on the data) cannot be updated by all. Use it on every process, or freeze it."
        )
    return [bool(answer) for answer in everyone]
