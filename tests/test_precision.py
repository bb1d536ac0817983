"""Exact masters of half-precision weights: every bit, the nearest weight, long runs, and what is saved."""

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pion_hf.optim import Pion, PionLora, Teon
from pion_hf.optim.masters import join, part, rounded_on_average
from tests.conftest import master

SHAPE = (8, 12)
HALF = [torch.bfloat16, torch.float16]


def pion(p: nn.Parameter, lr: float) -> Pion:
    return Pion([("w", p)], lr=lr)


def ambient(p: nn.Parameter, lr: float) -> Pion:
    return Pion([("w", p)], lr=lr / 10, preset="ambient")


def teon(p: nn.Parameter, lr: float) -> Teon:
    return Teon([("w", p)], lr=lr, stack=1)


def lora(method: str, unit_step: float):
    def build(p: nn.Parameter, lr: float) -> PionLora:
        group = {"params": [("w", p)], "rule": "pion_lora", "method": method, "unit_step": [unit_step]}
        return PionLora([group], lr=lr)

    return build


RULES = {"pion": pion, "ambient": ambient, "teon": teon, "rotate": lora("rotate", 1.0), "grow": lora("orthogonal", 0.2)}
ISOSPECTRAL = ("pion", "ambient", "rotate")  # whose factors are the masters; the others keep what bfloat16 drops


def start(seed: int = 0) -> torch.Tensor:
    """Weights that bfloat16 holds exactly, none so near to zero that a step of 1e-6 would show in it."""
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    return (w.sign() * (0.02 + 0.05 * w.abs())).bfloat16()


def gradients(count: int, seed: int = 1):
    """A direction that persists, with noise, in bfloat16."""
    draw = torch.Generator().manual_seed(seed)
    mean = torch.randn(SHAPE, generator=draw)
    for _ in range(count):
        yield (mean + 0.3 * torch.randn(SHAPE, generator=draw)).bfloat16()


def step(p: nn.Parameter, grad: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    p.grad = grad.to(p.dtype)
    optimizer.step()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


# -- the two halves ---------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_a_bfloat16_weight_and_its_rest_are_every_bit_of_the_master(values):
    x = torch.tensor(values, dtype=torch.float32)
    weight, rest = part(x, torch.bfloat16)
    assert (weight.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(bits(join(weight, rest)), bits(x))


def test_masters_of_every_size_come_back():
    draw = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (100_000,), generator=draw).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 3.4028234e38, -3.4028234e38, 1.00390625])
    x = torch.cat((random[random.isfinite()], special))
    assert torch.equal(bits(join(*part(x, torch.bfloat16))), bits(x))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(min_value=-65504, max_value=65504, width=32), min_size=1, max_size=40))
def test_a_float16_weight_and_its_rest_are_the_master(values):
    x = torch.tensor(values, dtype=torch.float32)
    weight, rest = part(x, torch.float16)
    assert (weight.dtype, rest.dtype) == (torch.float16, torch.float32)
    assert torch.equal(join(weight, rest), x)


@pytest.mark.parametrize("dtype", HALF)
@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(min_value=-60000, max_value=60000, width=32), min_size=1, max_size=40))
def test_the_weight_is_the_nearest(dtype, values):
    x = torch.tensor(values, dtype=torch.float32)
    weight, _ = part(x, dtype)
    error, least = ((x.double() - w.double()).abs() for w in (weight, x.to(dtype)))
    assert (error <= least).all()


@pytest.mark.parametrize("dtype", HALF)
def test_transposed_masters_come_back(dtype):
    """A view of `B` is transposed: its memory is not contiguous."""
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).T
    weight, rest = part(x, dtype)
    assert torch.equal(join(weight, rest), x)
    assert torch.equal(join(weight.T.contiguous().T, rest.contiguous()), x)


