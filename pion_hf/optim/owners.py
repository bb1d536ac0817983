"""Which process updates which matrices, and how gradients come to it and new weights go.

A matrix has one owner, which keeps its state and, of sharded ones, the whole weight: for a step the gradient comes, and
the new weight goes. What the owner holds is updated as a single process would. The matrices of a step come in rounds;
while one is computed, the gradients of the next come and the weights of the last go.

Under DDP every process has every gradient. There the weights alone are sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pion_hf.optim import blocks, exchange, sharding
from pion_hf.optim.batches import Batch, Block, Plan, Unit, batches_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# So many rounds at least, where there are as many matrices: what comes and goes hides behind what is computed. The
# elements of the matrices that one process updates in a round are bounded too, as two rounds of gradients and two of
# weights are in memory at once.
ROUNDS = 4

# Under DDP, products of a step per weight (the shorter side of a matrix, on average) from which the work is divided. A
# step of Pion is some ten such products; at 100 TFLOP/s and 50 GB/s two bytes of a weight take as long as 200 of them.
WORTHWHILE = 200


# -- who owns what ----------------------------------------------------------------------------------------------------


class Parcel(NamedTuple):
    """Parameters that one process updates: a single one, or those that share a stack; what they cost and hold."""

    params: list[Tensor]
    products: int
    bytes: int


def parcels_of(stacks: Iterable[Sequence[Block]], bytes_of: Callable[[Tensor], int]) -> list[Parcel]:
    """The smallest parcels that cut no stack and no parameter apart. bytes_of: what is held of a parameter."""
    found: dict[Tensor, Parcel] = {}
    for stack in stacks:
        params = list(dict.fromkeys(block.param for block in stack))
        met = list({id(found[p]): found[p] for p in params if p in found}.values())
        new = [p for p in params if p not in found]
        merged = Parcel(
            [*(p for parcel in met for p in parcel.params), *new],
            sum(parcel.products for parcel in met) + products_of(stack),
            sum(parcel.bytes for parcel in met) + sum(map(bytes_of, new)),
        )
        found.update(dict.fromkeys(merged.params, merged))
    return list({id(parcel): parcel for parcel in found.values()}.values())


def products_of(unit: Sequence[Block]) -> int:
    """Of matrices with their own Gram matrix, side by side as they are in a stack: what every rule consists of."""
    count, heads, rows, n = unit[0].view.shape
    m, wide = heads * rows, n * len(unit)
    return count * m * wide * min(m, wide)


def pays(parcels: Sequence[Parcel]) -> bool:
    """Whether sending the weights of copies takes less time than updating them everywhere."""
    weights = sum(p.numel() for parcel in parcels for p in parcel.params)
    return sum(parcel.products for parcel in parcels) >= WORTHWHILE * weights


class Division:
    """Who owns which of the matrices that several processes hold together: shards of a mesh, or equal copies (DDP).

    Without an example of them it is of one process alone, which owns everything.
    """

    def __init__(self, like: Tensor | None = None) -> None:
        """like: one of the parameters."""
        self.copies = like is None or not sharding.is_sharded(like)
        self.group = None if self.copies else sharding.group_of(like)
        self.rank, self.ranks = (0, 1) if like is None else (dist.get_rank(self.group), dist.get_world_size(self.group))
        self.device = None if like is None else sharding.local(like).device
        self.owner: dict[Tensor, int] = {}
        self.loads = [(0, 0)] * self.ranks
        """Of every process: products of a step, and bytes that it keeps."""
        self.staying: dict[Tensor, None] = {}
        """Experts of which every process holds whole ones, and owns these."""
        self._homes: dict[Tensor, Tensor] = {}

    def owns(self, p: Tensor) -> bool:
        return self.owner.get(p, self.rank) == self.rank

    def home(self, p: Tensor) -> Tensor:
        """Where the owner of `p` updates it: in a tensor of its own, if that is sharded; experts where they are."""
        return p if self.copies else self._homes[p]

    def homes(self) -> list[Tensor]:
        """The whole weights that this process keeps beside its shards."""
        return [home for p, home in self._homes.items() if p not in self.staying]

    def assign(self, parcels: Iterable[Parcel]) -> None:
        """Give parcels that have no owner one, for good; every process finds the same.

        The largest first, each to the process that has least with it, of all products or of all bytes.
        """
        new = [parcel for parcel in parcels if parcel.params[0] not in self.owner]
        for parcel in new:
            if all(map(sharding.is_whole_experts, parcel.params)):
                self.staying.update(dict.fromkeys(parcel.params))
        new = [parcel for parcel in new if parcel.params[0] not in self.staying]
        all_work, all_held = map(sum, zip((1, 1), *self.loads, *(parcel[1:] for parcel in new), strict=True))

        def share(work: int, held: int) -> float:
            return max(work / all_work, held / all_held)

        for parcel in sorted(new, key=lambda p: share(p.products, p.bytes), reverse=True):
            after = [(work + parcel.products, held + parcel.bytes) for work, held in self.loads]
            rank = min(range(self.ranks), key=lambda r: share(*after[r]))
            self.loads[rank] = after[rank]
            self.owner.update(dict.fromkeys(parcel.params, rank))

    def whole_shape(self, p: Tensor, entry: Tensor) -> torch.Size:
        """That of an entry of state that this process has, for all processes."""
        return torch.Size((p.shape[0], *entry.shape[1:])) if p in self.staying else entry.shape

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` returns, by process; what it raises on one, all raise. A collective, where there are several.

        Raises:
            ValueError: as `work`.
        """
        if self.ranks == 1:
            return [work()]
        mine, said = None, [None] * self.ranks
        try:
            mine = (work(), None)
        except ValueError as error:
            mine = (None, str(error))
        dist.all_gather_object(said, mine, group=self.group)
        for _, error in said:
            if error is not None:
                raise ValueError(error)
        return [result for result, _ in said]

    def fetch(self, params: Iterable[Tensor]) -> None:
        """Bring the whole of these weights home, into the memory that they have there, if they were there before."""
        for some in exchange.in_rounds([] if self.copies else [(p, p.detach()) for p in params]):
            for (p, _), whole in zip(some, self.gather(some)(), strict=True):
                if whole is not None:
                    known = self._homes.setdefault(p, whole)
                    if known.dtype != whole.dtype:
                        self._homes[p] = whole
                    elif known.data_ptr() != whole.data_ptr():
                        known.copy_(whole)

    def gather(self, wanted: list[tuple[Tensor, DTensor]]) -> Callable[[], list[Tensor | None]]:
        """Begin to bring tensors to the owners of parameters; what is returned waits for those of this process."""
        outgoing, incoming = [[] for _ in range(self.ranks)], [[] for _ in range(self.ranks)]
        found = []
        for p, x in wanted:
            if p in self.staying:
                found.append(x.redistribute(placements=p.placements).to_local())
                continue
            owner, held, target = self.owner[p], sharding.pieces(x), None
            if owner == self.rank:
                target = torch.empty(x.shape, dtype=x.dtype, device=self.device)
            for source in sharding.nearest(x, owner):
                if source == self.rank:
                    outgoing[owner] += [piece.of_held(x.to_local()) for piece in held[source]]
                if target is not None:
                    incoming[source] += [piece.of(target) for piece in held[source]]
            found.append(target)
        finish = self._exchange(outgoing, incoming)

        def finished() -> list[Tensor | None]:
            finish()
            return found

        return finished

    def scatter(self, updated: list[tuple[Tensor, Tensor | None, DTensor]]) -> Callable[[], None]:
        """The inverse: from the owners of parameters, which have the whole, into what everyone holds."""
        outgoing, incoming = [[] for _ in range(self.ranks)], [[] for _ in range(self.ranks)]
        for p, whole, x in updated:
            if p in self.staying:
                if whole.data_ptr() != x.to_local().data_ptr():  # weights are updated where they are
                    x.to_local().copy_(whole)
                continue
            owner, held = self.owner[p], sharding.pieces(x)
            if whole is not None:
                for rank in range(self.ranks):
                    outgoing[rank] += [piece.of(whole) for piece in held[rank]]
            incoming[owner] += [piece.of_held(x.to_local()) for piece in held[self.rank]]
        return self._exchange(outgoing, incoming)

    def reshard(self, held: list[tuple[Tensor, Tensor | None, Tensor]]) -> list[DTensor]:
        """Entries of state as checkpoints have them. held: a parameter, at its owner the entry, and what it is like."""
        entries = [sharding.zeros(form, p) for p, _, form in held]
        wholes = [x if x is None else x.view(entry.dtype) for (_, x, _), entry in zip(held, entries, strict=True)]
        self.scatter([(p, x, entry) for (p, *_), x, entry in zip(held, wholes, entries, strict=True)])()
        return entries

    def collect(self, held: list[tuple[Tensor, Tensor | None, Tensor]], to: int | None) -> list[Tensor | None]:
        """The same of copies: whole entries, in the memory of the CPU, on `to`; None: on all."""
        outgoing, incoming = [[] for _ in range(self.ranks)], [[] for _ in range(self.ranks)]
        targets = range(self.ranks) if to is None else [to]
        found = []
        for p, x, form in held:
            if x is not None:
                for rank in targets:
                    outgoing[rank].append(x)
            if self.rank in targets:
                found.append(torch.empty_like(form, device=self.device))
                incoming[self.owner[p]].append(found[-1])
        self._exchange(outgoing, incoming)()
        return [x.cpu() for x in found] if self.rank in targets else [None] * len(held)

    def spread(self, params: list[Tensor]) -> Callable[[], None]:
        """Begin to give everyone what the owners of parameters that all hold have made of them."""
        owned = [[p for p in params if self.owner[p] == rank] for rank in range(self.ranks)]
        return exchange.spread(owned, device=self.device, group=self.group)

    def _exchange(self, outgoing: list[list[Tensor]], incoming: list[list[Tensor]]) -> Callable[[], None]:
        return exchange.exchange(outgoing, incoming, device=self.device, group=self.group)


