"""Factors of matrices, tangents, and the way back: against dense generators and decompositions in float64."""

import pytest
import torch

from pion_hf.linalg.rotation import (
    MAX_ANGLE,
    Fixed,
    anchored,
    carried,
    extent,
    factorized,
    product_of,
    retracted,
    skew,
    spectral_norm,
    step_size,
    tangent,
    taylor_change,
)
from tests.reference import generator, polar

SHAPES = [(9, 9), (6, 14), (2, 5), (1, 4)]
SPECTRA = {
    "random": None,
    "down to 1e-6": lambda k: torch.logspace(0, -6, k, dtype=torch.float64),
    "of half rank": lambda k: (torch.arange(k) < (k + 1) // 2) * torch.linspace(1, 0.5, k, dtype=torch.float64),
    "all equal": lambda k: torch.ones(k, dtype=torch.float64),
}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrix(shape, spectrum, *, dtype=torch.float64):
    w = draw(*shape)
    if SPECTRA[spectrum] is not None:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        w = (u * SPECTRA[spectrum](s.shape[-1])) @ vh
    return w.to(dtype)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_factors(shape, spectrum, dtype, tolerance):
    w = matrix((3, *shape), spectrum, dtype=dtype)
    factors, eye = factorized(w), torch.eye(shape[0], dtype=dtype).expand(3, -1, -1)
    torch.testing.assert_close(product_of(factors), w, atol=10 * tolerance, rtol=0)
    torch.testing.assert_close(product_of(factors, transposed=True), w.mT, atol=10 * tolerance, rtol=0)
    torch.testing.assert_close(factors.u @ factors.u.mT, eye, atol=tolerance, rtol=0)
    torch.testing.assert_close(factors.v @ factors.v.mT, eye, atol=tolerance, rtol=0)
    torch.testing.assert_close(factors.s, torch.linalg.svdvals(w), atol=10 * tolerance, rtol=0)


@pytest.mark.parametrize("metric", ["lie", "ambient"])
@pytest.mark.parametrize("long", [True, False])
@pytest.mark.parametrize("spectrum", ["random", "of half rank"])
@pytest.mark.parametrize("shape", [(9, 9), (6, 14)])
def test_tangents_are_those_of_dense_generators(exact_rank, shape, spectrum, long, metric):
    w, d = matrix(shape, spectrum), draw(*shape, seed=1)
    factors = factorized(w)
    a = generator(*((w, d) if long else (w.T, d.T)), metric)
    x = tangent(factors, d, torch.ones(1, 1), long=long, ambient=metric == "ambient")
    # Of directions without weight, turns among themselves are nothing that the matrix would notice.
    noticed = factors.s.unsqueeze(-1)
    torch.testing.assert_close(noticed * x, noticed * (factors.side(long) @ a), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("long", [True, False])
def test_the_reach_of_a_tangent(shape, long):
    w, d = draw(4, *shape), draw(4, *shape, seed=1)
    factors = factorized(w)
    x = tangent(factors, d, torch.ones(1, 1), long=long)
    moved, bound = extent(factors, x)
    after = factors.turned(long, factors.side(long) + x)
    torch.testing.assert_close(moved[..., 0, 0], (product_of(after) - w).flatten(1).norm(dim=1))
    largest = torch.linalg.matrix_norm(x, 2)
    assert (bound[..., 0, 0] >= largest * (1 + 1e-9)).all() or not largest.any()
    assert (bound[..., 0, 0] <= 2 * largest).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_retraction_is_the_polar_factor(shape, dtype, tolerance):
    q = factorized(draw(3, *shape)).v.to(dtype)
    x = draw(3, *shape, seed=1).to(dtype)
    alpha = MAX_ANGLE * torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1) / torch.linalg.matrix_norm(x, 2, keepdim=True)
    if shape[0] == shape[1]:
        x = q @ skew(x)
        alpha = alpha / 2
    else:
        x = x - (x @ q.mT + (x @ q.mT).mT) @ q / 2
        alpha = alpha / 2
    found = retracted(q, x, alpha.to(dtype))
    for i in range(3):
        want = polar((q + alpha.to(dtype) * x)[i].double())
        torch.testing.assert_close(found[i].double(), want, atol=tolerance, rtol=0)
    assert torch.equal(found[0], q[0]), "without a step it stays, to the bit"


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_errors_do_not_add_up(low):
    """Whatever rounding makes of the tangent, and of what was orthogonal before."""
    q = factorized(draw(1, 24, 60, dtype=torch.float32)).v
    q = q + 1e-3 * draw(1, 24, 60, seed=5, dtype=torch.float32)
    for number in range(50):
        x = q @ skew(draw(1, 60, 60, seed=number, dtype=torch.float32))
        alpha = MAX_ANGLE / torch.linalg.matrix_norm(x, 2, keepdim=True)
        q = retracted(q, x.to(low), alpha)
    assert (q @ q.mT - torch.eye(24)).abs().max() < 5e-5


def test_a_step_is_at_most_what_its_bound_allows():
    want, bound = (torch.tensor(values).view(-1, 1, 1) for values in ([0.1, 3.0, 0.0], [1.0, 1.0, 0.0]))
    alpha, clipped = step_size(want, bound)
    assert alpha.flatten().tolist() == [pytest.approx(0.1), MAX_ANGLE, 0.0]
    assert clipped.flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("long", [True, False])
def test_momenta_are_carried_along(long):
    shape, alpha = (6, 14), torch.full((1, 1), 1e-3, dtype=torch.float64)
    w, d, m = (draw(*shape, seed=i) for i in range(3))
    a = generator(*((w, d) if long else (w.T, d.T)), "lie")
    q = factorized(w).side(long)
    change = carried(m, q, q @ a, alpha, long=long)
    torch.testing.assert_close(change, 1e-3 * (m @ a if long else (m.T @ a).T), atol=1e-10, rtol=1e-9)


def test_the_spectral_norm_is_nearly_that_of_the_generator():
    w, d = draw(5, 6, 14), draw(5, 6, 14, seed=1)
    q, a = factorized(w).v, -skew(w.mT @ d)
    ratio = spectral_norm(q, q @ a)[..., 0, 0] / torch.linalg.matrix_norm(a, 2)
    assert ((ratio > 0.9) & (ratio < 1 + 1e-9)).all()


@pytest.mark.parametrize("shape", [(9, 9), (6, 14)])
def test_what_is_fixed_stays(shape):
    w, d, kept = draw(*shape), draw(*shape, seed=1), torch.linalg.qr(draw(shape[1], 2, seed=2)).Q
    stays = torch.linalg.qr(w @ kept).Q
    factors = factorized(w, kept)
    fixed = Fixed(kept, stays, factors.u @ w @ kept)
    torch.testing.assert_close(product_of(factors, fixed), w)
    for long in (True, False):
        x = tangent(factors, d, torch.ones(1, 1), long=long, fixed=fixed)
        alpha = 0.2 / torch.linalg.matrix_norm(x, 2, keepdim=True)
        assert x.norm() > 1e-3
        before = factors.side(long)
        factors = factors.turned(long, anchored(retracted(before, x, alpha), before, fixed, long=long))
        now = product_of(factors, fixed)
        torch.testing.assert_close(now @ kept, w @ kept, atol=1e-12, rtol=0)
        torch.testing.assert_close(torch.linalg.svdvals(now), torch.linalg.svdvals(w))
    assert (product_of(factors, fixed) - w).norm() > 1e-2


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_the_papers_retraction(degree):
    w, x = draw(5, 9), 0.1 * skew(draw(9, 9, seed=1))
    series = sum(torch.linalg.matrix_power(x, j) / torch.tensor(j + 1.0).lgamma().exp() for j in range(degree + 1))
    torch.testing.assert_close(w + taylor_change(w, x, degree), w @ series, atol=1e-6, rtol=0)


def test_skew_is_exact():
    x = draw(7, 7, dtype=torch.float32)
    assert torch.equal(skew(x), -skew(x).mT)
