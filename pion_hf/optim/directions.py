"""What a step should do, and the generator of the rotation that does it: of whole matrices and of LoRA factors.

`state` is that of a batch, as in `MatrixOptimizer.update`; matrices are `(b, m, n)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pion_hf.linalg.ambient import ambient_generator
from pion_hf.linalg.polar import polar_factor
from pion_hf.linalg.precision import product_dtype
from pion_hf.linalg.rotation import Generator, generator, without
from pion_hf.linalg.spectrum import Basis
from pion_hf.optim import compiled
from pion_hf.optim.base import average, buffer

# Steps between fresh decompositions of the carried singular bases; in between they only collect rounding errors.
BASIS_REFRESH = 500


def direction_of(
    grad: Tensor,
    state: dict[str, Tensor],
    *,
    kind: str,
    betas: tuple[float, float],
    eps: float,
    step: int,
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
        scalars = beta1, beta2, 1 - beta1**step, 1 - beta2**step, eps
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


def generator_of(
    weight: Tensor,
    direction: Tensor,
    *,
    side: str,
    basis: Basis | None = None,
    hold: float = 0.0,
    tolerance: float = 0.0,
    dense: bool | None = None,
    dtype: str = "float32",
    fixed: Tensor | None = None,
) -> Generator:
    """Of the rotation on `side` that stands for `direction`: in the ambient metric of `basis`, or without in `lie`.

    hold, tolerance: see `ambient_generator`; dense: see `generator`, of `lie` only; dtype: of the products that form it
    (see `product_dtype`); fixed: directions it leaves alone, `(b, n, j)` or for `side="out"` `(b, m, j)`.
    """
    w, d = seen_from(weight, side), seen_from(direction, side)
    if fixed is not None:
        d = without(d, fixed)
    low, rows = product_dtype(weight, dtype), 2 * w.shape[-2]  # the weight and its momentum
    if basis is None:
        return generator(w.to(low), d.to(low), rows=rows, dense=dense, dtype=w.dtype, fixed=fixed)
    right = side == basis_side(weight)
    return ambient_generator(
        w, d, basis, right=right, hold=hold, tolerance=tolerance, rows=rows, dtype=low, fixed=fixed
    )


def seen_from(x: Tensor, side: str) -> Tensor:
    """The frame in which a rotation of `side`, `in` or `out`, acts from the right."""
    return x if side == "in" else x.mT


def basis_side(weight: Tensor) -> str:
    """The smaller side, whose singular vectors `singular_basis` returns."""
    return "in" if weight.shape[-2] >= weight.shape[-1] else "out"
