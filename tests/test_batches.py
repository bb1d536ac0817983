"""`batch_elements`: how many matrices are updated at once decides the memory of a step, and nothing else."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from pion_hf import Pion, PionLora, PionTrainingArguments, Teon, TeonLora
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES, resolve_options
from pion_hf.optim import MatrixOptimizer
from tests import test_sharding
from tests.distributed_worker import launch
from tests.test_plan import LiveBytes

# Equal ones, long ones of either side, and parameters that hold several matrices (with LAYOUTS, fused ones).
SHAPES = [(12, 8), (6, 40), (40, 6), (16, 16), (3, 10, 6), (30, 6)]
LAYOUTS = {(30, 6): "rows=12,12,6"}
EACH = 4
TOLERANCE = {torch.float32: {"atol": 1e-6, "rtol": 1e-5}, torch.float64: {"atol": 1e-12, "rtol": 1e-12}}


def grouped(params: list[nn.Parameter], **own: Any) -> list[dict]:
    """A group for each shape."""
    groups = [
        [(f"w{i}", p) for i, p in enumerate(params) if tuple(p.shape) == shape]
        for shape in dict.fromkeys(tuple(p.shape) for p in params)
    ]
    return [{"params": named, "layout": LAYOUTS.get(tuple(named[0][1].shape), ""), **own} for named in groups]


def pion(params: list[nn.Parameter], **options: Any) -> Pion:
    return Pion(grouped(params, rule="pion"), lr=1e-2, generator_dtype="float32", **options)


def muon(params: list[nn.Parameter], **options: Any) -> Teon:
    return Teon(grouped(params, rule="muon"), lr=1e-2, stack=1, polar_dtype="float32", **options)


def teon(params: list[nn.Parameter], **options: Any) -> Teon:
    """Stacks of two parameters' first matrices; the others are alone."""
    groups = grouped(params, rule="teon")
    for group in groups:
        names = [f"{name}[0]" if "rows" in group["layout"] else name for name, _ in group["params"]]
        group["stacks"] = [names[i : i + 2] for i in range(0, len(names), 2)]
    return Teon(groups, lr=1e-2, polar_dtype="float32", weight_decay=0.1, **options)


def pion_lora(params: list[nn.Parameter], *, method: str, **options: Any) -> PionLora:
    groups = grouped(params, rule="pion_lora", method=method)
    for group in groups:
        group["unit_step"] = [0.1 * (i + 1) for i in range(len(group["params"]))]
    return PionLora(groups, lr=3e-2, **options)


BUILDERS: dict[str, Callable[..., MatrixOptimizer]] = {
    "pion": pion,
    "pion ambient": functools.partial(pion, direction="natural", metric="ambient", momentum_frame="transported"),
    "pion both sides": functools.partial(pion, direction="natural", side="both"),
    "pion paper": functools.partial(pion, preset="paper"),
    "muon": muon,
    "teon": teon,
    "pion_lora rotate": functools.partial(pion_lora, method="rotate"),
    "pion_lora rotate, ambient": functools.partial(pion_lora, method="rotate", metric="ambient"),
    "pion_lora orthogonal": functools.partial(pion_lora, method="orthogonal"),
}


def weights(
    dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES, each: int = EACH
) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=draw, dtype=torch.float64).to(dtype)) for s in shapes * each]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    draw = torch.Generator().manual_seed(100 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype)


def updated_at_once(optimizer: MatrixOptimizer) -> list[int]:
    """A list that will hold the elements of every update to come."""
    found, update = [], optimizer.update

    def seen(weight: Tensor, grad: Tensor, state: dict, **rest: Any) -> Tensor:
        found.append(weight.numel())
        return update(weight, grad, state, **rest)

    optimizer.update = seen
    return found


# -- what does not depend on it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", BUILDERS)
def test_results_do_not_depend_on_it(case, dtype, tried):
    found = {}
    for elements in (None, 1, 1000):
        params = weights(dtype)
        optimizer = BUILDERS[case](params, batch_elements=elements)
        for seed in range(3):
            set_gradients(params, seed)
            optimizer.step()
        found[elements] = params
    for elements in (1, 1000):
        for p, usual, before in zip(found[elements], found[None], weights(dtype), strict=True):
            torch.testing.assert_close(p, usual, **TOLERANCE[dtype])
            assert not torch.equal(p, before)
    tried("batch_elements 1 and 1000, 3 steps: weights of the usual batches", len(SHAPES) * EACH, "matrices")


