"""Whether options and parameters are such as can be trained with; what is not is named, with its value."""

from __future__ import annotations

import functools
import math
import numbers
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pion_hf.errors import unknown
from pion_hf.linalg.polar import MOST_STEPS, check_method
from pion_hf.optim import sharding
from pion_hf.optim.groups import SWITCHES

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


def check_words(group: dict, cls: type) -> None:
    """Raises ValueError for an option that is none of the words that the constructor of `cls` takes, or no bool."""
    for option, words in _words(cls).items():
        if option not in group:
            continue
        if words == (True, False):
            check_flag(option, group[option])
        elif group[option] not in words:
            raise unknown(f"value of {option}", group[option], words)


@functools.cache
def _words(cls: type) -> dict[str, tuple]:
    """What the constructors' types say, of `cls` and those it inherits from."""
    owners = [c for c in reversed(cls.__mro__) if issubclass(c, torch.optim.Optimizer) and "__init__" in vars(c)]
    hints = {name: hint for c in owners[1:] for name, hint in typing.get_type_hints(c.__init__).items()}
    words = {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is typing.Literal}
    return {**words, **{name: (True, False) for name, hint in hints.items() if hint is bool}}


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


def check_polar(group: dict) -> None:
    """Raises ValueError for a way to the polar factor that does not exist, or whose package is not installed."""
    check_method(group["polar"])
    steps = f"in 1..{MOST_STEPS}"
    check_range("polar_steps", group["polar_steps"], lambda v: 1 <= v <= MOST_STEPS, steps, whole=True)


def check_unused(group: dict, usual: dict, options: tuple[str, ...]) -> None:
    """Raises ValueError for options that the group's rule does not read, where they are not the `usual` ones."""
    for option in options:
        if group[option] != usual[option]:
            raise ValueError(f"{option}={group[option]!r} is no option of rule {group['rule']!r}: leave it out.")


def check_common(group: dict) -> None:
    """Raises ValueError for options that every optimizer has."""
    for option in ("lr", "eps", "weight_decay"):
        check_range(option, group[option], lambda v: v >= 0, "at least 0")
    check_range("keep", group["keep"], lambda v: v >= 0, "a whole number of directions, 0 or more", whole=True)
    if group.get("keep_soft") and not group["keep"]:
        raise ValueError("keep_soft=True says how directions are kept, and keep=0 keeps none: set keep, 16 for example")
    elements = group.get("batch_elements")
    if elements is not None:
        check_range("batch_elements", elements, lambda v: v >= 1, "a whole number of at least 1", whole=True)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    for beta in betas:
        check_range("betas", beta, lambda v: 0 <= v < 1, "two numbers in [0, 1)")


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


def check_size(p: Tensor) -> None:
    """Raises ValueError for a matrix without entries."""
    if not p.numel():
        raise ValueError(f"it is empty ({' x '.join(map(str, p.shape))}): leave it out.")


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
