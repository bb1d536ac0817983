"""The default rule, written out literally in float64: full SVDs, dense n x n matrices, no batching. Slow on purpose."""

import torch
from torch import Tensor


def natural_ambient(
    w: Tensor,
    grads: Tensor,
    *,
    lr: float,
    rms: float = 0.2,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> list[Tensor]:
    """The weights after each step of Pion with direction `natural`, metric `ambient`, scale `rms`, side `alternate`."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    trajectory = []
    for t, g in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        d = (m / (1 - betas[0] ** t)) / (v / (1 - betas[1] ** t) + eps**2)
        if t % 2:
            e = rotation(w, d, lr * rms)
            w, m = w @ e, m @ e
        else:
            e = rotation(w.T, d.T, lr * rms)
            w, m = (w.T @ e).T, (m.T @ e).T
        trajectory.append(w)
    return trajectory


def rotation(w: Tensor, d: Tensor, size: float) -> Tensor:
    """The n x n rotation whose first-order effect on `w` comes nearest to `-d`, scaled to an update of RMS `size`."""
    _, s, vh = torch.linalg.svd(w, full_matrices=True)
    n = w.shape[1]
    s = torch.cat((s, torch.zeros(n - len(s), dtype=w.dtype)))
    skew = vh @ (w.T @ d - d.T @ w) @ vh.T
    sums = s[:, None] ** 2 + s[None, :] ** 2
    a = vh.T @ torch.where(sums > 0, -skew / sums, 0) @ vh
    x = a * size * w.numel() ** 0.5 / (w @ a).norm()
    values, vectors = torch.linalg.eigh(torch.eye(n, dtype=w.dtype) + x @ x / 4)
    return torch.eye(n, dtype=w.dtype) + x @ x / 2 + x @ (vectors * values.clamp_min(0).sqrt()) @ vectors.T
