"""Values read on the host: those of the last step where reading would wait for the device, and what that changes.

A CPU stands in for a GPU: `reading_waits` says yes, so a step takes the decisions it takes there.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pion_hf import Pion, PionLora, Teon
from pion_hf.linalg import ambient, precision, reading, rotation, series
from pion_hf.linalg.reading import GROWTH, LateReader, Reader
from pion_hf.linalg.rotation import Generator
from pion_hf.linalg.spectrum import singular_values, spectral_drift
from pion_hf.optim.base import MatrixOptimizer

SHAPES = ((24, 24), (40, 20), (20, 40), (24, 20))
RULES = {
    "default": {},
    "gradient, lie": {"direction": "gradient", "metric": "lie"},
    "gradient, lie, bfloat16": {"direction": "gradient", "metric": "lie", "generator_dtype": "bfloat16"},
    "default, bfloat16": {"generator_dtype": "bfloat16"},
    "adam, hold": {"direction": "adam", "scale": "none", "hold": 0.1},
    "polar, spectral": {"direction": "polar", "metric": "lie", "scale": "spectral"},
    "both sides": {"direction": "gradient", "metric": "lie", "side": "both"},
    "paper": {"preset": "paper"},
}
LR = 2e-3


@pytest.fixture
def device_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a value waits, as on a GPU."""
    for module in (reading, rotation, series, ambient):
        monkeypatch.setattr(module, "reading_waits", lambda x: True)


@pytest.fixture
def gpu_like(device_like: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And products are split where they would be float32's."""
    for module in (precision, rotation, ambient):
        monkeypatch.setattr(module, "splitting_pays", lambda device: True)


def matrices(seed: int = 0) -> list[nn.Parameter]:
    draws = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draws)) for shape in SHAPES for _ in range(2)]


def ready(optimizer: MatrixOptimizer, params: list[nn.Parameter], rates: list[float]) -> Iterator[int]:
    """For a step at every rate: gradients that repeat but for noise."""
    draws = torch.Generator().manual_seed(1)
    lasting = [torch.randn(p.shape, generator=draws) for p in params]
    for number, rate in enumerate(rates):
        for p, g in zip(params, lasting, strict=True):
            p.grad = g + 0.5 * torch.randn(p.shape, generator=draws)
        for group in optimizer.param_groups:
            group["lr"] = rate
        yield number


def trained(rates: list[float], options: dict) -> list[Tensor]:
    params = matrices()
    optimizer = Pion(params, **options)
    for _ in ready(optimizer, params, rates):
        optimizer.step()
    return [p.detach() for p in params]


class Waits(TorchDispatchMode):
    """Counts values that are read, of tensors that were not on their way already."""

    def __init__(self, optimizer: MatrixOptimizer) -> None:
        super().__init__()
        readers = optimizer._readers.values()
        self.arriving = [sent.value for reader in readers for sent in reader._last.values()]
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += not any(args[0] is value for value in self.arriving)
        return func(*args, **(kwargs or {}))


def lora_factors(params: list[nn.Parameter], **options: str) -> PionLora:
    names = [f"layers.{i}.lora" for i in range(len(params))]
    group = {"rule": "pion_lora", "method": "rotate", "reach": [1.0] * len(params)}
    return PionLora([{**group, "params": list(zip(names, params, strict=True))}], **options)


OPTIMIZERS = {name: lambda params, o=options: Pion(params, **o) for name, options in RULES.items()}
OPTIMIZERS |= {"cayley": lambda params: Pion(params, retraction="cayley")}
OPTIMIZERS |= {"muon": lambda params: Teon(params, stack=1), "lora": lora_factors}
OPTIMIZERS |= {"lora, root": lambda params: lora_factors(params, retraction="root")}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_waits_once(name: str, device_like: None) -> None:
    """For whether the gradients are finite; all else it wants to know is on its way since the last step of a side."""
    params = matrices()
    optimizer = OPTIMIZERS[name](params)
    counts = []
    for number in ready(optimizer, params, [LR] * 6):
        if number < 4:  # the first steps make the state, and know nothing of either side
            optimizer.step()
            continue
        with Waits(optimizer) as waits:
            optimizer.step()
        counts.append(waits.count)
    assert counts == [1, 1]


