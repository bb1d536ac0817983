"""Matrices that processes divide, shards (FSDP2, HSDP, tensor parallelism) or copies (DDP): equal to one process."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

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
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from pion_hf import Inputs, Muon, Pion, PionLora, RoutedAdamW, Teon, TeonLora
from pion_hf.linalg.sketch import sketch_of
from pion_hf.linalg.sketch import test_matrix as random_test_matrix
from pion_hf.optim import MatrixOptimizer, exchange, owners, sharding
from pion_hf.optim.batches import Block
from pion_hf.optim.fingerprints import fingerprint
from tests.conftest import master
from tests.distributed_worker import launch
from tests.test_older_state import VERSIONS

pytestmark = pytest.mark.filterwarnings("ignore:keep. no inputs of (experts|unused) were seen")

STEPS = 20
HALF_WAY = STEPS // 2
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


def adamw_routed(model: nn.Module, **options: Any) -> MatrixOptimizer:
    own = {"rule": "adamw_routed", "lr": 1e-2}
    groups = [{"params": [*LONE, "stack_0"], **own}, {**OTHERS, "lr": 1e-3}]
    groups += [{"params": [name], "layout": layout, **own} for name, layout in LAYOUTS.items()]
    return RoutedAdamW(with_tensors(groups, model), weight_decay=0.1, **options)


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
    "adamw_routed keep": lambda model, **options: adamw_routed(model, keep=2, inputs=watched(model), **options),
}
DTYPES = {"pion bfloat16": torch.bfloat16, "pion float16": torch.float16}
CASES = [*BUILDERS, *DTYPES]
DIVIDED = [case for case in CASES if "adamw" not in case]  # the rules that have work to divide
FAST = ["pion ambient", "pion keep", "teon", "pion_lora"]  # "pion" itself is in most tests below


def start(
    case: str, *, mesh: Any = None, copies: bool = False, **options: Any
) -> tuple[nn.ParameterDict, MatrixOptimizer]:
    """The model of a case and its optimizer; sharded as the mesh says, or copies of which processes divide the work."""
    model = net(DTYPES.get(case, torch.float32))
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer = BUILDERS.get(case, pion)(model, **options)
    if copies:
        optimizer.divides_work, owners.WORTHWHILE = True, 0
    return model, optimizer


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
    """The weights, of half precision those that they are the rounding of: a collective, where processes divide them."""
    optimizer.consolidate_state_dict(to=None)
    held, optimizer.state = optimizer.state, optimizer._whole_state()
    try:
        return {name: master(p, optimizer).clone() for name, p in model.items()}
    finally:
        optimizer.state = held


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


def stack_of(*params: Tensor) -> tuple[Block, ...]:
    return tuple(Block(p, str(id(p)), 0, p.unsqueeze(0).unsqueeze(0), p) for p in params)


def parcels(*stacks: tuple[Block, ...]) -> list[owners.Parcel]:
    return owners.parcels_of(stacks, lambda p: 10 * p.nbytes)


def divided(found: list[owners.Parcel], processes: int) -> owners.Division:
    division = owners.Division()
    division.ranks, division.loads = processes, [(0, 0)] * processes
    division.assign(found)
    return division


def test_parcels_cut_neither_stacks_nor_parameters():
    a, b, c, d, e = (torch.empty(4, 4) for _ in range(5))
    found = parcels(stack_of(a, b), stack_of(c), stack_of(d), stack_of(b, c), stack_of(d), stack_of(e))
    assert sorted(len(parcel.params) for parcel in found) == [1, 1, 3]
    assert {id(a), id(b), id(c)} in [{id(p) for p in parcel.params} for parcel in found]
    assert {len(parcel.params): (parcel.products, parcel.bytes) for parcel in found[:1]} == {3: (320, 1920)}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
def test_memory_and_work_are_divided_evenly_and_for_good(processes, stacked):
    """The matrices of SmolLM2-135M."""
    shapes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    shapes |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    params = {name: [torch.empty(shape, device="meta") for _ in range(30)] for name, shape in shapes.items()}
    stacks = []
    for name, own in params.items():
        size = 2 if stacked and name in "qkv" else 1
        stacks += [stack_of(*own[i : i + size]) for i in range(0, len(own), size)]
    found = parcels(*stacks)
    division = divided(found, processes)
    for kind in zip(*division.loads, strict=True):
        assert max(kind) <= 1.05 * sum(kind) / processes
    before = dict(division.owner)
    late = torch.empty(64, 64)
    division.assign([*found, *parcels(stack_of(late))])
    assert {**division.owner, late: 0} == {**before, late: 0}


def test_rounds_bound_what_a_process_holds(monkeypatch):
    monkeypatch.setattr(exchange, "ROUND_ELEMENTS", 5000)
    params = [torch.empty(40, 50) for _ in range(9)] + [torch.empty(90, 90)]
    found = parcels(*map(stack_of, params))
    division = divided(found, 2)
    rounds = owners.rounds_of([parcel.params for parcel in found], params[1:], division)
    for params_of_round in rounds:
        own = [[p for p in params_of_round if division.owner[p] == rank] for rank in range(2)]
        assert all(sum(p.numel() for p in mine) <= 5000 or len(mine) == 1 for mine in own)
    assert [id(p) for p in params[1:]] == sorted((id(p) for own in rounds for p in own), key=[*map(id, params)].index)
    assert owners.rounds_of([parcel.params for parcel in found], [], division) == []


def test_packed_tensors_come_out_again():
    tensors = [torch.randn(3, 5), torch.randn(0, 4), torch.randn(7).bfloat16(), torch.randn(4, 6).double().mT]
    tensors += [torch.randn(3, 1)[1:2], torch.randn(5, 3).mT[:1, :1]]  # one number, whose strides say nothing
    tensors += [torch.tensor([True, False, True]), torch.randint(-9, 9, (2, 3), dtype=torch.int16)]
    buffer = torch.empty(sum(map(exchange.bytes_of, tensors)), dtype=torch.uint8)
    exchange.pack(tensors, buffer)
    for x, y in zip(tensors, exchange.unpack(buffer, tensors), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


# -- sharded (FSDP2) --------------------------------------------------------------------------------------------------


def train_sharded(cases: list[str], *, replicas: int = 1, round_elements: int | None = None) -> dict[str, Any]:
    """In a process: every case to its end, what this one keeps, and what all make of it for a checkpoint."""
    shape = (dist.get_world_size(),) if replicas == 1 else (replicas, dist.get_world_size() // replicas)
    names = ("shard",) if replicas == 1 else ("replicate", "shard")
    mesh, found = init_device_mesh("cpu", shape, mesh_dim_names=names), {}
    exchange.ROUND_ELEMENTS = round_elements or exchange.ROUND_ELEMENTS
    for case in cases:
        model, optimizer = start(case, mesh=mesh)
        get_optimizer_state_dict(model, optimizer)  # takes a step with zero gradients, of which nothing may be left
        for number in range(STEPS):
            step(model, optimizer, number)
        found[case] = masters(model, optimizer), kept(model, optimizer), saved_as(model, optimizer)
    return found


def kept(model: nn.ParameterDict, optimizer: MatrixOptimizer) -> dict[str, set[str]]:
    """By matrix, the entries of state that are whole here."""
    matrices = [n for n, p in model.items() if p.ndim > 1]
    return {
        name: {key for key, x in optimizer.state[p].items() if isinstance(x, Tensor) and x.ndim}
        for name, p in model.items()
        if name in matrices and p in optimizer.state
    }


def saved_as(model: nn.ParameterDict, optimizer: MatrixOptimizer) -> list[tuple[str, Any]]:
    """How entries lie in a checkpoint."""
    layouts, params = [], [p for group in optimizer.param_groups for p in group["params"]]
    for p, entries in zip(params, optimizer.state_dict()["state"].values(), strict=True):
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.ndim:
                layouts.append((key, isinstance(value, DTensor) and value.placements))
                assert value.shape != p.shape or value.to_local().shape == p.to_local().shape
    return layouts


# By processes, how many keep the state of two experts: whole ones stay where they are.
WHOLE_EXPERTS = {2: 2}


def check_sharded(cases: list[str], results: list[dict], subtests: Any) -> None:
    for case in cases:
        with subtests.test(case):
            expected = alone(case)
            for weights, _, layouts in (result[case] for result in results):
                assert_equal(weights, expected)
                assert layouts
                assert all(placements and isinstance(placements[-1], Shard) for _, placements in layouts)
            for name in results[0][case][1] if "adamw" not in case else ():
                count = sum(bool(result[case][1][name]) for result in results)
                assert count == (WHOLE_EXPERTS.get(len(results), 1) if name == "experts" else 1), name


def test_two_processes_equal_one(subtests):
    check_sharded(FAST, launch(train_sharded, 2, FAST), subtests)


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
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


RULES = {"pion": Pion, "pion ambient": functools.partial(Pion, preset="ambient"), "muon": Muon}
RULES["pion paper"] = functools.partial(Pion, preset="paper")


def counted() -> dict[str, tuple[float, list[int]]]:
    """In a process: by rule, bytes sent for a parameter and step, and exchanges under way while a round is computed."""
    world, found = dist.get_world_size(), {}
    under_way, sent = [0], [0.0]

    def begin(into: Tensor, out: Tensor, *splits: Any, **options: Any) -> Any:
        sent[0] += out.nbytes
        under_way[0] += 1
        return all_to_all(into, out, *splits, **options)

    def end(self: Any) -> None:
        under_way[0] -= 1
        finish(self)

    all_to_all, finish = dist.all_to_all_single, exchange._Underway.__call__
    for rule, build in RULES.items():
        model = nn.ParameterDict({f"w{i}": torch.randn(64, 48).bfloat16() for i in range(8 * world)})
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        optimizer, seen = build(list(model.items()), lr=1e-2), []
        update = optimizer._update_batch

        def updated(*args: Any, update: Callable = update, seen: list = seen) -> None:
            seen.append(under_way[0])
            update(*args)

        optimizer._update_batch = updated
        for number in range(4):
            if number == 2:
                sent[0], seen[:] = 0.0, []
            with (
                mock.patch.object(dist, "all_to_all_single", begin),
                mock.patch.object(exchange._Underway, "__call__", end),
            ):
                step(model, optimizer, number)
        found[rule] = sent[0] / 2 / sum(p.numel() for p in model.values()), seen
    return found


def test_gradients_come_and_weights_go_and_nothing_else(tried):
    """Of bfloat16 (4 - 1) / 4 of two bytes each, while the round before or after is computed."""
    results = launch(counted, 4)
    for rule in RULES:
        assert sum(result[rule][0] for result in results) == pytest.approx(3.0), rule
        for _, seen in (result[rule] for result in results):
            assert len(seen) == 2 * owners.ROUNDS
            assert seen == [1, 2, 2, 1] * 2
    tried("bytes sent for a step by 4 processes: 3.0 a parameter, two rounds under way", len(RULES), "rules")


def restacked(copies: bool) -> dict[str, Tensor]:
    """Stacks that are named anew half way, of matrices that may have several owners by then."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if dist.is_initialized() and not copies else None
    model, optimizer = start("teon", mesh=mesh, copies=copies)
    for number in range(STEPS):
        if number == HALF_WAY:
            optimizer.param_groups[0]["stacks"] = [["stack_0", "stack_1"]]
            optimizer.param_groups[1]["stacks"] = [["fused_0[0]", "fused_1[0]"]]
        step(model, optimizer, number)
    return masters(model, optimizer)


