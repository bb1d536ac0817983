"""Typed options: the dataclass fields, the `optim_args` string, and their checks.

The constructors' signatures say which options there are, of which type and with which default; the fields repeat names
and types for parsers and editors (a test compares them) and add a help text.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

import pion_hf.optim
from pion_hf.errors import unknown
from pion_hf.linalg.precision import bfloat16_speedup
from pion_hf.needs import needed
from pion_hf.optim.lora import FactorMethod
from pion_hf.optim.pion import check_preset
from pion_hf.schedules import SCHEDULES, check_options
from pion_hf.values import check_ranges, fit_fields

with needed("transformers"):
    from transformers import TrainingArguments
    from transformers.training_args import OptimizerNames
    from transformers.utils import is_torch_bf16_gpu_available, logging

logger = logging.get_logger(__name__)

OPTIMIZER_CLASSES = {name: getattr(pion_hf.optim, kind) for name, kind in pion_hf.optim.REGISTERED.items()}
# What a name says, and no option of its own.
FIXED_OPTIONS = {"pion_ambient": {"preset": "ambient"}}

# Options of the routing and its groups rather than of the constructor (see `pion_hf.param_groups`).
GROUP_OPTIONS = {
    "adamw_lr": float,
    "adamw_betas": tuple[float, float],
    "adamw_eps": float,
    "targets": list[str],
    "exclude": list[str],
}

STACK_OPTIONS = {"stack": int, "stack_targets": list[str]}
LORA_OPTIONS = {"lora_a": FactorMethod, "lora_b": FactorMethod}
# By optimizer, those of the routing that not every one has.
ROUTING_OPTIONS = {"teon": STACK_OPTIONS, "teon_lora": STACK_OPTIONS, "pion_lora": LORA_OPTIONS}

# What TrainingArguments already has a field for.
TRAINER_FIELDS = {"lr": "learning_rate", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}


def _help(text: str) -> dict[str, str]:
    return {"help": f"{text} Unset: the optimizer's default."}


@dataclass
class PionOptions:
    """Options of this package's optimizers as `TrainingArguments` fields: each is named `optim_` and the option."""

    optim_adamw_lr: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the AdamW groups (embeddings, heads, norms). Unset: learning_rate."},
    )
    optim_adamw_betas: list[float] | None = field(
        default=None,
        metadata={"help": "Betas of the AdamW groups (adamw_routed: of all). Unset: adam_beta1 and adam_beta2."},
    )
    optim_adamw_eps: float | None = field(
        default=None, metadata={"help": "Epsilon of the AdamW groups (adamw_routed: of all). Unset: adam_epsilon."}
    )
    optim_exclude_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Regular expressions of parameters that AdamW takes instead of the matrix rule."},
    )
    optim_preset: Literal["paper", "ambient"] | None = field(
        default=None, metadata={"help": "Pion: 'paper' sets the options of arXiv 2605.12492, 'ambient' our own rule."}
    )
    optim_momentum: float | None = field(default=None, metadata=_help("TEON and Muon: decay of the momentum."))
    optim_momentum_frame: Literal["transported", "lie", "ambient"] | None = field(
        default=None, metadata=_help("Pion: where the momentum lives.")
    )
    optim_direction: Literal["gradient", "adam", "natural", "polar", "msign"] | None = field(
        default=None, metadata=_help("Pion: the step without the constraint.")
    )
    optim_metric: Literal["lie", "ambient"] | None = field(
        default=None, metadata=_help("Pion: which rotation stands for the direction.")
    )
    optim_side: Literal["alternate", "in", "out", "both"] | None = field(
        default=None, metadata=_help("Pion: the side(s) rotated in a step.")
    )
    optim_scale: str | None = field(
        default=None, metadata=_help("Pion: rms, none or spectral. TEON and Muon: rms, paper or original.")
    )
    optim_rms: float | None = field(
        default=None, metadata=_help("RMS of a matrix's update at learning rate 1 (scale=rms).")
    )
    optim_betas: list[float] | None = field(
        default=None, metadata=_help("Pion: decay of the momentum and of the second moment.")
    )
    optim_eps: float | None = field(default=None, metadata=_help("Pion: added to the root of the second moment."))
    optim_second_moment: bool | None = field(
        default=None, metadata=_help("Pion: divide the gradient by a second moment, as the paper's variant.")
    )
    optim_polar: Literal["express", "quintic", "svd", "gram"] | None = field(
        default=None,
        metadata=_help("Orthogonalisation method; gram: pion-hf[gram] and an NVIDIA GPU from Hopper on."),
    )
    optim_polar_steps: int | None = field(default=None, metadata=_help("Iterations of the orthogonalisation."))
    optim_polar_dtype: Literal["auto", "float32", "bfloat16"] | None = field(
        default=None, metadata=_help("TEON and Muon: precision of the orthogonalisation.")
    )
    optim_nesterov: bool | None = field(
        default=None, metadata=_help("TEON and Muon: look ahead by a step of momentum.")
    )
    optim_stack: int | None = field(
        default=None, metadata=_help("TEON: consecutive layers whose matrices are orthogonalised together.")
    )
    optim_stack_targets: list[str] | None = field(
        default=None,
        metadata=_help("TEON: which matrices are stacked: q, k, v, or regular expressions over parameter names."),
    )
    optim_lora_a: FactorMethod | None = field(
        default=None, metadata=_help("Pion on LoRA adapters: what the factor A does (of embeddings: B).")
    )
    optim_lora_b: FactorMethod | None = field(
        default=None, metadata=_help("Pion on LoRA adapters: what the factor B does (of embeddings: A).")
    )
    optim_retraction: Literal["polar", "taylor"] | None = field(
        default=None, metadata=_help("Pion: how a generator becomes a rotation.")
    )
    optim_degree: int | None = field(default=None, metadata=_help("Pion: degree of retraction=taylor."))
    optim_generator_dtype: Literal["auto", "float32", "bfloat16"] | None = field(
        default=None, metadata=_help("Pion: precision of the products that form a generator.")
    )
    optim_state_dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata=_help("Pion on whole matrices: precision of the averages of gradients.")
    )
    optim_compile: bool | None = field(
        default=None, metadata=_help("Elementwise parts of the matrices' steps through torch.compile.")
    )
    optim_batch_elements: int | None = field(
        default=None,
        metadata={
            "help": "Elements of the equal matrices that are updated at once: bounds the extra memory of a step. "
            "Unset: what is fastest on the device."
        },
    )
    optim_keep: int | None = field(
        default=None,
        metadata=_help("So many leading directions of every layer's inputs keep their outputs, against forgetting."),
    )
    optim_keep_soft: bool | None = field(
        default=None,
        metadata=_help("Muon, TEON, adamw_routed: keep more directions, each by the share that its inputs suggest."),
    )
    optim_share_work: bool | None = field(
        default=None,
        metadata=_help("DDP: each process updates a share of the matrices and tells the others, instead of all."),
    )

    def __post_init__(self) -> None:
        """Check before a model is loaded what would otherwise fail, or be ignored, when the optimizer is built."""
        if self.bf16 == "auto":
            self.bf16 = None
        fit_fields(self)
        check_ranges(vars(self))
        targets = self.optim_target_modules
        if isinstance(targets, str) and targets.startswith("[") and targets.endswith("]"):
            self.optim_target_modules = _convert("optim_target_modules", _literal(targets), list[str])
        names = OptimizerNames._value2member_map_
        if self.optim not in names:
            if self.optim in OPTIMIZER_CLASSES:
                raise ValueError(
                    f"optim={self.optim!r} could not be added to this transformers: a warning of pion_hf.register() "
                    "said why, and what is left."
                )
            raise unknown("optimizer", self.optim, names)
        optim, given = OptimizerNames(self.optim).value, self.given_options()
        if optim in OPTIMIZER_CLASSES:
            resolve_options(optim, given, parse_optim_args(self.optim_args))
        elif given:
            owners = ", ".join(OPTIMIZER_CLASSES)
            instead = " (optim='adamw_routed' is AdamW with keep)" if "keep" in given else ""
            logger.warning(f"optim={optim!r} ignores options that only {owners} have: {', '.join(given)}{instead}.")
        self._choose_precision()
        try:
            super().__post_init__()
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.doc!r} is not JSON: {error}") from None
        fit_fields(self)  # mappings were JSON strings until now
        schedule = self.lr_scheduler_type.value
        if schedule in SCHEDULES:  # its options were a JSON string until now
            check_options(schedule, self.lr_scheduler_kwargs, self.max_steps if self.max_steps > 0 else None)

    def _choose_precision(self) -> None:
        """Where `bf16` is left open (None, as in TRL's configs, or "auto") the hardware decides, and it is said."""
        is_open = self.bf16 is None
        on_cpu = self.use_cpu or not torch.accelerator.is_available()
        if is_open:
            self.bf16 = not self.fp16 and (bfloat16_speedup() > 1 if on_cpu else is_torch_bf16_gpu_available())
        if is_open and on_cpu and not self.fp16:
            logger.warning_once(f"{'bfloat16' if self.bf16 else 'float32'}: {measured_speed()} (bf16=auto)")
        if self.bf16 and on_cpu:
            self.use_cpu = True  # else transformers asks for a GPU, although there is none

    def given_options(self) -> dict[str, Any]:
        """The options that were set, by the constructor's names."""
        given = {option_name(f.name): getattr(self, f.name) for f in fields(PionOptions)}
        return {option: value for option, value in given.items() if value is not None}


