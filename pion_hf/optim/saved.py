"""State that is saved and loaded, and whether it belongs to an optimizer: the same parameters, form and rules."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor

from pion_hf.errors import listing
from pion_hf.optim import elementwise, groups, sharding
from pion_hf.optim.checks import check_switches
from pion_hf.optim.fingerprints import FINGERPRINT
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


class SavedState:
    """Mixed into `MatrixOptimizer`: its state in checkpoints, copies and pickles."""

    def state_dict(self) -> dict[str, Any]:
        """As `DividedState`'s, and `skipped_steps` and `clipped_steps`."""
        return {**super().state_dict(), **{name: getattr(self, name) for name in ("skipped_steps", "clipped_steps")}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its dtype: torch casts it to the parameter's, rounding that of half weights.

        Raises:
            ValueError: the state is of other parameters, or of another rule or option (see `check_saved`).
        """
        state_dict = renewed(state_dict)
        groups.follow_zeros(state_dict["param_groups"], self.param_groups)
        check_saved(state_dict, self.param_groups, self._options_of_groups(), self.elementwise_rules)
        own = [{key: group[key] for key in (*OWN, *CALLED) if key in group} for group in self.param_groups]
        super().load_state_dict(state_dict)
        self.skipped_steps = state_dict.get("skipped_steps", 0)
        self._clipped = {torch.device("cpu"): torch.tensor(state_dict.get("clipped_steps", 0))}
        for group, options in zip(self.param_groups, own, strict=True):
            group.update(options)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, p in zip(saved["params"], group["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor):
                        self.state[p][key] = sharding.placed(_loaded(key, value, self.state[p][key], p), p, key)

    def __getstate__(self) -> dict[str, Any]:
        """Of copying and pickling: who watches the model or the steps stays behind."""
        if self.inputs is not None and self.inputs.open:
            warnings.warn(
                "The copy of an optimizer whose `keep` has not seen all inputs yet has none to see them by: give it "
                "`inputs`, a pion_hf.Inputs of its model, or copy the optimizer after its first step.",
                stacklevel=4,
            )
        own = ("divides_work", "skipped_steps", "skipped_in_a_row", "_clipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of loading, copying and unpickling: what is not state starts anew."""
        super().__setstate__(state)
        self._start_anew()
        self.__dict__.setdefault("skipped_steps", 0)
        self.__dict__.setdefault("skipped_in_a_row", 0)
        self.__dict__.setdefault("_clipped", {})
        self.__dict__.setdefault("inputs", None)
        self.__dict__.setdefault("observers", [])

    def _is_asked_for_state(self) -> bool:
        """Whether this step is not one of training: with zero gradients and rates, and before any other.

        `torch.distributed.checkpoint` takes one before it saves or loads, to see what the state consists of.
        """
        if self.state or any(group["lr"] for group in self.param_groups):
            return False
        params = [p for group in self.param_groups for p in group["params"]]
        still = not any(sharding.local(p.grad).any() for p in params if p.grad is not None)
        (agreed,) = sharding.agree(torch.tensor([still], device=params[0].device), params, shared=self._is_divided())
        return agreed

    def _lay_out_state(self) -> None:
        """State at step 0 for every parameter with a gradient: a form to load into; a first step makes its own."""
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None:
                    continue
                if group["rule"] in self.elementwise_rules:
                    self.state[p].update(elementwise.begin(p))
                else:
                    forms = self._forms_of(index, p)
                    self.state[p].update({key: sharding.zeros(form, p) for key, form in forms.items()}, step=0)
                    if self._describes(forms):
                        self.state[p][FINGERPRINT] = torch.zeros((), dtype=torch.int64, device=p.device)

    def _forms_of(self, index: int, p: Tensor) -> dict[str, Tensor]:
        """`_state_forms` of a parameter of a group."""
        kind = index, p.shape, p.dtype
        if kind not in self._forms:
            self._forms[kind] = self._state_forms(p.shape, p.dtype, self.param_groups[index])
        return self._forms[kind]


def _loaded(key: str, saved: Tensor, cast: Tensor, p: Tensor) -> Tensor:
    """An entry of the state of `p` as it was saved, where torch has made `cast` of it.

    torch leaves steps on the device they were saved from. Its AdamW wants averages in the parameter's dtype.
    """
    dtype = cast.dtype if key in elementwise.AVERAGES else saved.dtype
    return cast if (cast.dtype, cast.device) == (dtype, p.device) else saved.to(p.device, dtype, copy=True)


def renewed(saved: dict[str, Any]) -> dict[str, Any]:
    """A state dict as this version would have saved it, of one that an older version has.

    Before 0.16 groups of factors had `begun` for `effective`. Before 0.13 rotated matrices had `momentum` for
    `momentum_frame`, their averages in float32, a retraction of another name, and options that are gone.

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
    group = {"effective" if key == "begun" else key: value for key, value in group.items()}
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
    named = zip(itertools.chain.from_iterable(theirs), _indices(saved), strict=True)
    bare = [name for name, index in named if saved["state"] and not saved["state"].get(index)]
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


def _indices(saved: dict[str, Any]) -> list[int]:
    """Of the parameters of a state dict, under which their state is there."""
    return [index for group in saved["param_groups"] for index in group["params"]]


def _is_number(value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def _forms(
    saved: dict[str, Any], groups: list[dict], by_name: dict[str, dict], elementwise: Container[str]
) -> list[str]:
    """Shapes and precisions that saved state says its parameters have, where theirs are others."""
    params = [p for group in groups for p in group["params"]]
    found = []
    for (name, group), index, p in zip(by_name.items(), _indices(saved), params, strict=True):
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