@pytest.mark.parametrize("copies", [False, True])
def test_owners_follow_stacks(copies):
    expected = restacked(False)
    for found in launch(restacked, 2, copies):
        assert_equal(found, expected)


# -- sharded otherwise (tensor parallelism) ---------------------------------------------------------------------------

# Of meshes of 2 and 2 x 2: columns, both axes, rows twice, in either order, chunks of groups, copies.
PLACEMENTS: dict[str, list] = {
    "columns": [Shard(1)],
    "copies": [Replicate()],
    "groups": [_StridedShard(0, split_factor=2)],
    "rows and columns": [Shard(0), Shard(1)],
    "copies of columns": [Replicate(), Shard(1)],
    "rows twice": [Shard(0), Shard(0)],
    "rows of parts": [_StridedShard(0, split_factor=2), Shard(0)],
    "parts of columns": [_StridedShard(1, split_factor=2), Shard(0)],
}


def train_placed(cases: list[str], names: list[str]) -> dict[str, Any]:
    """In a process: DTensors that nobody has made by FSDP2."""
    mesh, found = init_device_mesh("cpu", (2,) * len(PLACEMENTS[names[0]])), {}
    for name, case in itertools.product(names, cases):
        model = net(DTYPES.get(case, torch.float32))
        for key, p in model.items():
            placements = PLACEMENTS[name] if p.ndim > 1 else [Replicate()] * mesh.ndim
            model[key] = nn.Parameter(distribute_tensor(p.detach(), mesh, placements, src_data_rank=None))
        optimizer = BUILDERS.get(case, pion)(model)
        for number in range(HALF_WAY):
            step(model, optimizer, number)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for number in range(HALF_WAY, STEPS):
            step(model, optimizer, number)
        found[name, case] = masters(model, optimizer), kept(model, optimizer), saved_as(model, optimizer)
        for p in model.values():
            assert p.ndim == 1 or sharding.fingerprints_of([p])[0] == fingerprint(sharding.whole(p.detach()))
            for whole, piece in itertools.product([sharding.whole(p)], sharding.pieces(p)[dist.get_rank()]):
                assert torch.equal(piece.of(whole), piece.of_held(p.to_local()))
    return found