def test_state_does_not_say_it():
    """Saved state, of before there was the option too, goes on in batches of the size that is asked for now."""
    params = weights(shapes=[(16, 16)])
    optimizer = pion(params, batch_elements=10_000)
    set_gradients(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    older = {**state, "param_groups": [dict(group) for group in state["param_groups"]]}
    del older["param_groups"][0]["batch_elements"]
    for given in (1, None):
        for saved in (state, older):
            loaded = pion(params, batch_elements=given)
            loaded.load_state_dict(saved)
            assert loaded.param_groups[0]["batch_elements"] == given
            sizes = updated_at_once(loaded)
            loaded.step()
            assert max(sizes) == (256 if given else EACH * 256)


# -- what does ----------------------------------------------------------------------------------------------------


def sizes_of_a_step(build, shape, elements) -> list[int]:
    """Elements updated at once, one batch after the other, of equal parameters."""
    params = weights(shapes=[shape])
    optimizer = build(params, batch_elements=elements)
    sizes = updated_at_once(optimizer)
    set_gradients(params, 0)
    optimizer.step()
    return sizes


@pytest.mark.parametrize(("elements", "most"), [(1, 256), (511, 256), (512, 512), (1000, 768), (None, 1024)])
def test_a_batch_has_at_most_as_many_elements_or_is_one_matrix(elements, most):
    sizes = sizes_of_a_step(muon, (16, 16), elements)
    assert max(sizes) == most
    assert sum(sizes) == EACH * 256


@pytest.mark.parametrize(
    ("elements", "sizes"),
    [(400, [360, 360]), (200, [180] * 4), (179, [120] * 6), (100, [60] * 12), (1, [60] * 12)],
)
def test_experts_of_a_parameter_are_updated_some_at_a_time(elements, sizes):
    """Three matrices of 60 elements in each parameter; remainders of equal size share batches where they fit."""
    assert sizes_of_a_step(muon, (3, 10, 6), elements) == sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BUILDERS)
def test_some_experts_at_a_time_do_as_all_at_once(case, dtype):
    """Fused and transposed ones, and such as hold several matrices each; what is saved goes on in parts of any size."""
    layouts = {(3, 12, 8): "rows=8,4", (3, 8, 12): "transposed", (3, 6, 10): ""}
    found = {}
    for sizes in ((2**30, 2**30), (1, 1), (150, 2**30), (2**30, 100)):
        params, saved = weights(dtype, list(layouts), each=2), None
        for part, elements in enumerate(sizes):
            with mock.patch.dict(LAYOUTS, layouts):
                optimizer = BUILDERS[case](params, batch_elements=elements)
            if saved is not None:
                optimizer.load_state_dict(saved)
            for seed in range(2):
                set_gradients(params, 10 * part + seed)
                optimizer.step()
            saved = optimizer.state_dict()
        found[sizes] = params, saved["state"]
    params, states = found[2**30, 2**30]
    for others, states_of_others in found.values():
        for p, other in zip(params, others, strict=True):
            torch.testing.assert_close(p, other, **TOLERANCE.get(dtype, {"atol": 2e-2, "rtol": 2e-2}))
        assert {i: s.keys() for i, s in states.items()} == {i: s.keys() for i, s in states_of_others.items()}


def test_some_experts_are_seen_like_all(caplog):
    """What a rule says of its matrices at the first steps counts every expert once."""
    said = []
    for elements in (2**30, 1):
        caplog.clear()
        params = weights(shapes=[(3, 10, 6)])
        optimizer = pion(params, batch_elements=elements)
        with caplog.at_level("INFO", logger="pion_hf"):
            for seed in range(2):
                set_gradients(params, seed)
                optimizer.step()
        said.append([record.getMessage() for record in caplog.records])
    assert said == [["pion: 12 of 12 matrices rotated"]] * 2


def test_what_leaves_a_batch_takes_its_memory_along():
    """Layers that are frozen one after the other; a checkpoint would hold what is shared more than once."""
    params = [nn.Parameter(torch.randn(8, 8)) for _ in range(6)]
    optimizer = Teon(params, stack=1)
    for frozen in range(len(params)):
        for p in params:
            p.grad = torch.randn_like(p)
        for p in params[:frozen]:
            p.grad = None
        optimizer.step()
    buffers = [optimizer.state[p]["momentum"].untyped_storage() for p in params]
    held = {storage.data_ptr(): storage.nbytes() for storage in buffers}
    assert sum(held.values()) <= (len(params) + 1) * params[0].nbytes


