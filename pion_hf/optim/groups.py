"""Param groups: what they may hold, what is made of tensors without groups, and what is read from them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

from torch import Tensor

# Keys that torch or the routing put into a group, besides the options of a rule.
STRUCTURAL_KEYS = {
    *("params", "param_names", "rule", "layout", "role", "stacks"),
    *("method", "unit_step", "effective", "zeros"),
}
# Those that torch's schedulers keep there for themselves, and a group's label, as for loggers of learning rates.
SCHEDULERS_KEYS = {"initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum", "swa_lr", "name"}
# Those with which groups of torch's optimizers say how a step is to be made (see `checks.check_switches`).
SWITCHES = ("maximize", "foreach", "fused", "capturable", "differentiable", "amsgrad", "decoupled_weight_decay")

# With `keep_soft`, directions for each that `keep` counts.
SOFT_DIRECTIONS = 4


def as_groups(params: Iterable, *, owner: str) -> list[dict]:
    """What torch's optimizers take, as groups.

    owner: the optimizer, for a warning where those without a rule look like all of a model's tensors, as in groups
    with and without weight decay.

    Raises:
        ValueError: there is nothing in it, or something else.
    """
    params = _listed(params, owner)
    if not params:
        raise ValueError("the optimizer was given no parameters.")
    given = [dict(group) for group in params] if isinstance(params[0], dict) else [{"params": params}]
    for group in given:
        group["params"] = _listed(group.get("params"), owner)
        _check_params(group, owner)
    tensors = [_tensor(p) for group in given if "rule" not in group for p in group["params"]]
    if sum(p.ndim == 2 for p in tensors) > 1 and any(p.ndim < 2 for p in tensors):
        warnings.warn(
            f"{owner} was given a model's tensors without groups, or in groups without a rule: those of embeddings and "
            "heads are updated as matrices too, and fused projections as one. Use pion_hf.param_groups(model), or give "
            "every group's rule.",
            stacklevel=4,
        )
    return given


def _listed(params: Iterable, owner: str) -> list:
    if isinstance(params, (Tensor, dict)):
        return [params]
    if not isinstance(params, Iterable) or isinstance(params, str):
        raise ValueError(f"params of {owner} are tensors, (name, tensor) pairs or groups with params, got {params!r}.")
    return list(params)


def _check_params(group: dict, owner: str) -> None:
    """Raises ValueError for what are no tensors, and for a tensor or a name that is there twice."""
    params, names = group["params"], group.get("param_names")
    for p in params:
        if not isinstance(_tensor(p), Tensor) or (isinstance(p, tuple) and not isinstance(p[0], str)):
            found = f"({', '.join(type(x).__name__ for x in p)})" if isinstance(p, tuple) else type(p).__name__
            raise ValueError(f"params of {owner} are tensors or (name, tensor) pairs, got {found} among them.")
    if names is not None and len(names) != len(params):
        raise ValueError(f"a group of {owner} has {len(params)} params and {len(names)} param_names.")
    names = [p[0] for p in params if isinstance(p, tuple)] if names is None else names
    if len(set(names)) < len(names):
        raise ValueError(f"a group of {owner} has params of one name: {max(names, key=list(names).count)!r}.")
    if len({id(_tensor(p)) for p in params}) < len(params):
        raise ValueError(f"a group of {owner} holds a parameter more than once.")


def divide(group: dict, rule: str) -> Iterator[dict]:
    """A group without a rule becomes one of matrices, with `rule`, and two for AdamW: what decays, biases and norms."""
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    if "param_names" in group:
        params = list(zip(group["param_names"], params, strict=True))
        group = {key: value for key, value in group.items() if key != "param_names"}
    matrices = [p for p in params if _tensor(p).ndim == 2]
    others = [p for p in params if _tensor(p).ndim > 2]
    vectors = [p for p in params if _tensor(p).ndim < 2]
    if matrices:
        yield {**group, "params": matrices, "rule": rule}
    if others:
        yield {**group, "params": others, "rule": "adamw"}
    if vectors:
        yield {"weight_decay": 0.0, **group, "params": vectors, "rule": "adamw"}


def follow_zeros(saved: list[dict], groups: list[dict]) -> None:
    """Put matrices that were zero at the start (`zeros`) where `saved` groups have them: by now they have moved.

    Groups that differ in anything else stay as they are.
    """
    before, now = ({name for group in side for name in group.get("zeros") or ()} for side in (saved, groups))
    if before == now or len(saved) != len(groups) or not all("param_names" in group for group in (*saved, *groups)):
        return
    tensors = {name: p for group in groups for name, p in named_parameters(group)}
    pairs = list(zip(saved, groups, strict=True))
    if all(set(s["param_names"]) ^ set(g["param_names"]) <= (before ^ now) & tensors.keys() for s, g in pairs):
        for theirs, group in pairs:
            group["params"] = [tensors[name] for name in theirs["param_names"]]
            group.update(param_names=list(theirs["param_names"]), zeros=list(theirs.get("zeros") or ()))


def _tensor(param: Tensor | tuple[str, Tensor]) -> Tensor:
    return param[1] if isinstance(param, tuple) and len(param) == 2 else param


def named_parameters(group: dict) -> Iterator[tuple[str, Tensor]]:
    """A group's parameters with their names, or their positions where it has none."""
    names = group.get("param_names") or [f"parameter {i} of its group" for i in range(len(group["params"]))]
    return zip(names, group["params"], strict=True)


def kept_columns(options: dict) -> int:
    """As many directions as the options `keep` and `keep_soft` ask for."""
    return options["keep"] * (SOFT_DIRECTIONS if options.get("keep_soft") else 1)
