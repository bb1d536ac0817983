"""Pion with the polar retraction, written out literally in float64: SVDs, dense n x n generators, no batching."""

import torch
from torch import Tensor


def trajectory(
    w: Tensor,
    grads: Tensor,
    *,
    lr: float,
    direction: str = "gradient",
    metric: str = "lie",
    momentum_frame: str = "ambient",
    side: str = "alternate",
    scale: str = "rms",
    second_moment: bool = False,
    rms: float = 0.2,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    max_angle: float = 0.25,
) -> list[Tensor]:
    """The weights after each step."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    averages = {"in": 0.0, "out": 0.0}
    squares = {"in": 0.0, "out": 0.0}
    weights = []
    for t, g in enumerate(grads, start=1):
        sides = {"alternate": ("in",) if t % 2 else ("out",), "both": ("in", "out")}.get(side, (side,))
        if momentum_frame == "lie":
            generators = {}
            for s in ("in", "out"):
                x, y = seen(w, s), seen(g, s)
                k = x.T @ y - y.T @ x
                averages[s] = betas[0] * averages[s] + (1 - betas[0]) * k
                squares[s] = betas[1] * squares[s] + (1 - betas[1]) * k**2
                generators[s] = -averages[s] / (squares[s].sqrt() + eps) if second_moment else -averages[s]
            generators = {s: generators[s] for s in sides}
        else:
            m = betas[0] * m + (1 - betas[0]) * g
            first, second = m / (1 - betas[0] ** t), None
            if second_moment or direction in ("adam", "natural"):
                v = betas[1] * v + (1 - betas[1]) * (m if second_moment else g) ** 2
                second = v / (1 - betas[1] ** t)
            if direction == "natural":
                d = first / (second + eps**2)
            elif direction == "adam":
                d = first / (second.sqrt() + eps)
            elif direction == "polar":
                d = polar(m)
            else:
                d = m / (v.sqrt() + eps) if second_moment else m
            generators = {s: generator(seen(w, s), seen(d, s), metric) for s in sides}
        if direction == "msign":
            generators = {s: polar(a) for s, a in generators.items()}
        moved = sum(seen(seen(w, s) @ a, s) for s, a in generators.items()).norm()
        largest = max(torch.linalg.matrix_norm(a, 2) for a in generators.values())
        alpha = {"rms": lr * rms * w.numel() ** 0.5 / moved, "none": lr, "spectral": lr / largest}[scale]
        xs = {s: a * alpha for s, a in generators.items()}
        tangents = [torch.linalg.svd(seen(w, s), full_matrices=False)[2] @ x for s, x in xs.items()]
        assert max(torch.linalg.matrix_norm(x, 2) for x in tangents) < max_angle / 2, "a step that may be clipped"
        for s, x in xs.items():
            w = seen(rotated(seen(w, s), x), s)
            m = m + seen(seen(m, s) @ x, s) if momentum_frame == "transported" else m
        weights.append(w)
    return weights


def seen(x: Tensor, side: str) -> Tensor:
    """The frame in which a rotation of `side` acts from the right."""
    return x if side == "in" else x.T


def rotated(w: Tensor, x: Tensor) -> Tensor:
    """`w` with its right singular vectors moved along `x` and made orthogonal again."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u @ torch.diag(s) @ polar(vh + vh @ x)


def polar(x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u[:, s > 1e-9 * s[0]] @ vh[s > 1e-9 * s[0]]


def generator(w: Tensor, d: Tensor, metric: str) -> Tensor:
    """The skew n x n `A` of a direction: `-skew(w^T d)`, or the one whose `w A` is nearest to `-d`."""
    skew = w.T @ d - d.T @ w
    if metric == "lie":
        return -skew
    _, s, vh = torch.linalg.svd(w, full_matrices=True)
    s = torch.cat((s.where(s > 1e-12 * s[0], 0), torch.zeros(w.shape[1] - len(s), dtype=w.dtype)))
    sums = s[:, None] ** 2 + s[None, :] ** 2
    a = torch.where(sums > 0, -(vh @ skew @ vh.T) / sums, 0)
    return vh.T @ a @ vh
