"""The options of `pion_hf.optim.options` as fields of `TrainingArguments` and in the `optim_args` string."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

import pion_hf.optim
from pion_hf.errors import unknown
from pion_hf.integrations.schedules import SCHEDULES, check_options
from pion_hf.integrations.values import OPTION, check_ranges, fit_fields
from pion_hf.linalg.products import bfloat16_speedup
from pion_hf.needs import needed
from pion_hf.optim.checks import check_value
from pion_hf.optim.options import PRESETS, Factors, Routed, Shown, Stacked, check_preset, types_of

with needed("transformers"):
    from transformers import TrainingArguments
    from transformers.training_args import OptimizerNames
    from transformers.utils import is_torch_bf16_gpu_available, logging

logger = logging.get_logger(__name__)

OPTIMIZER_CLASSES = {name: getattr(pion_hf.optim, kind) for name, kind in pion_hf.optim.REGISTERED.items()}
# What a name says, and no option of its own.
FIXED_OPTIONS = {"pion_ambient": {"preset": "ambient"}}

# By optimizer, the options that no constructor has: of its groups, which `pion_hf.param_groups` makes, and of Trainers.
ROUTED = {
    **dict.fromkeys(OPTIMIZER_CLASSES, (Routed, Shown)),
    **dict.fromkeys(("teon", "teon_lora"), (Routed, Shown, Stacked)),
    "pion_lora": (Routed, Shown, Factors),
}
NO_CONSTRUCTORS = tuple(dict.fromkeys(name for kinds in ROUTED.values() for kind in kinds for name in types_of(kind)))
# Those of them that `pion_hf.param_groups` takes.
GROUP_OPTIONS = tuple(name for name in NO_CONSTRUCTORS if name not in types_of(Shown))

# What TrainingArguments already has a field for.
TRAINER_FIELDS = {"lr": "learning_rate", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}


def options_of(optim: str, *, by_trainer: bool = True) -> dict[str, Any]:
    """Every option of an optimizer that `optim_args` takes, constructor's and groups', as fields of dataclasses.

    by_trainer: whether learning rate and weight decay are fields of a Trainer's arguments, and none of these.
    """
    constructor = dataclasses.fields(OPTIMIZER_CLASSES[optim].options)
    elsewhere = (TRAINER_FIELDS.keys() if by_trainer else set()) | FIXED_OPTIONS.get(optim, {}).keys()
    own = {f.name: f for f in constructor if f.name not in elsewhere}
    return own | {f.name: f for kind in ROUTED[optim] for f in dataclasses.fields(kind)}


def default_rate(optim: str) -> float:
    """The learning rate of an optimizer where nobody says one."""
    return OPTIMIZER_CLASSES[optim].options.lr


def default_of(optim: str, option: str) -> Any:
    """The value of an option where nobody says one: None where other arguments decide."""
    preset = PRESETS.get(FIXED_OPTIONS.get(optim, {}).get("preset"), {})
    return preset.get(option, options_of(optim, by_trainer=False)[option].default)


def option_types(optim: str, *, by_trainer: bool = True) -> dict[str, Any]:
    """Every option of an optimizer, as above, and its type."""
    kinds = (OPTIMIZER_CLASSES[optim].options, *ROUTED[optim])
    types = {name: wanted for kind in kinds for name, wanted in types_of(kind).items()}
    return {name: types[name] for name in options_of(optim, by_trainer=by_trainer)}


def field_name(option: str) -> str:
    """The name of an option among the fields of `TrainingArguments`."""
    return {"exclude": "optim_exclude_modules", "targets": "optim_target_modules"}.get(option, f"{OPTION}{option}")


def option_name(field: str) -> str:
    """The inverse of `field_name`."""
    return "exclude" if field == "optim_exclude_modules" else field.removeprefix(OPTION)


def _without_none(wanted: Any) -> Any:
    kinds = typing.get_args(wanted)
    return next(kind for kind in kinds if kind is not type(None)) if type(None) in kinds else wanted


def _typed_fields() -> list[tuple[str, Any, Any]]:
    """A field for every option but `targets`, which transformers has: all words of all optimizers, and who takes it."""
    owners: dict[str, dict[str, Any]] = {}
    for optim in OPTIMIZER_CLASSES:
        for option, field in options_of(optim).items():
            owners.setdefault(option, {})[optim] = field
    types = {optim: option_types(optim) for optim in OPTIMIZER_CLASSES}
    return [
        (field_name(option), _field_type([types[optim][option] for optim in by]), _field(option, by))
        for option, by in owners.items()
        if option != "targets"
    ]


def _field_type(wanted: list[Any]) -> Any:
    """What argparse takes for several types: words of all, a list for a tuple."""
    kinds = list(dict.fromkeys(_without_none(kind) for kind in wanted))
    choices = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal]
    words = dict.fromkeys(word for each in choices for word in each)
    kind = Literal[tuple(words)] if words else kinds[0]
    return (list[float] if typing.get_origin(kind) is tuple else kind) | None


def _field(option: str, by: dict[str, Any]) -> Any:
    """Its help says what it is, of which optimizers, and their defaults."""
    helps = _names_by_value({optim: field.metadata["help"] for optim, field in by.items()})
    defaults = {optim: str(default_of(optim, option)) for optim in by}
    everyone = len(by) == len(OPTIMIZER_CLASSES)
    said = [help if everyone else f"{', '.join(optims)}: {help}" for help, optims in helps.items()]
    if {*defaults.values()} != {"None"}:  # else the help says what None means
        said.append(f"(default: {by_optimizer(defaults)})")
    return dataclasses.field(default=None, metadata={"help": " ".join(said)})


def by_optimizer(values: Mapping[str, str]) -> str:
    """A value of every optimizer in words: one if they are equal, else each with the names that have it."""
    names = _names_by_value(values)
    return "; ".join(value if len(names) == 1 else f"{value} of {', '.join(of)}" for value, of in names.items())


def _names_by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    return {value: [name for name in values if values[name] == value] for value in values.values()}


_Fields = dataclasses.make_dataclass("_Fields", _typed_fields(), namespace={"__module__": __name__})


@dataclass
class OptimizerFields(_Fields):
    """Options of this package's optimizers as `TrainingArguments` fields: each is named `optim_` and the option."""

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
        # TRL turns it on by the old name, of which transformers 5.23 warns, whoever chose it.
        if getattr(self, "activation_checkpointing", True) is None:
            self.activation_checkpointing = self.gradient_checkpointing
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
        on_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and (bfloat16_speedup() > 1 if on_cpu else is_torch_bf16_gpu_available())
            if on_cpu and not self.fp16:
                logger.warning_once(f"{'bfloat16' if self.bf16 else 'float32'}: {measured_speed()} (bf16=auto)")
        if self.bf16 and on_cpu:
            self.use_cpu = True  # else transformers asks for a GPU, although there is none

    def given_options(self) -> dict[str, Any]:
        """The options that were set, by the constructor's names."""
        given = {option_name(f.name): getattr(self, f.name) for f in dataclasses.fields(OptimizerFields)}
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


