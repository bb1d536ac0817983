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
            w, m = rotated(w, m, d, lr * rms)
        else:
            w, m = (x.T for x in rotated(w.T, m.T, d.T, lr * rms))
        trajectory.append(w)
    return trajectory


def rotated(w: Tensor, m: Tensor, d: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """`w` and its momentum after the n x n rotation that comes nearest to `-d`, scaled to an update of RMS `size`.

    A side of at least one and a half times the other turns by the polar factor of `V^T (I + x)`, and carries the
    momentum along at first order.
    """
    n = w.shape[1]
    x = generator(w, d)
    x = x * size * w.numel() ** 0.5 / (w @ x).norm()
    if n >= 1.5 * len(w):
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        left, _, right = torch.linalg.svd(vh + vh @ x, full_matrices=False)
        return u @ torch.diag(s) @ left @ right, m + m @ x
    values, vectors = torch.linalg.eigh(torch.eye(n, dtype=w.dtype) + x @ x / 4)
    e = torch.eye(n, dtype=w.dtype) + x @ x / 2 + x @ (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return w @ e, m @ e


def generator(w: Tensor, d: Tensor) -> Tensor:
    """The skew n x n `A` whose `w A` is nearest to `-d`."""
    _, s, vh = torch.linalg.svd(w, full_matrices=True)
    n = w.shape[1]
    s = torch.cat((s, torch.zeros(n - len(s), dtype=w.dtype)))
    skew = vh @ (w.T @ d - d.T @ w) @ vh.T
    sums = s[:, None] ** 2 + s[None, :] ** 2
    return vh.T @ torch.where(sums > 0, -skew / sums, 0) @ vh
