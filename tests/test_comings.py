"""Gradients that come and go, as those of experts and branches: nothing is planned anew, and nothing falls apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from pion_hf import Pion, Teon, TeonLora
from pion_hf.optim import MatrixOptimizer, batches
from tests import test_batches, test_sharding
from tests.distributed_worker import launch
from tests.test_batches import TOLERANCE, pion

EXPERTS, STEPS = 8, 60
BUILDERS: dict[str, Callable[..., MatrixOptimizer]] = {
    **{case: build for case, build in test_batches.BUILDERS.items() if case != "teon"},
    "pion adam": functools.partial(pion, direction="adam", metric="ambient", scale="none"),
    "pion in": functools.partial(pion, side="in", momentum_frame="ambient"),
}


def experts(shape: tuple[int, ...] = (12, 8), dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)) for _ in range(EXPERTS)]


def random_gradients(params: list[nn.Parameter], steps: int = STEPS) -> Iterator[int]:
    """At every step about half of the parameters have one; gives how many."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        there = torch.rand(len(params), generator=draw) < 0.5
        grads = torch.randn(len(params), *params[0].shape, generator=draw, dtype=torch.float64)
        for p, has, grad in zip(params, there, grads, strict=True):
            p.grad = grad.to(p.dtype) if has else None
        yield int(there.sum())


@pytest.mark.parametrize("case", BUILDERS)
def test_one_plan_and_batches_whatever_has_a_gradient(case, tried):
    params = experts()
    optimizer = BUILDERS[case](params)
    with (
        mock.patch.object(optimizer, "_make_plan", wraps=optimizer._make_plan) as plans,
        mock.patch.object(optimizer, "update", wraps=optimizer.update) as updates,
    ):
        taken = sum(optimizer.step() or count for count in random_gradients(params))
    assert plans.call_count == 1
    first = sum(call.kwargs["step"].first for call in updates.call_args_list)
    turns = len({optimizer.turn_of(optimizer.param_groups[0], number) for number in (1, 2)})
    assert updates.call_count <= turns * STEPS + first < taken
    tried(f"{case}: plans for gradients at random, 8 experts", STEPS, "steps")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", BUILDERS)
def test_each_does_as_it_does_alone(case, dtype):
    params, lone = experts(dtype=dtype), experts(dtype=dtype)
    optimizer, others = BUILDERS[case](params), [BUILDERS[case]([p]) for p in lone]
    for i, other in enumerate(others):
        if "unit_step" in other.param_groups[0]:
            other.param_groups[0]["unit_step"] = [optimizer.param_groups[0]["unit_step"][i]]
    for _ in random_gradients(params, 24):
        optimizer.step()
        for p, q, other in zip(params, lone, others, strict=True):
            q.grad = p.grad
            if p.grad is not None:
                other.step()
    for p, q, before in zip(params, lone, experts(dtype=dtype), strict=True):
        distance = torch.linalg.matrix_norm(p - before)
        assert torch.linalg.matrix_norm(p - q) <= (1e-4 if dtype == torch.float32 else 1e-10) * distance


@pytest.mark.parametrize("shape", [(12, 8), (3, 12, 8)])
@pytest.mark.parametrize("case", BUILDERS)
def test_state_is_held_once(case, shape):
    """Neither batches of earlier steps nor those that have left them keep memory."""
    params = experts(shape)
    optimizer = BUILDERS[case](params)
    for _ in random_gradients(params, 12):
        optimizer.step()
    entries = [x for p in params for x in optimizer.state[p].values() if torch.is_tensor(x)]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in entries}
    assert sum(held.values()) == sum(x.nbytes for x in entries)


def test_branches_that_take_turns_find_their_state_as_it_was():
    """Nothing is copied after each has been there: buffers that are changed in place stay where they are."""
    params = experts()
    optimizer = Teon(params, stack=1)
    places = []
    with mock.patch.object(batches, "unshared", wraps=batches.unshared) as copies:
        for number in range(6):
            for i, p in enumerate(params):
                p.grad = torch.randn_like(p) if i % 2 == number % 2 else None
            optimizer.step()
            places.append([optimizer.state[p]["momentum"].data_ptr() for p in params[number % 2 :: 2]])
    assert not copies.called
    assert places[0] == places[2] == places[4]
    assert places[1] == places[3] == places[5]