ALONE = Division()


# -- the plan ---------------------------------------------------------------------------------------------------------


class DividedPlan(Plan):
    """As `Plan`, of matrices that several processes have divided: this one's are updated here, the others' come."""

    def __init__(
        self,
        stacks: list[list[Block]],
        layout: blocks.Layout,
        params: list[Tensor],
        elements: int | None,
        division: Division,
    ) -> None:
        self._division = division
        own = [[self._at_home(b, layout) for b in stack] for stack in stacks if division.owns(stack[0].param)]
        super().__init__(own, layout, params, elements)
        self._parcels = [parcel.params for parcel in parcels_of(stacks, lambda p: 0)]

    def _at_home(self, block: Block, layout: blocks.Layout) -> Block:
        home = self._division.home(block.param)
        return block._replace(home=home, view=blocks.split(home, layout)[block.index])

    def _arrange(self, units: list[tuple[Unit, int]], state: dict) -> None:
        self._rounds = rounds_of(self._parcels, self.params, self._division)
        place = {p: i for i, params in enumerate(self._rounds) for p in params}
        mine: list[list[tuple[Unit, int]]] = [[] for _ in self._rounds]
        for unit, label in units:
            mine[place[unit[0].param]].append((unit, label))
        self._batches = self._known([batches_of(own, self._layout, self._elements) for own in mine], state)

    def rounds(self, state: dict) -> Iterator[tuple[list[Batch], dict]]:
        going: list[Callable[[], None]] = []
        coming = self._gradients(0)
        for i, batches in enumerate(self._batches):
            homes = coming()
            coming = self._gradients(i + 1)
            yield batches, state
            for home in homes:
                home.grad = None
            going.append(self._weights(i))
            if len(going) > 1:
                going.pop(0)()
        for finish in going:
            finish()

    def _gradients(self, index: int) -> Callable[[], list[Tensor]]:
        """Begin to bring those of a round; what is returned waits for them and puts them where weights are updated."""
        if self._division.copies or index == len(self._rounds):
            return list
        params = self._rounds[index]
        finish = self._division.gather([(p, _as_placed(p.grad, p)) for p in params])

        def arrived() -> list[Tensor]:
            homes = []
            for p, grad in zip(params, finish(), strict=True):
                if grad is not None:
                    homes.append(self._division.home(p))
                    homes[-1].grad = grad
            return homes

        return arrived

    def _weights(self, index: int) -> Callable[[], None]:
        """Begin to give everyone those of a round."""
        division, params = self._division, self._rounds[index]
        if division.copies:
            return division.spread(params)
        return division.scatter([(p, division.home(p) if division.owns(p) else None, p.detach()) for p in params])


