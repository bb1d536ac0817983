"""Gradients before a step: whether they are finite, and such as can be squared and summed."""

from __future__ import annotations

import warnings
from collections import defaultdict

import torch
from torch import Tensor

from pion_hf.errors import listing
from pion_hf.optim import sharding

# Larger gradients are scaled down to it, each parameter's by a power of two: float32 ends at 2^128, sums of squares of
# their products with a matrix are formed, and their inverses (`direction="natural"`) must stay far above 1e-12.
LARGEST = 2.0**30


def are_usual(params: list[Tensor]) -> Tensor:
    """Whether all of this process's are finite and below `LARGEST`; a tensor, which nobody has waited for yet."""
    by_kind = defaultdict(list)
    for p in params:
        if p.grad is not None:
            grad = sharding.local(p.grad)
            by_kind[grad.device, grad.dtype].append(grad)
    norms = []
    for (_, kind), grads in by_kind.items():
        dtype = torch.float64 if kind == torch.float64 else torch.float32
        norms.append(torch.stack(torch._foreach_norm(grads, dtype=dtype)).sum())
    device = params[0].device
    total = sum((norm.to(device) for norm in norms), torch.zeros((), device=device))
    return total < LARGEST  # not so of NaN


def refuse_weights(named: list[tuple[str, Tensor]], *, shared: bool) -> None:
    """Raises ValueError for weights that are not finite: of these no gradient will ever be. As collective as above."""
    params = [p for _, p in named]
    finite = torch.stack([sharding.local(p).isfinite().all().to(params[0].device) for p in params])
    finite = sharding.agree(finite, params, shared=shared)
    wrong = [name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite]
    if wrong:
        raise ValueError(
            f"{listing(wrong)} {'holds' if len(wrong) == 1 else 'hold'} values that are not finite, and so do the "
            "gradients: load or initialise it before training; what has diverged goes on from a checkpoint, with a "
            "smaller learning rate."
        )


def bring_down(named: list[tuple[str, Tensor]], *, shared: bool) -> bool:
    """Whether the gradients are finite after all; then those that are too large are scaled, in place.

    named: the parameters by name. A collective, where some are sharded; shared: see `sharding.agree`.
    """
    params = [p for _, p in named]
    own = [(name, p, sharding.local(p.grad)) for name, p in named if p.grad is not None]
    device = params[0].device
    peaks = torch.stack([(g.abs().amax() if g.numel() else g.new_zeros(())).double().to(device) for *_, g in own])
    (finite,) = sharding.agree(peaks.isfinite().all()[None], params, shared=shared)
    if not finite:
        return False
    peaks = sharding.largest(peaks, [p for _, p, _ in own]).tolist()
    large = [(name, grad, peak) for (name, _, grad), peak in zip(own, peaks, strict=True) if peak > LARGEST]
    for _, grad, peak in large:
        grad.mul_(2.0 ** -torch.tensor(peak / LARGEST).log2().ceil().item())
    if large:
        warnings.warn(
            f"Gradients as large as {max(peaks):.0e}, whose squares no average holds, are scaled down to "
            f"{LARGEST:.0e}: those of {listing([name for name, *_ in large])}. Is the loss a sum?",
            stacklevel=4,
        )
    return True
