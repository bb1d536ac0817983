"""Whether saved state belongs to an optimizer: the same parameters, in the same form, under the same rules."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor

from pion_hf.errors import listing
from pion_hf.optim.checks import check_switches
from pion_hf.optim.masters import REST_DTYPES

# What state depends on, of what the routing puts into a group. (`unit_step` is measured anew; state has the first.)
ROUTED = ("rule", "layout", "method", "stacks")
# How a step is carried out, which is the optimizer's own affair: not that of saved state.
OWN = ("compile", "batch_elements")
# What parameters are called here: their saved names may be those of a model that was compiled.
CALLED = ("param_names", "stacks")
# Numbers that make a rule another one: state of the one is none of the other.
RULES_IN_NUMBERS = ("keep",)
# A learning rate is a schedule's; the other one torch's, which only groups have that were added after loading.
NOT_COMPARED = ("lr", "differentiable", *OWN)
# So is what OneCycleLR and CyclicLR cycle, of groups in which they leave their bounds.
CYCLED = ("betas", "momentum")
ADAMW_OPTIONS = ("betas", "eps", "weight_decay")
# Of a weight that is the product of factors in its state, whatever its own precision.
FACTOR = "u.0"
# Of a sharded bfloat16 weight it is kept as bfloat16 bits (see `sharding`).
HALF_OF_REST = {**{rest: half for half, rest in REST_DTYPES.items()}, torch.bfloat16: torch.bfloat16}


def renewed(saved: dict[str, Any]) -> dict[str, Any]:
    """A state dict as this version would have saved it, of one that a version before 0.13 has.

    Rotated matrices had `momentum` for `momentum_frame`, their averages in float32, a retraction of another name, and
    options that are gone.

    Raises:
        ValueError: it was saved with an option that is gone, or with learning rates of another scale.
    """
    of_factors = next((group["rule"] for group in saved["param_groups"] if "reach" in group), None)
    if of_factors:
        raise ValueError(
            f"the saved optimizer state of rule {of_factors!r} is of a version before 0.13, whose learning rates were "
            "15 to 25 times as large: load the weights only and start with fresh state, at a rate that is right for "
            "AdamW."
        )
    return {**saved, "param_groups": [_renewed(group) for group in saved["param_groups"]]}


def _renewed(group: dict[str, Any]) -> dict[str, Any]:
    if "rank_tolerance" not in group:
        return group
    if group["hold"]:
        raise ValueError(
            f"the saved optimizer state was made with hold={group['hold']}, which is gone since 0.13: load the weights "
            "only and start with fresh state."
        )
    kept = {key: value for key, value in group.items() if key not in ("momentum", "hold", "rank_tolerance")}
    retraction = group["retraction"] if group["retraction"] == "taylor" else "polar"
    return {"state_dtype": "float32", **kept, "momentum_frame": group["momentum"], "retraction": retraction}


def _is_ambient(group: dict[str, Any]) -> bool:
    """Whether its rule is Pion's preset `ambient`, and was its default once."""
    return (group.get("direction"), group.get("metric")) == ("natural", "ambient")


def options_of_state(group: dict[str, Any]) -> dict[str, Any]:
    """Those that decide what the state of a group's parameters holds, and how it is used."""
    decide = (*RULES_IN_NUMBERS, "stacks")
    return {key: value for key, value in group.items() if key in decide or isinstance(value, (str, bool))}


def check_saved(
    saved: dict[str, Any], groups: list[dict[str, Any]], options: Iterable[str], elementwise: Container[str]
) -> None:
    """Compare a state dict with the groups of the optimizer that is to load it.

    options: the optimizer's. Those that are numbers are the saved ones after loading, as with every torch optimizer,
    and a warning says so where they differ; a learning rate is a schedule's. elementwise: rules without masters.

    Raises:
        ValueError: parameters of other names, shapes or precision, in other groups, or under another rule, layout,
            stack or other option that is a word.
    """
    for group in saved["param_groups"]:
        check_switches(group)
        names, params = group.get("param_names", group["params"]), group["params"]
        if len(names) != len(params):
            raise ValueError(
                f"the saved optimizer state is damaged: a group has {len(params)} parameters, {len(names)} names."
            )
    theirs, ours = _names(saved["param_groups"], groups), _names(groups, saved["param_groups"])
    found, replaced = _missing(theirs, ours), []
    if not found:
        before = {name: group for names, group in zip(theirs, saved["param_groups"], strict=True) for name in names}
        after = {name: group for names, group in zip(ours, groups, strict=True) for name in names}
        for name in {(id(before[name]), id(after[name])): name for name in reversed(after)}.values():
            words, numbers = _options(name, before[name], after[name], options)
            found += words
            replaced += numbers
        if theirs != ours:
            found = found or ["its parameters are in other groups, or in another order"]
        else:
            found += _forms(saved, groups, after, elementwise)
    if found:
        ambient = any(map(_is_ambient, saved["param_groups"])) and not any(map(_is_ambient, groups))
        whose = "It is that of optim='pion_ambient', as optim='pion' was called before 0.13. " if ambient else ""
        raise ValueError(
            f"the saved optimizer state does not fit: {listing(found)}. {whose}Continue with the model, the routing "
            "and the options of the saved run, or load its weights only and start with fresh state."
        )
    bare = _without_state(saved, theirs)
    if bare:
        warnings.warn(f"The saved optimizer state has none of {listing(bare)}: it begins afresh there.", stacklevel=3)
    if replaced:
        warnings.warn(f"Numbers of the saved optimizer state replace those given: {listing(replaced)}.", stacklevel=3)


