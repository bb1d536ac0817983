"""What users of torch.optim are used to: switches in param groups, schedulers that cycle momentum, two threads."""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import SWALR

from pion_hf import Muon, Pion, PionLora, RoutedAdamW, Teon, TeonLora
from pion_hf.linalg.products import full_float32
from pion_hf.optim import MatrixOptimizer

LORA = {"method": "orthogonal", "unit_step": [0.5, 2.0]}
BUILDERS: dict[str, Callable[..., MatrixOptimizer]] = {
    "pion": lambda **own: Pion(groups("pion", **own), lr=1e-2),
    "pion, preset": lambda **own: Pion(groups("pion", **own), lr=1e-2, preset="paper"),
    "pion, ambient": lambda **own: Pion(groups("pion", **own), lr=1e-3, preset="ambient"),
    "teon": lambda **own: Teon(groups("teon", stacks=[["a", "b"]], **own), lr=1e-2),
    "muon": lambda **own: Muon(groups("muon", **own), lr=1e-2),
    "pion_lora, rotate": lambda **own: PionLora(groups("pion_lora", **{**LORA, "method": "rotate"}, **own)),
    "pion_lora, orthogonal": lambda **own: PionLora(groups("pion_lora", **LORA, **own)),
    "teon_lora": lambda **own: TeonLora(groups("teon_lora", stacks=[["a", "b"]], **LORA, **own)),
    "adamw_routed": lambda **own: RoutedAdamW(groups("adamw_routed", **own), lr=1e-2),
}


def named(*names: str) -> list[tuple[str, nn.Parameter]]:
    draw = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(6, 9, generator=draw))) for name in names]


def groups(rule: str, *, everywhere: dict[str, Any] | None = None, **own: Any) -> list[dict[str, Any]]:
    """Two matrices, and a vector that AdamW updates."""
    vector = [("c", nn.Parameter(torch.linspace(-1, 1, 7)))]
    keys = everywhere or {}
    return [{"params": named("a", "b"), "rule": rule, **own, **keys}, {"params": vector, "rule": "adamw", **keys}]


