"""Orthogonalisation: the polar factor `U V^T` of a matrix `U diag(s) V^T`, batched over leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

POLAR_METHODS = ("express", "quintic", "svd")

# Polar Express (Amsel et al., arXiv 2505.16932), the optimal odd quintics for singular values in
# [1e-3, 1]; the safety factor 1.01 is applied where they are used, on all but the last.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115952949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
EXPRESS_SAFETY = 1.01
# Muon (Jordan et al., 2024): one quintic, steep at zero; leaves singular values within about [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)


def polar_factor(x: Tensor, *, method: str = "express", steps: int = 5) -> Tensor:
    """The polar factor of `x`, `(..., m, n)`; odd in `x`, so that a skew matrix stays skew.

    method: `express` and `quintic` are `steps` Newton-Schulz-like iterations on the smaller side,
    `svd` is exact. A zero matrix gives zero.

    Raises:
        ValueError: unknown method, or `steps` outside 1..10.
    """
    if method == "svd":
        return _polar_svd(x)
    if method not in POLAR_METHODS:
        raise ValueError(f"polar must be one of {POLAR_METHODS}, got {method!r}")
    if not 1 <= steps <= 10:
        raise ValueError(f"polar_steps must lie in 1..10, got {steps}")
    if x.shape[-2] > x.shape[-1]:
        return polar_factor(x.mT, method=method, steps=steps).mT
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    x = x / norm.clamp_min(torch.finfo(x.dtype).tiny)
    for a, b, c in _coefficients(method, steps):
        gram = x @ x.mT
        x = (
            torch.baddbmm(x, b * gram + c * (gram @ gram), x, beta=a)
            if x.ndim == 3
            else a * x + (b * gram + c * (gram @ gram)) @ x
        )
    return x


def _coefficients(method: str, steps: int) -> list[tuple[float, float, float]]:
    if method == "quintic":
        return [QUINTIC] * steps
    table = [POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)] for i in range(steps)]
    s = EXPRESS_SAFETY
    return [(a / s, b / s**3, c / s**5) for a, b, c in table[:-1]] + table[-1:]


def _polar_svd(x: Tensor) -> Tensor:
    """Exact, on the range of `x`: singular values below 1e-9 of the largest (float64; 1e-6 in float32) are dropped."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    tolerance = 1e-9 if x.dtype == torch.float64 else 1e-6
    kept = (s > tolerance * s[..., :1]).to(x.dtype)
    return (u * kept.unsqueeze(-2)) @ vh
