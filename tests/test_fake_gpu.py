"""Steps as a GPU takes them, on fake tensors: nothing crosses devices, and nothing is waited for but one value."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from pion_hf import Pion, PionLora, RoutedAdamW, Teon

SCRIPT = Path(__file__).parent.parent / "examples" / "benchmarks" / "fake_gpu.py"
SHAPES = ((64, 64), (96, 64), (64, 96), (64, 320), (320, 64))
LIE = {"metric": "lie"}


def lora(params: list[nn.Parameter]) -> PionLora:
    names = [f"layers.{i}.lora" for i in range(len(params))]
    group = {"rule": "pion_lora", "method": "rotate", "reach": [1.0] * len(params)}
    return PionLora([{**group, "params": list(zip(names, params, strict=True))}])


OPTIMIZERS = {
    "default": Pion,
    "adam, hold": lambda params: Pion(params, direction="adam", scale="none", hold=0.1),
    "spectral": lambda params: Pion(params, scale="spectral"),
    "gradient, lie": lambda params: Pion(params, direction="gradient", **LIE),
    "polar, lie": lambda params: Pion(params, direction="polar", **LIE),
    "msign": lambda params: Pion(params, direction="msign", **LIE),
    "both sides": lambda params: Pion(params, direction="gradient", side="both", **LIE),
    "lie momentum": lambda params: Pion(params, direction="gradient", momentum="lie", second_moment=True, **LIE),
    "paper": lambda params: Pion(params, preset="paper"),
    "cayley": lambda params: Pion(params, retraction="cayley", direction="gradient", **LIE),
    "float32": lambda params: Pion(params, generator_dtype="float32"),
    "muon": lambda params: Teon(params, stack=1),
    "adamw": RoutedAdamW,
    "lora": lora,
}


@pytest.fixture
def fake_gpu():
    spec = importlib.util.spec_from_file_location("fake_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fake_gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_stays_on_the_device(name, dtype, fake_gpu, monkeypatch):
    monkeypatch.setattr(PionLora, "check_matrix", lambda *args: None)  # that there are no zeros no fake tensor knows
    read = {"angle": 0.1, "gram": 0.05, "effect": 1e-3, "smallest": 0.05}.__getitem__
    with fake_gpu(read) as counts:
        params = [nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for shape in SHAPES]
        optimizer = OPTIMIZERS[name](params)
        for step in range(4):
            for p in params:
                p.grad = torch.randn_like(p)
            counts.reset()
            optimizer.step()
            if step:  # the first one makes and checks the state
                assert counts.waits == 1  # whether the gradients are finite
                assert counts.copies == []
        states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        assert {value.device.type for value in states if value.ndim} <= {"cuda"}


def test_products_are_in_bfloat16(fake_gpu):
    """What is left to float32 are a few vectors: its products take ten times as long there."""
    read = {"angle": 0.1, "gram": 0.05, "effect": 1e-3, "smallest": 0.05}.__getitem__
    for rule in ("default", "gradient, lie", "polar, lie"):
        with fake_gpu(read) as counts:
            params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]
            optimizer = OPTIMIZERS[rule](params)
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn_like(p)
                counts.reset()
                optimizer.step()
            assert 0 < counts.flops("float32") < 0.1 * counts.flops("bfloat16")
