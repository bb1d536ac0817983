"""Fresh weights of the right size for rotations, which keep whatever spectrum a matrix starts with."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pion_hf.optim.blocks import Layout, split
from pion_hf.routing.table import routing_table


@torch.no_grad()
def spectral_init_(model: nn.Module, scale: float = 1.0) -> int:
    """Rescale, in place, every trainable matrix of a hidden layer to `||W||_2 = scale * sqrt(out / in)`.

    This is the spectral condition of arXiv 2310.17813 (muP): under it a layer neither shrinks nor grows its input as
    width changes. Pion's rotations never change a spectrum, so a matrix that starts too small stays so for ever.
    Fused projections, experts and transposed weights are scaled as the matrices they hold. Directions stay as they
    are; embeddings, heads, norms and biases are left alone.

    Args:
        model: on a real device. scale: the gain of every layer, 1 in the paper.

    Returns:
        The number of matrices.

    Raises:
        ValueError: a scale that is not positive; a zero, non-finite or meta-device matrix (nothing is changed then); a
            model without matrices in hidden layers.
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"the scale of spectral_init must be positive, got {scale}")
    # All factors before the first change: an error leaves the model as it was.
    factors = [(matrix, _factor(name, matrix, scale)) for name, matrix in _hidden_matrices(model)]
    for matrix, factor in factors:
        matrix.copy_(matrix.double() * factor)
    return len(factors)


def _hidden_matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`(name, (heads, d, in))` of every matrix: a view of the parameter, of `heads * d` output rows."""
    for route in routing_table(model, "pion", zeros=()).matrices:
        p = route.parameter
        views = split(p.detach(), Layout.parse(route.layout))
        for part, view in enumerate(views):
            for expert, matrix in enumerate(view):
                indices = [f"[{expert}]"] * (p.ndim == 3) + [f"[{part}]"] * (len(views) > 1)
                yield route.name + "".join(indices), matrix


def _factor(name: str, matrix: Tensor, scale: float) -> float:
    if matrix.is_meta:
        raise ValueError(f"{name} is on the meta device: give the model its weights before spectral_init_.")
    matrix = matrix.flatten(0, 1).double()
    if not matrix.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite.")
    norm = torch.linalg.matrix_norm(matrix, ord=2).item()
    if norm == 0:
        raise ValueError(f"{name} is zero: no factor gives it a spectral norm.")
    out, width = matrix.shape
    return scale * math.sqrt(out / width) / norm
