"""Steps as a GPU takes them, on fake tensors: nothing crosses devices, and nothing is waited for but one value."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from pion_hf import Inputs, Pion, PionLora, RoutedAdamW, Teon

SCRIPT = Path(__file__).parent.parent / "examples" / "benchmarks" / "fake_gpu.py"
SHAPES = ((128, 128), (192, 128), (128, 640))


def lora(params: list[nn.Parameter]) -> PionLora:
    names = [f"layers.{i}.lora" for i in range(len(params))]
    group = {"rule": "pion_lora", "method": "rotate", "unit_step": [1.0] * len(params)}
    return PionLora([{**group, "params": list(zip(names, params, strict=True))}])


class Kept(Inputs):
    """Directions of inputs that nobody watched."""

    def __init__(self) -> None:
        super().__init__(nn.Module(), 16)

    def directions(self, name, n, columns, device, *, half=None):
        return torch.randn(n, columns, device=device)


OPTIMIZERS = {
    "default": Pion,
    "natural, ambient": lambda params: Pion(params, preset="ambient"),
    "adam, ambient": lambda params: Pion(params, direction="adam", metric="ambient", scale="none"),
    "spectral": lambda params: Pion(params, scale="spectral"),
    "spectral, ambient": lambda params: Pion(params, metric="ambient", scale="spectral"),
    "polar": lambda params: Pion(params, direction="polar"),
    "msign": lambda params: Pion(params, direction="msign"),
    "both sides": lambda params: Pion(params, side="both"),
    "lie momentum": lambda params: Pion(params, momentum_frame="lie", second_moment=True),
    "paper": lambda params: Pion(params, preset="paper"),
    "transported": lambda params: Pion(params, momentum_frame="transported"),
    "float32": lambda params: Pion(params, generator_dtype="float32"),
    "keep": lambda params: Pion(params, keep=4, inputs=Kept()),
    "muon": lambda params: Teon(params, stack=1),
    "muon, keep": lambda params: Teon(params, stack=1, keep=4, inputs=Kept()),
    "adamw": RoutedAdamW,
    "adamw, keep": lambda params: RoutedAdamW(params, keep=4, keep_soft=True, inputs=Kept()),
    "lora": lora,
}


@pytest.fixture
def fake_gpu():
    spec = importlib.util.spec_from_file_location("fake_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fake_gpu


def steps(name, counts, dtype=torch.float32):
    """Three steps, each with what ran in it counted; gives their number and the optimizer."""
    params = [nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for shape in SHAPES]
    optimizer = OPTIMIZERS[name](params)
    for number in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        counts.reset()
        optimizer.step()
        yield number, optimizer


@pytest.mark.parametrize(
    ("name", "dtype"),
    [  # of half precision there are masters beside
        *((name, torch.bfloat16) for name in OPTIMIZERS),
        *((name, torch.float32) for name in ("default", "muon", "adamw", "lora")),
    ],
)
def test_a_step_stays_on_the_device(name, dtype, fake_gpu, monkeypatch):
    monkeypatch.setattr(PionLora, "check_matrix", lambda *args: None)  # that there are no zeros no fake tensor knows
    with fake_gpu() as counts:
        for number, optimizer in steps(name, counts, dtype):
            if number:  # the first one makes and checks the state
                assert counts.waits == 1  # whether the gradients are finite
                assert counts.copies == []
            states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
            assert {value.device.type for value in states if value.ndim} <= {"cuda"}


@pytest.mark.parametrize("name", ["default", "natural, ambient", "polar"])
def test_products_are_in_bfloat16(name, fake_gpu):
    """All of them: those of float32 take ten times as long there."""
    with fake_gpu() as counts:
        for number, _ in steps(name, counts):
            if number:
                assert counts.flops("float32") == 0 < counts.flops("bfloat16")
