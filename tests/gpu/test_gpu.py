"""Every rule on a real device: numbers, waits, kernels, memory and times; skipped without one (`make test-gpu`)."""

from __future__ import annotations

import statistics
import warnings

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pion_hf.linalg.spectrum import singular_values, spectral_drift
from pion_hf.optim import Pion, PionLora, Teon
from tests.conftest import master
from tests.test_pion import RULES
from tests.test_trust import SPECTRA, gradients, matrix, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHAPES = [(256, 256), (320, 192), (192, 320)]
# Of a layer of Llama-3.1-8B: queries and outputs, keys and values, the MLP's three.
LAYER = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
AMBIENT = {"preset": "ambient"}
CONTENDERS = {
    "torch Muon": lambda params: torch.optim.Muon(params, lr=1e-4, weight_decay=0.0),
    "Muon": lambda params: Teon(params, lr=1e-4, stack=1),
    "Pion": Pion,
    "Pion, transported": lambda params: Pion(params, momentum_frame="transported"),
    "natural, ambient": lambda params: Pion(params, **AMBIENT),
    "natural, ambient, not transported": lambda params: Pion(params, direction="natural", metric="ambient"),
    "polar, ambient": lambda params: Pion(params, direction="polar", metric="ambient"),
    "paper": lambda params: Pion(params, preset="paper"),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_spectra_stay_and_steps_are_those_of_a_cpu(rule, shape):
    draw = torch.Generator().manual_seed(0)
    starts = [matrix(shape, kind, draw) for kind in SPECTRA]
    grads = [[g] * len(starts) for g in gradients(shape, 40, 1000.0)]
    options = {**RULES[rule], "lr": 1e-2}
    there, here = ([nn.Parameter(w.to(device)) for w in starts] for device in ("cuda", "cpu"))
    optimizer = Pion(there, **options)
    run(optimizer, there, [[g.cuda() for g in of_step] for of_step in grads[:1]])
    run(Pion(here, **{**options, "generator_dtype": "float32"}), here, grads[:1])
    for p, q, w in zip(there, here, starts, strict=True):
        assert (p.cpu() - q).norm() < 0.05 * (q - w).norm()  # half-precision products
    run(optimizer, there, [[g.cuda() for g in of_step] for of_step in grads[1:]])
    for p, w in zip(there, starts, strict=True):
        assert spectral_drift(singular_values(w), singular_values(p.detach().cpu())) < 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_neighbours_have_little_influence(rule):
    """A library may choose its kernels by the size of a batch: what is left is rounding."""
    starts = [matrix((192, 320), kind, torch.Generator().manual_seed(0)).cuda() for kind in SPECTRA]
    together, alone = [nn.Parameter(w.clone()) for w in starts], [nn.Parameter(starts[0].clone())]
    grads = [g.cuda() for g in gradients((192, 320), 30)]
    options = {**RULES[rule], "lr": 1e-2, "generator_dtype": "float32"}
    run(Pion(together, **options), together, [[g] * len(starts) for g in grads])
    run(Pion(alone, **options), alone, [[g] for g in grads])
    assert (together[0] - alone[0]).norm() < 1e-4 * (alone[0] - starts[0]).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Muon", "Pion", "natural, ambient", "polar, ambient", "paper", "rotate"])
def test_a_step_waits_once(name, dtype):
    params = [nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for shape in SHAPES]
    group = {"params": params, "rule": "pion_lora", "method": "rotate", "unit_step": [1.0] * len(params)}
    optimizer = PionLora([group]) if name == "rotate" else CONTENDERS[name](params)
    for number in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        torch.cuda.set_sync_debug_mode("warn" if number > 2 else "default")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in said) <= 1


@pytest.mark.parametrize("rule", ["default", "natural, ambient"])
@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_same_to_the_bit(products, rule):
    starts = [matrix((192, 320), kind, torch.Generator().manual_seed(0)).cuda() for kind in SPECTRA]
    grads = [[g.cuda()] * len(starts) for g in gradients((192, 320), 10, 1000.0)]
    straight, resumed = ([nn.Parameter(w.clone()) for w in starts] for _ in range(2))
    options = {**RULES[rule], "lr": 1e-2, "generator_dtype": products}
    run(Pion(straight, **options), straight, grads)
    first, second = Pion(resumed, **options), Pion(resumed, **options)
    run(first, resumed, grads[:4])
    second.load_state_dict(first.state_dict())
    run(second, resumed, grads[4:])
    assert all(torch.equal(p, q) for p, q in zip(straight, resumed, strict=True))
    assert master(resumed[0], second).isfinite().all()


def test_what_a_step_costs():
    """Printed (`-s`): the layer's matrices in bfloat16; a mean of the medians of odd and even steps."""
    table = Table("rule", "first step, s", "step, ms", "over torch Muon", "kernels", "peak, GiB")
    usual = None
    for name, build in CONTENDERS.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        params = [nn.Parameter(0.02 * torch.randn(shape, device="cuda", dtype=torch.bfloat16)) for shape in LAYER]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = build(params)
        times = [timed(optimizer) for _ in range(11)]
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            optimizer.step()
            torch.cuda.synchronize()
        kernels = sum(event.count for event in seen.key_averages() if event.device_type.name == "CUDA")
        usual_step = statistics.mean(statistics.median(times[start::2]) for start in (3, 4))
        usual = usual or usual_step
        peak = torch.cuda.max_memory_allocated() / 2**30
        cells = times[0] / 1e3, usual_step, usual_step / usual
        table.add_row(name, *(f"{cell:.2f}" for cell in cells), f"{kernels:,}", f"{peak:.1f}")
        del params, optimizer
    Console(width=110).print(table)


def timed(optimizer: torch.optim.Optimizer) -> float:
    """Milliseconds of a step."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    optimizer.step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
