"""Whether options and parameters are such as can be trained with; what is not is named, with its value."""

from __future__ import annotations

import math
import numbers
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pion_hf.errors import unknown
from pion_hf.linalg.polar import check_method
from pion_hf.optim import sharding
from pion_hf.optim.groups import SWITCHES
from pion_hf.optim.options import DECAYS, NOT_NEGATIVE, Range, ranges_of, types_of

# What groups of torch's optimizers may ask for and nobody does here.
REFUSED = {
    ("capturable", True): "a step reads on the host whether gradients are finite, which no CUDA graph can hold",
    ("differentiable", True): "no gradient passes through a step",
    ("amsgrad", True): "no rule keeps a maximum of its second moments",
    ("decoupled_weight_decay", False): "weight decay is AdamW's, never a part of the gradient",
}
# Of a matrix's largest entry. Every form of Pion was tried and stays finite between these in float32; beyond them the
# products of some do not.
SMALLEST, LARGEST = 1e-9, 1e15


def check_values(group: dict, options: type) -> None:
    """Raises ValueError for a value of a group that its option (see `options`) cannot have."""
    allowed = {"betas": DECAYS, "eps": NOT_NEGATIVE, **ranges_of(options)}
    wanted = {"betas": tuple[float, float], "eps": float, **types_of(options)}
    for name in wanted.keys() & group.keys():
        check_value(name, group[name], wanted[name], allowed.get(name))
    if "polar" in group:
        check_method(group["polar"])
    if group.get("keep_soft") and not group["keep"]:
        raise ValueError("keep_soft=True says how directions are kept, and keep=0 keeps none: set keep, 16 for example")


def check_value(name: str, value: Any, wanted: Any, allowed: Range | None) -> None:
    """Raises ValueError for a value of another type than `wanted`, or out of the range `allowed`."""
    kinds = typing.get_args(wanted) if type(None) in typing.get_args(wanted) else (wanted,)
    if value is None and len(kinds) > 1:
        return
    kind = kinds[0]
    if kind is bool:
        check_flag(name, value)
    elif typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            raise unknown(f"value of {name}", value, typing.get_args(kind))
    elif typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)) or len(value) != len(typing.get_args(kind)):
            raise ValueError(f"{name} must be {allowed.words}, got {value!r}")
        for number in value:
            check_range(name, number, *allowed)
    elif allowed:
        check_range(name, value, *allowed, whole=kind is int)


def check_flag(option: str, value: Any) -> None:
    """Raises ValueError for what is neither True nor False: every other word would count as True."""
    if not isinstance(value, bool):
        raise ValueError(f"{option} must be True or False, got {value!r}")


def check_switches(group: dict) -> None:
    """Raises ValueError for a switch of torch's optimizers that asks for something that is not done here.

    `maximize` is; `foreach` and `fused` may be anything, as matrices are stepped in batches and the rest is fused
    whatever they say; None leaves a choice open.
    """
    for option in SWITCHES:
        value = group.get(option)
        if value is None:
            continue
        check_flag(option, value)
        if (option, value) in REFUSED:
            raise ValueError(f"{option}={value} of a param group: {REFUSED[option, value]}. Leave it out.")


def check_range(option: str, value: Any, ok: Callable[[float], bool], wanted: str, *, whole: bool = False) -> None:
    """Raises ValueError unless `value` is a finite number, a whole one where that is `wanted`, and `ok`."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(number, bool) or not isinstance(number, kind) or not (math.isfinite(number) and ok(number)):
        raise ValueError(f"{option} must be {wanted}, got {value!r}")


def check_finite(name: str, matrix: Tensor) -> None:
    """Raises ValueError for a matrix that holds NaN or infinities."""
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{name} holds values that are not finite: load or initialise it before training.")


def check_rotatable(name: str, matrix: Tensor) -> None:
    """Raises ValueError where one of `matrix`, `(E, m, n)`, is too small or too large to be rotated in float32."""
    largest = matrix.detach().abs().flatten(1).amax(dim=1).float()
    if not ((largest >= SMALLEST) & (largest <= LARGEST)).all():
        wrong = min(largest.tolist(), key=lambda size: SMALLEST <= size <= LARGEST)
        raise ValueError(
            f"the largest entry of {name} is {wrong:.0e}, and rotations are computed between {SMALLEST:.0e} and "
            f"{LARGEST:.0e}: rescale it, or train it with AdamW (exclude it from the rotated matrices)."
        )


def check_parameter(name: str, p: Tensor) -> None:
    """Raises ValueError for a parameter that no optimizer here can take."""
    if p.is_complex():
        raise ValueError(f"{name} is complex; only real parameters can be optimized here.")
    if p.is_sparse or p.layout != torch.strided:
        raise ValueError(f"{name} is sparse; only dense parameters can be optimized here.")
    if not p.is_floating_point():
        raise ValueError(
            f"{name} has dtype {p.dtype}; freeze quantised weights (requires_grad_(False)) and train LoRA adapters on "
            "them."
        )
    if type(p).__name__ == "FlatParameter" or getattr(p, "_is_flat_param", False):
        raise ValueError(
            f"{name} is a flat shard of FSDP1, which holds no whole matrix: use FSDP2 (fsdp_version: 2) or DDP."
        )
    sharding.check(name, p)
