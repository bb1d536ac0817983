"""From a model to param groups: the role of every parameter, by the type and place of its module.

Names serve for overrides only (`targets`, `exclude`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, get_args

from torch import Tensor, nn

from pion_hf.errors import listing, unknown
from pion_hf.optim.blocks import Layout, split
from pion_hf.optim.lora import rate_at
from pion_hf.optim.options import FactorMethod
from pion_hf.routing.adapters import Factor, has_adapters, lora_factors
from pion_hf.routing.patterns import Patterns, spellings_of
from pion_hf.routing.routes import NO_STACKS, Route, Routing
from pion_hf.routing.stacks import ALL_FACTORS, DEFAULT_STACK, find_stacks
from pion_hf.routing.structure import Structure, parameter_count

OPTIMIZERS = ("pion", "pion_ambient", "teon", "muon", "adamw_routed", "pion_lora", "teon_lora")
# What an optimizer becomes on a model with LoRA adapters, and the options that come with it.
LORA_FORMS = {
    "pion": ("pion_lora", {"direction": "gradient"}),
    "pion_ambient": ("pion_lora", {}),
    "teon": ("teon_lora", {}),
    "muon": ("teon_lora", {"stack": 1}),
}
# The rule of an optimizer's matrices, where it has another name.
RULES = {"pion_ambient": "pion"}
FOR_ADAPTERS = ("pion_lora", "teon_lora")


def routing_table(
    model: nn.Module,
    optim: str = "pion",
    *,
    targets: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    stack: int | None = None,
    stack_targets: str | Iterable[str] | None = None,
    lora_a: FactorMethod | None = None,
    lora_b: FactorMethod | None = None,
    zeros: Iterable[str] | None = None,
) -> Routing:
    """Route every trainable parameter of `model`.

    Args:
        model: as it will be trained: with its adapters, and what is frozen frozen.
        optim: `pion`, `pion_ambient`, `teon`, `muon` or `adamw_routed`; for models with LoRA adapters `pion_lora` or
            `teon_lora`.
        targets: regular expressions, searched in the names of parameters and of their modules (all of them, where
            a parameter is tied): only matrices of hidden layers that match are given to the matrix rule, the rest
            goes to AdamW. `"all-linear"` (the default) means all.
        exclude: regular expressions of parameters that AdamW takes in any case.
        stack, stack_targets: of `teon` and `teon_lora`: how many consecutive layers are orthogonalised together
            (default 2), and which of their matrices, `q`, `k`, `v` (the default of `teon`; of `teon_lora` all) or
            regular expressions; see `stacks.find_stacks`.
        lora_a, lora_b: of `pion_lora`: what the two factors do, `rotate` (the default of `A`), `orthogonal` (of `B`) or
            `adamw`. In embeddings, where peft starts `A` at zero instead of `B`, they change places.
        zeros: of `pion` and `pion_ambient`: names of matrices that were zero when training began, and that AdamW
            therefore takes, since no rotation can move them. Default: those that are zero now, which is right for a
            model not trained yet.

    Raises:
        ValueError: no trainable parameter, no matrix matched, an expression that is malformed or matches nothing, a
            stack that no matrices fill, adapters where there should be none or none where there should be.

    Warns:
        UserWarning: one of several targets matches embeddings, heads, norms or biases only, and so has no effect;
            matrices are zero; a third or more of the weights in the model's layers are no matrices that are known.
    """
    if optim not in OPTIMIZERS:
        raise unknown("optimizer", optim, OPTIMIZERS)
    if targets is not None and not isinstance(targets, str):
        targets = list(targets)
    _check_choices(optim, stack=stack, stack_targets=stack_targets, lora_a=lora_a, lora_b=lora_b)
    if targets in ("all-linear", "all_linear", ["all-linear"], ["all_linear"]):
        targets = None
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter: every requires_grad is False.")
    factors = _factors(model, optim)
    methods = {False: lora_a or ("rotate" if optim == "pion_lora" else "orthogonal"), True: lora_b or "orthogonal"}
    structure, rule = Structure(model), RULES.get(optim, optim)
    wanted, unwanted = Patterns("optim_target_modules", targets), Patterns("optim_exclude_modules", exclude)
    spellings = spellings_of(model)
    routes = []
    for name, p in named:
        factor = factors.get(id(p))
        role, layout = (factor.role, factor.layout) if factor else structure.classify(name, p)
        candidate = p.ndim == 2 if factor else role == "matrix" and not factors
        is_matrix = candidate and (not wanted or wanted.match(spellings[id(p)]))
        if unwanted.match(spellings[id(p)]) or (factor and methods[factor.grows] == "adamw"):
            is_matrix = False
        if not is_matrix:
            routes.append(Route(name, p, role, "adamw", gain=role == "other" and structure.is_gain(name, p)))
        elif rule == "pion" and (_holds_zeros(p, layout) if zeros is None else name in zeros):
            routes.append(Route(name, p, "zero", "adamw"))
        else:
            count = layout.pieces * (len(p) if p.ndim == 3 else 1)
            of_factor = _step_of(factor, rule, methods[factor.grows]) if factor else {}
            routes.append(Route(name, p, role, rule, str(layout), count, **of_factor))
    names = [n for _, p in named for n in spellings[id(p)]]
    wanted.require_all_used(names)
    unwanted.require_all_used(names)
    frozen = sum(parameter_count(p) for p in model.parameters() if not p.requires_grad)
    routing = Routing(tuple(routes), frozen, optim)
    if not routing.matrices:
        raise _nothing_to_update(optim, routes, by_adamw=set(methods.values()) == {"adamw"}, excluded=bool(unwanted))
    if zeros is None and routing.zeros:
        warnings.warn(
            f"{len(routing.zeros)} matrices are zero, or hold a zero matrix, which no rotation can move: AdamW updates "
            f"them: {', '.join(routing.zeros)}.",
            stacklevel=2,
        )
    if not (factors or wanted or unwanted):
        _warn_of_strange_layers(routing, structure)
    if optim in ("teon", "teon_lora"):
        return _stacked(routing, model, stack, stack_targets)
    return routing


def _nothing_to_update(optim: str, routes: list[Route], *, by_adamw: bool, excluded: bool) -> ValueError:
    """What to say where the rule found no matrix, and why it did not."""
    if optim in FOR_ADAPTERS:
        hint = "widen optim_target_modules or narrow optim_exclude_modules (factors of convolutions always go there)"
        if by_adamw:
            hint = "set lora_a='rotate' or lora_b='orthogonal'"
        return ValueError(f"every LoRA factor is left to AdamW: {hint}, or train with adamw_torch.")
    if any(r.role == "zero" for r in routes):
        hint = "All there are are zero, which no rotation can move: initialise them, or use AdamW for this model."
    elif not any(r.role == "matrix" for r in routes):
        hint = "Use AdamW for this model: it trains no weight of an nn.Linear in a hidden layer."
    elif excluded:
        hint = "optim_exclude_modules leaves none of those that optim_target_modules allows (default: all)."
    else:
        hint = "The expressions in optim_target_modules match only embeddings, heads, norms or biases."
    return ValueError(f"no trainable matrix of a hidden layer was found for optim={optim!r}. {hint}")


def _holds_zeros(p: Tensor, layout: Layout) -> bool:
    """Whether one of its matrices is zero. False where the values are elsewhere: without data, or in shards."""
    if p.is_meta or hasattr(p, "device_mesh"):
        return False
    return not all(view.any(dim=(1, 2, 3)).all() for view in split(p.detach(), layout))


def _warn_of_strange_layers(routing: Routing, structure: Structure) -> None:
    """Of a model whose layers' weights are to a third or more of a form that is not known, such as 3-D projections."""
    sizable = [r for r in routing if sum(n > 1 for n in r.parameter.shape) > 1]
    inside = [r for r in sizable if r.role in ("matrix", "other") and structure.is_hidden(r.name)]
    left = [r for r in inside if r.role == "other"]
    counts = [sum(r.parameter.numel() for r in routes) for routes in (left, inside)]
    if 3 * counts[0] > counts[1]:  # of XLNet's, attention is 5 of 13
        warnings.warn(
            f"AdamW updates {counts[0]:,} of the {counts[1]:,} weights in this model's layers: they are not those of "
            f"linear layers or experts, and so no matrices that optim={routing.optim!r} knows: "
            f"{listing([r.name for r in left])}.",
            stacklevel=3,
        )