def test_stacks_are_not_cut():
    assert sizes_of_a_step(teon, (16, 16), 1) == [512, 512]


def test_groups_may_differ():
    first, second = weights(shapes=[(16, 16)]), weights(shapes=[(16, 16)])
    groups = [{"params": first, "rule": "pion", "batch_elements": 1}, {"params": second, "rule": "pion"}]
    optimizer = Pion(groups, lr=1e-2)
    sizes = updated_at_once(optimizer)
    set_gradients([*first, *second], 0)
    optimizer.step()
    assert sizes == [256] * EACH + [EACH * 256]


@pytest.mark.parametrize(("case", "shape"), zip(BUILDERS, itertools.cycle([(64, 64), (24, 160)])), ids=str)
def test_it_bounds_the_extra_memory_of_a_step(case, shape, tried):
    """Of 8 equal matrices, with the state there: less than half of what updating them all at once takes."""

    def extra(elements: int) -> int:
        params = weights(shapes=[shape] * (8 // EACH))
        optimizer = BUILDERS[case](params, batch_elements=elements)
        set_gradients(params, 0)
        with LiveBytes(*params, *(p.grad for p in params)) as used:
            optimizer.step()  # makes the state, which later ones replace
            before = used.peak = used.live
            optimizer.step()  # turns one side, then the other
            optimizer.step()
        return used.peak - before

    at_once, bounded = extra(2**30), extra(1)
    assert bounded < at_once / 2, f"{bounded} of {at_once} bytes"
    tried("batch_elements 1 of 8 matrices: extra memory of a step below half", 8, "matrices")


# -- several processes ----------------------------------------------------------------------------------------------


def one_by_one(cases: list[str]) -> dict[tuple[str, str], tuple[dict[str, Tensor], int]]:
    """In a process: by case and way of dividing the work, the weights in the end, and the most units of a batch."""
    ways = {"sharded": {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}, "copies": {"copies": True}}
    found = {}
    for case, (way, options) in itertools.product(cases, ways.items()):
        model, optimizer = test_sharding.start(case, batch_elements=1, **options)
        with mock.patch.object(optimizer, "_update_batch", wraps=optimizer._update_batch) as updates:
            for number in range(test_sharding.STEPS):
                test_sharding.step(model, optimizer, number)
        most = max(len(call.args[0].units) for call in updates.call_args_list)
        found[case, way] = test_sharding.masters(model, optimizer), most
    return found


def test_processes_update_as_many_at_once_as_they_are_told(subtests):
    for result in launch(one_by_one, 2, ["pion", "teon"]):
        for (case, way), (found, most) in result.items():
            with subtests.test(f"{case}, {way}"):
                test_sharding.assert_equal(found, test_sharding.alone(case))
                assert most == 1


# -- what it may be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -5, 1.5, True, "many", float("inf")])
@pytest.mark.parametrize("case", ["pion", "muon", "pion_lora rotate"])
def test_what_is_no_size_is_refused(case, value):
    with pytest.raises(ValueError, match=r"^batch_elements must be a whole number of at least 1, got "):
        BUILDERS[case](weights(shapes=[(8, 8)]), batch_elements=value)


def test_the_arguments_have_it():
    given = PionTrainingArguments(optim="pion", optim_batch_elements=1000, report_to="none").given_options()
    for optim in OPTIMIZER_CLASSES.keys() - {"adamw_routed"}:
        assert resolve_options(optim, given)[0]["batch_elements"] == 1000
        assert resolve_options(optim, given, {"batch_elements": None})[0]["batch_elements"] is None
    with pytest.raises(ValueError, match=r"'batch_elements' is an option of .*, not of optim='adamw_routed'"):
        resolve_options("adamw_routed", given)


def test_adapters_have_it():
    params = weights(shapes=[(8, 8)])
    groups = [{"params": params, "rule": "teon_lora", "method": "orthogonal", "unit_step": [1.0] * EACH, "stack": 1}]
    optimizer = TeonLora(groups, batch_elements=64)
    sizes = updated_at_once(optimizer)
    set_gradients(params, 0)
    optimizer.step()
    assert sizes == [64] * EACH
