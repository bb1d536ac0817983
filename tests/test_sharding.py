"""Sharded matrices (FSDP2) and shared work: equal to one process that holds everything, to rounding."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pion_hf import Inputs, Pion, PionLora, RoutedAdamW, Teon, TeonLora
from pion_hf.linalg.sketch import sketch_of
from pion_hf.linalg.sketch import test_matrix as random_test_matrix
from pion_hf.optim import MatrixOptimizer, sharding
from pion_hf.optim.batches import Block
from pion_hf.optim.fingerprints import fingerprint
from tests.conftest import master
from tests.distributed_worker import launch

pytestmark = pytest.mark.filterwarnings("ignore:keep. no inputs of (experts|unused) were seen")

STEPS = 20
# Rows that four processes cannot share evenly, and some that are too few for all: 3 and 5 rows, two experts.
SHAPES = {
    "small": (3, 8),
    "wide": (5, 11),
    "tall": (13, 6),
    "stack_0": (9, 5),
    "stack_1": (9, 5),
    "stack_2": (9, 5),
    "fused_0": (12, 8),
    "fused_1": (12, 8),
    "conv": (8, 10),
    "experts": (2, 6, 5),
    "interleaved": (12, 7),
    "unused": (4, 6),
    "bias": (7,),
    "gain": (5,),
}
LONE = ["small", "wide", "tall", "unused"]
LAYOUTS = {"conv": "transposed", "experts": "", "interleaved": "interleaved=2,3"}
OTHERS = {"params": ["bias", "gain"], "rule": "adamw", "lr": 1e-2, "weight_decay": 0.1}


def net(dtype: torch.dtype = torch.float32) -> nn.ParameterDict:
    draw = torch.Generator().manual_seed(0)
    return nn.ParameterDict({n: torch.randn(shape, generator=draw).to(dtype) for n, shape in SHAPES.items()})


def pion(model: nn.Module, **options: Any) -> MatrixOptimizer:
    groups = [{"params": [*LONE, "stack_0", "stack_1", "stack_2"], "rule": "pion"}, OTHERS]
    groups += [{"params": ["fused_0", "fused_1"], "rule": "pion", "layout": "rows=5,4,3"}]
    groups += [{"params": [name], "rule": "pion", "layout": layout} for name, layout in LAYOUTS.items()]
    return Pion(with_tensors(groups, model), lr=1e-2, **options)


def teon(model: nn.Module, **options: Any) -> MatrixOptimizer:
    """Stacks over parameters that hold several matrices, and a matrix that no stack has room for."""
    fused = [["fused_0[0]", "fused_1[0]"], ["fused_0[2]", "fused_1[2]"]]
    groups = [
        {"params": ["stack_0", "stack_1", "stack_2"], "rule": "teon", "stacks": [["stack_0", "stack_2"]]},
        {"params": ["fused_0", "fused_1"], "rule": "teon", "layout": "rows=6,4,2", "stacks": fused},
        OTHERS,
    ]
    return Teon(with_tensors(groups, model), lr=1e-2, polar_dtype="float32", weight_decay=0.1, **options)


def muon(model: nn.Module, **options: Any) -> MatrixOptimizer:
    groups = [{"params": [*LONE, "stack_0"], "rule": "muon"}, OTHERS]
    groups += [{"params": [name], "rule": "muon", "layout": layout} for name, layout in LAYOUTS.items()]
    return Teon(with_tensors(groups, model), lr=1e-2, stack=1, polar_dtype="float32", **options)


def pion_lora(model: nn.Module, **options: Any) -> MatrixOptimizer:
    """`A`, which rotates, and `B`, which grows."""
    a = {"params": ["small", "wide"], "rule": "pion_lora", "method": "rotate", "unit_step": [1.0, 1.0]}
    b = {"params": ["tall", "stack_0"], "rule": "pion_lora", "layout": "transposed", "method": "orthogonal"}
    return PionLora(with_tensors([a, {**b, "unit_step": [0.5, 2.0]}, OTHERS], model), lr=3e-2, **options)


def teon_lora(model: nn.Module, **options: Any) -> MatrixOptimizer:
    own = {"rule": "teon_lora", "method": "orthogonal"}
    a = {"params": ["small", "wide"], "unit_step": [1.0, 0.3], "stacks": [], "stack": 1, **own}
    b = {"params": ["stack_0", "stack_1"], "unit_step": [0.5, 2.0], "layout": "transposed", **own}
    return TeonLora(with_tensors([a, {**b, "stacks": [["stack_0", "stack_1"]]}, OTHERS], model), lr=3e-2, **options)


def adamw_routed(model: nn.Module) -> MatrixOptimizer:
    own = {"rule": "adamw_routed", "lr": 1e-2}
    groups = [{"params": [*LONE, "stack_0"], **own}, {**OTHERS, "lr": 1e-3}]
    groups += [{"params": [name], "layout": layout, **own} for name, layout in LAYOUTS.items()]
    return RoutedAdamW(with_tensors(groups, model), weight_decay=0.1)


def watched(model: nn.Module) -> Inputs:
    """As if layers of these names had been called; experts and such as have no gradient at first are not seen.

    In double precision: the sum over three processes is rounded otherwise than one's, and low products make more of it.
    """
    inputs = Inputs(model, 2)
    for name in {*SHAPES} - {"unused", "experts", "bias", "gain"}:
        n = SHAPES[name][0 if LAYOUTS.get(name) == "transposed" else 1]
        rows = torch.randn(20, n, generator=torch.Generator().manual_seed(n)) * torch.arange(1, n + 1)
        sketch = sketch_of(rows.double(), random_test_matrix(n, 2, rows.device).double())
        inputs._sketches[name] = {rows.device: sketch}
    return inputs


def with_tensors(groups: list[dict], model: nn.Module) -> list[dict]:
    return [{**group, "params": [(name, model[name]) for name in group["params"]]} for group in groups]


BUILDERS: dict[str, Callable[..., MatrixOptimizer]] = {
    "pion": pion,
    "pion ambient": lambda model, **options: pion(model, preset="ambient", **options),
    "pion paper": lambda model, **options: pion(model, preset="paper", **options),
    "pion keep": lambda model, **options: pion(model, keep=1, inputs=watched(model), **options),
    "muon keep": lambda model, **options: muon(model, keep=2, inputs=watched(model), **options),
    "pion both sides, msign": lambda model, **options: pion(
        model, side="both", direction="msign", polar="svd", **options
    ),
    "teon": teon,
    "muon": muon,
    "pion_lora": pion_lora,
    "teon_lora": teon_lora,
    "adamw_routed": adamw_routed,
}
DTYPES = {"pion bfloat16": torch.bfloat16, "pion float16": torch.float16}
CASES = [*BUILDERS, *DTYPES]
SHARING = [case for case in CASES if case != "adamw_routed"]  # the rules that have work to share
FAST = ["pion", "pion ambient", "pion keep", "teon", "pion_lora"]


def start(case: str, *, mesh: Any = None, **options: Any) -> tuple[nn.ParameterDict, MatrixOptimizer]:
    """The model of a case and its optimizer; sharded over all processes, or as the mesh says."""
    model = net(DTYPES.get(case, torch.float32))
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model, BUILDERS.get(case, pion)(model, **options)


def step(model: nn.ParameterDict, optimizer: MatrixOptimizer, number: int, *, poison: float = 0.0) -> None:
    """A step with the gradients of that number; `unused` has none in some, and `poison` is added to an entry."""
    for index, (name, p) in enumerate(model.items()):
        draw = torch.Generator().manual_seed(1000 * number + index)
        grad = torch.randn(p.shape, generator=draw)
        if name == "tall":
            grad[-1, -1] += poison
        grad = grad.to(p.dtype)
        if isinstance(p, DTensor):
            grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = None if name == "unused" and number % 3 == 0 else grad
    optimizer.step()


@torch.no_grad()
def set_weights(model: nn.ParameterDict, weights: dict[str, Tensor]) -> None:
    for name, p in model.items():
        p.copy_(distribute_tensor(weights[name], p.device_mesh, p.placements, src_data_rank=None))


def masters(model: nn.ParameterDict, optimizer: MatrixOptimizer) -> dict[str, Tensor]:
    """The weights, of half precision those that they are the rounding of."""
    return {name: master(p, optimizer).clone() for name, p in model.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max().item()
        assert error < tolerance, f"{name} is off by {error:.1e}"


@functools.cache
def alone(case: str) -> dict[str, Tensor]:
    """What one process ends with."""
    model, optimizer = start(case)
    for number in range(STEPS):
        step(model, optimizer, number)
    return masters(model, optimizer)


# -- who updates what -------------------------------------------------------------------------------------------------


def unit(*params: Tensor) -> tuple[tuple[Block, ...], int]:
    return tuple(Block(p, str(id(p)), 0, p.unsqueeze(0).unsqueeze(0)) for p in params), 1


def test_parcels_cut_neither_stacks_nor_parameters():
    a, b, c, d, e = (torch.empty(4, 4) for _ in range(5))
    parcels = sharding.parcels_of([unit(a, b), unit(c), unit(d), unit(b, c), unit(d), unit(e)])
    found = [{id(p) for p in parcel.params} for parcel in parcels]
    assert sorted(map(len, found)) == [1, 1, 3]
    assert {id(a), id(b), id(c)} in found
    assert sorted(len(parcel.units) for parcel in parcels) == [1, 2, 3]


@pytest.mark.parametrize("processes", [1, 3, 8])
def test_work_is_divided_evenly_and_the_same_everywhere(processes):
    shapes = [(64, 64)] * 9 + [(64, 192), (192, 64)] * 7 + [(16, 64)] * 5
    parcels = [sharding.Parcel([p], [unit(p)]) for p in (torch.empty(shape) for shape in shapes)]
    (owned,) = sharding.rounds_of(parcels, processes)
    work = [sum(map(sharding._cost, own)) for own in owned]
    assert max(work) - min(work) <= max(map(sharding._cost, parcels))
    assert sorted(id(c) for own in owned for c in own) == sorted(map(id, parcels))
    again = sharding.rounds_of(parcels, processes)
    assert [[id(c) for c in own] for own in again[0]] == [[id(c) for c in own] for own in owned]


def test_rounds_bound_what_a_process_holds(monkeypatch):
    monkeypatch.setattr(sharding, "ROUND_ELEMENTS", 5000)
    parcels = [sharding.Parcel([p], [unit(p)]) for p in [torch.empty(40, 50) for _ in range(9)] + [torch.empty(90, 90)]]
    rounds = sharding.rounds_of(parcels, 2)
    for owned in rounds:
        assert len(owned) == 2
        assert all(sum(p.numel() for c in own for p in c.params) <= 5000 or len(own) == 1 for own in owned)
    assert sum(len(own) for owned in rounds for own in owned) == 10


def test_packed_tensors_come_out_again():
    tensors = [torch.randn(3, 5), torch.randn(0, 4), torch.randn(7).bfloat16(), torch.randn(4, 6).double().mT]
    tensors += [torch.randn(3, 1)[1:2], torch.randn(5, 3).mT[:1, :1]]  # one number, whose strides say nothing
    tensors += [torch.tensor([True, False, True]), torch.randint(-9, 9, (2, 3), dtype=torch.int16)]
    forms = [sharding.Form(tuple(x.shape), x.dtype) for x in tensors]
    buffer = torch.empty(sum(form.bytes for form in forms), dtype=torch.uint8)
    sharding.pack(tensors, buffer)
    for x, y in zip(tensors, sharding.unpack(buffer, forms), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


# -- sharded (FSDP2) --------------------------------------------------------------------------------------------------


def train_sharded(cases: list[str], *, replicas: int = 1, round_elements: int | None = None) -> dict[str, Any]:
    """In a process: every case to its end, and what is kept where."""
    shape = (dist.get_world_size(),) if replicas == 1 else (replicas, dist.get_world_size() // replicas)
    names = ("shard",) if replicas == 1 else ("replicate", "shard")
    mesh, found = init_device_mesh("cpu", shape, mesh_dim_names=names), {}
    sharding.ROUND_ELEMENTS = round_elements or sharding.ROUND_ELEMENTS
    for case in cases:
        model, optimizer = start(case, mesh=mesh)
        get_optimizer_state_dict(model, optimizer)  # takes a step with zero gradients, of which nothing may be left
        for number in range(STEPS):
            step(model, optimizer, number)
        layouts = []
        for p in model.values():
            for key, value in optimizer.state[p].items():
                if isinstance(value, Tensor) and value.ndim:
                    layouts.append((key, tuple(value.shape), isinstance(value, DTensor) and value.placements))
                    same = value.shape == p.shape
                    assert not same or value.to_local().shape == p.to_local().shape
        found[case] = masters(model, optimizer), layouts
    return found


def check_sharded(cases: list[str], results: list[dict], subtests: Any) -> None:
    for case in cases:
        with subtests.test(case):
            expected = alone(case)
            for result in results:
                weights, layouts = result[case]
                assert_equal(weights, expected)
                assert layouts
                assert all(placements and isinstance(placements[-1], Shard) for _, _, placements in layouts)


def test_two_processes_equal_one(subtests):
    check_sharded(FAST, launch(train_sharded, 2, FAST), subtests)


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_equal_one(processes, subtests, tried):
    check_sharded(CASES, launch(train_sharded, processes, CASES), subtests)
    tried(f"sharded over {processes}, 20 steps: weights of one process", len(CASES), "rules")


def in_small_rounds(cases: list[str]) -> dict[str, Any]:
    return train_sharded(cases, round_elements=60)


@pytest.mark.distributed
def test_many_rounds_equal_one(subtests, tried):
    check_sharded(CASES, launch(in_small_rounds, 2, CASES), subtests)
    tried("sharded over 2, a matrix at a time: weights of one process", len(CASES), "rules")


def in_replicas(cases: list[str]) -> dict[str, Any]:
    return train_sharded(cases, replicas=2)


@pytest.mark.distributed
def test_hybrid_sharding_equals_one_process(subtests, tried):
    check_sharded(CASES, launch(in_replicas, 4, CASES), subtests)
    tried("sharded over 2, twice (HSDP): weights of one process", len(CASES), "rules")


# -- what must not happen ---------------------------------------------------------------------------------------------


def refusals() -> dict[str, Any]:
    """In a process of four: what is said of what cannot be updated."""
    world, found = dist.get_world_size(), {}
    line = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))

    def said(name: str, action: Callable[[], Any]) -> None:
        try:
            found[name] = action()
        except ValueError as error:
            found[name] = str(error)

    def of(placements: list, mesh: Any) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(torch.randn(8, 8), mesh, placements))

    said("tp", lambda: Pion([("w", of([Shard(0), Shard(1)], grid))]))
    said("tp of replicas", lambda: Pion([("w", of([Replicate(), Shard(1)], grid))]))
    said("replicated", lambda: Pion([("w", of([Replicate()], line))]))
    mixed = [{"params": [("w", of([Shard(0)], line)), ("v", nn.Parameter(torch.randn(4, 4)))], "rule": "pion"}]
    optimizer = Pion(mixed, lr=1e-2)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    said("mixed", optimizer.step)

    model, optimizer = start("pion", mesh=line)
    with torch.no_grad():
        model["small"].to_local().zero_()
    said("zero", lambda: step(model, optimizer, 1))
    said("zero again", lambda: step(model, optimizer, 1))

    model, optimizer = start("pion", mesh=line)
    said("some", lambda: some_without(model, optimizer))
    return found


def some_without(model: nn.ParameterDict, optimizer: MatrixOptimizer) -> None:
    for name, p in model.items():
        p.grad = torch.zeros_like(p) if name != "tall" or dist.get_rank() else None
    optimizer.step()


def test_what_cannot_be_updated_is_refused_on_all_processes():
    for found in launch(refusals, 4):
        assert "w is a DTensor with the placements (S(0), S(1)), as tensor parallelism" in found["tp"]
        assert "placements (R, S(1)), as tensor parallelism makes them" in found["tp of replicas"]
        assert all("use FSDP2 (fully_shard)" in found[name] for name in ("tp", "tp of replicas", "replicated"))
        assert "shard all of them on one mesh" in found["mixed"]
        assert found["zero"] == found["zero again"]
        assert found["zero"].startswith("small is (or holds) a zero matrix")
        assert "have a gradient on some processes and none on others" in found["some"]


def skip_steps() -> dict[str, Any]:
    """In a process: not a number in one shard, of one process, at some steps."""
    model, optimizer = start("pion", mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for number in range(STEPS):
        step(model, optimizer, number)
        step(model, optimizer, 100, poison=float("nan") if number % 2 else float("inf"))
    return {"weights": masters(model, optimizer), "skipped": optimizer.skipped_steps}


def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_all(tried):
    expected = alone("pion")
    for found in launch(skip_steps, 2):
        assert found["skipped"] == STEPS
        assert_equal(found["weights"], expected)
    tried("NaN or Inf in one shard: skipped by all processes", STEPS, "steps")


def rewrite() -> dict[str, Any]:
    """In a process: weights that are written between steps."""
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    for case in ("pion", "pion bfloat16"):
        model, optimizer = start(case, mesh=mesh)
        for number in range(STEPS):
            if number == HALF_WAY:
                for p in model.values():
                    p.data.mul_(-0.5)
            step(model, optimizer, number)
        found[case] = masters(model, optimizer)
        for p in optimizer.param_groups[0]["params"]:
            if "fingerprint" in optimizer.state[p]:
                assert optimizer.state[p]["fingerprint"] == fingerprint(sharding.whole(p.detach()))
    return found


def test_processes_see_together_what_others_write():
    expected = {}
    for case in ("pion", "pion bfloat16"):
        model, optimizer = start(case)
        for number in range(STEPS):
            if number == HALF_WAY:
                for p in model.values():
                    p.data.mul_(-0.5)
            step(model, optimizer, number)
        expected[case] = masters(model, optimizer)
    for found in launch(rewrite, 2):
        for case, weights in expected.items():
            assert_equal(found[case], weights)


# -- checkpoints ------------------------------------------------------------------------------------------------------

HALF_WAY = STEPS // 2


def options_of(full: bool) -> StateDictOptions:
    return StateDictOptions(full_state_dict=full, cpu_offload=full, broadcast_from_rank0=full)


def save_half_way(folder: str, cases: list[str], full: bool) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for case in cases:
        model, optimizer = start(case, mesh=mesh)
        for number in range(HALF_WAY):
            step(model, optimizer, number)
        state = get_optimizer_state_dict(model, optimizer, options=options_of(full))
        weights = {name: sharding.whole(p.detach()) for name, p in model.items()}
        if full and dist.get_rank() == 0:
            torch.save(state, Path(folder, f"{case}.pt"))
        elif not full:
            dcp.save({"optimizer": state}, checkpoint_id=str(Path(folder, case)))
        if dist.get_rank() == 0:
            torch.save(weights, Path(folder, f"{case} weights.pt"))


def go_on(folder: str, cases: list[str], full: bool) -> dict[str, dict[str, Tensor]]:
    found, mesh = {}, init_device_mesh("cpu", (dist.get_world_size(),))
    for case in cases:
        model, optimizer = start(case, mesh=mesh)
        set_weights(model, torch.load(Path(folder, f"{case} weights.pt")))
        if full:
            state = torch.load(Path(folder, f"{case}.pt")) if dist.get_rank() == 0 else {}
        else:
            wanted = {"optimizer": get_optimizer_state_dict(model, optimizer)}
            dcp.load(wanted, checkpoint_id=str(Path(folder, case)))
            state = wanted["optimizer"]
        set_optimizer_state_dict(model, optimizer, state, options=options_of(full))
        for number in range(HALF_WAY, STEPS):
            step(model, optimizer, number)
        found[case] = masters(model, optimizer)
    return found


@pytest.mark.distributed
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
def test_two_processes_save_and_any_number_goes_on(full, tmp_path, subtests, tried):
    launch(save_half_way, 2, str(tmp_path), CASES, full)
    for processes in (1, 2, 4):
        results = launch(go_on, processes, str(tmp_path), CASES, full)
        for case in CASES:
            with subtests.test(f"{case}, {processes}"):
                for result in results:
                    assert_equal(result[case], alone(case))
        kind = "full" if full else "sharded"
        tried(f"sharded, saved by 2 ({kind}), loaded by {processes}: goes on the same", len(CASES), "rules")


def load_whole(folder: str) -> dict[str, Tensor]:
    """In a process: state of an unsharded optimizer, which goes on sharded."""
    model, optimizer = start("pion bfloat16", mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    saved = torch.load(Path(folder, "alone.pt"))
    set_weights(model, saved["weights"])
    optimizer.load_state_dict(saved["optimizer"])
    assert all(isinstance(optimizer.state[p]["momentum"], DTensor) for p in optimizer.param_groups[0]["params"])
    for number in range(HALF_WAY, STEPS):
        step(model, optimizer, number)
    return masters(model, optimizer)


def test_state_of_one_process_goes_on_sharded(tmp_path):
    model, optimizer = start("pion bfloat16")
    for number in range(HALF_WAY):
        step(model, optimizer, number)
    weights = {name: p.detach().clone() for name, p in model.items()}
    torch.save({"weights": weights, "optimizer": copy.deepcopy(optimizer.state_dict())}, tmp_path / "alone.pt")
    for found in launch(load_whole, 2, str(tmp_path)):
        assert_equal(found, alone("pion bfloat16"))


def save_whole(folder: str) -> None:
    """In a process: half-precision weights and the state of all, as one file."""
    model, optimizer = start("pion bfloat16", mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for number in range(HALF_WAY):
        step(model, optimizer, number)
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    weights = {name: sharding.whole(p.detach()) for name, p in model.items()}
    if dist.get_rank() == 0:
        torch.save({"weights": weights, "optimizer": state}, Path(folder, "whole.pt"))


def test_sharded_state_goes_on_in_one_process(tmp_path):
    launch(save_whole, 2, str(tmp_path))
    saved = torch.load(tmp_path / "whole.pt")
    model, optimizer = start("pion bfloat16")
    for name, p in model.items():
        p.data.copy_(saved["weights"][name])
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=StateDictOptions(full_state_dict=True))
    assert optimizer.state[model["tall"]]["v.0"].dtype == torch.float32
    for number in range(HALF_WAY, STEPS):
        step(model, optimizer, number)
    assert_equal(masters(model, optimizer), alone("pion bfloat16"))


# -- shared work (DDP) ------------------------------------------------------------------------------------------------


def train_shared(cases: list[str]) -> dict[str, Any]:
    """In a process: all hold everything, each updates its share."""
    found = {}
    for case in cases:
        model, optimizer = start(case, share_work=True)
        for number in range(STEPS):
            step(model, optimizer, number)
            if number == HALF_WAY:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        found[case] = masters(model, optimizer), optimizer.state_dict()["state"]
    return found


def check_shared(cases: list[str], results: list[dict], subtests: Any) -> None:
    for case in cases:
        with subtests.test(case):
            expected = alone(case)
            for result in results:
                assert_equal(result[case][0], expected)
                assert all(torch.equal(result[case][0][name], w) for name, w in results[0][case][0].items())
            first, *others = (result[case][1] for result in results)
            for other in others:
                assert first.keys() == other.keys()
                for index, entries in first.items():
                    assert entries.keys() == other[index].keys()
                    for key, value in entries.items():
                        same = torch.equal(value, other[index][key]) if isinstance(value, Tensor) else True
                        assert same, f"{key} of {index}"


def test_processes_that_share_the_work_equal_one(subtests):
    check_shared(FAST, launch(train_shared, 2, FAST), subtests)


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_more_processes_that_share_the_work_equal_one(processes, subtests, tried):
    check_shared(SHARING, launch(train_shared, processes, SHARING), subtests)
    tried(f"work shared by {processes}, 20 steps: weights of one process", len(SHARING), "rules")


def test_one_process_has_no_one_to_share_with():
    model, optimizer = start("pion", share_work=True)
    for number in range(STEPS):
        step(model, optimizer, number)
    assert_equal(masters(model, optimizer), alone("pion"), tolerance=1e-12)
