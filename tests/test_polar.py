"""Orthogonalisation against exact SVDs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pion_hf.linalg.polar import ITERATIONS, POLAR_METHODS, polar_factor, polar_map

METHODS = [method for method in POLAR_METHODS if method != "gram"]  # test_gram.py


def with_spectrum(values: torch.Tensor, width: int, seed: int = 0) -> torch.Tensor:
    """A float64 matrix `(n, width)` with these singular values and random singular vectors."""
    draw = torch.Generator().manual_seed(seed)
    n = len(values)
    u, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=draw))
    v, _ = torch.linalg.qr(torch.randn(width, n, dtype=torch.float64, generator=draw))
    return (u * values) @ v.T


SPECTRA = {
    "geometric": lambda n: torch.logspace(0, -3, n, dtype=torch.float64),
    "linear": lambda n: torch.linspace(1, 1e-3, n, dtype=torch.float64),
    "two levels": lambda n: torch.where(torch.arange(n) < n // 2, 1.0, 1e-3).double(),
    "one small": lambda n: torch.where(torch.arange(n) < n - 1, 1.0, 1e-3).double(),
    "one large": lambda n: torch.where(torch.arange(n) < 1, 1.0, 1e-3).double(),
}


@pytest.mark.parametrize("n", [16, 64, 256])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("size", [1.0, 1e-9, 1e6])
def test_express_is_within_two_percent_of_the_polar_factor_up_to_condition_1e3(spectrum, n, size):
    x = with_spectrum(SPECTRA[spectrum](n), n + 20)
    express = polar_factor((size * x).float(), steps=8).double()
    assert (torch.linalg.svdvals(express) - 1).abs().max() < 0.02
    # In which directions: float32 rounding of the input alone turns the smallest ones by 1e-4.
    assert torch.linalg.matrix_norm(express - polar_factor(x, method="svd"), 2) < 0.03


@pytest.mark.parametrize("spectrum", ["geometric", "linear"])
def test_express_needs_seven_steps_for_spread_spectra(spectrum):
    x = with_spectrum(SPECTRA[spectrum](128), 128).float()
    errors = [(torch.linalg.svdvals(polar_factor(x, steps=k).double()) - 1).abs().max() for k in (5, 7)]
    assert errors[1] < 0.02 < errors[0]


def test_express_in_bfloat16_stays_near_one():
    x = with_spectrum(SPECTRA["geometric"](128), 200).bfloat16()
    values = torch.linalg.svdvals(polar_factor(x, steps=7).double())
    assert (values - 1).abs().max() < 0.02


@pytest.mark.parametrize("shape", [(2, 8), (4, 48), (8, 32)])
def test_express_in_bfloat16_never_leaves_the_interval_of_its_polynomials(shape):
    """With the authors' safety factor five of six thousand of these matrices came out with norms up to 1e10."""
    draw = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(6000, *shape, generator=draw), full_matrices=False)
    s = 10 ** -(torch.rand(s.shape, generator=draw) * torch.rand(6000, 1, generator=draw))
    factors = polar_factor(((u * s.unsqueeze(-2)) @ vh).bfloat16()).float()
    assert (torch.linalg.matrix_norm(factors, 2) < 1.2).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 12, 5), (3, 5, 12), (2, 3, 6, 4)])
def test_a_batch_equals_its_slices(method, shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = polar_factor(x, method=method)
    assert whole.shape == x.shape
    for got, one in zip(whole.flatten(0, -3), x.flatten(0, -3), strict=True):
        torch.testing.assert_close(got, polar_factor(one, method=method), atol=1e-12, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 12), n=st.integers(1, 12), method=st.sampled_from(METHODS), seed=st.integers(0, 10**6))
def test_tall_equals_transposed_wide_and_the_sign_comes_through(m, n, method, seed):
    x = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q = polar_factor(x, method=method)
    torch.testing.assert_close(polar_factor(x.T, method=method), q.T, atol=1e-9, rtol=0)
    torch.testing.assert_close(polar_factor(-x, method=method), -q, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gives_zero(method, dtype):
    if method == "svd":
        dtype = torch.float32
    assert not polar_factor(torch.zeros(2, 4, 6, dtype=dtype), method=method).any()


@pytest.mark.parametrize("steps", [0, 11])
@pytest.mark.parametrize("method", ["express", "quintic"])
def test_steps_out_of_range(method, steps):
    with pytest.raises(ValueError, match=r"polar_steps must lie in 1\.\.10"):
        polar_factor(torch.eye(2), method=method, steps=steps)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="Did you mean 'express'"):
        polar_factor(torch.eye(2), method="expres")


def test_a_skew_matrix_has_a_skew_polar_factor():
    x = torch.randn(2, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for method in METHODS:
        q = polar_factor(x - x.mT, method=method)
        torch.testing.assert_close(q, -q.mT, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", ["svd", "nonsense"])
def test_only_iterations_have_a_map(method):
    with pytest.raises(ValueError, match="iteration of polar_map"):
        polar_map(torch.eye(2), method=method)


@pytest.mark.parametrize("method", ITERATIONS)
def test_the_map_times_the_matrix_is_the_factor(method):
    x = torch.randn(3, 4, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for wide in (x, x[..., :9]):  # on the Gram matrix or not
        torch.testing.assert_close(polar_map(wide, method=method) @ wide, polar_factor(wide, method=method))


def test_products_in_low_precision_give_the_dtype_back():
    x = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(0))
    low = polar_factor(x, dtype="bfloat16")
    assert low.dtype == x.dtype
    torch.testing.assert_close(low, polar_factor(x.bfloat16()).float(), atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40)])
@pytest.mark.parametrize(("method", "low", "high"), [("express", 0.85, 1.15), ("quintic", 0.5, 1.3)])
def test_how_near_the_iterations_come(shape, method, low, high):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    x = (u * torch.logspace(0, -1.5, min(shape))) @ vh
    torch.testing.assert_close(polar_factor(x, method="svd"), u @ vh, atol=2e-5, rtol=0)
    values = torch.linalg.svdvals(polar_factor(x, method=method))
    assert low < values.min() <= values.max() < high
