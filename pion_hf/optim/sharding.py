"""Matrices of several processes: the only room that knows DTensors and process groups.

Under FSDP2 every process holds some rows of each parameter, of its gradient and of its state, but the update of a
matrix needs the whole of it. The matrices are divided among the processes by the work they are. In rounds of bounded
size, each process gathers those it owns, updates them as a single process would, and gives every other its rows back:
two collectives a round, and no process ever holds more than a round's matrices.

Under DDP every process holds everything. There the processes can share the work instead of each doing all of it, and
spread what they have updated: one collective a round.
"""

from __future__ import annotations

import functools
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pion_hf.optim import blocks
from pion_hf.optim.batches import REST, Batch, Block, Plan, Unit, batches_of
from pion_hf.optim.fingerprints import FINGERPRINT, Part, fingerprints
from pion_hf.optim.precision import REST_DTYPES

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Shard

# Elements of the matrices that one process updates in a round: bounds the memory of a step, which is about three times
# as many weights, gradients and entries of state. A larger matrix is a round of its own.
ROUND_ELEMENTS = 2**24

# Collectives carry no 16-bit integers (neither gloo nor NCCL), and checkpoints gather state by collectives: what a
# bfloat16 weight drops of its master is kept as the bfloat16 number of the same bits.
CARRIED = {torch.int16: torch.bfloat16}

ALIGNMENT = 16  # bytes, of every tensor in a buffer


# -- what a process holds ---------------------------------------------------------------------------------------------


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