def check_placed(cases: list[str], names: list[str], results: list[dict], subtests: Any) -> None:
    for name, case in itertools.product(names, cases):
        with subtests.test(f"{name}, {case}"):
            for result in results:
                assert_equal(result[name, case][0], alone(case))
                assert result[name, case][2]
            for matrix in results[0][name, case][1] if "adamw" not in case else ():
                count = sum(bool(result[name, case][1][matrix]) for result in results)
                assert count == 1 or matrix == "experts"


def test_columns_and_copies_equal_one_process(subtests):
    names = [name for name, placements in PLACEMENTS.items() if len(placements) == 1]
    check_placed(["pion"], names, launch(train_placed, 2, ["pion"], names), subtests)


@pytest.mark.distributed
def test_every_way_of_sharding_equals_one_process(subtests, tried):
    cases = ["pion", "pion bfloat16", "teon", "pion_lora", "adamw_routed keep"]
    for processes in (2, 4):
        names = [name for name, placements in PLACEMENTS.items() if 2 ** len(placements) == processes]
        check_placed(cases, names, launch(train_placed, processes, cases, names), subtests)
        tried(f"DTensors of {processes} processes (columns, both axes, ...): weights of one", len(names), "ways")


# -- what must not happen ---------------------------------------------------------------------------------------------