def resolve_options(
    optim: str, *sources: dict[str, Any], by_trainer: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge and check sources of options; later ones win. Returns the constructor's and the groups'.

    by_trainer: see `options_of`.

    Raises:
        ValueError: an option that does not exist (with the nearest that does) or a value of the wrong type.
    """
    types = option_types(optim, by_trainer=by_trainer)
    merged: dict[str, Any] = {}
    for source in sources:
        for key, value in source.items():
            if by_trainer and key in TRAINER_FIELDS:
                raise ValueError(f"optim_args: {key!r} is set by --{TRAINER_FIELDS[key]}, not here.")
            if key not in types:
                raise _not_an_option(key, optim, types)
            merged[key] = _convert(key, value, types[key])
    for key, field in options_of(optim, by_trainer=by_trainer).items():
        if key in merged:
            check_value(key, merged[key], types[key], field.metadata["allowed"])
    if optim in FIXED_OPTIONS:
        _check_name(optim, merged)
    merged |= FIXED_OPTIONS.get(optim, {})
    if merged.get("preset") is not None:
        check_preset(merged["preset"], merged)
    if merged.get("keep_data") is not None and not merged.get("keep"):
        raise ValueError(
            f"keep_data={merged['keep_data']!r} says what is kept, and keep=0 keeps nothing: set keep, 96 for example"
        )
    groups = {key: merged.pop(key) for key in NO_CONSTRUCTORS if key in merged}
    return merged, groups


def _check_name(optim: str, given: dict[str, Any]) -> None:
    """Raise ValueError for an option that the optimizer's name has decided otherwise."""
    for option, value in PRESETS[FIXED_OPTIONS[optim]["preset"]].items():
        if given.get(option, value) != value:
            raise ValueError(
                f"optim={optim!r} means {option}={value!r}, but {option}={given[option]!r} was given: leave it out, or "
                "use optim='pion', which has all choices."
            )


# Options of other optimizers that one might look for here, or of earlier versions, and what to do instead.
ELSEWHERE = {
    "learning_rate": "it is called 'lr' here",
    "hold": "it is gone since 0.13, as no benchmark spoke for it: leave it out",
    "rank_tolerance": "it is gone since 0.13, and always 0.02: leave it out",
    "share_work": "it is gone since 0.14, as Trainers divide the work of DDP's processes themselves: leave it out",
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
        hint = " It is momentum_frame since 0.13." if key == "momentum" and "momentum_frame" in types else ""
        owner = " and ".join(map(repr, owners))
        return ValueError(f"{key!r} is an option of optim={owner}, not of optim={optim!r}.{hint}")
    return unknown(f"option of optim={optim!r}", key, types)


def _split_top_level(text: str) -> list[str]:
    """Split at commas outside brackets and quotes; empty parts (trailing commas) are dropped."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
        if depth < 0:
            break
    if depth or quote:
        raise ValueError(f"optim_args: unbalanced brackets or quotes in {text!r}")
    return [part for part in parts if part.strip()]


def _literal(value: str) -> Any:
    if value.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[value.lower()]
    if value[0] in "'\"" and value.find(value[0], 1) == len(value) - 1:
        return value[1:-1]
    if value[0] in "([" and value[-1] in ")]":
        with contextlib.suppress(ValueError):  # `(q|k)_(proj|x)` is none
            return [_literal(part.strip()) for part in _split_top_level(value[1:-1])]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _convert(key: str, value: Any, wanted: Any) -> Any:
    """`value` as `wanted`, or a ValueError that names the option, the value and what it should be."""
    arguments = typing.get_args(wanted)
    if type(None) in arguments:  # Optional
        wanted = _without_none(wanted)
        is_none = value is None and "none" not in typing.get_args(wanted)
        return None if is_none else _convert(key, value, wanted)
    if value is None and "none" in arguments:
        return "none"  # scale=none: the option's own word, which also reads as a literal
    origin = typing.get_origin(wanted)
    if origin is Literal:
        if value not in arguments:
            raise unknown(f"value of {key}", value, arguments)
        return value
    if origin in (tuple, list):
        values = list(value) if isinstance(value, (tuple, list)) else [value]
        if origin is list:
            return [_convert(key, v, arguments[0]) for v in values]
        if len(values) != len(arguments):
            raise ValueError(f"{key} must be {len(arguments)} numbers, as in {key}=(0.9,0.95), got {value!r}")
        return tuple(_convert(key, v, a) for v, a in zip(values, arguments, strict=True))
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is str:
        return str(value)
    if wanted in (int, float) and isinstance(value, str) and value:
        value = _literal(value)  # a field that is a word for one optimizer and a number for another
    is_number = wanted in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and (wanted is float or (math.isfinite(value) and int(value) == value)):
        return wanted(value)
    raise ValueError(f"{key} must be of type {wanted.__name__}, got {value!r}")
