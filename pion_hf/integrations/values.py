"""Values of arguments as the types of their fields want them, and the ranges outside of which training is no training.

YAML reads `1e-3` as text, `no` as False and `4.0` as no whole number; a person may write any of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Union

from pion_hf.errors import unknown

# What YAML 1.1 takes for text: it wants a point, and a sign in the exponent.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
OPTION = "optim_"  # begins the fields of an optimizer's options
_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class Range(NamedTuple):
    """Whether a number is right, how to say so, and what to do instead. None, where a field may be, is always right."""

    holds: Callable[[float], bool]
    words: str
    instead: str = ""


def _each(allowed: Range, *names: str) -> dict[str, Range]:
    return {name: allowed for line in names for name in line.split()}


_COUNT = Range(lambda v: v >= 1, "at least 1")
_LIMIT = Range(lambda v: v >= 1, "at least 1", ": leave it out for no limit")
_NOT_NEGATIVE = Range(lambda v: v >= 0, "at least 0")
_POSITIVE = Range(lambda v: v > 0, "above 0")
_SHARE = Range(lambda v: 0 <= v <= 1, "between 0 and 1")
_DECAY = Range(lambda v: 0 <= v < 1, "at least 0 and below 1")
_STEPS = Range(lambda v: v >= 0, "a number of steps, or below 1 a share of all steps", ": leave it out for the default")
RANGES = {
    **_each(
        _COUNT,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps",
        "dataloader_prefetch_factor dataset_num_proc pad_to_multiple_of lora_r lora_alpha max_new_tokens",
        "generation_batch_size steps_per_generation num_generations num_iterations",
    ),
    **_each(_LIMIT, "max_length max_completion_length save_total_limit lm_eval_limit"),
    **_each(_POSITIVE, "num_train_epochs temperature repetition_penalty spectral_init"),
    **_each(
        _NOT_NEGATIVE,
        "learning_rate weight_decay adam_epsilon max_grad_norm neftune_noise_alpha eval_delay beta data_seed",
        "dataloader_num_workers lm_eval_num_fewshot exact_match_samples",
    ),
    **_each(_STEPS, "warmup_steps logging_steps eval_steps save_steps"),
    **_each(_SHARE, "warmup_ratio label_smoothing_factor top_p min_p"),
    **_each(
        _DECAY,
        "adam_beta1 adam_beta2 lora_dropout",
    ),
    "seed": Range(lambda v: 0 <= v < 2**32, "between 0 and 2^32 - 1"),
    "max_steps": Range(lambda v: v == -1 or v >= 1, "at least 1", ", or -1 to train for num_train_epochs"),
}
_MAY_BE_INFINITE = {"max_grad_norm"}  # which then only measures


def check_ranges(values: Mapping[str, Any], where: Callable[[str], str] = str) -> None:
    """Raise ValueError for a number that is out of its field's range, or none; `where` names a key's place."""
    for key, value in values.items():
        allowed = RANGES.get(key)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if allowed is None or isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            finite = math.isfinite(number) or (number == math.inf and key in _MAY_BE_INFINITE)
            if not finite or not allowed.holds(number):
                raise ValueError(f"{where(key)} must be {allowed.words}{allowed.instead}, got {value!r}")


def fit_fields(args: Any) -> None:
    """Convert the fields of a dataclass instance to their types (see `fit`), but for options of an optimizer."""
    try:
        hints = typing.get_type_hints(type(args))
    except NameError:  # of a class of somebody else's, made where its names are no longer
        return
    for field in dataclasses.fields(args):
        if field.init and hasattr(args, field.name) and not field.name.startswith(OPTION):
            value = getattr(args, field.name)
            fitting = fit(field.name, value, hints[field.name])
            if fitting is not value:
                setattr(args, field.name, fitting)


def fit(key: str, value: Any, wanted: Any) -> Any:
    """`value` as the type of a field has it: numbers from text, whole ones from `4.0`, words from yes and no.

    What no rule is for stays as it is: this is no check of types.
    """
    kinds = _kinds(wanted)
    plain = [kind for kind in kinds if kind in (bool, int, float)]
    if value is None or not kinds:
        return value
    if isinstance(value, Mapping) and not plain:
        return numbers_in(value)
    words = next(filter(None, map(_words_of, kinds)), None)
    if words and isinstance(value, bool) and bool not in kinds:
        said = [word for word in words if _FLAGS.get(str(word).lower()) is value]
        if not said:
            raise ValueError(f"{unknown(f'value of {key}', value, words)} (YAML takes yes, no, on and off for flags.)")
        return said[0]
    entry = next((typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is list), None)
    if isinstance(value, (list, tuple)) and entry is not None:
        return [fit(key, v, entry) for v in value]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if words or len(plain) != len(kinds):
        if number and len(kinds) == 1 and entry in (int, float):
            return [fit(key, value, entry)]
        return str(value) if number and kinds == [str] else value
    if bool in plain:
        return _flag(key, value) if len(plain) == 1 else value
    return _number(key, value, whole=float not in plain)


def check_form(key: str, value: Any, wanted: Any) -> None:
    """Raise ValueError for a value whose form is not its field's: a list for text, a flag for keys and values.

    Text is not looked at, nor is what is none of JSON's: others convert it, or take it.
    """
    kinds = {typing.get_origin(kind) or kind for kind in _kinds(wanted)}
    given = next((kind for kind in (bool, int, float, list, dict) if isinstance(value, kind)), None)
    suits = {bool: {bool}, int: {int, float, str, bool}, float: {int, float, str}, list: {list}, dict: {dict}}
    forms = {dict: "hold keys and values", list: "be a list", str: "be text (in quotes)"}
    form = next((forms[kind] for kind in forms if kind in kinds), None)
    if given is None or form is None or not kinds <= {*forms, bool, int, float} or kinds & suits[given]:
        return
    numbers = given in (int, float) and any(typing.get_args(kind)[:1] in ((int,), (float,)) for kind in _kinds(wanted))
    if not numbers:
        raise ValueError(f"{key} must {form}, got {value!r}")


def _kinds(wanted: Any) -> list[Any]:
    """The types of a union, or the one; without None."""
    union = typing.get_origin(wanted) in (Union, types.UnionType)
    return [kind for kind in (typing.get_args(wanted) if union else (wanted,)) if kind is not type(None)]


def _words_of(kind: Any) -> list[Any]:
    """The values of a type that has a list of them."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [member.value for member in kind]
    return list(typing.get_args(kind)) if typing.get_origin(kind) is Literal else []


def _flag(key: str, value: Any) -> Any:
    flag = value if isinstance(value, bool) else _FLAGS.get(str(value).lower())
    if flag is None:
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return flag


def _number(key: str, value: Any, *, whole: bool) -> Any:
    number = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = int(value) if re.fullmatch(r"[-+]?\d+", value.strip()) else float(value)
    right = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not right or (whole and not float(number).is_integer()):
        types, words = ("of type int", "of type float"), ("a whole number", "a number")
        raise ValueError(f"{key} must be {(types if isinstance(value, str) else words)[not whole]}, got {value!r}")
    return int(number) if whole else number


def numbers_in(value: Any, key: str = "") -> Any:
    """`value` with numbers for text like `1e-4`, at any depth; a commit may look like one."""
    if isinstance(value, Mapping):
        return {name: numbers_in(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [numbers_in(entry, key) for entry in value]
    is_number = isinstance(value, str) and _EXPONENT.fullmatch(value) and not key.endswith("revision")
    return float(value) if is_number else value