# -- in training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["pion", "ambient", "teon", "rotate"])
def test_small_steps_of_a_bfloat16_matrix_follow_the_float32_trajectory(rule):
    lr, steps = 1e-5, 200
    half, full = nn.Parameter(start()), nn.Parameter(start().float())
    rounded = nn.Parameter(start().float())
    first, second, third = (RULES[rule](p, lr) for p in (half, full, rounded))
    for grad in gradients(steps):
        step(half, grad, first)
        step(full, grad, second)
    error, moved = (master(half, first) - full).norm(), (full - start().float()).norm()
    assert error <= 1e-6 * full.norm()
    assert error <= 1e-2 * moved, "the matrix hardly moved: this shows nothing"
    torch.testing.assert_close(half, full.bfloat16(), rtol=2**-7, atol=0)
    assert not torch.equal(half, start()), "the stored weight did not move"
    for grad in gradients(20):  # without masters: every step is rounded away
        step(rounded, grad, third)
        with torch.no_grad():
            rounded.copy_(rounded.bfloat16())
    assert torch.equal(rounded.bfloat16(), start())


@pytest.mark.parametrize("rule", RULES)
def test_a_float16_matrix_follows_the_float32_trajectory(rule):
    half, full = nn.Parameter(start().half()), nn.Parameter(start().half().float())
    first, second = (RULES[rule](p, 1e-5) for p in (half, full))
    for grad in gradients(50):
        grad = grad.half()
        step(half, grad, first)
        step(full, grad, second)
    assert (master(half, first) - full).norm() <= 1e-6 * full.norm()


def test_matrices_of_a_fused_bfloat16_parameter_keep_their_own_masters():
    options = {"rule": "pion", "layout": "transposed;rows=5,7"}
    half, full = nn.Parameter(start()), nn.Parameter(start().float())
    first, second = (Pion([{"params": [("w", p)], **options}], lr=1e-4) for p in (half, full))
    for grad in gradients(30):
        step(half, grad, first)
        step(full, grad, second)
    assert {"u.0", "u.1"} <= set(first.state[half])
    torch.testing.assert_close(master(half, first), full.detach(), rtol=0, atol=1e-6 * full.abs().max().item())


