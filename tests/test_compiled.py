"""`compile=True`: the same steps, one compilation for all of them, and as they are where none is possible."""

import functools
import warnings

import pytest
import torch
from torch import nn

from pion_hf.optim import Pion, Teon, compiled

OPTIMIZERS = {
    "natural": functools.partial(
        Pion, direction="natural", metric="ambient", momentum_frame="transported", generator_dtype="float32"
    ),
    "published": functools.partial(Pion, generator_dtype="float32"),
    "both sides": functools.partial(Pion, direction="adam", side="both", scale="spectral", generator_dtype="float32"),
    "adam": functools.partial(Pion, direction="adam", metric="ambient", scale="none", generator_dtype="float32"),
    "muon": functools.partial(Teon, stack=1, weight_decay=0.1),
    "muon, plain": functools.partial(Teon, stack=1, nesterov=False),
}
SHAPES = [(12, 8), (8, 12), (12, 8), (16, 16)]
OTHERS = [(20, 6), (6, 20), (20, 6), (10, 10)]


@pytest.fixture(autouse=True)
def fresh():
    compiled._compiled.cache_clear()
    compiled._refused.clear()
    torch._dynamo.reset()
    yield
    compiled._compiled.cache_clear()
    compiled._refused.clear()


def train(build, *, compile: bool, steps: int = 6, shapes: list[tuple[int, int]] = SHAPES) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    optimizer = build(params, lr=1e-2, compile=compile)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
    return [p.detach() for p in params]


def assert_same(build) -> None:
    for eager, fast in zip(train(build, compile=False), train(build, compile=True), strict=True):
        torch.testing.assert_close(fast, eager, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "adam" else name for name in OPTIMIZERS]
)
def test_a_compiled_step_is_the_same_step(name, monkeypatch):
    """Traced and made functional as for any compiler, without the minute that one may take."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(OPTIMIZERS[name])
    count = len(graphs)
    assert count > 0
    train(OPTIMIZERS[name], compile=True, steps=9, shapes=OTHERS)
    assert len(graphs) == count, "a new learning rate, step or shape of a known kind must not compile again"


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_compiler_agrees(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(OPTIMIZERS[name])


def test_where_nothing_compiles_a_step_is_as_it_was_and_says_so_once(monkeypatch):
    def refuse(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=refuse))
    with pytest.warns(UserWarning, match="natural_direction could not be compiled, and steps") as caught:
        assert_same(OPTIMIZERS["natural"])
    assert sum("could not be compiled" in str(warning.message) for warning in caught) == 1


def test_memory_that_runs_out_is_no_failed_compilation(monkeypatch):
    def kernel(x):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "compile", lambda kernel, **options: kernel)
    with pytest.raises(torch.OutOfMemoryError):
        compiled.run(kernel, torch.ones(1), compiled=True)


def test_state_does_not_say_how_steps_are_carried_out():
    """A run that was not compiled, or was saved before there was the option, goes on compiled if that is asked for."""
    p = nn.Parameter(torch.randn(6, 4))
    p.grad = torch.randn_like(p)
    optimizer = Pion([p])
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["compile"]
    loaded = Pion([p], compile=True)
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["compile"] is True