def step(optimizer: MatrixOptimizer, seed: int, sign: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in weights(optimizer):
        p.grad = sign * torch.randn(p.shape, generator=draw)
    optimizer.step()


def weights(optimizer: MatrixOptimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def same(first: MatrixOptimizer, second: MatrixOptimizer) -> list[bool]:
    return [torch.equal(p, q) for p, q in zip(weights(first), weights(second), strict=True)]


# -- switches of torch's optimizers -----------------------------------------------------------------------------------

HARMLESS = [
    *itertools.product(("foreach", "fused"), (None, False, True)),
    *itertools.product(("maximize", "capturable", "differentiable", "amsgrad"), (None, False)),
    *itertools.product(("decoupled_weight_decay",), (None, True)),
]
REFUSED = {
    "capturable": (True, "no CUDA graph can hold"),
    "differentiable": (True, "no gradient passes through a step"),
    "amsgrad": (True, "maximum of its second moments"),
    "decoupled_weight_decay": (False, "never a part of the gradient"),
}


@pytest.mark.parametrize("case", BUILDERS)
def test_switches_that_change_nothing_are_taken(case):
    plain = BUILDERS[case]()
    step(plain, 0)
    for key, value in HARMLESS:
        given = BUILDERS[case](everywhere={key: value})
        step(given, 0)
        assert all(same(given, plain)), (key, value)
        BUILDERS[case](everywhere={key: value}).load_state_dict(given.state_dict())
        BUILDERS[case]().load_state_dict(given.state_dict())


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("case", BUILDERS)
def test_switches_that_ask_for_what_is_not_done_are_refused(case, key):
    value, reason = REFUSED[key]
    says = rf"^{key}={value} of a param group: [^\n]*{reason}\. Leave it out\.$"
    with pytest.raises(ValueError, match=says):
        BUILDERS[case](everywhere={key: value})
    optimizer = BUILDERS[case]()
    with pytest.raises(ValueError, match=says):
        optimizer.add_param_group({**optimizer.param_groups[1], "params": [torch.zeros(3)], key: value})
    assert len(optimizer.param_groups) == 2
    state = optimizer.state_dict()
    state["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(state)
    for seed in range(2):  # as those do who change groups themselves
        optimizer.param_groups[0][key] = value
        with pytest.raises(ValueError, match=says):
            step(optimizer, seed)
        del optimizer.param_groups[0][key]
        step(optimizer, seed)


@pytest.mark.parametrize("key", ["foreach", "maximize", "differentiable"])
def test_a_switch_is_a_bool(key):
    with pytest.raises(ValueError, match=f"^{key} must be True or False, got 'no'$"):
        BUILDERS["pion"](everywhere={key: "no"})


@pytest.mark.parametrize("case", BUILDERS)
def test_maximize_goes_the_other_way(case):
    up, down = BUILDERS[case](everywhere={"maximize": True}), BUILDERS[case]()
    for seed in range(3):
        step(up, seed)
        grads = [p.grad.clone() for p in weights(up)]
        step(down, seed, sign=-1.0)
        assert all(torch.equal(p.grad, -g) for p, g in zip(weights(down), grads, strict=True))
        assert all(same(up, down))
    with pytest.raises(ValueError, match=r"does not fit: .*maximize of a was True and is False"):
        BUILDERS[case]().load_state_dict(up.state_dict())


@pytest.mark.parametrize("torchs", [torch.optim.AdamW, torch.optim.SGD])
def test_groups_of_torchs_optimizers(torchs):
    """AdamW's are taken as they are; of others what has no meaning here is named."""
    found = torchs(named("a", "b"), lr=1e-3).param_groups
    if torchs is torch.optim.AdamW:
        step(RoutedAdamW([{**group, "rule": "adamw_routed"} for group in found]), 0)
    else:
        with pytest.raises(ValueError, match="'momentum' is not a known option of RoutedAdamW"):
            RoutedAdamW([{**group, "rule": "adamw_routed"} for group in found])


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("maximise", "maximize"),
        ("diferentiable", "differentiable"),
        ("beta", "betas"),
        ("weigth_decay", "weight_decay"),
    ],
)
@pytest.mark.parametrize("case", BUILDERS)
def test_a_typo_gets_the_right_name(case, key, right):
    with pytest.raises(ValueError, match=f"^'{key}' is not a known option of .*Did you mean '{right}'"):
        BUILDERS[case](everywhere={key: False})


# -- schedulers -------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[..., LRScheduler]] = {
    "one cycle": lambda optimizer, **own: OneCycleLR(optimizer, max_lr=2e-2, total_steps=8, **own),
    "cyclic": lambda optimizer, **own: CyclicLR(optimizer, base_lr=1e-3, max_lr=2e-2, step_size_up=3, **own),
}
BY_MOMENTUM = ("teon", "muon", "teon_lora")


