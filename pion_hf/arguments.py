"""Typed options: the dataclass fields, the `optim_args` string, and their checks.

The constructors' signatures are the only place that knows an option's name, type and default.
"""

from __future__ import annotations

import ast
import inspect
import typing
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pion_hf.errors import unknown
from pion_hf.optim import Pion

OPTIMIZER_CLASSES = {"pion": Pion}

# Options of the groups rather than of the constructor (see `pion_hf.param_groups`).
GROUP_OPTIONS = {
    "adamw_lr": float,
    "adamw_betas": tuple[float, float],
    "adamw_eps": float,
    "targets": list[str],
    "exclude": list[str],
}

# What TrainingArguments already has a field for.
TRAINER_FIELDS = {"lr": "learning_rate", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}


def _help(text: str, **kwargs: Any) -> Any:
    return field(default=None, metadata={"help": f"{text} Unset: the optimizer's default."}, **kwargs)


@dataclass
class PionOptions:
    """Options of this package's optimizers as `TrainingArguments` fields; each is the option of that name after `optim_`."""

    optim_adamw_lr: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the AdamW groups (embeddings, heads, norms). Unset: learning_rate."},
    )
    optim_adamw_betas: list[float] | None = field(
        default=None, metadata={"help": "Betas of the AdamW groups. Unset: adam_beta1 and adam_beta2."}
    )
    optim_exclude_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Regular expressions of parameters that AdamW takes instead of the matrix rule."},
    )
    optim_preset: Literal["paper"] | None = field(
        default=None, metadata={"help": "Pion: 'paper' sets the options of arXiv 2605.12492."}
    )
    optim_momentum: str | None = _help("Pion: transported, lie or ambient.")
    optim_direction: Literal["gradient", "adam", "polar", "msign"] | None = _help(
        "Pion: the step without the constraint."
    )
    optim_metric: Literal["lie", "ambient"] | None = _help("Pion: which rotation stands for the direction.")
    optim_side: Literal["alternate", "in", "out", "both"] | None = _help("Pion: the side(s) rotated in a step.")
    optim_scale: str | None = _help("Pion: rms, none or spectral.")
    optim_hold: float | None = _help("Pion: fraction of leading singular directions left alone (ambient metric).")
    optim_rms: float | None = _help("RMS of a matrix's update at learning rate 1 (scale=rms).")
    optim_betas: list[float] | None = _help("Pion: decay of the momentum and of the second moment.")
    optim_second_moment: bool | None = _help("Pion: divide the gradient by a second moment, as the paper's variant.")
    optim_polar: Literal["express", "quintic", "svd"] | None = _help("Orthogonalisation method.")
    optim_polar_steps: int | None = _help("Iterations of the orthogonalisation.")
    optim_retraction: Literal["cayley", "taylor"] | None = _help("Pion: how a generator becomes a rotation.")
    optim_degree: int | None = _help("Pion: degree of retraction=taylor.")

    def given_options(self) -> dict[str, Any]:
        """The options that were set, by the constructor's names."""
        names = {f.name: f.name.removeprefix("optim_") for f in fields(PionOptions)}
        names["optim_exclude_modules"] = "exclude"
        return {option: getattr(self, name) for name, option in names.items() if getattr(self, name) is not None}


def option_types(optim: str) -> dict[str, Any]:
    """Every option of an optimizer and its type, constructor's and groups'."""
    constructor = OPTIMIZER_CLASSES[optim].__init__
    hints = typing.get_type_hints(constructor)
    names = [n for n in inspect.signature(constructor).parameters if n not in ("self", "params", *TRAINER_FIELDS)]
    return {**{n: hints[n] for n in names}, **GROUP_OPTIONS}


def parse_optim_args(text: str | None) -> dict[str, Any]:
    """`"rms=0.2, side=both, betas=(0.9, 0.95),"` as a dict; values are Python literals where they look like one.

    Raises:
        ValueError: an entry without `=`, unbalanced brackets or quotes, a key given twice.
    """
    options: dict[str, Any] = {}
    for entry in _split_top_level(text or ""):
        key, equals, value = entry.partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not key or not value:
            raise ValueError(f"optim_args: {entry.strip()!r} is not of the form key=value (in {text!r})")
        if key in options:
            raise ValueError(f"optim_args: {key!r} is given twice (in {text!r})")
        options[key] = _literal(value)
    return options


def resolve_options(optim: str, *sources: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge and check sources of options; later ones win. Returns the constructor's and the groups'.

    Raises:
        ValueError: an option that does not exist (with the nearest that does) or a value of the wrong type.
    """
    types = option_types(optim)
    merged: dict[str, Any] = {}
    for source in sources:
        for key, value in source.items():
            if key in TRAINER_FIELDS:
                raise ValueError(f"optim_args: {key!r} is set by --{TRAINER_FIELDS[key]}, not here.")
            if key not in types:
                raise unknown(f"option of optim={optim!r}", key, types)
            merged[key] = _convert(key, value, types[key])
    groups = {key: merged.pop(key) for key in GROUP_OPTIONS if key in merged}
    return merged, groups


def _split_top_level(text: str) -> list[str]:
    """Split at commas outside brackets and quotes; empty parts (trailing commas) are dropped."""
    parts, depth, quote, current = [], 0, "", ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        if char == "," and depth == 0 and not quote:
            parts.append(current)
            current = ""
        else:
            current += char
    if depth or quote:
        raise ValueError(f"optim_args: unbalanced brackets or quotes in {text!r}")
    return [p for p in [*parts, current] if p.strip()]


def _literal(value: str) -> Any:
    if value.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _convert(key: str, value: Any, wanted: Any) -> Any:
    """`value` as `wanted`, or a ValueError that names the option, the value and what it should be."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if type(None) in arguments:  # Optional
        if value is None:
            return None
        (wanted,) = (a for a in arguments if a is not type(None))
        return _convert(key, value, wanted)
    if origin is Literal:
        if value not in arguments:
            raise unknown(f"value of {key}", value, arguments)
        return value
    if origin is tuple:
        values = list(value) if isinstance(value, (tuple, list)) else [value]
        if len(values) != len(arguments):
            raise ValueError(f"{key} must be {len(arguments)} numbers, as in {key}=(0.9,0.95), got {value!r}")
        return tuple(_convert(key, v, a) for v, a in zip(values, arguments, strict=True))
    if origin is list:
        values = list(value) if isinstance(value, (tuple, list)) else [value]
        return [_convert(key, v, arguments[0]) for v in values]
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is str:
        return str(value)
    if wanted in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if wanted(value) == value:
            return wanted(value)
    raise ValueError(f"{key} must be of type {wanted.__name__}, got {value!r}")
