"""What every step promises: a matrix moves as it would alone, its spectrum stays, and a resumed run is the same."""

import itertools

import pytest
import torch
from torch import nn

from pion_hf.linalg.spectrum import singular_values, spectral_drift
from pion_hf.optim import Pion, Teon
from tests.conftest import master
from tests.test_pion import RULES

SHAPES = [(16, 16), (24, 10), (10, 24)]
PRECISIONS = ["float32", "bfloat16"]
# The rules of the spectrum test, and others that the matrices of a batch could have in common more than they should.
BATCHED = {
    **{name: options for name, options in RULES.items() if "generator_dtype" not in options},
    "gradient, ambient": {"metric": "ambient"},
    "spectral scale, gradient, ambient": {"scale": "spectral", "metric": "ambient"},
    "polar by SVD, ambient": {"direction": "polar", "polar": "svd", "metric": "ambient"},
    "paper": {"preset": "paper"},
}
SPECTRA = {
    "random": None,
    "down to 1e-6": lambda k: torch.logspace(0, -6, k),
    "of half rank": lambda k: (torch.arange(k) < k // 2).float(),
    "all equal": torch.ones,
}


def matrix(shape: tuple[int, int], spectrum: str, draw: torch.Generator) -> torch.Tensor:
    w = torch.randn(shape, generator=draw) * 0.05
    if SPECTRA[spectrum] is None:
        return w
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    return ((u * SPECTRA[spectrum](len(s)).double()) @ vh).float()


def neighbours(shape: tuple[int, int]) -> list[torch.Tensor]:
    """Of every kind, and of other sizes."""
    draw = torch.Generator().manual_seed(1)
    sizes = [1.0, 1.0, 1.0, 1.0, 1e6, 1e-3]
    return [
        matrix(shape, kind, draw) * size for kind, size in zip([*SPECTRA, "random", "all equal"], sizes, strict=True)
    ]


def gradients(shape: tuple[int, int], steps: int, jump: float = 1.0) -> list[torch.Tensor]:
    """From leading to trailing directions of entries, noise, and jumps up and down."""
    draw, found = torch.Generator().manual_seed(2), []
    for t in range(steps):
        g = torch.randn(shape, generator=draw)
        g[t * (shape[0] - 1) // steps] *= 10
        found.append(1e-2 * g * (jump if t % 17 == 9 else 1 / jump if t % 23 == 11 else 1.0))
    return found


def run(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], grads: list[list[torch.Tensor]]) -> None:
    for of_step in grads:
        for p, g in zip(weights, of_step, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize(
    ("shape", "products"), [((16, 16), "bfloat16"), ((24, 10), "bfloat16"), ((10, 24), "float32")], ids=str
)
@pytest.mark.parametrize("rule", BATCHED)
def test_neighbours_have_no_influence(rule, shape, products):
    """To the bit, and so in batches of any size and order."""
    options = {"lr": 1e-2, "generator_dtype": products, **BATCHED[rule]}
    starts = neighbours(shape)
    of_all = [gradients(shape, 12, 1.0 + 999.0 * (i == 1)) for i in range(len(starts))]
    together = [nn.Parameter(w.clone()) for w in starts]
    run(Pion(together, **options), together, list(zip(*of_all, strict=True)))
    for i in (0, 1, 3):
        alone = [nn.Parameter(starts[i].clone())]
        run(Pion(alone, **options), alone, [[g] for g in of_all[i]])
        assert torch.equal(alone[0], together[i])
        assert not torch.equal(alone[0], starts[i])
    split = [nn.Parameter(w.clone()) for w in reversed(starts)]
    run(Pion(split, batch_elements=2 * starts[0].numel(), **options), split, list(zip(*reversed(of_all), strict=True)))
    for p, q in zip(split, reversed(together), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("products", PRECISIONS)
def test_neighbours_have_no_influence_on_muon(products):
    starts = neighbours((10, 24))
    of_all = [gradients((10, 24), 6) for _ in starts]
    together = [nn.Parameter(w.clone()) for w in starts]
    options = {"lr": 1e-2, "stack": 1, "polar_dtype": products}
    run(Teon(together, **options), together, list(zip(*of_all, strict=True)))
    alone = [nn.Parameter(starts[1].clone())]
    run(Teon(alone, **options), alone, [[g] for g in of_all[1]])
    assert torch.equal(alone[0], together[1])


@pytest.mark.parametrize(
    ("lr", "dtype", "products"),
    [
        (1e-5, torch.float32, "float32"),
        (1e-5, torch.bfloat16, "bfloat16"),
        (1e-2, torch.float32, "bfloat16"),
        (1e-2, torch.bfloat16, "float32"),
        (0.3, torch.float32, "float32"),
        (0.3, torch.bfloat16, "bfloat16"),
    ],
)
@pytest.mark.parametrize("rule", ["default", "both sides", "natural, ambient", "polar, ambient", "adam, ambient"])
def test_the_spectrum_stays(rule, lr, dtype, products):
    """At any conditioning, with gradients that jump and such as do not; every two of rate and precisions together."""
    draw, steps = torch.Generator().manual_seed(0), 60
    cases = list(itertools.product(SHAPES, SPECTRA, (1.0, 1000.0)))
    weights = [nn.Parameter(matrix(shape, kind, draw).to(dtype)) for shape, kind, _ in cases]
    before = [singular_values(p.detach().float()) for p in weights]
    optimizer = Pion(weights, **{**RULES[rule], "lr": lr, "generator_dtype": products})
    grads = {(shape, jump): gradients(shape, steps, jump) for shape, _, jump in cases}
    run(optimizer, weights, [[grads[shape, jump][t] for shape, _, jump in cases] for t in range(steps)])
    for p, values in zip(weights, before, strict=True):
        assert spectral_drift(values, singular_values(master(p, optimizer))) < 1e-4


def test_long_steps_are_clipped_and_counted():
    p = nn.Parameter(matrix((10, 24), "random", torch.Generator().manual_seed(0)))
    optimizer = Pion([p], lr=1e-3, scale="none")
    run(optimizer, [p], [[g] for g in gradients((10, 24), 3)])
    assert optimizer.clipped_steps == 0
    p.grad = torch.full_like(p, 1e9)
    before = p.detach().clone()
    optimizer.step()
    assert optimizer.clipped_steps == 1
    assert 0.01 < (p - before).norm() / before.norm() < 0.3