def plain_name(name: str) -> str:
    """A parameter's name without what `torch.compile` puts into it."""
    return name.replace("_orig_mod.", "")


def _names(groups: list[dict], others: list[dict]) -> list[list[str]]:
    """Of every group's parameters; numbers where one of the two sides has no names."""
    named = all("param_names" in group for group in (*groups, *others))
    start, found = 0, []
    for group in groups:
        numbers = range(start, start := start + len(group["params"]))
        names = group["param_names"] if named else (f"parameter {i}" for i in numbers)
        found.append([plain_name(name) for name in names])
    return found


def _missing(theirs: list[list[str]], ours: list[list[str]]) -> list[str]:
    found, sides = [], [[name for names in side for name in names] for side in (theirs, ours)]
    for names, others, who in zip(sides, sides[::-1], ("saved state", "optimizer"), strict=True):
        known = set(others)
        alone = [name for name in names if name not in known]
        found += [f"only the {who} has {listing(alone)}"] if alone else []
    return found


def _options(name: str, before: dict, group: dict, options: Iterable[str]) -> tuple[list[str], list[str]]:
    """What differs between two groups, in words and in numbers; `name` is the group's first parameter."""
    adamw = before.get("rule") == group["rule"] == "adamw"
    words, numbers = [], []
    for key in ("maximize", *(ADAMW_OPTIONS if adamw else (*ROUTED, *options))):
        saved, given = before.get(key), group.get(key)
        if key == "maximize":
            saved, given = bool(saved), bool(given)
        if key == "stacks":
            saved, given = ([[plain_name(name) for name in stack] for stack in of or ()] for of in (saved, given))
        # torch.distributed.checkpoint makes lists of tuples, and loses empty ones.
        if isinstance(saved, list) and isinstance(given, tuple):
            saved = tuple(saved)
        if key in NOT_COMPARED or saved == given or (saved is None and given == []):
            continue
        number = _is_number(saved) and _is_number(given) and key not in RULES_IN_NUMBERS
        if number and key in CYCLED and "max_momentum" in before:
            continue
        kind = numbers if number else words
        if isinstance(saved, list) and isinstance(given, list):  # the first of many stacks says enough
            saved, given = next(pair for pair in itertools.zip_longest(saved, given) if pair[0] != pair[1])
        said = f"{key} of {name} is {saved!r}, not {given!r}"
        kind.append(said if number else f"{key} of {name} was {saved!r} and is {given!r}")
        if key == "rule":
            break
    return words, numbers


def _without_state(saved: dict[str, Any], names: list[list[str]]) -> list[str]:
    """Parameters that no state was saved of, if it was of others."""
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    named = zip(itertools.chain.from_iterable(names), indices, strict=True)
    return [name for name, index in named if saved["state"] and not saved["state"].get(index)]


def _is_number(value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def _forms(
    saved: dict[str, Any], groups: list[dict], by_name: dict[str, dict], elementwise: Container[str]
) -> list[str]:
    """Shapes and precisions that saved state says its parameters have, where theirs are others."""
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    params = [p for group in groups for p in group["params"]]
    found = []
    for (name, group), index, p in zip(by_name.items(), indices, params, strict=True):
        # Entries of one matrix of several (`u.0`) have shapes of their own.
        everything = saved["state"].get(index, {})
        state = {k: v for k, v in everything.items() if isinstance(v, Tensor) and "." not in k}
        shapes = [tuple(v.shape) for v in state.values() if v.ndim and v.shape != p.shape]
        half = HALF_OF_REST.get(state["rest"].dtype) if "rest" in state else None
        if shapes:
            found.append(f"{name} was {shapes[0]} and is {tuple(p.shape)}")
        elif (
            state
            and group["rule"] not in elementwise
            and FACTOR not in everything
            and half != (p.dtype if p.dtype in REST_DTYPES else None)
        ):
            found.append(f"{name} was {half or 'of full precision'} and is {p.dtype}")
    return found
