"""What a step should do, if no spectrum had to stay: of whole matrices and of LoRA factors.

`state` is that of a batch, as in `MatrixOptimizer.update`; matrices are `(b, m, n)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pion_hf.linalg.polar import polar_factor
from pion_hf.optim import compiled
from pion_hf.optim.base import average, buffer
from pion_hf.optim.batches import Step


def direction_of(
    grad: Tensor,
    state: dict[str, Tensor],
    *,
    kind: str,
    betas: tuple[float, float],
    eps: float,
    step: Step,
    polar: str = "express",
    polar_steps: int = 5,
    polar_dtype: str = "float32",
    second_moment: bool = False,
    compile: bool = False,
) -> Tensor:
    """`D`, the step one would take without the constraint, `(b, m, n)`; updates the averages in `state`.

    kind: `adam`, `natural`, `polar`, or the momentum itself, which `second_moment` divides by the root of one. polar,
    polar_steps, polar_dtype: see `polar_factor`.
    """
    beta1, beta2 = betas
    if kind in ("adam", "natural"):
        kernel = _adam_direction if kind == "adam" else _natural_direction
        buffers = buffer(state, "momentum", grad), buffer(state, "second", grad)
        scalars = beta1, beta2, step.weight(beta1, grad), step.weight(beta2, grad), eps
        return compiled.run(kernel, grad, *buffers, *scalars, compiled=compile)
    momentum = average(state, "momentum", grad, beta1)
    if kind == "polar":
        return polar_factor(momentum, method=polar, steps=polar_steps, dtype=polar_dtype)
    if second_moment:
        return momentum / (average(state, "second", momentum.square(), beta2).sqrt() + eps)
    return momentum


def _moments(grad: Tensor, momentum: Tensor, second: Tensor, beta1: float, beta2: float) -> None:
    momentum.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)


def _adam_direction(
    grad: Tensor, momentum: Tensor, second: Tensor, beta1: float, beta2: float, bias1: float, bias2: float, eps: float
) -> Tensor:
    _moments(grad, momentum, second, beta1, beta2)
    root = _unseen_apart(second / bias2).sqrt_().add_(eps).mul_(bias1)
    return torch.div(momentum, root, out=root)


def _natural_direction(
    grad: Tensor, momentum: Tensor, second: Tensor, beta1: float, beta2: float, bias1: float, bias2: float, eps: float
) -> Tensor:
    _moments(grad, momentum, second, beta1, beta2)
    unbiased = _unseen_apart(second * (bias1 / bias2)).add_(eps**2 * bias1)
    return torch.div(momentum, unbiased, out=unbiased)


def _unseen_apart(second: Tensor) -> Tensor:
    """Infinite where no gradient ever was: a rotation carries momentum there too, and over `eps` it would be all."""
    return torch.threshold_(second, 0.0, math.inf)


def seen_from(x: Tensor, side: str) -> Tensor:
    """The frame in which a rotation of `side`, `in` or `out`, acts from the right."""
    return x if side == "in" else x.mT