def measured_speed() -> str:
    """How fast this CPU multiplies bfloat16, in words."""
    speedup = bfloat16_speedup()
    times, how = (speedup, "faster") if speedup > 1 else (1 / speedup, "more slowly")
    return f"this CPU multiplies bfloat16 {times:.{0 if times >= 10 else 1}f} times {how} than float32"


def warn_of_slow_bfloat16(args: TrainingArguments) -> None:
    """Of `bf16=True` on a CPU that only emulates it; training is about to begin."""
    if args.bf16 and args.device.type == "cpu" and bfloat16_speedup() < 1:
        logger.warning_once(f"bf16=True, but {measured_speed()}: leave it out (or bf16=auto) to train in float32.")


def option_name(field: str) -> str:
    """The constructor's name of a field of `PionOptions`."""
    return "exclude" if field == "optim_exclude_modules" else field.removeprefix("optim_")


def option_types(optim: str) -> dict[str, Any]:
    """Every option of an optimizer and its type, constructor's and groups'."""
    constructor = OPTIMIZER_CLASSES[optim].__init__
    hints = typing.get_type_hints(constructor)
    elsewhere = {"self", "params", "inputs", *TRAINER_FIELDS, *STACK_OPTIONS, *FIXED_OPTIONS.get(optim, ())}
    own = {name: hints[name] for name in inspect.signature(constructor).parameters if name not in elsewhere}
    return {**own, **GROUP_OPTIONS, **ROUTING_OPTIONS.get(optim, {})}