def _check_choices(optim: str, *, stack: Any, stack_targets: Any, lora_a: Any, lora_b: Any) -> None:
    """Raise ValueError for options that this optimizer would ignore, or methods that do not exist."""
    if optim not in ("teon", "teon_lora") and (stack is not None or stack_targets is not None):
        raise ValueError(
            f"stack and stack_targets are options of optim='teon' and 'teon_lora', not of optim={optim!r}."
        )
    for name, method in (("lora_a", lora_a), ("lora_b", lora_b)):
        if method is None:
            continue
        if optim != "pion_lora":
            raise ValueError(f"{name} is an option of optim='pion_lora', not of optim={optim!r}.")
        if method not in get_args(FactorMethod):
            raise unknown(f"value of {name}", method, get_args(FactorMethod))


def _factors(model: nn.Module, optim: str) -> dict[int, Factor]:
    """The model's LoRA factors by parameter, if the optimizer is one for adapters."""
    if optim not in FOR_ADAPTERS:
        if has_adapters(model):
            refuse_adapters(optim)
            form, _ = LORA_FORMS[optim]
            raise ValueError(
                f"the model has LoRA adapters, and optim={optim!r} is for whole matrices (a fresh adapter has B = 0, "
                f"which no rotation can move): use optim={form!r}."
            )
        return {}
    factors = {id(f.parameter): f for f in lora_factors(model)}
    if not factors:
        whole = next(name for name, form in LORA_FORMS.items() if form == (optim, {}))
        raise ValueError(
            f"optim={optim!r} trains LoRA adapters, and the model has none that is trainable: add one "
            f"(peft.get_peft_model, use_peft), or use optim={whole!r} for whole matrices."
        )
    return factors