def test_an_error_in_another_group_begins_nothing_twice():
    """The state that a first step has made is that of a first step still."""
    params, zero = experts()[:2], nn.Parameter(torch.zeros(12, 8))
    optimizer = Pion([{"params": params, "rule": "pion"}, {"params": [zero], "rule": "pion"}], lr=1e-2)
    for p in (*params, zero):
        p.grad = torch.randn_like(p)
    with pytest.raises(ValueError, match="zero matrix"):
        optimizer.step()
    zero.grad = None
    peers = [nn.Parameter(p.detach().clone()) for p in params]
    peer = Pion([{"params": peers, "rule": "pion"}], lr=1e-2)
    for p, q in zip(params, peers, strict=True):
        q.grad = p.grad
    for _ in range(2):
        optimizer.step()
        peer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, peers, strict=True))


# -- stacks -----------------------------------------------------------------------------------------------------------


def teon(params: list[nn.Parameter]) -> Teon:
    group = {"params": list(zip("ab", params, strict=True)), "rule": "teon", "stacks": [["a", "b"]]}
    return Teon([group], lr=1e-2, polar="svd")


def teon_lora(params: list[nn.Parameter]) -> TeonLora:
    group = {"params": list(zip("ab", params, strict=True)), "rule": "teon_lora", "stacks": [["a", "b"]]}
    return TeonLora([{**group, "method": "orthogonal", "unit_step": [1.0, 1.0]}], lr=1e-2, polar="svd")


@pytest.mark.parametrize("build", [teon, teon_lora])
def test_a_layer_that_was_frozen_is_a_full_part_of_its_stack_again(build):
    """From its second step on, and with steps of their size, though its momentum is young."""
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 16, generator=draw)) for _ in range(2)]
    optimizer = build(params)
    sizes, moved = [], []

    def seen(weight: Tensor, *args: Tensor, **options) -> Tensor:
        sizes.append(tuple(weight.shape[:-2]))
        return update(weight, *args, **options)

    update, optimizer.update = optimizer.update, seen
    direction = torch.randn(2, 4, 16, generator=draw)
    for number in range(32):
        before = [p.detach().clone() for p in params]
        for i, p in enumerate(params):
            noise = torch.randn(4, 16, generator=draw)
            p.grad = None if i == 1 and number < 30 else direction[i] + 0.3 * noise
        optimizer.step()
        moved.append([torch.linalg.matrix_norm(p - q).item() for p, q in zip(params, before, strict=True)])
    assert sizes[-3:] == [(1,), (1,), (1, 2)]  # its first step alone, then together
    old, young = moved[-1]
    assert old / 2 < young < 2 * old


def test_stacks_of_one_age_are_as_ever():
    """Momenta that began together are not divided by anything."""
    with mock.patch.object(batches.Step, "weight", side_effect=AssertionError):
        params = experts()[:2]
        optimizer = teon(params)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()


# -- several processes ------------------------------------------------------------------------------------------------

CASES = ["pion", "teon"]


def trained(case: str, **options: Any) -> tuple[dict[str, Tensor], int]:
    """A third of the parameters has no gradient at a step, the same on all processes: the weights in the end, plans."""
    model, optimizer = test_sharding.start(case, **options)
    draw = torch.Generator().manual_seed(2)

    def leave_out(*args: Any) -> None:
        for p, missing in zip(model.values(), torch.rand(len(model), generator=draw) < 1 / 3, strict=True):
            p.grad = None if missing else p.grad

    optimizer.register_step_pre_hook(leave_out)
    with mock.patch.object(optimizer, "_make_plan", wraps=optimizer._make_plan) as plans:
        for number in range(8):
            test_sharding.step(model, optimizer, number)
    return test_sharding.masters(model, optimizer), plans.call_count


def in_processes() -> dict[str, Any]:
    ways = {"sharded": {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}, "copies": {"copies": True}}
    return {(case, way): trained(case, **options) for case in CASES for way, options in ways.items()}


def test_processes_agree_whatever_has_a_gradient(subtests):
    for result in launch(in_processes, 2):
        for (case, way), (weights, plans) in result.items():
            with subtests.test(f"{case}, {way}"):
                expected, plans_alone = trained(case)
                test_sharding.assert_equal(weights, expected)
                assert plans == plans_alone