def refusals() -> dict[str, Any]:
    """In a process of four: what is said of what cannot be updated."""
    world, found = dist.get_world_size(), {}
    line = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (2, world // 2))

    def said(name: str, action: Callable[[], Any]) -> None:
        try:
            found[name] = action()
        except ValueError as error:
            found[name] = str(error)

    partial = DTensor.from_local(torch.ones(8, 8), grid, [Shard(0), Partial()], run_check=False)
    said("partial", lambda: Pion([("w", nn.Parameter(partial))]))
    sharded = nn.Parameter(distribute_tensor(torch.randn(8, 8), line, [Shard(0)]))
    mixed = [{"params": [("w", sharded), ("v", nn.Parameter(torch.randn(4, 4)))], "rule": "pion"}]
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
        assert "w is a DTensor with the placements (S(0), P(sum)), of which every process holds" in found["partial"]
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


def options_of(full: bool) -> StateDictOptions:
    return StateDictOptions(full_state_dict=full, cpu_offload=full, broadcast_from_rank0=full)


def save_half_way(folder: str, cases: list[str], full: bool) -> dict[str, dict[str, Tensor]]:
    """In a process: what it ends with, had it not been interrupted."""
    found, mesh = {}, init_device_mesh("cpu", (dist.get_world_size(),))
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
        for number in range(HALF_WAY, STEPS):
            step(model, optimizer, number)
        found[case] = masters(model, optimizer)
    return found


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
def test_four_processes_save_and_any_number_goes_on(full, tmp_path, subtests, tried):
    """On four again to the bit."""
    straight = launch(save_half_way, 4, str(tmp_path), CASES, full)
    for processes in (1, 4) if full else (1, 2, 3, 4, 8):
        results = launch(go_on, processes, str(tmp_path), CASES, full)
        for case in CASES:
            with subtests.test(f"{case}, {processes}"):
                for result in results:
                    assert_equal(result[case], alone(case) if processes != 4 else straight[0][case], 1e-5)
                    assert processes != 4 or all(torch.equal(w, straight[0][case][n]) for n, w in result[case].items())
        kind, how = "full" if full else "sharded", "the bits" if processes == 4 else "the same"
        tried(f"sharded, saved by 4 ({kind}), loaded by {processes}: goes on, {how}", len(CASES), "rules")


def load_whole(folder: str, case: str) -> dict[str, dict[str, Tensor]]:
    """In a process: states of an unsharded optimizer, by version, which go on sharded."""
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    saved = torch.load(Path(folder, "alone.pt"))
    for version, state in saved["optimizer"].items():
        model, optimizer = start(case, mesh=mesh)
        set_weights(model, saved["weights"])
        optimizer.load_state_dict(state)
        assert all(isinstance(optimizer.state[p]["momentum"], DTensor) for p in optimizer.param_groups[0]["params"])
        for number in range(HALF_WAY, STEPS):
            step(model, optimizer, number)
        found[version] = masters(model, optimizer)
    return found


@pytest.mark.parametrize("case", ["pion", "pion bfloat16"])
def test_state_of_one_process_goes_on_sharded(case, tmp_path, subtests):
    """This version's, and such as earlier ones have saved: without factors, or bits that half precision drops."""
    model, optimizer = start(case)
    for number in range(HALF_WAY):
        step(model, optimizer, number)
    weights = {name: p.detach().clone() for name, p in model.items()}
    now = copy.deepcopy(optimizer.state_dict())
    older = {version: change(now) for version, change in VERSIONS.items()} if case == "pion" else {}
    torch.save({"weights": weights, "optimizer": {"now": now, **older}}, tmp_path / "alone.pt")
    for result in launch(load_whole, 2, str(tmp_path), case):
        for version, found in result.items():
            with subtests.test(version):
                assert_equal(found, alone(case), 1e-5 if version == "now" else 1e-3)


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


# -- copies (DDP) -----------------------------------------------------------------------------------------------------


def train_copies(cases: list[str]) -> dict[str, Any]:
    """In a process: all hold the weights and gradients, each the state of its own matrices."""
    found = {}
    for case in cases:
        model, optimizer = start(case, copies=True)
        for number in range(STEPS):
            step(model, optimizer, number)
            if number == HALF_WAY:
                optimizer.consolidate_state_dict(to=None)
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer.load_state_dict(copy.deepcopy(saved))
        found[case] = masters(model, optimizer), kept(model, optimizer), saved["state"]
    return found


def check_copies(cases: list[str], results: list[dict], subtests: Any) -> None:
    for case in cases:
        with subtests.test(case):
            expected = alone(case)
            for result in results:
                assert_equal(result[case][0], expected)
                assert all(torch.equal(result[case][0][name], w) for name, w in results[0][case][0].items())
            for name in results[0][case][1]:
                assert sum(bool(result[case][1][name]) for result in results) == 1, f"{name} has several owners"
            first, *others = (result[case][2] for result in results)
            for other in others:
                assert first.keys() == other.keys()
                for index, entries in first.items():
                    assert entries.keys() == other[index].keys()
                    for key, value in entries.items():
                        same = torch.equal(value, other[index][key]) if isinstance(value, Tensor) else True
                        assert same, f"{key} of {index}"


def test_processes_that_divide_copies_equal_one(subtests):
    check_copies(FAST, launch(train_copies, 2, FAST), subtests)


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 8])
def test_more_processes_that_divide_copies_equal_one(processes, subtests, tried):
    check_copies(DIVIDED, launch(train_copies, processes, DIVIDED), subtests)
    tried(f"copies divided by {processes} (DDP), 20 steps: weights of one process", len(DIVIDED), "rules")