def rounds_of(parcels: list[list[Tensor]], params: list[Tensor], division: Division) -> list[list[Tensor]]:
    """Those of `params` that are updated one after the other, by round; of a parcel all in one."""
    wanted = {id(p) for p in params}
    due = [own for own in ([p for p in parcel if id(p) in wanted] for parcel in parcels) if own]
    staying, due = [[own for own in due if (own[0] in division.staying) is stay] for stay in (True, False)]
    sizes = [[sum(p.numel() for p in own) for own in due if division.owner[own[0]] == r] for r in range(division.ranks)]
    most = min(exchange.ROUND_ELEMENTS, math.ceil(max(map(sum, sizes), default=0) / ROUNDS))
    found: list[list[Tensor]] = []
    at, held = [0] * division.ranks, [0] * division.ranks
    for own in due:
        rank, size = division.owner[own[0]], sum(p.numel() for p in own)
        if held[rank] and held[rank] + size > most:
            at[rank], held[rank] = at[rank] + 1, 0
        held[rank] += size
        found += [[] for _ in range(at[rank] + 1 - len(found))]
        found[at[rank]] += own
    found = found or [[] for _ in staying[:1]]
    for i, own in enumerate(staying):
        found[i % len(found)] += own
    return found


def _as_placed(grad: DTensor, p: DTensor) -> DTensor:
    """A gradient where its parameter is: that of a replicated one may be a sum that nobody has formed yet."""
    return grad if grad.placements == p.placements else grad.redistribute(placements=p.placements)


def mesh_of(params: list[Tensor]) -> Any:
    """That of the matrices of a group; None of such that are not sharded.

    Raises:
        ValueError: only some of the parameters are sharded, or they are on several meshes.
    """
    meshes = {p.device_mesh if sharding.is_sharded(p) else None for p in params}
    if len(meshes) > 1:
        raise ValueError(
            "the matrices of one group are sharded in different ways: shard all of them on one mesh (fully_shard of "
            "the whole model), or give those that are not sharded, or on another mesh, a group of their own."
        )
    return next(iter(meshes), None)
