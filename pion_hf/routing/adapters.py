"""The LoRA factors of a peft model, found through peft's own layers."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pion_hf.errors import listing
from pion_hf.needs import require
from pion_hf.optim.blocks import Layout
from pion_hf.optim.lora import USUAL_RANK
from pion_hf.optim.sharding import whole


@dataclass(frozen=True)
class Factor:
    """One factor of `dW = scaling B A`, to be seen as `(rank, n)` through `layout`.

    grows: whether it is the one that starts at zero (`B`, but `A` of an embedding) by peft's default.
    growth: each singular value of an orthogonalised step, where a rotation turns by one radian; see `PionLora`.
    effective: whether its partner is not zero any more, so that the adapter has an effect.
    """

    parameter: nn.Parameter
    role: str
    layout: Layout
    grows: bool
    rank: int
    growth: float
    effective: bool


def lora_factors(model: nn.Module) -> list[Factor]:
    """Every trainable factor of every adapter (all names, linear layers, embeddings, experts), in the model's order.

    Warns:
        UserWarning: adapters of which one factor is frozen.

    Raises:
        ValueError: an adapter with two zero factors, neither of which can move.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    factors, frozen = [], []
    if layers := _lora_layers(model):
        require("peft")
    for layer in layers:
        for adapter, a, b, embedding in _pairs(layer):
            for own, partner, side in ((a, b, "A"), (b, a, "B")):
                if not own.requires_grad:
                    continue
                if not partner.requires_grad:
                    frozen.append(names[id(partner)])
                factors.append(_factor(names[id(own)], own, partner, side, layer, adapter, embedding))
    if frozen:
        warnings.warn(
            f"{len(frozen)} LoRA factors are frozen while their partners train: {listing(frozen)}.", stacklevel=3
        )
    return factors


def has_adapters(model: nn.Module) -> bool:
    """Whether a LoRA factor of `model` is trainable."""
    return any(p.requires_grad for layer in _lora_layers(model) for _, *pair, _ in _pairs(layer) for p in pair)


def idle_factors(model: nn.Module) -> set[nn.Parameter]:
    """Factors beside a partner that is zero, so that they have no effect yet."""
    pairs = [(a, b) for layer in _lora_layers(model) for _, a, b, _ in _pairs(layer)]
    return {own for a, b in pairs for own, partner in ((a, b), (b, a)) if not partner.any()}


def _lora_layers(model: nn.Module) -> list[Any]:
    if "peft" not in sys.modules:  # and so no model of peft's
        return []
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _pairs(layer: Any) -> list[tuple[str, nn.Parameter, nn.Parameter, bool]]:
    """`(adapter, A, B, whether of an embedding)`."""
    modules = ((k, a, layer.lora_B[k]) for k, a in layer.lora_A.items() if k in layer.lora_B)
    # AdaLoRA's are bare parameters, with a diagonal between them that its own schedule prunes.
    linear = [(k, a.weight, b.weight, False) for k, a, b in modules if isinstance(a, nn.Module)]
    return linear + [(k, a, layer.lora_embedding_B[k], True) for k, a in layer.lora_embedding_A.items()]


def _factor(
    name: str, own: nn.Parameter, partner: nn.Parameter, side: str, layer: Any, adapter: str, embedding: bool
) -> Factor:
    experts, rank = getattr(layer, "num_experts", 1), layer.r[adapter]
    layout = Layout(transposed=side == "B")
    if experts > 1:  # rows of A expert by expert, columns of B rank by rank
        layout = Layout(rows=(rank,) * experts) if side == "A" else Layout(True, interleaved=(rank, experts))
    a, b = (own, partner) if side == "A" else (partner, own)
    growth, effective = 1.0, False
    if not own.is_meta and own.ndim == 2:
        size, other = _size(own, rank * experts), _size(partner, rank * experts)
        if not (size or other):
            raise ValueError(f"{name} and its partner are both zero: neither can move. Initialise one of them.")
        effective = other > 0
        scale = abs(float(layer.scaling[adapter]))
        spread = math.sqrt(USUAL_RANK / rank * b.shape[0] / a.shape[1])  # over all directions of the product
        growth = spread / (scale * other) if other and scale else size
    return Factor(
        parameter=own,
        role=f"lora_embedding_{side}" if embedding else f"lora_{side}",
        layout=layout,
        grows=(side == "A") == embedding,
        rank=rank,
        growth=growth,
        effective=effective,
    )


def _size(factor: Tensor, rank: int) -> float:
    """The root mean square of its singular values."""
    return whole(factor.detach()).float().norm().item() / math.sqrt(rank)