def refuse_adapters(optim: str) -> None:
    """Raises ValueError for an optimizer of whole matrices that has no form for LoRA adapters."""
    if optim not in (*LORA_FORMS, *FOR_ADAPTERS):
        raise ValueError(
            f"optim={optim!r} tells hidden matrices from embeddings, heads and norms, and LoRA adapters have only "
            "factors: use optim='adamw_torch' for them."
        )


def _step_of(factor: Factor, rule: str, method: str) -> dict[str, Any]:
    """What the route of a LoRA factor says besides."""
    unit_step = rate_at(rule, factor.rank) * (1.0 if method == "rotate" else factor.growth)
    return {"method": method, "unit_step": unit_step, "effective": factor.effective}


def _stacked(routing: Routing, model: nn.Module, stack: int | None, targets: str | Iterable[str] | None) -> Routing:
    """Rule `teon` for parameters that take part in a stack, `muon` for other matrices; LoRA factors keep theirs."""
    parameters = [(r.name, r.parameter, r.layout) for r in routing.matrices]
    if targets is None and any(r.method for r in routing.matrices):
        targets = ALL_FACTORS
    stacks = find_stacks(model, parameters, stack=stack, targets=targets)
    if stack == 1:
        stacks = NO_STACKS
    stack = DEFAULT_STACK if stack is None else stack
    stacked = {name for names in stacks.stacks for name in names}
    routes = [
        dataclasses.replace(r, rule="muon") if r.rule == "teon" and not stacked.intersection(r.matrix_names) else r
        for r in routing
    ]
    return dataclasses.replace(routing, routes=tuple(routes), stack=stack, stacks=stacks)


def param_groups(
    model: nn.Module,
    optim: str | None = None,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    adamw_lr: float | None = None,
    adamw_betas: tuple[float, float] | None = None,
    adamw_eps: float | None = None,
    targets: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    stack: int | None = None,
    stack_targets: str | Iterable[str] | None = None,
    lora_a: FactorMethod | None = None,
    lora_b: FactorMethod | None = None,
    routing: Routing | None = None,
) -> list[dict[str, Any]]:
    """Groups for the optimizer's constructor, one per rule, layout and decay; names in `param_names`.

    What is not given here is not in the groups: there the optimizer's own `lr`, `weight_decay`, `betas` and `eps` hold.

    Args:
        model, optim: see `routing_table`; by default for `pion`.
        lr: of the matrices. weight_decay: of every matrix that is not rotated, embeddings and heads included; biases
            and norms have none in any case.
        adamw_lr: of the AdamW groups, if not `lr`. adamw_betas, adamw_eps: theirs; of `adamw_routed` the matrices' too.
        targets, exclude, stack, stack_targets, lora_a, lora_b: see `routing_table`. routing: its result, if at hand.

    Raises:
        ValueError: as `routing_table`; one of its options, or another `optim`, beside a `routing` that it could not
            change.
    """
    given = _given(
        targets=targets, exclude=exclude, stack=stack, stack_targets=stack_targets, lora_a=lora_a, lora_b=lora_b
    )
    if routing is None:
        routing = routing_table(model, optim or "pion", **given)
    elif given:
        raise ValueError(f"{', '.join(given)} can have no effect on a finished routing: give it to routing_table.")
    elif optim not in (None, routing.optim):
        raise ValueError(f"optim={optim!r} was given beside a routing for {routing.optim!r}: leave it out.")
    matrix_options = _given(lr=lr, weight_decay=weight_decay)
    adamw_options = {
        **matrix_options,
        **_given(lr=adamw_lr, betas=adamw_betas and tuple(adamw_betas), eps=adamw_eps),
    }
    by_rule = {"adamw": adamw_options, "adamw_routed": {**adamw_options, **matrix_options}}
    alike: dict[tuple, list[Route]] = defaultdict(list)
    for r in sorted(routing, key=lambda r: r.rule == "adamw"):
        alike[r.rule, r.layout, r.method, r.decays].append(r)
    groups, group_of = [], {}
    for (rule, layout, method, decays), routes in alike.items():
        group = {"params": [(r.name, r.parameter) for r in routes], "rule": rule, "layout": layout}
        group |= by_rule.get(rule, matrix_options)
        if not decays:
            group["weight_decay"] = 0.0
        if rule in ("teon", "teon_lora"):
            group |= {"stack": routing.stack, "stacks": []}
        if method:
            effective = [r.name for r in routes if r.effective]
            group |= {"method": method, "unit_step": [r.unit_step for r in routes], "effective": effective}
        if zeros := [r.name for r in routes if r.role == "zero"]:
            group["zeros"] = zeros
        group_of |= {name: group for r in routes for name in r.matrix_names}
        groups.append(group)
    for names in routing.stacks.stacks:
        group_of[names[0]]["stacks"].append(list(names))
    return groups


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