class Copies(TorchDispatchMode):
    """Counts copies from one device to another."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.count += out.device != args[0].device
        return out


def test_an_angle_is_estimated_without_a_copy_from_the_host() -> None:
    """On a GPU that there need not be: fake tensors know their device and nothing else."""
    with FakeTensorMode(), Copies() as copies:
        core = torch.randn(2, 8, 8, device="cuda")
        assert Generator(core).spectral_norm().device == core.device
        assert copies.count == 0
        torch.randn(1, 8).to(core)  # what would be seen
        assert copies.count == 1


def test_mixed_gradients_are_read_once() -> None:
    params = [nn.Parameter(torch.randn(8, 8).to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    optimizer = Pion(params)
    for p in params:
        p.grad = torch.randn_like(p)
    with Waits(optimizer) as waits:
        assert optimizer._look() == (True, [])
    assert waits.count == 1
    params[1].grad[3, 3] = torch.inf
    assert optimizer._look() == (False, [])


@pytest.mark.parametrize("name", RULES)
def test_late_values_change_nothing_but_rounding(name: str, request: pytest.FixtureRequest) -> None:
    """With a warmup from zero and a rate that jumps by two, which is what late values have to bear."""
    rates = [0.0, LR / 4, LR / 2, LR, LR, LR, 2 * LR, 2 * LR, LR, LR / 2, LR / 8, LR / 64]
    at_once = trained(rates, RULES[name])
    request.getfixturevalue("device_like")
    late = trained(rates, RULES[name])
    low = "bfloat16" in name  # what is rounded to 8 bits is rounded again for every other split into terms
    for a, b, start in zip(at_once, late, matrices(), strict=True):
        moved = (a - start).norm()
        assert moved > 1e-4 * start.norm()
        assert (a - b).norm() < (1e-3 if low else 2e-5) * moved


@pytest.mark.parametrize("name", sorted(set(RULES) - {"paper"}))
@pytest.mark.parametrize("like", ["device_like", "gpu_like"])
def test_late_values_keep_the_spectrum(name: str, like: str, request: pytest.FixtureRequest) -> None:
    """Over 300 steps whose rate rises and falls by 1.5 from one to the next."""
    request.getfixturevalue(like)
    options = RULES[name]
    rates = [LR * (1.5 if number % 4 < 2 else 1.0) for number in range(300)]
    for start, after in zip(matrices(), trained(rates, options), strict=True):
        assert (after - start).norm() > 0.05 * start.norm()
        assert spectral_drift(singular_values(start), singular_values(after)) < 5e-6


def test_large_angles_are_read_at_once(device_like: None) -> None:
    """A step so large that its series would not do as it is, in every batch and on both sides."""
    for start, after in zip(matrices(), trained([0.5] * 6, {}), strict=True):
        assert (after - start).norm() > 0.2 * start.norm()
        assert spectral_drift(singular_values(start), singular_values(after)) < 1e-5


def test_a_cpu_reads_at_once() -> None:
    late = LateReader()
    assert [late.read("angle", torch.tensor(float(x))) for x in (1, 2, 3)] == [1, 2, 3]
    assert late.waited == 0
    assert Reader().read("angle", torch.tensor(4.0)) == 4


def test_late_values_are_those_of_the_last_time(device_like: None) -> None:
    late = LateReader()
    late.lr = 0.1
    assert late.read("angle", torch.tensor(1.0)) == 1  # nothing known: waited for
    assert late.read("angle", torch.tensor(5.0)) == GROWTH * 1
    late.lr = 0.2
    assert late.read("angle", torch.tensor(7.0)) == pytest.approx(GROWTH * 2 * 5)
    assert late.read("gram", torch.tensor(3.0), order=2) == 3  # a key of its own
    late.lr = 0.1
    assert late.read("gram", torch.tensor(0.0), order=2) == pytest.approx(GROWTH**2 * 3 / 4)
    assert late.read("constant", torch.tensor(3.0), order=0) == 3
    assert late.read("constant", torch.tensor(9.0), order=0) == 3
    assert late.waited == 3


def test_a_rate_of_zero_tells_nothing(device_like: None) -> None:
    late = LateReader()
    late.lr = 0.0
    assert late.read("angle", torch.tensor(0.0)) == 0
    late.lr = 0.1
    assert late.read("angle", torch.tensor(2.0)) == 2
    assert late.waited == 2


def test_a_value_of_zero_bounds_nothing(device_like: None) -> None:
    """As of layers without a gradient before the output behind them has moved."""
    late = LateReader()
    late.lr = 0.1
    assert late.read("angle", torch.tensor(0.0)) == 0
    assert late.read("angle", torch.tensor(2.0)) == 2
    assert late.read("angle", torch.tensor(3.0)) == GROWTH * 2


def test_a_value_is_kept_as_it_was(device_like: None) -> None:
    """Its memory may be used for something else before it is read."""
    late, value = LateReader(), torch.tensor(1.0)
    late.read("angle", value)
    late.read("angle", value)
    value.fill_(100.0)
    assert late.read("angle", value) == GROWTH