def tensors(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    return [{k: v for k, v in s.items() if isinstance(v, torch.Tensor)} for s in optimizer.state.values()]


@pytest.mark.parametrize("rule", RULES)
def test_saved_state_keeps_its_dtypes_and_resumes_bit_for_bit(rule):
    grads = list(gradients(8))
    straight = nn.Parameter(start())
    whole = RULES[rule](straight, 1e-4)
    for grad in grads:
        step(straight, grad, whole)

    first = nn.Parameter(start())
    half = RULES[rule](first, 1e-4)
    for grad in grads[:4]:
        step(first, grad, half)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    second = nn.Parameter(first.detach().clone())
    resumed = RULES[rule](second, 1e-4)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    if rule in ISOSPECTRAL:
        assert {resumed.state[second][key].dtype for key in ("u.0", "s.0", "v.0")} == {torch.float32}
    else:
        assert resumed.state[second]["rest"].dtype == torch.int16
    assert resumed.state[second]["momentum"].dtype == torch.float32
    assert [{k: v.dtype for k, v in s.items()} for s in tensors(resumed)] == [
        {k: v.dtype for k, v in s.items()} for s in tensors(half)
    ]
    for grad in grads[4:]:
        step(second, grad, resumed)
    assert torch.equal(second, straight)
    assert torch.equal(bits(master(second, resumed)), bits(master(straight, whole)))


@pytest.mark.parametrize(("rule", "entry"), [("pion", "v.0"), ("teon", "rest")])
def test_loading_state_does_not_tie_it_to_the_saved(rule, entry):
    p = nn.Parameter(start())
    optimizer = RULES[rule](p, 1e-3)
    for grad in gradients(2):
        step(p, grad, optimizer)
    saved = optimizer.state_dict()
    kept = saved["state"][0][entry].clone()
    second = nn.Parameter(p.detach().clone())
    resumed = RULES[rule](second, 1e-3)
    resumed.load_state_dict(saved)
    for grad in gradients(2):
        step(second, grad, resumed)
    assert torch.equal(saved["state"][0][entry], kept)
    assert not torch.equal(resumed.state[second][entry], kept)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("rule", RULES)
def test_state_bytes_are_those_held(rule, dtype):
    p, bias = nn.Parameter(start().to(dtype)), nn.Parameter(torch.zeros(9, dtype=dtype))
    optimizer = RULES[rule](p, 1e-3)
    optimizer.add_param_group({"params": [("bias", bias)], "rule": "adamw"})
    planned = optimizer.state_bytes()
    p.grad, bias.grad = torch.randn_like(p), torch.randn_like(bias)
    optimizer.step()
    held = sum(v.numel() * v.element_size() for s in tensors(optimizer) for key, v in s.items() if key != "step")
    assert planned == held
    rest = 0 if rule in ISOSPECTRAL else {torch.bfloat16: 2, torch.float16: 4, torch.float32: 0}[dtype]
    assert sum(v.numel() * v.element_size() for s in tensors(optimizer) for k, v in s.items() if k == "rest") == (
        rest * p.numel()
    )


def test_rounding_loses_nothing_on_average():
    x = torch.randn(3, 40, 60) * torch.logspace(-8, 8, 60)
    rounded = torch.stack([rounded_on_average(x, (number,) * 3).float() for number in range(1, 401)])
    step = x.abs() * 2**-7
    assert ((rounded - x).abs() <= step).all()
    error = (rounded.mean(0) - x) / step
    assert error.abs().max() < 0.15, "of 400 draws"
    assert error.mean().abs() < 2e-3
    # A number that bfloat16 holds stays, and so do what is infinite and what is not a number.
    held = torch.tensor([[0.0, -0.0, 1.0, -3.5, torch.inf, torch.nan]])
    torch.testing.assert_close(rounded_on_average(held, (7,)).float(), held, equal_nan=True, rtol=0, atol=0)


def test_rounding_is_each_matrixs_own():
    x = torch.randn(2, 8, 12)
    together = rounded_on_average(x, (3, 5))
    for i, number in enumerate((3, 5)):
        assert torch.equal(together[i], rounded_on_average(x[i : i + 1], (number,))[0])
    assert not torch.equal(rounded_on_average(x, (3, 3)), rounded_on_average(x, (4, 4)))


@pytest.mark.parametrize(
    "options",
    [{}, {"direction": "natural", "metric": "ambient", "momentum_frame": "transported"}, {"preset": "paper"}],
    ids=str,
)
def test_averages_in_bfloat16_follow_those_in_float32(options):
    """A second moment in bfloat16 that rounds to nearest stands still under beta2 = 0.999."""
    w, target = (torch.randn(24, 40, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    found = {}
    for dtype in ("float32", "bfloat16"):
        p = nn.Parameter(w * 0.05)
        optimizer = Pion([p], lr=3e-3, betas=(0.9, 0.999), state_dtype=dtype, **options)
        draw = torch.Generator().manual_seed(2)
        for _ in range(150):
            p.grad = p.detach() - 0.05 * target + 0.05 * torch.randn(p.shape, generator=draw)
            optimizer.step()
        state = optimizer.state[p]
        assert {v.dtype for k, v in state.items() if k.startswith(("momentum", "second", "lie"))} == {
            getattr(torch, dtype)
        }
        held = sum(v.numel() * v.element_size() for k, v in state.items() if torch.is_tensor(v))
        assert held == Pion([nn.Parameter(w)], state_dtype=dtype, **options).state_bytes()
        found[dtype] = p.detach()
    assert (found["bfloat16"] - found["float32"]).norm() < 0.03 * (found["float32"] - 0.05 * w).norm()
