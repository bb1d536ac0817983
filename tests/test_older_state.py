"""Optimizer state that versions before 0.13 saved: what of it goes on, and what is refused with a line."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pion_hf import Muon, Pion, PionLora, Teon, param_groups
from tests.conftest import toy_llama
from tests.test_load_state import named, step

Optimizer = torch.optim.Optimizer
RULES = {
    "ambient": {"preset": "ambient"},
    "default": {},
    "polar, lie": {"direction": "polar"},
    "paper": {"preset": "paper"},
}
# What is kept of a matrix, beside averages of gradients.
OF_WEIGHTS = ("u.0", "s.0", "v.0")


def pion(**options: Any) -> Pion:
    """Matrices of every form, and a vector."""
    matrices = {"params": [*named("a", (6, 9)), *named("b", (9, 6)), *named("c", (6, 6))], "rule": "pion"}
    return Pion([matrices, {"params": [("bias", torch.nn.Parameter(torch.ones(6)))], "rule": "adamw"}], 1e-3, **options)


def as_of_0_12(state: dict[str, Any]) -> dict[str, Any]:
    """Two options more, one by its older name, and fingerprints that were summed otherwise."""
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group |= {"momentum": group.pop("momentum_frame"), "hold": 0.0, "rank_tolerance": 0.02}
    for entries in state["state"].values():
        if "fingerprint" in entries:
            entries["fingerprint"] += 1
    return state


def as_of_0_11(state: dict[str, Any], retraction: str = "root") -> dict[str, Any]:
    """Without factors, but an orthogonal basis that is none of them; averages in float32 are no option yet."""
    state = as_of_0_12(state)
    for group in state["param_groups"]:
        del group["state_dtype"]
        group["retraction"] = retraction if group["retraction"] == "polar" else group["retraction"]
    for entries in state["state"].values():
        if all(key in entries for key in OF_WEIGHTS):
            u, s, _ = (entries.pop(key) for key in OF_WEIGHTS)
            entries |= {"basis.0": u, "values.0": s}
    return state


def as_of_0_10(state: dict[str, Any]) -> dict[str, Any]:
    state = as_of_0_11(state, "cayley")
    for entries in state["state"].values():
        entries.pop("fingerprint", None)
    return state


def weights(optimizer: Optimizer) -> list[Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def resumed(build: Callable[[], Optimizer], state: dict[str, Any], of: list[Tensor]) -> Optimizer:
    optimizer = build()
    with torch.no_grad():
        for p, q in zip(weights(optimizer), of, strict=True):
            p.copy_(q)
    optimizer.load_state_dict(state)
    return optimizer


VERSIONS = {"0.12": as_of_0_12, "0.11": as_of_0_11, "0.10": as_of_0_10}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("rule", RULES)
def test_rotations_go_on_with_their_averages(rule, version):
    straight = pion(**RULES[rule])
    for seed in range(3):
        step(straight, seed)
    state, start = VERSIONS[version](straight.state_dict()), [p.clone() for p in weights(straight)]
    optimizer = resumed(lambda: pion(**RULES[rule]), state, start)
    assert [g.keys() for g in optimizer.param_groups] == [g.keys() for g in straight.param_groups]
    assert [{**g, "params": 0} for g in optimizer.param_groups] == [{**g, "params": 0} for g in straight.param_groups]
    averages = ("momentum", "second", "lie_in.0", "lie_out.0", "exp_avg", "exp_avg_sq", "step")
    for (key, entries), p in zip(state["state"].items(), straight.state, strict=True):
        kept = {name: torch.as_tensor(value) for name, value in entries.items() if name in averages}
        found = optimizer.state[optimizer.param_groups[key // 3]["params"][key % 3]]
        assert kept
        assert all(torch.equal(torch.as_tensor(found[name]), value) for name, value in kept.items())
        assert kept.keys() >= {name for name in straight.state[p] if name in averages}
    for seed in range(3, 6):
        step(straight, seed)
        step(optimizer, seed)
    for p, q, w in zip(weights(optimizer), weights(straight), start, strict=True):
        assert (p - q).norm() <= 1e-3 * (q - w).norm() > 0  # factors of the weight as it is, in float32
    assert [s.keys() for s in optimizer.state.values()] == [s.keys() for s in straight.state.values()]


@pytest.mark.parametrize("rule", RULES)
def test_without_a_change_of_fingerprints_they_go_on_to_the_bit(rule):
    straight = pion(**RULES[rule])
    for seed in range(3):
        step(straight, seed)
    state = as_of_0_12(straight.state_dict())
    for entries, now in zip(state["state"].values(), straight.state.values(), strict=True):
        entries |= {"fingerprint": now["fingerprint"]} if "fingerprint" in now else {}
    optimizer = resumed(lambda: pion(**RULES[rule]), state, weights(straight))
    for seed in range(3, 6):
        step(straight, seed)
        step(optimizer, seed)
    assert all(torch.equal(p, q) for p, q in zip(weights(optimizer), weights(straight), strict=True))


def test_its_numbers_go_on_and_a_warning_says_so():
    """RMS and learning rate belong together: both are those of before."""
    optimizer = pion(direction="natural", metric="ambient", momentum_frame="transported")
    step(optimizer, 0)
    with pytest.warns(UserWarning, match=r"replace those given: rms of a is 0\.2, not 2\.0"):
        loaded = resumed(lambda: pion(preset="ambient"), as_of_0_12(optimizer.state_dict()), weights(optimizer))
    assert [(g["rms"], g["lr"]) for g in loaded.param_groups] == [(0.2, 1e-3)] * 2


def refused(build: Callable[[], Optimizer], state: dict[str, Any]) -> str:
    optimizer = build()
    with pytest.raises(ValueError, match=r"^the saved optimizer state ") as error:
        optimizer.load_state_dict(state)
    assert "\n" not in str(error.value)
    assert not optimizer.state, "half loaded"
    return str(error.value)


@pytest.mark.parametrize("version", VERSIONS)
def test_state_of_the_old_default_names_pion_ambient(version):
    optimizer = pion(direction="natural", metric="ambient", momentum_frame="transported")
    step(optimizer, 0)
    for options in ({}, {"preset": "paper"}):
        said = refused(lambda options=options: pion(**options), VERSIONS[version](optimizer.state_dict()))
        assert "direction of a was 'natural' and is 'gradient', metric of a was 'ambient' and is 'lie'" in said
        assert "It is that of optim='pion_ambient', as optim='pion' was called before 0.13." in said
    assert "pion_ambient" not in refused(lambda: pion(side="in"), pion().state_dict())


@pytest.mark.parametrize("version", VERSIONS)
def test_held_directions_are_gone(version):
    optimizer = pion(preset="ambient")
    step(optimizer, 0)
    state = VERSIONS[version](optimizer.state_dict())
    for group in state["param_groups"]:
        group["hold"] = 0.1
    said = refused(lambda: pion(preset="ambient"), state)
    assert re.search(r"was made with hold=0\.1, which is gone since 0\.13: load the weights only", said)


@pytest.mark.parametrize("others_first", [False, True])
def test_factors_of_adapters_begin_afresh(others_first):
    """Their learning rates are of another scale now."""

    def build() -> PionLora:
        factors = {"params": named("a", (4, 9)), "rule": "pion_lora", "method": "rotate", "unit_step": [1.0]}
        groups = [factors, {"params": named("b"), "rule": "adamw"}]
        return PionLora(groups[::-1] if others_first else groups, lr=1e-3)

    optimizer = build()
    step(optimizer, 0)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group |= {"momentum": group.pop("momentum_frame"), "rank_tolerance": 0.02}
        if "unit_step" in group:
            group["reach"] = group.pop("unit_step")
    for entries in state["state"].values():
        entries.pop("unit_step.0", None)
    said = refused(build, state)
    assert "state of rule 'pion_lora' is of a version before 0.13" in said
    assert "start with fresh state, at a rate that is right for AdamW" in said


def test_adapters_of_0_15_go_on():
    """Groups said `begun` of factors whose adapter has an effect."""

    def build() -> PionLora:
        return PionLora([{"params": named("a", (4, 9)), "rule": "pion_lora", "method": "rotate", "unit_step": [1.0]}])

    before = build()
    step(before, 0)
    state = copy.deepcopy(before.state_dict())
    state["param_groups"][0]["begun"] = ["a"]
    after = resumed(build, state, weights(before))
    assert after.param_groups[0]["effective"] == ["a"]
    assert "begun" not in after.param_groups[0]
    for optimizer in (before, after):
        step(optimizer, 1)
    assert all(torch.equal(p, q) for p, q in zip(weights(after), weights(before), strict=True))


def test_a_run_of_muon_goes_on():
    """It was TEON with stacks of one."""
    groups = [param_groups(toy_llama(), "muon", lr=1e-2) for _ in range(2)]
    before = Teon(groups[0], stack=1, weight_decay=0.1)
    for seed in range(3):
        step(before, seed)
    state = copy.deepcopy(before.state_dict())
    after = resumed(lambda: Muon(groups[1], weight_decay=0.1), state, weights(before))
    for seed in range(3, 6):
        step(before, seed)
        step(after, seed)
    assert all(torch.equal(p, q) for p, q in zip(weights(after), weights(before), strict=True))