def parse_optim_args(text: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """`"rms=0.2, side=both, betas=(0.9, 0.95),"` as a dict; what is one already as it is.

    Values are Python literals where they look like one. Names in a list need no quotes (`targets=[q_proj, k_proj]`);
    what is quoted is taken as it stands, so that a regular expression keeps its backslashes.

    Raises:
        ValueError: an entry without `=`, unbalanced brackets or quotes, a key given twice.
    """
    if isinstance(text, Mapping):
        return dict(text)
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
                raise _not_an_option(key, optim, types)
            merged[key] = _convert(key, value, types[key])
    check_ranges({f"optim_{key}": value for key, value in merged.items()}, lambda key: key.removeprefix("optim_"))
    merged |= FIXED_OPTIONS.get(optim, {})
    if merged.get("preset") is not None:
        check_preset(merged["preset"], merged)
    groups = {key: merged.pop(key) for key in (*GROUP_OPTIONS, *STACK_OPTIONS, *LORA_OPTIONS) if key in merged}
    return merged, groups


# Options of other optimizers that one might look for here, or of earlier versions, and what to do instead.
ELSEWHERE = {
    "hold": "it is gone since 0.13, as no benchmark spoke for it: leave it out",
    "rank_tolerance": "it is gone since 0.13, and always 0.02: leave it out",
    "fused": "AdamW's groups are updated by torch's fused AdamW as it is, and matrices in batches: leave it out",
    "foreach": "AdamW's groups are updated by torch's fused AdamW as it is, and matrices in batches: leave it out",
    **dict.fromkeys(
        ("optim_bits", "bits", "is_paged", "block_wise", "percentile_clipping"),
        "the state is not kept in 8 bits or paged: leave it out (LoRA needs little state, FSDP2 divides it), or use "
        "optim='adamw_bnb_8bit'",
    ),
}


def _not_an_option(key: str, optim: str, types: dict[str, Any]) -> ValueError:
    if key in ELSEWHERE:
        return ValueError(f"optim={optim!r} has no option {key!r}: {ELSEWHERE[key]}.")
    owners = [name for name in OPTIMIZER_CLASSES if key in option_types(name)]
    if owners:
        return ValueError(f"{key!r} is an option of optim={' and '.join(map(repr, owners))}, not of optim={optim!r}.")
    return unknown(f"option of optim={optim!r}", key, types)


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
    if value[0] in "'\"" and value.find(value[0], 1) == len(value) - 1:
        return value[1:-1]
    if _closing_bracket(value) == len(value) - 1:
        return [_literal(part.strip()) for part in _split_top_level(value[1:-1])]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _closing_bracket(value: str) -> int | None:
    """Where the list or tuple that `value` begins with ends; `(q|k)_proj` begins with one and is none."""
    if value[0] not in "([":
        return None
    depth = 0
    for position, char in enumerate(value):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return position
    return None


def _convert(key: str, value: Any, wanted: Any) -> Any:
    """`value` as `wanted`, or a ValueError that names the option, the value and what it should be."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if type(None) in arguments:  # Optional
        (wanted,) = (a for a in arguments if a is not type(None))
        if value is None and "none" not in typing.get_args(wanted):
            return None
        return _convert(key, value, wanted)
    if value is None and "none" in arguments:
        return "none"  # scale=none: the option's own word, which also reads as a literal
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
    if wanted in (int, float) and isinstance(value, str) and value:
        value = _literal(value)  # a field that is a word for one optimizer and a number for another
    if wanted in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        whole = math.isfinite(value) and int(value) == value
        if wanted is float or whole:
            return wanted(value)
    raise ValueError(f"{key} must be of type {wanted.__name__}, got {value!r}")
