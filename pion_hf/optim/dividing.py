"""The state of matrices that several processes have divided: at its owner in training, for all in checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pion_hf.optim import blocks, groups, sharding
from pion_hf.optim.batches import REST, Block, Plan, unshared
from pion_hf.optim.exchange import in_rounds
from pion_hf.optim.fingerprints import FINGERPRINT
from pion_hf.optim.masters import REST_DTYPES
from pion_hf.optim.owners import ALONE, DividedPlan, Division, mesh_of, parcels_of, pays


class DividedState:
    """Mixed into `MatrixOptimizer`: processes that hold matrices together divide them among themselves.

    Sharded ones (DTensors) always; copies with equal gradients, as DDP makes them, where `divides_work` says so before
    the first step, and a step costs more than what it sends (`owners.WORTHWHILE`).
    """

    divides_work = False
    """Whether other processes hold the same unsharded parameters with the same gradients, and divide the work.

    Then `state_dict` needs `consolidate_state_dict` before it, on all of them; a `PionTrainer` sees to both.
    """

    _plans: dict[int, Plan]
    """By the group's index."""
    _divisions: dict[Any, Division]
    """By the mesh of sharded parameters; None for those of which every process has a copy."""
    _consolidated: dict[Tensor, dict[str, Tensor]] | None
    """What the last `consolidate_state_dict` brought here, until the next step."""

    def _division_of(self, p: Tensor) -> Division:
        return self._divisions.get(p.device_mesh if sharding.is_sharded(p) else None, ALONE)

    def _is_divided(self) -> bool:
        """Whether processes divide copies."""
        return self.divides_work and sharding.several()

    # -- who updates what -----------------------------------------------------------------------------------------

    def _make_plans(self) -> None:
        """Which matrices are updated together, and by whom, where that is not known yet.

        Raises:
            ValueError: the matrices of a group are on several meshes.
        """
        stale = {}
        for index, group in enumerate(self.param_groups):
            known = self._plans.get(index)
            if group["rule"] not in self.elementwise_rules and not (known and known.fits(group["params"])):
                stale[index] = mesh_of(group["params"])
        stacks = {index: self._stacks(index) for index in stale}
        for mesh in dict.fromkeys(stale.values()):
            self._assign(mesh, {index: found for index, found in stacks.items() if stale[index] == mesh})
        for index, found in stacks.items():
            self._plans[index] = self._make_plan(self.param_groups[index], found, self._divisions.get(stale[index]))

    def _stacks(self, index: int) -> list[list[Block]]:
        """The matrices of a group, by what is updated as one: stacks, then all others alone."""
        group = self.param_groups[index]
        layout = blocks.Layout.parse(group["layout"])
        stacked = {name: i for i, names in enumerate(self.stacks_of(group)) for name in names}
        stacks: dict[int | str, list[Block]] = defaultdict(list)
        for name, p in groups.named_parameters(group):
            home = sharding.stand_in(p)
            views = blocks.split(home.detach(), layout)
            for i, view in enumerate(views):
                own = blocks.name_of(name, i, len(views))
                stacks[stacked.get(own, own)].append(Block(p, name, i, view, home))
        return list(stacks.values())

    def _assign(self, mesh: Any, stacks: dict[int, list[list[Block]]]) -> None:
        """Give the matrices of these groups, all on one mesh, owners; what has one keeps it."""
        if mesh is None and not self._is_divided():
            return
        parcels = []
        for index, found in stacks.items():
            held = {p: self._bytes_of(index, p) for p in self.param_groups[index]["params"]}
            parcels += parcels_of(found, held.__getitem__)
        division = self._divisions.get(mesh)
        if division is None:
            if mesh is None and not pays(parcels):
                return
            division = self._divisions[mesh] = Division(parcels[0].params[0])
        # Stacks that were named anew may have several owners.
        apart = [p for own in parcels if len({division.owner.get(p) for p in own.params}) > 1 for p in own.params]
        known = [p for p in apart if p in division.owner]
        for p, entries in self._for_all(division, known).items() if known else ():
            self.state[p].update({key: entry.to(p.device) for key, entry in entries.items()})
            del division.owner[p]
        division.assign(parcels)

    def _bytes_of(self, index: int, p: Tensor) -> int:
        """What an owner keeps of a parameter."""
        held = sum(form.numel() * form.element_size() for form in self._forms_of(index, p).values())
        return held + sharding.is_sharded(p) * p.numel() * p.element_size()

    def _make_plan(self, group: dict, stacks: list[list[Block]], division: Division | None) -> Plan:
        """How a group is updated, whose weights and state come to their owners for that."""
        params, layout, most = group["params"], blocks.Layout.parse(group["layout"]), group.get("batch_elements")
        for p in params:
            if p.grad is None and p in self.state:  # it may be in the memory of an older plan
                self.state[p] = unshared(self.state[p])
        if division is None:
            return Plan(stacks, layout, params, most)
        division.fetch(params)
        self._adopt(division, params)
        return DividedPlan(stacks, layout, params, most, division)

    def _adopt(self, division: Division, params: list[Tensor]) -> None:
        """Leave the state of these parameters, of which all have a part or a copy, to their owners."""
        held = [(p, key, value) for p in params for key, value in _entries(self.state.get(p, {}))]
        if division.copies:
            for p, key, _ in held:
                if not division.owns(p):
                    del self.state[p][key]
            return
        for some in in_rounds([entry for entry in held if sharding.is_sharded(entry[-1])]):
            wholes = division.gather([(p, value) for p, _, value in some])()
            for (p, key, _), whole in zip(some, wholes, strict=True):
                del self.state[p][key]
                if whole is not None:
                    bits = key == REST and whole.dtype in REST_DTYPES
                    self.state[p][key] = whole.view(REST_DTYPES[whole.dtype]) if bits else whole

    # -- for all, as checkpoints have it ----------------------------------------------------------------------------

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Bring together what processes that divide copies of the model (DDP) keep each alone: a collective.

        `state_dict` then holds all of it, on the process `to` (None: on all of them), until the next step. Without a
        division, and of sharded parameters, there is nothing to do.
        """
        division = self._divisions.get(None)
        if division is not None:
            found = self._for_all(division, [p for p in division.owner if p in self.state], to=to)
            self._consolidated = found if to in (None, division.rank) else None

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Of sharded parameters it is sharded too, and a collective.

        Raises:
            RuntimeError: other processes have some of it (see `consolidate_state_dict`).
        """
        held, self.state = self.state, self._whole_state()
        try:
            return super().state_dict()
        finally:
            self.state = held

    def _whole_state(self) -> dict[Tensor, dict[str, Any]]:
        params = [p for group in self.param_groups for p in group["params"] if p in self.state]
        found = defaultdict(dict, {p: self.state[p] for p in params} | self.state)  # in one order on all processes
        for division in self._divisions.values():
            params = [p for p in (*division.owner, *division.staying) if p in self.state]
            if division.copies and self._consolidated is None and params:
                raise RuntimeError(
                    "each process has the optimizer state of its own matrices only: all processes must call "
                    "consolidate_state_dict() before this one calls state_dict() (a PionTrainer does), or set "
                    "divides_work=False before the first step."
                )
            of_all = self._consolidated if division.copies else self._for_all(division, params)
            for p, entries in of_all.items() if params else ():
                others = {key: value for key, value in self.state[p].items() if key not in entries}
                if not self._describes(entries):  # but of the copy that an owner has
                    others.pop(FINGERPRINT, None)
                found[p] = {**others, **entries}
        return found

    def _for_all(
        self, division: Division, params: list[Tensor], *, to: int | None = None
    ) -> dict[Tensor, dict[str, Tensor]]:
        """The entries of these parameters' state for all processes: sharded, or of copies whole, on `to` if it says so.

        What is whole comes to the memory of the CPU: a device may have none for all of it.
        """
        mine = [
            {key: (division.whole_shape(p, x), x.dtype) for key, x in _entries(self.state[p])}
            if division.owns(p)
            else {}
            for p in params
        ]
        known = zip(*division.together(lambda: mine), strict=True)
        forms = [{key: form for own in of_p for key, form in own.items()} for of_p in known]
        wanted = [
            (p, key, torch.empty(shape, dtype=dtype, device="meta"))
            for p, of_p in zip(params, forms, strict=True)
            for key, (shape, dtype) in of_p.items()
        ]
        found: dict[Tensor, dict[str, Tensor]] = {p: {} for p in params}
        for some in in_rounds(wanted):
            held = [(p, self.state[p][key] if division.owns(p) else None, form) for p, key, form in some]
            arrived = division.collect(held, to) if division.copies else division.reshard(held)
            for (p, key, _), entry in zip(some, arrived, strict=True):
                found[p][key] = entry
        return found


def _entries(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Those that an owner alone keeps, in the order in which they are sent."""
    for key in sorted(state):
        if isinstance(state[key], Tensor) and key != FINGERPRINT:
            yield key, state[key]