def momentum_of(case: str, group: dict[str, Any]) -> float:
    """What its rule reads."""
    return group["momentum"] if case in BY_MOMENTUM and group["rule"] != "adamw" else group["betas"][0]


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("case", BUILDERS)
def test_the_momentum_that_a_rule_reads_is_cycled(case, kind):
    """It is what a hand that writes rates and momenta into the groups makes of the same gradients."""
    cycled, by_hand, constant = (BUILDERS[case]() for _ in range(3))
    scheduler = SCHEDULERS[kind](cycled, base_momentum=0.5, max_momentum=0.8)
    still = SCHEDULERS[kind](constant, cycle_momentum=False)
    words = [{k: v for k, v in group.items() if isinstance(v, (str, bool))} for group in cycled.param_groups]
    seen = []
    for seed in range(6):
        step(cycled, seed)
        seen.append([momentum_of(case, group) for group in cycled.param_groups])
        for group, given, momentum in zip(by_hand.param_groups, cycled.param_groups, seen[-1], strict=True):
            group.update(lr=given["lr"], betas=(momentum, given["betas"][1]))
            if case in BY_MOMENTUM:
                group["momentum"] = momentum
        step(by_hand, seed)
        step(constant, seed)
        assert all(same(cycled, by_hand))
        scheduler.step()
        still.step()
    assert len({tuple(momenta) for momenta in seen}) > 3
    assert all(0.5 <= momentum <= 0.8 for momentum in itertools.chain(*seen))
    assert not any(same(cycled, constant))
    assert words == [{k: v for k, v in group.items() if isinstance(v, (str, bool))} for group in cycled.param_groups]
    assert cycled.param_groups[1]["betas"][1] == BUILDERS[case]().param_groups[1]["betas"][1]


@pytest.mark.parametrize("kind", [*SCHEDULERS, "swa"])
@pytest.mark.parametrize("case", BUILDERS)
def test_what_schedulers_leave_in_groups_is_taken_and_goes_on(case, kind):
    """Given again, copied, and saved and loaded, without a word."""
    make = SCHEDULERS.get(kind, lambda optimizer: SWALR(optimizer, swa_lr=1e-2, anneal_epochs=3))
    straight = BUILDERS[case]()
    scheduler = make(straight)
    for seed in range(3):
        step(straight, seed)
        scheduler.step()
    resumed, copied = BUILDERS[case](), copy.deepcopy(straight)
    for p, q in zip(weights(resumed), weights(straight), strict=True):
        p.data.copy_(q)
    schedule = make(resumed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
        type(straight)([dict(group) for group in straight.param_groups])
        schedule.load_state_dict(scheduler.state_dict())
    step(copied, 3)
    for seed in range(3, 6):
        for optimizer, its in ((straight, scheduler), (resumed, schedule)):
            step(optimizer, seed)
            its.step()
        assert all(same(straight, resumed))
        assert seed > 3 or all(same(straight, copied))


def test_a_copy_takes_groups_as_its_original_does():
    """AdamW's betas are no default of Teon, whose momentum is another number."""
    for build in (copy.deepcopy, lambda optimizer: optimizer):
        optimizer = build(Teon(named("a"), stack=1, adamw_betas=(0.7, 0.8)))
        optimizer.add_param_group({"params": named("b"), "rule": "adamw"})
        assert [group["betas"] for group in optimizer.param_groups] == [(0.7, 0.8)] * 2


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def products():
    """Where it is said in what products of float32 are computed."""
    place = torch.backends.mkldnn.matmul
    before = place.fp32_precision
    yield place
    place.fp32_precision = before


@pytest.mark.parametrize("before", ["ieee", "tf32", "none"])
def test_two_threads_leave_the_precision_of_products_as_it_was(before, products):
    """They meet inside a step as far as they can; the first to begin is the first to end."""
    products.fp32_precision = before
    inside, found = [threading.Event(), threading.Event()], []
    optimizers = [BUILDERS["pion"](), BUILDERS["muon"]()]
    first_is_done = threading.Event()

    def run(index: int) -> None:
        update = optimizers[index].update

        def waiting(*args: Any, **kwargs: Any) -> torch.Tensor:
            inside[index].set()
            (inside[1] if index == 0 else first_is_done).wait(0.2)
            found.append(products.fp32_precision)
            return update(*args, **kwargs)

        optimizers[index].update = waiting
        step(optimizers[index], 0)
        if index == 0:
            first_is_done.set()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    threads[0].start()
    assert inside[0].wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(10)
    assert set(found) == {"ieee"}
    assert products.fp32_precision == before


def test_full_float32_is_undone_by_an_error(products):
    products.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="within"), full_float32(), full_float32():
        raise RuntimeError("within")
    assert products.fp32_precision == "tf32"
