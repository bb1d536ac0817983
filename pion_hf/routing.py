"""From a model to param groups: the role of every parameter, by the type and place of its module.

Names serve for overrides only (`targets`, `exclude`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pion_hf.errors import unknown
from pion_hf.optim.blocks import Layout, split

OPTIMIZERS = ("pion",)

# Fused projections of attention modules whose class does not say how they are put together.
# Interleaved: head by head, (heads, 3, head_dim) output rows. Falcon and GPTBigCode do so without multi_query only.
INTERLEAVED_QKV = {
    "GPTNeoXAttention",
    "BloomAttention",
    "PersimmonAttention",
    "GPTNeoXJapaneseAttention",
    "MiniMaxLightningAttention",
    "FalconAttention",
    "GPTBigCodeAttention",
}
CODEGEN_SHARDS = 4  # CodeGenAttention.forward: `mp_num`, each shard holds its heads' queries, values and keys
QKV_NAMES = {"qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv"}
GATE_UP_NAMES = {"gate_up_proj", "gate_up"}
# Experts stored (E, in, out) that carry no `is_transposed`.
TRANSPOSED_EXPERTS = {"Llama4TextExperts"}


@dataclasses.dataclass(frozen=True)
class Route:
    """Where one parameter goes. `matrices` counts what it holds, `decays` says whether weight decay may act."""

    name: str
    parameter: nn.Parameter = dataclasses.field(repr=False, compare=False)
    role: str
    rule: str
    layout: str = ""
    matrices: int = 0

    @property
    def decays(self) -> bool:
        """Decay never touches biases and norms; a rotated matrix has none either."""
        return self.rule == "adamw" and self.role not in ("norm", "bias")


@dataclasses.dataclass(frozen=True)
class Routing:
    """All trainable parameters of a model, routed; prints as a table."""

    routes: tuple[Route, ...]
    frozen: int

    def __iter__(self) -> Iterator[Route]:
        return iter(self.routes)

    @property
    def matrices(self) -> tuple[Route, ...]:
        return tuple(r for r in self.routes if r.rule != "adamw")

    def rows(self, learning_rates: dict[str, float]) -> list[dict[str, Any]]:
        """One row per role and rule: role, rule, tensors, matrices, parameters, lr (`learning_rates` is by rule)."""
        collected: dict[tuple, Counter] = defaultdict(Counter)
        for r in self.routes:
            role = _matrix_role(r) if r.rule != "adamw" else r.role
            row = collected[role, r.rule]
            row["tensors"] += 1
            row["matrices"] += r.matrices
            row["parameters"] += r.parameter.numel()
        return [
            {"role": role, "rule": rule, **counts, "lr": learning_rates.get(rule)}
            for (role, rule), counts in collected.items()
        ]

    def table(self, learning_rates: dict[str, float]) -> Any:
        """The rows as a `rich.table.Table`."""
        from rich.table import Table

        table = Table(title="Which rule updates what")
        for column in ("role", "rule"):
            table.add_column(column)
        for column in ("tensors", "matrices", "parameters", "lr"):
            table.add_column(column, justify="right")
        for row in self.rows(learning_rates):
            lr = "" if row["lr"] is None else f"{row['lr']:g}"
            table.add_row(
                row["role"], row["rule"], f"{row['tensors']:,}", f"{row['matrices']:,}", f"{row['parameters']:,}", lr
            )
        if self.frozen:
            table.add_row("(frozen)", "-", "", "", f"{self.frozen:,}", "")
        return table

    def save(self, path: str | os.PathLike, learning_rates: dict[str, float]) -> None:
        """Write `routing.json`: the summary rows and, for every parameter, its role, rule, layout and shape."""
        record = {
            "summary": self.rows(learning_rates),
            "frozen_parameters": self.frozen,
            "parameters": [
                {
                    "name": r.name,
                    "role": r.role,
                    "rule": r.rule,
                    "layout": r.layout,
                    "matrices": r.matrices,
                    "shape": list(r.parameter.shape),
                }
                for r in self.routes
            ],
        }
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)


def routing_table(
    model: nn.Module,
    optim: str = "pion",
    *,
    targets: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> Routing:
    """Route every trainable parameter of `model`.

    Args:
        targets: regular expressions, searched in the names of parameters and of their modules (all of them, where
            a parameter is tied): only matrices of hidden layers that match are given to the matrix rule, the rest
            goes to AdamW. `"all-linear"` (the default) means all.
        exclude: regular expressions of parameters that AdamW takes in any case.

    Raises:
        ValueError: no trainable parameter, no matrix matched, an expression that is malformed or matches nothing.

    Warns:
        UserWarning: one of several targets matches embeddings, heads, norms or biases only, and so has no effect.
    """
    if optim not in OPTIMIZERS:
        raise unknown("optimizer", optim, OPTIMIZERS)
    if targets is not None and not isinstance(targets, str):
        targets = list(targets)
    if targets in ("all-linear", "all_linear", ["all-linear"], ["all_linear"]):
        targets = None
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter: every requires_grad is False.")
    _refuse_adapters(model, optim)
    structure = _Structure(model)
    wanted, unwanted = _Patterns("optim_target_modules", targets), _Patterns("optim_exclude_modules", exclude)
    spellings = _spellings(model)
    routes = []
    for name, p in named:
        role, layout = structure.classify(name, p)
        is_matrix = role == "matrix" and (not wanted or wanted.match(spellings[id(p)]))
        if unwanted and unwanted.match(spellings[id(p)]):
            is_matrix = False
        if is_matrix:
            routes.append(Route(name, p, role, optim, str(layout), _count(p, layout)))
        else:
            routes.append(Route(name, p, role, "adamw", matrices=0))
    names = [n for _, p in named for n in spellings[id(p)]]
    wanted.require_all_used(names)
    unwanted.require_all_used(names)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    routing = Routing(tuple(routes), frozen)
    if not routing.matrices:
        if not any(r.role == "matrix" for r in routes):
            hint = " Use AdamW for this model: it trains no weight of an nn.Linear in a hidden layer."
        elif unwanted:
            hint = " optim_exclude_modules leaves none of those that optim_target_modules allows (default: all)."
        else:
            hint = " The expressions in optim_target_modules match only embeddings, heads, norms or biases."
        raise ValueError(f"no trainable matrix of a hidden layer was found for optim={optim!r}.{hint}")
    return routing


def param_groups(
    model: nn.Module,
    optim: str = "pion",
    *,
    lr: float = 1e-4,
    weight_decay: float = 0.0,
    adamw_lr: float | None = None,
    adamw_betas: tuple[float, float] | None = None,
    adamw_eps: float | None = None,
    targets: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    routing: Routing | None = None,
) -> list[dict[str, Any]]:
    """Groups for the optimizer's constructor, one per rule, layout and decay; names in `param_names`.

    Args:
        lr: of the matrices. weight_decay: of AdamW's embeddings, heads and other matrices.
        adamw_lr, adamw_betas, adamw_eps: of the AdamW groups (default: `lr` and the optimizer's own).
        targets, exclude: see `routing_table`. routing: its result, if it is at hand.

    Raises:
        ValueError: as `routing_table`; `targets` or `exclude` beside a `routing`, which they could not change.
    """
    if routing is not None and (targets or exclude):
        raise ValueError("targets and exclude have no effect on a finished routing: give them to routing_table.")
    routing = routing or routing_table(model, optim, targets=targets, exclude=exclude)
    adamw_options = {"lr": lr if adamw_lr is None else adamw_lr}
    if adamw_betas is not None:
        adamw_options["betas"] = tuple(adamw_betas)
    if adamw_eps is not None:
        adamw_options["eps"] = adamw_eps
    groups: dict[tuple, dict[str, Any]] = {}
    for r in sorted(routing, key=lambda r: r.rule == "adamw"):
        key = (r.rule, r.layout, r.decays)
        if key not in groups:
            options = (
                {**adamw_options, "weight_decay": weight_decay if r.decays else 0.0}
                if r.rule == "adamw"
                else {"lr": lr, "weight_decay": 0.0}
            )
            groups[key] = {"params": [], "rule": r.rule, "layout": r.layout, **options}
        groups[key]["params"].append((r.name, r.parameter))
    return list(groups.values())


def _matrix_role(route: Route) -> str:
    """The module's own name, which is how people know a projection (`q_proj`, `down_proj`)."""
    parts = [p for p in route.name.split(".") if p not in ("weight", "default", "modules_to_save", "base_layer")]
    return parts[-1] if parts else route.name


def _count(p: Tensor, layout: Layout) -> int:
    return (p.shape[0] if p.ndim == 3 else 1) * layout.pieces


class _Patterns:
    """Regular expressions, remembered by what they matched."""

    def __init__(self, option: str, patterns: str | Iterable[str] | None) -> None:
        self.option = option
        patterns = [patterns] if isinstance(patterns, str) else list(patterns or ())
        self.compiled = []
        for pattern in patterns:
            try:
                self.compiled.append(re.compile(pattern))
            except re.error as error:
                raise ValueError(f"{option}: {pattern!r} is not a regular expression: {error}") from None
        self.unused = {c.pattern for c in self.compiled}

    def __bool__(self) -> bool:
        return bool(self.compiled)

    def match(self, spellings: list[str]) -> bool:
        hits = [c.pattern for c in self.compiled if any(map(c.search, spellings))]
        self.unused.difference_update(hits)
        return bool(hits)

    def require_all_used(self, names: list[str]) -> None:
        ineffective = []
        for pattern in sorted(self.unused):
            if not any(re.search(pattern, n) for n in names):
                what = f"parameter name ({self.option} matches no trainable parameter)"
                raise unknown(what, pattern, _candidates(pattern, names))
            ineffective.append(pattern)
        if ineffective and len(ineffective) < len(self.compiled):  # if none has an effect, the caller raises
            warnings.warn(
                f"{self.option}: {', '.join(map(repr, ineffective))} match embeddings, heads, norms or biases only, "
                "which AdamW updates in any case.",
                stacklevel=3,
            )


def _spellings(model: nn.Module) -> dict[int, list[str]]:
    """By parameter: all its names (a tied one has several), and the module's name beside each `.weight`."""
    spellings: dict[int, list[str]] = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        spellings[id(p)] += [name, name.removesuffix(".weight")] if name.endswith(".weight") else [name]
    return spellings


def _candidates(pattern: str, names: list[str]) -> list[str]:
    """What `pattern` may have meant: ends of names with as many dots as it has, or else their last parts."""
    for depth in (pattern.count(".") + 1, 1):
        ends = list(dict.fromkeys(".".join(n.removesuffix(".weight").split(".")[-depth:]) for n in names))
        if difflib.get_close_matches(pattern, ends, n=1, cutoff=0.5):
            break
    return ends


def _refuse_adapters(model: nn.Module, optim: str) -> None:
    for name, p in model.named_parameters():
        if p.requires_grad and re.search(r"\.lora_(embedding_)?[AB]\.", name):
            raise ValueError(
                f"{name} is a LoRA factor: a fresh adapter has B = 0, which no rotation can move. optim={optim!r} "
                "trains whole matrices; train adapters with adamw_torch in this version."
            )


class _Structure:
    """What the model's modules say about a parameter."""

    def __init__(self, model: nn.Module) -> None:
        # The outermost transformers model, inside whatever wraps it (peft, DDP, a module of the user's).
        inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.config = getattr(inner, "config", None)
        self.inputs = _parameters_of(inner, "get_input_embeddings")
        self.outputs = _parameters_of(inner, "get_output_embeddings")
        base = getattr(inner, "base_model", inner)
        self.outside = {id(m) for m in inner.modules()} - {id(m) for m in base.modules()}

    def classify(self, name: str, p: Tensor) -> tuple[str, Layout]:
        path, _, leaf = name.rpartition(".")
        module = self.modules[path]
        owner_path, _, child = path.rpartition(".")
        owner, child = self._unwrapped(owner_path, child)
        none = Layout()
        if leaf == "bias" or leaf.endswith("_bias"):
            return "bias", none
        if id(p) in self.inputs or isinstance(module, nn.Embedding):
            return "embedding", none
        if _is_norm(module):
            return "norm", none
        if p.ndim < 2:
            return "other", none
        if id(p) in self.outputs or id(module) in self.outside:
            return "head", none
        if isinstance(module, (nn.Linear, Conv1D)) and leaf == "weight":
            if self._is_router(owner_path, owner, p):
                return "router", none
            layout = self._linear_layout(module, owner, child, p)
            return ("matrix" if _is_rotatable(p, layout) else "other"), layout
        if p.ndim == 3 and _looks_like_experts(module, p):
            layout = _expert_layout(module, leaf, p)
            return ("matrix" if _is_rotatable(p, layout) else "other"), layout
        if isinstance(module, nn.MultiheadAttention) and leaf.endswith("proj_weight"):
            layout = Layout(rows=(p.shape[0] // 3,) * 3) if leaf == "in_proj_weight" else none
            return ("matrix" if _is_rotatable(p, layout) else "other"), layout
        if p.ndim == 2 and self._is_router(owner_path, owner, p):
            return "router", none
        return "other", none

    def _unwrapped(self, path: str, child: str) -> tuple[nn.Module | None, str]:
        """The owner and attribute name of a module, seen through peft's `ModulesToSaveWrapper`."""
        owner = self.modules.get(path)
        if child and (path.endswith(".modules_to_save") or path == "modules_to_save"):
            wrapper_path = path.rpartition(".")[0]
            grand, _, child = wrapper_path.rpartition(".")
            owner = self.modules.get(grand)
        return owner, child

    def _linear_layout(self, module: nn.Module, owner: nn.Module | None, child: str, p: Tensor) -> Layout:
        transposed = isinstance(module, Conv1D)
        width, out = p.shape if transposed else p.shape[::-1]
        if child in QKV_NAMES:
            return self._qkv_layout(owner, out, width, transposed)
        if child in GATE_UP_NAMES and out % 2 == 0:
            return Layout(transposed, rows=(out // 2,) * 2)
        return Layout(transposed)

    def _qkv_layout(self, owner: nn.Module | None, out: int, width: int, transposed: bool) -> Layout:
        """Rows of q, k and v; one matrix where neither class nor shapes say how they lie."""
        # The vision part of a model has other heads than the text part: an attention's own config comes first.
        config = getattr(owner, "config", None) or self.config
        heads = _attribute(config, "num_attention_heads") or _attribute(config, "num_heads")
        kv = _attribute(config, "num_key_value_heads") or heads
        kind = type(owner).__name__
        if kind == "CodeGenAttention" and out % (CODEGEN_SHARDS * 3) == 0:
            return Layout(transposed, interleaved=(CODEGEN_SHARDS, 3))
        if getattr(owner, "new_decoder_architecture", False):  # Falcon's groups (queries, key, value) of unequal size
            return Layout(transposed)
        if getattr(owner, "multi_query", False):
            kv = 1
        elif kind in INTERLEAVED_QKV and not hasattr(owner, "q_attn"):
            return Layout(transposed, interleaved=(heads, 3) if heads and out % (3 * heads) == 0 else None)
        dim = getattr(owner, "head_dim", None) or _attribute(config, "head_dim") or (heads and width // heads)
        if heads and dim and out == (heads + 2 * kv) * dim:
            return Layout(transposed, rows=(heads * dim, kv * dim, kv * dim))
        if out == 3 * width:
            return Layout(transposed, rows=(width,) * 3)
        if out == 2 * width and hasattr(owner, "q_attn"):  # GPT-2's cross-attention: keys and values
            return Layout(transposed, rows=(width,) * 2)
        return Layout(transposed)

    def _is_router(self, path: str, owner: nn.Module | None, p: Tensor) -> bool:
        """It has one row per expert and sits beside them, itself or inside a module that is nothing but a router."""
        if owner is not None and re.search(r"rout|gat(e|ing)$", type(owner).__name__.lower()):
            beside, _ = self._unwrapped(*_parent(path))
            if p.shape[0] == _expert_count(beside):
                return True
        return p.shape[0] == _expert_count(owner)


def _parent(path: str) -> tuple[str, str]:
    owner, _, child = path.rpartition(".")
    return owner, child


def _attribute(config: Any, name: str) -> Any:
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, name, None)


def _parameters_of(model: nn.Module, getter: str) -> set[int]:
    """Of the module that `getter` returns; empty where the model has none."""
    try:
        module = getattr(model, getter)() if hasattr(model, getter) else None
    except (NotImplementedError, AttributeError):  # models without one raise rather than return None
        module = None
    return {id(p) for p in module.parameters()} if module is not None else set()


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not isinstance(module, (nn.Linear, Conv1D))


def _is_rotatable(p: Tensor, layout: Layout) -> bool:
    """A vector has no plane to rotate in: both sides need two dimensions or more."""
    return all(min(v.shape[1] * v.shape[2], v.shape[3]) > 1 for v in split(p, layout))


def _expert_count(owner: nn.Module | None) -> int | None:
    """How many experts `owner` chooses between: a child list of modules, or 3-D parameters of a child."""
    for child in owner.children() if owner is not None else ():
        child = getattr(child, "original_module", child)  # peft's ModulesToSaveWrapper
        if isinstance(child, nn.ModuleList) and len(child) > 1 and all(map(_is_plain_mlp, child)):
            return len(child)
        for p in child.parameters(recurse=False):
            if p.ndim == 3 and _looks_like_experts(child, p):
                return p.shape[0]
    return None


def _is_plain_mlp(module: nn.Module) -> bool:
    """Its children are projections and activations: an expert, not a whole layer."""
    children = list(module.children())
    return bool(children) and all(isinstance(c, nn.Linear) or next(c.parameters(), None) is None for c in children)


def _looks_like_experts(module: nn.Module, p: Tensor) -> bool:
    return p.ndim == 3 and (getattr(module, "num_experts", None) == p.shape[0] or hasattr(module, "is_transposed"))


def _expert_layout(module: nn.Module, leaf: str, p: Tensor) -> Layout:
    """transformers' experts say how they store their weights (`use_experts_implementation`)."""
    transposed = bool(getattr(module, "is_transposed", type(module).__name__ in TRANSPOSED_EXPERTS))
    out = p.shape[2] if transposed else p.shape[1]
    if leaf in GATE_UP_NAMES and out % 2 == 0:
        if getattr(module, "is_concatenated", True):
            return Layout(transposed, rows=(out // 2,) * 2)
        return Layout(transposed, interleaved=(out // 2, 2))
    return Layout(transposed)
