"""Which matrices of consecutive layers are orthogonalised together (TEON), found in a model's structure."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from torch import nn

from pion_hf.errors import unknown
from pion_hf.optim import blocks
from pion_hf.routing.patterns import Patterns, candidates, spellings_of
from pion_hf.routing.structure import QKV_NAMES, is_plain_mlp, text_config

# What attention modules call their projections; the words themselves are what `stack_targets` takes.
PROJECTIONS = {
    "q": {"q_proj", "query", "q", "q_lin", "wq", "to_q", "q_attn", "query_proj"},
    "k": {"k_proj", "key", "k", "k_lin", "wk", "to_k", "key_proj"},
    "v": {"v_proj", "value", "v", "v_lin", "wv", "to_v", "value_proj"},
}
DEFAULT_TARGETS = tuple(PROJECTIONS)
ALL_FACTORS = r"\.lora_"  # the default on adapters
DEFAULT_STACK = 2


@dataclasses.dataclass(frozen=True)
class Stacks:
    """Names of matrices (`blocks.name_of`): those stacked together, and those of a stacked type that are left over."""

    stacks: tuple[tuple[str, ...], ...] = ()
    alone: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """One view of a parameter. `type` is all that the matrices of a stack must have in common."""

    name: str
    parameter: str
    layer: int
    type: tuple
    projection: str | None


def find_stacks(
    model: nn.Module,
    parameters: Sequence[tuple[str, nn.Parameter, str]],
    *,
    stack: int | None = None,
    targets: Iterable[str] | None = None,
) -> Stacks:
    """Stacks of `stack` matrices each, of one type and shape, in the order of their layers.

    Matrices are of one type if they lie at the same place of layers of the same kind: of the same class and the same
    entry in the config's `layer_types`. The i-th experts of consecutive layers share a stack. Of a type whose number is
    no multiple of `stack`, the last ones are left alone.

    Args:
        parameters: name, tensor and layout of the matrices to choose from.
        stack: K, at least 1. Default: 2, where there are so many layers.
        targets: the words `q`, `k`, `v` (that projection of every attention, fused or not) or regular expressions over
            names. Default: all three words.

    Raises:
        ValueError: `stack` below 1, a target that matches no matrix, or a stack or target given that nothing fills.

    Warns:
        UserWarning: matrices do not fill a stack of the default options.
    """
    asked = stack is not None or targets not in (None, ALL_FACTORS)
    stack = DEFAULT_STACK if stack is None else stack
    if not isinstance(stack, int) or stack < 1:
        raise ValueError(f"stack must be a whole number of layers, 1 (Muon) or more, got {stack!r}")
    given = [targets] if isinstance(targets, str) else list(targets or ())
    matrices = _matrices(model, parameters)
    spellings = spellings_of(model)
    by_name = {name: spellings[id(p)] for name, p, _ in parameters}
    chosen: dict[str, list[_Matrix]] = {
        target: _matching(target, matrices, by_name) for target in (given or DEFAULT_TARGETS)
    }
    if not given and not any(chosen.values()):
        raise ValueError(
            "stack_targets: no attention of this model has query, key or value projections known by name: name the "
            "matrices to stack, stack_targets=['...'], or use optim='muon', which stacks nothing."
        )
    wanted = {m.name for found in chosen.values() for m in found}
    of_type: dict[tuple, list[_Matrix]] = defaultdict(list)
    for m in matrices:
        if m.name in wanted:
            of_type[m.type].append(m)
    stacks, alone = [], []
    for members in of_type.values():
        names = [m.name for m in sorted(members, key=lambda m: m.layer)]
        full = len(names) - len(names) % stack
        stacks += [tuple(names[i : i + stack]) for i in range(0, full, stack)]
        alone += names[full:]
    lacking = _lacking_layers(given, chosen, of_type, stack)
    if lacking and asked:
        raise ValueError(lacking)
    if lacking:
        warnings.warn(f"{lacking} Until then each is orthogonalised alone, as by muon.", stacklevel=4)
    return Stacks(tuple(stacks), tuple(alone))


def _lacking_layers(given: list[str], chosen: dict[str, list], of_type: dict[tuple, list], stack: int) -> str:
    """What to say where a target that was given, or every one of the default ones, fills no stack."""
    largest = {t: max((len(of_type[m.type]) for m in found), default=0) for t, found in chosen.items()}
    for target in given or [max(largest, key=largest.get)]:
        if largest[target] < stack:
            most = max(1, largest[target])
            what, out = ("LoRA factors", "") if target == ALL_FACTORS else (f"{target!r} matrices", target)
            return (
                f"stack={stack} is more than the {largest[target]} consecutive layers of one kind and shape that have "
                f"{what}: set stack to at most {most}{f', or take {out!r} out of stack_targets' if out else ''}."
            )
    return ""


def _matching(target: str, matrices: list[_Matrix], spellings: dict[str, list[str]]) -> list[_Matrix]:
    if target in PROJECTIONS:
        return [m for m in matrices if m.projection == target]
    pattern = Patterns("stack_targets", target)
    found = [m for m in matrices if pattern.match(spellings[m.parameter])]
    if not found:
        names = [*DEFAULT_TARGETS, *(n for m in matrices for n in spellings[m.parameter])]
        raise unknown("matrix (stack_targets matches none that is trained)", target, candidates(target, names))
    return found


def _matrices(model: nn.Module, parameters: Sequence[tuple[str, nn.Parameter, str]]) -> list[_Matrix]:
    modules = dict(model.named_modules(remove_duplicate=False))
    places = {name: _places(name, modules) for name, _, _ in parameters}
    how_many = Counter(template for options in places.values() for template, _, _ in options)
    types = list(getattr(text_config(model), "layer_types", None) or ())
    found = []
    for name, p, text in parameters:
        # The innermost list in which another entry has the same matrix is the list of layers.
        options = places[name] or [((name,), 0, "")]
        template, layer, path = next((o for o in options if how_many[o[0]] > 1), options[-1])
        kind = (*_classes(name, path, modules), types[layer] if layer < len(types) else None)
        views = blocks.split(p, blocks.Layout.parse(text))
        for i, view in enumerate(views):
            own, projection = blocks.name_of(name, i, len(views)), projection_of(name, i, len(views), modules)
            found.append(_Matrix(own, name, layer, (template, i, tuple(view.shape), kind), projection))
    return found


def _places(name: str, modules: dict[str, nn.Module]) -> list[tuple[tuple[str, ...], int, str]]:
    """`(name without the index, index, path of the entry)` for every list of modules on the way, innermost first.

    Lists of experts and of bare projections come last: such an entry is a part of a layer.
    """
    parts = name.split(".")
    layers, parts_of_layers = [], []
    for i in range(len(parts) - 1, 0, -1):
        owner = modules.get(".".join(parts[:i]))
        if isinstance(owner, (nn.ModuleList, nn.Sequential)) and parts[i].isdigit():
            place = ((*parts[:i], "*", *parts[i + 1 :]), int(parts[i]), ".".join(parts[: i + 1]))
            (parts_of_layers if all(map(_is_part, owner)) else layers).append(place)
    return layers + parts_of_layers


def _is_part(module: nn.Module) -> bool:
    return is_plain_mlp(module) or next(module.children(), None) is None


def _classes(name: str, path: str, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """The classes of the modules from the layer at `path` to the matrix."""
    parts = name.split(".")
    first = len(path.split(".")) if path else len(parts)
    return tuple(type(modules[".".join(parts[:i])]).__name__ for i in range(first, len(parts)))


def projection_of(name: str, index: int, count: int, modules: dict[str, nn.Module]) -> str | None:
    """`q`, `k` or `v`, or None for anything else."""
    owner, _, child = name.partition(".lora_")[0].removesuffix(".weight").rpartition(".")
    if count == 3 and (child in QKV_NAMES or child == "in_proj_weight"):
        return ("qvk" if type(modules.get(owner)).__name__ == "CodeGenAttention" else "qkv")[index]
    if count == 2 and child in QKV_NAMES:
        return "kv"[index]
    if count == 1:
        return next((word for word, names in PROJECTIONS.items() if child in names), None)
    return None
