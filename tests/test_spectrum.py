"""Singular values."""

import pytest
import torch

from pion_hf.linalg.spectrum import singular_values, spectral_drift

SHAPES = [(9, 9), (14, 6), (6, 14), (2, 5)]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_against_svd(shape):
    w = draw(3, *shape)
    torch.testing.assert_close(singular_values(w), torch.linalg.svdvals(w), atol=1e-12, rtol=1e-9)


def test_spectral_drift_is_relative_to_the_norm():
    before = torch.tensor([[4.0, 2.0], [10.0, 1.0]])
    after = torch.tensor([[4.0, 2.4], [11.0, 1.0]])
    torch.testing.assert_close(spectral_drift(before, after), torch.tensor([0.1, 0.1]))
