"""`polar="gram"` without its GPU: what the package is asked for, what is refused, and its arithmetic if installed."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from importlib.machinery import ModuleSpec
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pion_hf.linalg import gram
from pion_hf.linalg.polar import polar_factor
from pion_hf.optim import Pion, PionLora, Teon, TeonLora

INSTALLED = importlib.util.find_spec(gram.PACKAGE) is not None
needs_package = pytest.mark.skipif(not INSTALLED, reason="gram-newton-schulz is not installed")


class FakeNewtonSchulz:
    """The signature of gram-newton-schulz 0.1.6; exact instead of iterated."""

    made: ClassVar[list[FakeNewtonSchulz]] = []

    def __init__(
        self,
        ns_epsilon=1e-7,
        ns_use_kernels=True,
        ns_coefficients=None,
        use_gram_newton_schulz=True,
        gram_newton_schulz_reset_iterations=None,
        compile_kwargs={"fullgraph": True, "mode": "reduce-overhead"},  # noqa: B006, as there
    ):
        self.options = {name: value for name, value in locals().items() if name != "self"}
        self.inputs = []
        self.made.append(self)

    def __call__(self, X):
        assert X.ndim == 3, "of more dimensions the package takes views, which not every tensor has"
        assert not any(size % 8 for size in X.shape[1:]), "the kernels want rows of a multiple of 16 bytes"
        self.inputs.append(X)
        x = X.double() / (X.double().norm(dim=(-2, -1), keepdim=True) + self.options["ns_epsilon"])
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return ((u * (s > 1e-6).unsqueeze(-2)) @ vh).to(X.dtype)


@pytest.fixture
def package(monkeypatch) -> list[FakeNewtonSchulz]:
    """The fake package, as if installed; the objects made of it."""
    module = types.ModuleType(gram.PACKAGE)
    module.__spec__ = ModuleSpec(gram.PACKAGE, loader=None)
    module.GramNewtonSchulz = FakeNewtonSchulz
    monkeypatch.setitem(sys.modules, gram.PACKAGE, module)
    monkeypatch.setattr(FakeNewtonSchulz, "made", [])
    return FakeNewtonSchulz.made


@pytest.fixture
def any_device(monkeypatch) -> None:
    monkeypatch.setattr(gram, "require_gpu", lambda device: None)


@pytest.fixture
def absent(monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == gram.PACKAGE else found(name))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def optimizer(kind: type, **options):
    weight = torch.nn.Parameter(draw(8, 16).float())
    if kind in (Pion, Teon):
        return kind([weight], **({"stack": 1} if kind is Teon else {"direction": "polar"}), **options)
    rule = {PionLora: "pion_lora", TeonLora: "teon_lora"}[kind]
    group = {"rule": rule, "method": "orthogonal", "layout": "", "unit_step": [1.0], "params": [("lora_A", weight)]}
    return kind([group], **({"stack": 1} if kind is TeonLora else {}), **options)


# -- what comes out ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    lead=st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2)]),
    seed=st.integers(0, 10**6),
    transposed=st.booleans(),
)
def test_every_shape_gives_the_polar_factor_of_every_matrix(package, any_device, m, n, lead, seed, transposed):
    x = draw(*lead, n, m, seed=seed).mT if transposed else draw(*lead, m, n, seed=seed)
    got = polar_factor(x, method="gram")
    assert got.shape == x.shape
    torch.testing.assert_close(got, polar_factor(x, method="svd"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_the_dtype_is_kept_and_size_does_not_matter(package, any_device, dtype, size):
    if dtype == torch.float16:
        size = {1.0: 1.0, 1e-30: 1e-3, 1e30: 1e4}[size]
    x = draw(2, 16, 8)
    got = polar_factor((x * size).to(dtype), method="gram")
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), polar_factor(x, method="svd"), atol=2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_gives_zero_and_does_not_disturb_its_neighbours(package, any_device, dtype):
    x = torch.stack([torch.zeros(8, 5), draw(8, 5).float()]).to(dtype)
    got = polar_factor(x, method="gram")
    assert not got[0].any()
    torch.testing.assert_close(got[1].double(), polar_factor(x[1].double(), method="svd"), atol=2e-2, rtol=0)


# -- what goes in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "restarts"), [(1, []), (2, []), (3, [2]), (5, [2]), (6, [2, 5]), (10, [2, 5, 8])])
def test_steps_are_iterations_of_polar_express_with_restarts(package, any_device, steps, restarts):
    polar_factor(draw(2, 8, 16), method="gram", steps=steps)
    (made,) = package
    coefficients = made.options["ns_coefficients"]
    assert len(coefficients) == steps
    assert all(type(c) is float for abc in coefficients for c in abc)  # the kernels take others for tensors
    values = torch.logspace(-2, 0, 200, dtype=torch.float64)
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    assert (values - 1).abs().max() < {5: 0.15, 6: 0.02, 10: 1e-9}.get(steps, 1.01)
    assert {name: value for name, value in made.options.items() if name != "ns_coefficients"} == {
        "ns_epsilon": 1e-7,
        "ns_use_kernels": True,
        "use_gram_newton_schulz": True,
        "gram_newton_schulz_reset_iterations": restarts,
        "compile_kwargs": None,
    }


def test_a_stack_of_layers_is_one_matrix_and_equal_shapes_are_one_call(package, any_device):
    params = [torch.nn.Parameter(draw(16, 24, seed=i).float()) for i in range(4)]
    names = [f"layer {i}" for i in range(4)]
    group = {"params": list(zip(names, params, strict=True)), "rule": "teon", "stacks": [names[:2], names[2:]]}
    exact = [torch.nn.Parameter(p.detach().clone()) for p in params]
    same = {**group, "params": list(zip(names, exact, strict=True))}
    optimizers = Teon([group], polar="gram"), Teon([same], polar="svd")
    for i, (p, q) in enumerate(zip(params, exact, strict=True)):
        p.grad = q.grad = draw(16, 24, seed=10 + i).float()
    for each in optimizers:
        each.step()
    assert [tuple(x.shape) for made in package for x in made.inputs] == [(2, 16, 48)]
    for p, q in zip(params, exact, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [Pion, Teon, PionLora, TeonLora])
def test_every_optimizer_steps_as_with_the_exact_polar_factor(package, any_device, kind):
    results = []
    for polar in ("gram", "svd"):
        one = optimizer(kind, polar=polar, lr=0.1)
        (weight,) = one.param_groups[0]["params"]
        before = weight.detach().clone()
        weight.grad = draw(8, 16, seed=1).float()
        one.step()
        results.append(weight.detach() - before)
    assert len(package) == 1
    assert results[1].abs().max() > 1e-2
    torch.testing.assert_close(*results, atol=2e-6, rtol=0)


def test_wide_lora_factors_do_not_fall_back_to_other_iterations(package, any_device):
    weight = torch.nn.Parameter(torch.zeros(8, 80))
    group = {
        "rule": "teon_lora",
        "method": "orthogonal",
        "layout": "",
        "unit_step": [1.0],
        "params": [("lora_A", weight)],
    }
    weight.grad = draw(8, 80).float()
    TeonLora([group], lr=1.0, stack=1, polar="gram").step()
    assert len(package) == 1
    torch.testing.assert_close(weight.detach(), -polar_factor(weight.grad, method="svd"), atol=1e-4, rtol=0)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Pion, Teon, PionLora, TeonLora])
def test_without_the_package_the_constructor_says_so(absent, kind):
    with pytest.raises(ValueError, match=r"polar='gram' .* pip install 'pion-hf\[gram\]', or set polar='express'\.$"):
        optimizer(kind, polar="gram")
    optimizer(kind, polar="express")


def test_without_the_package_the_function_says_so(absent):
    with pytest.raises(ValueError, match="gram-newton-schulz, which is not installed"):
        polar_factor(torch.eye(8), method="gram")


def test_on_a_cpu_the_first_step_says_so_and_leaves_the_weights(package):
    one = optimizer(Teon, polar="gram")
    (weight,) = one.param_groups[0]["params"]
    before, weight.grad = weight.detach().clone(), torch.ones(8, 16)
    with pytest.raises(ValueError, match=r"^polar='gram' needs an NVIDIA GPU .* are on cpu: set polar='express'\.$"):
        one.step()
    assert torch.equal(weight, before)
    assert not package


@pytest.mark.parametrize(
    ("capability", "hip", "refused"),
    [
        ((8, 0), None, "compute capability 8.0"),
        ((8, 9), None, "compute capability 8.9"),
        ((9, 0), None, None),
        ((10, 0), None, None),
        ((12, 0), None, None),
        ((9, 4), "6.4", "an AMD GPU"),
    ],
)
def test_which_gpus(monkeypatch, capability, hip, refused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    device = torch.device("cuda", 0)
    if refused is None:
        gram.require_gpu(device)
    else:
        with pytest.raises(ValueError, match=f"the matrices are on (a GPU of )?{refused}"):
            gram.require_gpu(device)


# -- the package itself, where it is installed; its plain products run on a CPU ---------------------------------------


@pytest.fixture
def plain_products(monkeypatch, any_device):
    from gram_newton_schulz import gram_newton_schulz as source

    monkeypatch.setattr(source, "_make_kernel_backend", lambda: source._TORCH_BACKEND)


@needs_package
def test_the_fake_has_the_signature_of_the_package():
    from gram_newton_schulz import GramNewtonSchulz

    theirs, ours = (inspect.signature(cls).parameters.values() for cls in (GramNewtonSchulz, FakeNewtonSchulz))
    assert [(p.name, p.default) for p in theirs] == [(p.name, p.default) for p in ours]


@needs_package
@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (100, 60), (30, 31)])
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_the_package_comes_near_the_polar_factor(plain_products, shape, size):
    u, _, vh = torch.linalg.svd(draw(3, *shape), full_matrices=False)
    x = (u * torch.logspace(0, -2, min(shape), dtype=torch.float64)) @ vh
    for steps, tolerance in ((5, 0.2), (7, 0.04), (10, 0.04)):
        got = polar_factor((size * x).float(), method="gram", steps=steps).double()
        assert torch.linalg.matrix_norm(got - u @ vh, 2).max() < tolerance, steps


@needs_package
@pytest.mark.parametrize("shape", [(2, 8), (4, 48), (8, 32), (8, 8)])
@pytest.mark.parametrize("steps", [5, 8, 10])
def test_the_package_never_leaves_the_interval_of_its_polynomials(plain_products, shape, steps):
    u, s, vh = torch.linalg.svd(draw(3000, *shape), full_matrices=False)
    s = 10 ** -(3 * torch.rand(s.shape, generator=torch.Generator().manual_seed(0)))
    factors = polar_factor(((u * s.unsqueeze(-2)) @ vh).float(), method="gram", steps=steps)
    assert torch.linalg.matrix_norm(factors, 2).max() < (1.3 if steps == 5 else 1.05)


@pytest.mark.parametrize("kind", [Pion, Teon])
def test_its_state_is_foretold_without_a_gpu(package, kind):
    options = {"direction": "polar", "metric": "lie"} if kind is Pion else {"stack": 1}
    p = torch.nn.Parameter(torch.randn(6, 4))
    assert kind([p], polar="gram", **options).state_bytes() == kind([p], **options).state_bytes() >= p.nbytes