def test_one_process_has_no_one_to_divide_with(monkeypatch):
    monkeypatch.setattr(owners, "WORTHWHILE", 0)
    model, optimizer = start("pion", copies=True)
    for number in range(STEPS):
        step(model, optimizer, number)
    optimizer.state_dict()
    assert_equal(masters(model, optimizer), alone("pion"), tolerance=1e-12)


def save_on_the_first() -> dict[str, Any]:
    """In a process: what `state_dict` says before and after it is consolidated, and what it holds."""
    model, optimizer = start("pion", copies=True)
    found = {}

    def state(name: str) -> None:
        try:
            found[name] = copy.deepcopy(optimizer.state_dict()["state"])
        except RuntimeError as error:
            found[name] = str(error)

    state("at first")
    for number in range(HALF_WAY):
        step(model, optimizer, number)
    state("before")
    optimizer.consolidate_state_dict()
    state("after")
    step(model, optimizer, HALF_WAY)
    state("a step later")
    return found


def test_the_first_process_saves_what_all_have_consolidated():
    model, optimizer = start("pion")
    for number in range(HALF_WAY):
        step(model, optimizer, number)
    expected = optimizer.state_dict()["state"]
    first, second = launch(save_on_the_first, 2)
    for found in (first, second):
        assert found["at first"] == {}
        assert "all processes must call consolidate_state_dict()" in found["before"]
        assert found["a step later"] == found["before"]
    assert second["after"] == second["before"]
    assert first["after"].keys() == expected.keys()
    for index, entries in expected.items():
        assert first["after"][index].keys() == entries.keys()
        for key, value in entries.items():
            torch.testing.assert_close(first["after"][index][key], value, rtol=1e-4, atol=1e-5)


def too_cheap() -> bool:
    usual = owners.WORTHWHILE
    model, optimizer = start("pion", copies=True)
    owners.WORTHWHILE = usual
    step(model, optimizer, 1)
    return all(kept(model, optimizer).values())


def test_what_costs_less_than_it_sends_is_not_divided():
    assert launch(too_cheap, 2) == [True, True]