def check(name: str, p: Tensor) -> None:
    """Raises ValueError for a DTensor that is not of FSDP2: cut into chunks along one dimension of the mesh."""
    if not is_sharded(p):
        return
    from torch.distributed.tensor import Shard

    mesh, cut = p.device_mesh, [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    names = [str((mesh.mesh_dim_names or {}) and mesh.mesh_dim_names[i]) for i in cut]
    way_out = "use FSDP2 (fully_shard) on a mesh of one dimension, or of two (HSDP), or DDP."
    if len(cut) != 1 or type(p.placements[cut[0]]) is not Shard or "tp" in names:
        placements = ", ".join(map(str, p.placements))
        raise ValueError(
            f"{name} is a DTensor with the placements ({placements}), as tensor parallelism makes them, which is not "
            f"supported: {way_out}"
        )
    if p.device.type not in ("meta", mesh.device_type):
        raise ValueError(
            f"{name} is offloaded to the {p.device.type.upper()} by FSDP2, where updating whole matrices would stop "
            f"the {mesh.device_type} at every step: set fsdp_offload_params: false (without a policy: "
            "offload_policy=OffloadPolicy())."
        )


def zeros(form: Tensor, p: Tensor) -> Tensor:
    """An entry of a parameter's state, of the shape and dtype of `form`.

    Sharded as the parameter, or, if it has another shape, along its own longest dimension.
    """
    if not is_sharded(p):
        return torch.zeros(form.shape, dtype=form.dtype, device=p.device)
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor import zeros as sharded_zeros

    dim = _cut(p).dim if form.shape == p.shape else max(range(form.ndim), key=lambda d: form.shape[d])
    placements = [Shard(dim) if placement.is_shard() else placement for placement in p.placements]
    dtype = CARRIED.get(form.dtype, form.dtype)
    return sharded_zeros(form.shape, dtype=dtype, device_mesh=p.device_mesh, placements=placements)


def placed(value: Tensor, p: Tensor, key: str) -> Tensor:
    """`value`, the entry `key` of a parameter's state as every process holds it, as the parameter's own are held."""
    if is_sharded(p) and not is_sharded(value) and value.ndim:
        entry = zeros(value, p)
        rank, ranks = dist.get_rank(_group(p)), dist.get_world_size(_group(p))
        entry.to_local().copy_(_pieces(value.view(entry.dtype), entry, ranks)[rank])
        return entry
    if key == REST and not is_sharded(p):  # it may come from where the parameter was sharded
        return value.view(REST_DTYPES[p.dtype])
    return value


def of_first(value: list) -> list:
    """What the first of all processes has in the place of `value`: a collective, where there are several."""
    if value and _several():
        dist.broadcast_object_list(value := list(value), src=0)
    return value


def summed(x: Tensor) -> Tensor:
    """The sum of what all processes have in the place of `x`: a collective, where there are several."""
    if _several():
        dist.all_reduce(x := x.clone())
    return x


def fingerprints_of(params: list[Tensor]) -> Tensor:
    """The fingerprints of all of each parameter, `(len(params),)`: a collective, where some are sharded."""
    return _over_shards(fingerprints([_part(p) for p in params]), params, "SUM")


def _part(p: Tensor) -> Part:
    if not is_sharded(p):
        return Part(p, tuple(p.shape))
    dim, rank, ranks = _cut(p).dim, dist.get_rank(_group(p)), dist.get_world_size(_group(p))
    return Part(p.to_local(), tuple(p.shape), dim, sum(chunks(p.shape[dim], ranks)[:rank]))


def largest(values: Tensor, params: list[Tensor]) -> Tensor:
    """`values`, one of each parameter, the largest of all processes that share it: a collective, as above."""
    return _over_shards(values, params, "MAX")


def _over_shards(values: Tensor, params: list[Tensor], op: str) -> Tensor:
    """`values` of what processes hold of these parameters, reduced to those of the whole."""
    for group in dict.fromkeys(_group(p) for p in params if is_sharded(p)):
        own = [i for i, p in enumerate(params) if is_sharded(p) and _group(p) == group]
        dist.all_reduce(of_group := values[own], getattr(dist.ReduceOp, op), group=group)
        values[own] = of_group
    return values


def agree(yes: Tensor, params: list[Tensor], *, shared: bool) -> list[bool]:
    """To which questions all processes that update these parameters together say yes; alone, the answers `yes`, `(k,)`.

    It waits for the device once. shared: they share the work without sharding.

    Raises:
        ValueError: a parameter has a gradient on some of them only.
    """
    sharded = next((p for p in params if is_sharded(p)), None)
    if sharded is None and not (shared and _several()):
        return [True] * len(yes) if yes.all().item() else yes.tolist()
    pattern = zlib.crc32(bytes(p.grad is not None for p in params))
    answers = torch.cat((yes.long(), torch.tensor([pattern, -pattern], device=yes.device)))
    dist.all_reduce(answers, dist.ReduceOp.MIN, group=None if sharded is None else _group(sharded))
    *everyone, least, most = answers.tolist()
    if least != -most:
        raise ValueError(
            "parameters have a gradient on some processes and none on others: a matrix that only some use in a step (a "
            "branch that depends on the data) cannot be updated by all. Use it on every process, or freeze it."
        )
    return [bool(answer) for answer in everyone]


def _cut(p: DTensor) -> Shard:
    return next(placement for placement in p.placements if placement.is_shard())


def _group(p: DTensor) -> dist.ProcessGroup:
    """The processes among which `p` is cut."""
    return p.device_mesh.get_group(next(i for i, placement in enumerate(p.placements) if placement.is_shard()))


def _forms(x: DTensor, ranks: int) -> list[Form]:
    """What each of so many processes holds of `x`."""
    dim = _cut(x).dim
    return [Form((*x.shape[:dim], n, *x.shape[dim + 1 :]), x.dtype) for n in chunks(x.shape[dim], ranks)]


def _pieces(whole: Tensor, x: DTensor, ranks: int) -> tuple[Tensor, ...]:
    """Views of what each of so many processes holds, in the whole of `x`."""
    dim = _cut(x).dim
    return whole.split(chunks(x.shape[dim], ranks), dim)


@functools.cache
def chunks(size: int, parts: int) -> tuple[int, ...]:
    """Lengths as `torch.chunk` and FSDP2 cut: equal ones, then what is left, then nothing."""
    each = math.ceil(size / parts)
    return tuple(max(0, min(each, size - i * each)) for i in range(parts))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# -- who updates what -------------------------------------------------------------------------------------------------


class Parcel(NamedTuple):
    """Parameters that one process updates: a single one, or those that share a stack. Their matrices as units, each
    with a number (see `batches_of`)."""

    params: list[Tensor]
    units: list[tuple[Unit, int]]


def parcels_of(units: Iterable[tuple[Unit, int]]) -> list[Parcel]:
    """The smallest parcels that cut no unit and no parameter apart."""
    of_param: dict[Tensor, Parcel] = {}
    for unit, label in units:
        params = list(dict.fromkeys(block.param for block in unit))
        met = list({id(of_param[p]): of_param[p] for p in params if p in of_param}.values())
        merged = Parcel([p for m in met for p in m.params], [u for m in met for u in m.units])
        merged.params.extend(p for p in params if p not in of_param)
        merged.units.append((unit, label))
        of_param.update(dict.fromkeys(merged.params, merged))
    return list({id(parcel): parcel for parcel in of_param.values()}.values())


def rounds_of(parcels: list[Parcel], processes: int) -> list[list[list[Parcel]]]:
    """By round and process, what it updates. Every process finds the same.

    The costliest parcel goes first, each to the process with the least work so far, so that all have about the same
    and those of one round are of similar size. In a round, a process has at most `ROUND_ELEMENTS`, but one parcel.
    """
    work, queues = [0] * processes, [[[]] for _ in range(processes)]
    sizes = [[0] for _ in range(processes)]
    for parcel in sorted(parcels, key=_cost, reverse=True):
        rank = work.index(min(work))
        work[rank] += _cost(parcel)
        size = sum(p.numel() for p in parcel.params)
        if queues[rank][-1] and sizes[rank][-1] + size > ROUND_ELEMENTS:
            queues[rank].append([])
            sizes[rank].append(0)
        queues[rank][-1].append(parcel)
        sizes[rank][-1] += size
    count = max(map(len, queues)) if parcels else 0
    return [[queue[i] if i < len(queue) else [] for queue in queues] for i in range(count)]


def _cost(parcel: Parcel) -> int:
    """Of products of a matrix with its own Gram matrix, which every rule consists of."""
    total = 0
    for unit, _ in parcel.units:
        count, heads, rows, n = unit[0].view.shape
        m, wide = heads * rows, n * len(unit)
        total += count * m * wide * min(m, wide)
    return total


# -- how it is moved --------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A tensor to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.shape) * self.dtype.itemsize / ALIGNMENT) * ALIGNMENT


def pack(tensors: Sequence[Tensor], buffer: Tensor) -> None:
    """Write tensors into a buffer of bytes, one after the other."""
    # Not `reshape(-1)`: a single number, of any stride, would keep that.
    raw = [x.contiguous().as_strided((x.numel(),), (1,)).view(torch.uint8) for x in tensors]
    copy(unpack(buffer, [Form(x.shape, x.dtype) for x in raw]), raw)


def unpack(buffer: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """Views of the tensors in a buffer."""
    found, start = [], 0
    for form in forms:
        size = math.prod(form.shape) * form.dtype.itemsize
        found.append(buffer[start : start + size].view(form.dtype).view(form.shape))
        start += form.bytes
    return found


def copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """In one call, which on a GPU is one kernel for many small tensors."""
    if targets:
        torch._foreach_copy_(targets, sources)


def exchange(
    outgoing: list[Sequence[Tensor]], incoming: list[Sequence[Form]], *, device: torch.device, group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """By process, what it sends to this one (`incoming` says what) while this one sends it `outgoing`: a collective."""
    sent = [sum(Form(x.shape, x.dtype).bytes for x in tensors) for tensors in outgoing]
    received = [sum(form.bytes for form in forms) for forms in incoming]
    out = torch.empty(sum(sent), dtype=torch.uint8, device=device)
    for tensors, part in zip(outgoing, out.split(sent), strict=True):
        pack(tensors, part)
    into = torch.empty(sum(received), dtype=torch.uint8, device=device)
    dist.all_to_all_single(into, out, received, sent, group=group)
    return [unpack(part, forms) for part, forms in zip(into.split(received), incoming, strict=True)]


def spread(
    mine: list[Tensor], others: list[list[Form]], *, device: torch.device, group: dist.ProcessGroup | None
) -> list[list[Tensor]]:
    """By process, what it has (`others` says what, this one included) when all give theirs to all: a collective."""
    size = max(sum(form.bytes for form in forms) for forms in others)
    out = torch.empty(size, dtype=torch.uint8, device=device)
    pack(mine, out)
    into = torch.empty(size * len(others), dtype=torch.uint8, device=device)
    dist.all_gather_single(into, out, group=group)
    return [unpack(part, forms) for part, forms in zip(into.split(size), others, strict=True)]


# -- the plans --------------------------------------------------------------------------------------------------------


def plan_class(params: list[Tensor], *, share_work: bool) -> type[Plan]:
    """How the matrices of a group are updated: by this process alone, or together with others.

    Raises:
        ValueError: only some of the parameters are sharded, or they are on several meshes.
    """
    meshes = {p.device_mesh if is_sharded(p) else None for p in params}
    if len(meshes) > 1:
        raise ValueError(
            "the matrices of one group are sharded in different ways: shard all of them on one mesh (fully_shard of "
            "the whole model), or give those that are not sharded, or on another mesh, a group of their own."
        )
    if meshes != {None}:
        return ShardedPlan
    return SharedPlan if share_work and _several() else Plan


class _PlanOfSeveral(Plan):
    """As `Plan`, of processes that divide the matrices among themselves.

    forms: of a parameter, the entries of its state after a step, as tensors whose memory is not asked for. group: the
    processes; None for all.
    """

    def __init__(
        self,
        stacks: Iterable[list[Block]],
        layout: blocks.Layout,
        params: list[Tensor],
        elements: int | None,
        forms: Callable[[Tensor], dict[str, Tensor]],
        group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__(stacks, layout, params, elements)
        self._forms, self._process_group, self._device = forms, group, local(params[0]).device
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)

    def _arrange(self, units: list[tuple[Unit, int]], state: dict) -> None:
        self._rounds = rounds_of(parcels_of(units), self._ranks)


class ShardedPlan(_PlanOfSeveral):
    """As `Plan`, of parameters that are sharded (FSDP2)."""

    def __init__(
        self, stacks: Iterable, layout: blocks.Layout, params: list[Tensor], elements: int | None, forms: Callable
    ) -> None:
        super().__init__(stacks, layout, params, elements, forms, _group(params[0]))

    def inspect(self, check: Callable[[str, Tensor], None], fresh: set[Tensor]) -> None:
        """`check(name, matrices)` of every matrix of fresh parameters, by its owner; what one raises, all raise.

        Raises:
            ValueError: as `check`.
        """
        error = None
        for owned in self._rounds:
            whole = self._gather(owned, lambda p: [p] if p in fresh else [])
            for unit, _ in (unit for parcel in owned[self._rank] for unit in parcel.units):
                for block in unit:
                    if block.param in fresh and error is None:
                        view = blocks.split(*whole[block.param], self._layout)[block.index]
                        try:
                            check(block.name, blocks.merge_rows(view))
                        except ValueError as raised:
                            error = str(raised)
        errors = [None] * self._ranks
        dist.all_gather_object(errors, error, group=self._process_group)
        for message in filter(None, errors):
            raise ValueError(message)

    def rounds(self, state: dict) -> Iterator[tuple[list[Batch], dict]]:
        """Whole copies of the matrices that this process owns; what they have become goes back to all."""
        for owned in self._rounds:
            before = {p: _entries(state[p]) for parcels in owned for parcel in parcels for p in parcel.params}
            kept = {p: [state[p][key] for key in before[p]] for p in before}
            gathered = self._gather(owned, lambda p, kept=kept: [p, p.grad, *kept[p]])
            whole, of_whole = {}, {}
            for p, (weight, grad, *entries) in gathered.items():
                weight.grad = grad
                whole[p] = weight
                of_whole[weight] = {"step": state[p]["step"], **dict(zip(before[p], entries, strict=True))}
                if REST in before[p]:
                    of_whole[weight][REST] = of_whole[weight][REST].view(REST_DTYPES[p.dtype])
            units = [
                (self._of_whole(unit, whole), label) for parcel in owned[self._rank] for unit, label in parcel.units
            ]
            yield batches_of(units, self._layout, self._elements), of_whole
            after = {p: [weight, *_updated(of_whole[weight], self._forms(p))] for p, weight in whole.items()}
            self._scatter(owned, after, state)

    def _of_whole(self, unit: Unit, whole: dict[Tensor, Tensor]) -> Unit:
        return tuple(
            Block(whole[b.param], b.name, b.index, blocks.split(whole[b.param], self._layout)[b.index]) for b in unit
        )

    def _gather(self, owned: list[list[Parcel]], of: Callable[[Tensor], list[DTensor]]) -> dict[Tensor, list[Tensor]]:
        """By parameter that this process owns, the whole of what `of` it is sharded."""
        wanted = [[x for parcel in parcels for p in parcel.params for x in of(p)] for parcels in owned]
        mine = wanted[self._rank]
        forms = list(zip(*(_forms(x, self._ranks) for x in mine), strict=True)) or [()] * self._ranks
        received = self._exchange([[x.to_local() for x in theirs] for theirs in wanted], forms)
        found = [torch.empty(x.shape, dtype=x.dtype, device=self._device) for x in mine]
        by_rank = zip(*(_pieces(whole, x, self._ranks) for whole, x in zip(found, mine, strict=True)), strict=True)
        for pieces, theirs in zip(by_rank, received, strict=False):  # there are none if this process owns nothing
            copy(list(pieces), theirs)
        rest = iter(found)
        return {p: [next(rest) for _ in of(p)] for parcel in owned[self._rank] for p in parcel.params}

    def _scatter(self, owned: list[list[Parcel]], after: dict[Tensor, list[Tensor]], state: dict) -> None:
        """The inverse of `_gather`, of weights and state."""
        targets = []
        for params in ([p for parcel in parcels for p in parcel.params] for parcels in owned):
            for p in params:
                state[p].update({k: zeros(form, p) for k, form in self._forms(p).items() if k not in state[p]})
            targets.append([x for p in params for x in (p, *(state[p][key] for key in sorted(self._forms(p))))])
        updated = [x for parcel in owned[self._rank] for p in parcel.params for x in after[p]]
        pieces = (_pieces(whole, x, self._ranks) for whole, x in zip(updated, targets[self._rank], strict=True))
        outgoing = list(zip(*pieces, strict=True)) or [()] * self._ranks
        forms = [[_forms(x, self._ranks)[self._rank] for x in theirs] for theirs in targets]
        for theirs, received in zip(targets, self._exchange(outgoing, forms), strict=True):
            copy([x.to_local() for x in theirs], received)

    def _exchange(self, outgoing: list[Sequence[Tensor]], incoming: list[Sequence[Form]]) -> list[list[Tensor]]:
        return exchange(outgoing, incoming, device=self._device, group=self._process_group)


class SharedPlan(_PlanOfSeveral):
    """As `Plan`, of parameters that every process holds, with equal gradients (DDP): each updates its share."""

    def __init__(
        self, stacks: Iterable, layout: blocks.Layout, params: list[Tensor], elements: int | None, forms: Callable
    ) -> None:
        super().__init__(stacks, layout, params, elements, forms, None)

    def _arrange(self, units: list[tuple[Unit, int]], state: dict) -> None:
        super()._arrange(units, state)
        mine = [[unit for parcel in owned[self._rank] for unit in parcel.units] for owned in self._rounds]
        self._of_rounds = self._known([batches_of(own, self._layout, self._elements) for own in mine], state)

    def rounds(self, state: dict) -> Iterator[tuple[list[Batch], dict]]:
        """This process's share; what each has updated goes to all."""
        for owned, batches in zip(self._rounds, self._of_rounds, strict=True):
            yield batches, state
            params = [[p for parcel in parcels for p in parcel.params] for parcels in owned]
            forms = [
                [Form(x.shape, x.dtype) for p in theirs for x in (p, *(f for _, f in sorted(self._forms(p).items())))]
                for theirs in params
            ]
            mine = [x for p in params[self._rank] for x in (p, *_updated(state[p], self._forms(p)))]
            for rank, tensors in enumerate(spread(mine, forms, device=self._device, group=None)):
                if rank != self._rank:
                    self._take(params[rank], iter(tensors), state)

    def _take(self, params: list[Tensor], tensors: Iterator[Tensor], state: dict) -> None:
        for p in params:
            p.copy_(next(tensors))
            for key in sorted(self._forms(p)):
                value = next(tensors)
                if key in state[p]:
                    state[p][key].copy_(value)
                else:
                    state[p][key] = value.clone()


def _entries(state: dict) -> list[str]:
    """The names of a parameter's tensors, in the order in which they are sent."""
    return sorted(key for key, value in state.items() if isinstance(value, Tensor) and key != FINGERPRINT)


def _updated(state: dict, forms: dict[str, Tensor]) -> list[Tensor]:
    """What a rule has left of a parameter's state, in the order in which it is sent."""
    if _entries(state) != sorted(forms):
        raise RuntimeError(
            f"the state of a matrix holds {', '.join(_entries(state))} and not {', '.join(sorted(forms))}: an option "
            "that decides what it holds was changed during training, which processes that share matrices cannot do."
        )
    return [state[key] for key in sorted(forms)]
