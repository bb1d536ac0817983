"""Param groups: what they may hold, what is made of tensors without groups, and what is read from them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

from torch import Tensor

# Keys that torch, its schedulers or the routing put into a group, besides the options of a rule.
STRUCTURAL_KEYS = {
    "params",
    "param_names",
    "rule",
    "layout",
    "role",
    "stacks",
    "method",
    "reach",
    "begun",
    "initial_lr",
}

# With `keep_soft`, directions for each that `keep` counts.
SOFT_DIRECTIONS = 4


def as_groups(params: Iterable) -> list[dict]:
    """What torch's optimizers take, as groups.

    Raises:
        ValueError: there is nothing in it.
    """
    params = [params] if isinstance(params, (Tensor, dict)) else list(params)
    if not params:
        raise ValueError("the optimizer was given no parameters.")
    if isinstance(params[0], dict):
        return [dict(group) for group in params]
    return [{"params": params}]


def divide(group: dict, rule: str, *, owner: str) -> Iterator[dict]:
    """A group without a rule becomes one of matrices, with `rule`, and two for AdamW: what decays, biases and norms.

    owner: the optimizer, for a warning where these look like all of a model's tensors.
    """
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    if "param_names" in group:
        params = list(zip(group["param_names"], params, strict=True))
        group = {key: value for key, value in group.items() if key != "param_names"}
    matrices = [p for p in params if _tensor(p).ndim == 2]
    others = [p for p in params if _tensor(p).ndim > 2]
    vectors = [p for p in params if _tensor(p).ndim < 2]
    if matrices and vectors and len(matrices) > 1:
        warnings.warn(
            f"{owner} was given a model's tensors without groups: those of embeddings and heads are "
            "updated as matrices too, and fused projections as one. Use pion_hf.param_groups(model), or give a "
            "group's rule.",
            stacklevel=6,
        )
    if matrices:
        yield {**group, "params": matrices, "rule": rule}
    if others:
        yield {**group, "params": others, "rule": "adamw"}
    if vectors:
        yield {"weight_decay": 0.0, **group, "params": vectors, "rule": "adamw"}


def _tensor(param: Tensor | tuple[str, Tensor]) -> Tensor:
    return param[1] if isinstance(param, tuple) else param


def named_parameters(group: dict) -> Iterator[tuple[str, Tensor]]:
    """A group's parameters with their names, or their positions where it has none."""
    names = group.get("param_names") or [f"parameter {i} of its group" for i in range(len(group["params"]))]
    return zip(names, group["params"], strict=True)


def kept_columns(options: dict) -> int:
    """As many directions as the options `keep` and `keep_soft` ask for."""
    return options["keep"] * (SOFT_DIRECTIONS if options.get("keep_soft") else 1)
