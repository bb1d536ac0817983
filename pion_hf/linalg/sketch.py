"""Leading eigenvectors of a second moment `C = sum_t x_t x_t^T` of which only a thin product is kept.

`Y = C T` with a fixed random test matrix `T`, `(n, r)`, holds enough of `C` (Nystroem's method; Halko, Martinsson and
Tropp, arXiv 0909.4061): `C` is about `Y (T^T Y)^+ Y^T`, and nothing `n x n` is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of a sketch beyond the directions that are wanted of it.
OVERSAMPLING = 16


def test_matrix(n: int, directions: int, device: torch.device) -> Tensor:
    """`(n, r)` random orthonormal columns, the same at every call: `r = directions + OVERSAMPLING`, `n` at most.

    Random numbers span the same, but `T^T C T` then loses small eigenvalues to rounding where `r` is nearly `n`.
    """
    draws = torch.Generator().manual_seed(0)
    numbers = torch.randn(n, min(n, directions + OVERSAMPLING), generator=draws, dtype=torch.float64)
    return torch.linalg.qr(numbers).Q.float().to(device)


def sketch_of(x: Tensor, test: Tensor) -> Tensor:
    """What rows `x`, `(t, n)`, add to a sketch: `x^T x T`, `(n, r)`."""
    return x.mT @ (x @ test)


def leading_directions(sketch: Tensor, test: Tensor, count: int, *, half: int | None = None) -> Tensor:
    """The `count` leading eigenvectors of `C`, orthonormal columns `(n, count)`; 0 beyond those that `C` shows.

    half: that of an eigenvalue `s` has the length `sqrt(s / (s + s_half))` instead of 1: `s_half`, the eigenvalue of so
    many directions, is kept by half.
    """
    rounding = torch.finfo(sketch.dtype).eps
    y, t = sketch.double(), test.double()
    core = t.mT @ y
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    inverse_root = torch.where(values > rounding * values[-1].abs(), values.clamp_min(0).rsqrt(), 0)
    # `C` is about `F F^T`, whose eigenvectors `F^T F` has; what it squares away is below the rounding of float32.
    f = y @ (vectors * inverse_root)
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(f.mT @ f))
    s = values.clamp_min(0).sqrt()
    u = f @ (vectors / s.clamp_min(torch.finfo(s.dtype).tiny))
    lengths = (s > rounding**0.5 * s[0]).to(s.dtype)
    if half is not None:
        values = s.square()
        sums = (values + values[min(half, len(s)) - 1]).clamp_min(torch.finfo(s.dtype).tiny)
        lengths = lengths * (values / sums).sqrt()
    found = (u * lengths)[:, :count].to(sketch.dtype)
    return torch.nn.functional.pad(found, (0, count - found.shape[1]))
