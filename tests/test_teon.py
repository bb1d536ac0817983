"""TEON and Muon: reference trajectories, torch's own Muon, stacks, and what is refused."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from pion_hf.optim import Teon

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "pion_teon_cases.json").read_text())
EXACT = {"polar": "svd"}


@pytest.fixture(scope="module")
def trajectories():
    return load_file(DATA / "pion_teon_trajectories.safetensors")


def stacked(weights, **options) -> tuple[list[nn.Parameter], Teon]:
    """One stack of all `weights`."""
    params = [nn.Parameter(w.clone()) for w in weights]
    names = [f"layer {i}" for i in range(len(params))]
    group = {"params": list(zip(names, params, strict=True)), "rule": "teon", "stacks": [names]}
    return params, Teon([group], stack=len(params), **options)


def step(params: list[nn.Parameter], grads, optimizer: torch.optim.Optimizer) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else grad.to(p.dtype, copy=True)
    optimizer.step()


@pytest.mark.parametrize("case", range(len(CASES["teon_configs"])))
@pytest.mark.parametrize("shape", range(len(CASES["teon_shapes"])))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_reference_trajectories(trajectories, shape, case, dtype, tolerance):
    config = CASES["teon_configs"][case]
    options = {"momentum": config["mu"], **{k: config[k] for k in ("lr", "nesterov", "scale")}}
    params, optimizer = stacked(trajectories[f"teon.{shape}.weight"].to(dtype), **options, **EXACT)
    expected = trajectories[f"teon.{shape}.{case}.trajectory"]
    for grads, want in zip(trajectories[f"teon.{shape}.grads"], expected, strict=True):
        step(params, grads, optimizer)
        got = torch.stack([p.detach() for p in params]).double()
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize(("scale", "theirs"), [("original", "original"), ("rms", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_stacks_of_one_are_torchs_muon(shape, scale, theirs, nesterov):
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=draw) * 0.05
    ours, peer = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    common = {"lr": 1e-2, "weight_decay": 0.1, "nesterov": nesterov}
    first = Teon([ours], stack=1, polar="quintic", polar_dtype="bfloat16", scale=scale, **common)
    second = torch.optim.Muon([peer], adjust_lr_fn=theirs, **common)
    for _ in range(20):
        grads = [torch.randn(shape, generator=draw)]
        step([ours], grads, first)
        step([peer], grads, second)
        torch.testing.assert_close(ours, peer, atol=1e-6, rtol=1e-6)
    assert (ours - w).norm() > 0.1 * w.norm(), "the matrix hardly moved: this shows nothing"


def test_the_papers_scale_is_torchs_original_for_tall_matrices():
    w = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    moved = []
    for scale in ("paper", "original"):
        p = nn.Parameter(w.clone())
        step([p], [w], Teon([p], lr=1e-2, stack=1, scale=scale))
        moved.append(p.detach())
    torch.testing.assert_close(*moved)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(2, 20), n=st.integers(2, 20), k=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_a_stack_steps_as_far_as_a_lone_matrix(m, n, k, seed):
    grads = torch.randn(k, m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    params, optimizer = stacked(torch.zeros(k, m, n, dtype=torch.float64), lr=1e-2, rms=0.2, **EXACT)
    step(params, grads, optimizer)
    rms = torch.stack([p.detach() for p in params]).square().mean().sqrt().item()
    assert math.isclose(rms, 1e-2 * 0.2, rel_tol=1e-9)


def test_the_stack_is_orthogonal_side_by_side_and_its_slices_are_not():
    grads = torch.randn(2, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    params, optimizer = stacked(torch.zeros(2, 6, 10, dtype=torch.float64), lr=1.0, scale="original", **EXACT)
    step(params, grads, optimizer)
    wide = torch.cat([p.detach() for p in params], dim=1)
    torch.testing.assert_close(wide @ wide.T, torch.eye(6, dtype=torch.float64))
    assert (params[0] @ params[0].T - torch.eye(6, dtype=torch.float64)).norm() > 0.1


def test_equal_gradients_share_a_stack_equally():
    grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    params, optimizer = stacked(torch.zeros(3, 6, 10), lr=1e-2)
    step(params, [grad] * 3, optimizer)
    torch.testing.assert_close(params[0], params[1])
    torch.testing.assert_close(params[0], params[2])


def test_matrices_in_no_stack_are_updated_alone():
    grads = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(torch.zeros(6, 4, dtype=torch.float64)) for _ in range(3)]
    group = {"params": list(zip("abc", params, strict=True)), "rule": "teon", "stacks": [["a", "b"]]}
    step(params, grads, Teon([group], lr=1e-2, **EXACT))
    alone = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    step([alone], grads[2:], Teon([alone], lr=1e-2, stack=1, **EXACT))
    pair, optimizer = stacked(torch.zeros(2, 6, 4, dtype=torch.float64), lr=1e-2, **EXACT)
    step(pair, grads[:2], optimizer)
    for got, want in zip(params, [*pair, alone], strict=True):
        torch.testing.assert_close(got, want)


def test_a_stack_cuts_fused_parameters_and_stacks_experts_by_index():
    draw = torch.Generator().manual_seed(0)
    fused = [torch.randn(10, 6, dtype=torch.float64, generator=draw) for _ in range(2)]
    experts = [torch.randn(3, 4, 6, dtype=torch.float64, generator=draw) for _ in range(2)]
    params = {n: nn.Parameter(torch.zeros_like(g)) for n, g in zip("abcd", fused + experts, strict=True)}
    names = list(params.items())
    optimizer = Teon(
        [
            {"params": names[:2], "rule": "teon", "layout": "rows=4,6", "stacks": [["a[0]", "b[0]"]]},
            {"params": names[2:], "rule": "teon", "stacks": [["c", "d"]]},
        ],
        lr=1e-2,
        **EXACT,
    )
    step(list(params.values()), fused + experts, optimizer)
    for rows, stack in ((slice(0, 4), True), (slice(4, 10), False)):
        grads = [g[rows] for g in fused]
        if stack:
            want, peer = stacked([torch.zeros_like(g) for g in grads], lr=1e-2, **EXACT)
        else:
            want = [nn.Parameter(torch.zeros_like(g)) for g in grads]
            peer = Teon(want, lr=1e-2, stack=1, **EXACT)
        step(want, grads, peer)
        for name, w in zip("ab", want, strict=True):
            torch.testing.assert_close(params[name][rows], w.detach())
    for e in range(3):
        want, peer = stacked(torch.zeros(2, 4, 6, dtype=torch.float64), lr=1e-2, **EXACT)
        step(want, [g[e] for g in experts], peer)
        for name, w in zip("cd", want, strict=True):
            torch.testing.assert_close(params[name][e], w.detach())


def test_a_layer_without_a_gradient_is_left_out_of_its_stack_and_comes_back():
    draw = torch.Generator().manual_seed(0)
    params, optimizer = stacked(torch.zeros(2, 5, 5), lr=1e-2)
    step(params, [torch.randn(5, 5, generator=draw), None], optimizer)
    assert params[0].any()
    assert not params[1].any()
    step(params, torch.randn(2, 5, 5, generator=draw), optimizer)
    assert params[1].any()
    assert all(torch.isfinite(p).all() for p in params)


def test_weight_decay_is_decoupled_and_acts_on_matrices():
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    plain, decayed = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    step([plain], [w], Teon([plain], lr=1e-2, stack=1))
    step([decayed], [w], Teon([decayed], lr=1e-2, stack=1, weight_decay=0.5))
    torch.testing.assert_close(decayed.detach(), plain.detach() - 1e-2 * 0.5 * w)


def test_vectors_beside_matrices_go_to_adamw():
    matrix, bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    optimizer = Teon([("weight", matrix), ("bias", bias)], stack=1)
    assert [(g["rule"], len(g["params"])) for g in optimizer.param_groups] == [("teon", 1), ("adamw", 1)]


def params_and(group: dict, shapes=((4, 4), (4, 4))) -> list[dict]:
    named = [(f"p{i}", nn.Parameter(torch.randn(shape))) for i, shape in enumerate(shapes)]
    return [{"params": named, "rule": "teon", **group}]


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (params_and({}), {}, "the group names no stacks"),
        ([nn.Parameter(torch.eye(3))], {}, 'use pion_hf.param_groups(model, "teon")'),
        ([nn.Parameter(torch.eye(3))], {"stack": 0}, "stack must be a whole number of layers, 1 (Muon) or more, got 0"),
        ([nn.Parameter(torch.eye(3))], {"stack": 1.5}, "stack must be a whole number"),
        (params_and({"stacks": [["p0", "p1"]]}, ((4, 4), (4, 5))), {}, "p0 (4, 4), p1 (4, 5)"),
        (params_and({"stacks": [["p0", "p2"]]}), {}, "the group has no matrix 'p2'"),
        (params_and({"stacks": [["p0", "p1"]]}), {"stack": 3}, "are 2 matrices, stack is 3"),
        (params_and({"stacks": [["p0", "p0"]]}), {}, "p0 is in 2 places"),
        (params_and({"stacks": [["p0", "p1"]], "stack": 2}), {"stack": 3}, "the groups hold stacks of 2"),
        (params_and({"rule": "muon", "stacks": [["p0", "p1"]]}), {}, "a group of rule 'muon' has no stacks"),
        ([nn.Parameter(torch.eye(3))], {"stack": 1, "polar_steps": 0}, "polar_steps must be in 1..10, got 0"),
        ([nn.Parameter(torch.eye(3))], {"stack": 1, "polar_steps": 11}, "polar_steps must be in 1..10, got 11"),
        ([nn.Parameter(torch.eye(3))], {"stack": 1, "polar": "expres"}, "Did you mean 'express'"),
        ([nn.Parameter(torch.eye(3))], {"stack": 1, "scale": "papr"}, "Did you mean 'paper'"),
        ([nn.Parameter(torch.eye(3))], {"stack": 1, "momentum": 1.0}, "momentum must be in [0, 1), got 1.0"),
        ([nn.Parameter(torch.eye(3))], {"stack": 1, "rms": 0}, "rms must be above 0"),
    ],
)
def test_bad_input_names_the_right_form(params, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Teon(params, **options)
