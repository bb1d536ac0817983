"""Learning-rate schedules that treat matrices and AdamW's parameters apart: `pion_cosine` and `teon_wsd`.

A rate is its group's own times a multiplier, a pure function of the step: 0 at the first, as in torch's `LambdaLR`.
A group whose `rule` is another than `"adamw"` holds matrices; groups without a rule (torch's AdamW) do not.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pion_hf.errors import unknown

# Every option and its default. None: of warmups those of TrainingArguments, of `adamw_min_lr_ratio` `min_lr_ratio`.
OPTIONS = {
    "pion_cosine": {
        "matrix_warmup_steps": 0,
        "adamw_warmup_steps": None,
        "min_lr_ratio": 0.01,
        "adamw_min_lr_ratio": None,
    },
    "teon_wsd": {
        "matrix_warmup_steps": None,
        "adamw_warmup_steps": None,
        "decay_fraction": 0.4,
        "min_lr_ratio": 0.0,
        "adamw_min_lr_ratio": None,
    },
}


def warmup(step: int, *, warmup_steps: int) -> float:
    """`min(1, (step + 1) / warmup_steps)`; 1 without a warmup. The first step already moves."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine(step: int, *, warmup_steps: int, training_steps: int, min_lr_ratio: float) -> float:
    """A warmup, then `r + (1 - r) (1 + cos(pi p)) / 2`, where `p` goes from 0 to 1 at `training_steps`, and stays."""
    progress = (step - warmup_steps) / max(1, training_steps - warmup_steps)
    decayed = (1 + math.cos(math.pi * min(1.0, max(0.0, progress)))) / 2
    return min(warmup(step, warmup_steps=warmup_steps), min_lr_ratio + (1 - min_lr_ratio) * decayed)


def warmup_stable_decay(
    step: int, *, warmup_steps: int, training_steps: int, decay_fraction: float, min_lr_ratio: float
) -> float:
    """The smaller of a warmup and `r + (1 - r) d`, where `d` falls linearly from 1 to 0.

    It does so over the last `decay_fraction` of the training: `d = (T - step) / (decay_fraction T)`, held to [0, 1].
    """
    decay = (training_steps - step) / (decay_fraction * max(1, training_steps))
    decayed = min(1.0, max(0.0, decay))
    return min(warmup(step, warmup_steps=warmup_steps), min_lr_ratio + (1 - min_lr_ratio) * decayed)


def pion_cosine(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, **options: Any) -> LambdaLR:
    """`cosine` for every group: matrices without a warmup, AdamW groups with `num_warmup_steps`.

    Args:
        matrix_warmup_steps: steps of the matrices' warmup (default 0; None: `num_warmup_steps`).
        adamw_warmup_steps: the same of the AdamW groups (default None).
        min_lr_ratio: the multiplier at `num_training_steps` (default 0.01).
        adamw_min_lr_ratio: the same of the AdamW groups (default None: `min_lr_ratio`).

    Raises:
        ValueError: as `check_options`, or a `num_warmup_steps` beyond the training.
    """
    return _schedule("pion_cosine", cosine, optimizer, num_warmup_steps, num_training_steps, options)


def teon_wsd(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, **options: Any) -> LambdaLR:
    """`warmup_stable_decay` for every group: a warmup, a constant rate, a linear decay.

    Args:
        matrix_warmup_steps, adamw_warmup_steps: steps of the warmups (default None: `num_warmup_steps`).
        decay_fraction: the part of the training over which rates decay, in (0, 1] (default 0.4).
        min_lr_ratio: the multiplier at `num_training_steps` (default 0).
        adamw_min_lr_ratio: the same of the AdamW groups (default None: `min_lr_ratio`).

    Raises:
        ValueError: as `check_options`, or a `num_warmup_steps` beyond the training.
    """
    return _schedule("teon_wsd", warmup_stable_decay, optimizer, num_warmup_steps, num_training_steps, options)


SCHEDULES = {"pion_cosine": pion_cosine, "teon_wsd": teon_wsd}


def check_options(name: str, options: Mapping[str, Any] | None, num_training_steps: int | None = None) -> dict:
    """All options of schedule `name`: those given (`lr_scheduler_kwargs`), the others at their defaults.

    Raises:
        ValueError: an option that does not exist (with the nearest that does), a value of the wrong type or out of
            its range, or a warmup longer than the training, if `num_training_steps` is known.
    """
    if name not in OPTIONS:
        raise unknown("schedule", name, OPTIONS)
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise ValueError(
            f"lr_scheduler_kwargs must be a dict or a JSON object, as in '{{\"min_lr_ratio\": 0.1}}', got {options!r}"
        )
    checked = dict(OPTIONS[name])
    for key, value in options.items():
        if key not in checked:
            raise unknown(f"option of {name} in lr_scheduler_kwargs", key, checked)
        if value is None and (OPTIONS[name][key] is None or key.endswith("warmup_steps")):
            checked[key] = None
        elif key.endswith("warmup_steps"):
            checked[key] = _whole_steps(f"lr_scheduler_kwargs: {key}", value, num_training_steps)
        else:
            checked[key] = _ratio(key, value)
    return checked


def _whole_steps(field: str, value: Any, training_steps: int | None = None) -> int:
    if not _is_number(value) or value != value // 1 or value < 0:
        raise ValueError(f"{field} must be a whole number of optimizer steps, 0 for no warmup, got {value!r}")
    if training_steps is not None and value > training_steps:
        raise ValueError(
            f"{field} is {value}, but the training has only {training_steps} steps: shorten the warmup, or train longer"
        )
    return int(value)


def _ratio(key: str, value: Any) -> float:
    if not _is_number(value):
        hint = " (YAML reads 1e-2 as text: write 0.01)" if isinstance(value, str) else ""
        raise ValueError(f"lr_scheduler_kwargs: {key} must be a number, got {value!r}{hint}")
    if key == "decay_fraction" and not 0 < value <= 1:
        raise ValueError(
            f"lr_scheduler_kwargs: decay_fraction must be in (0, 1], the part of the training over which the learning "
            f"rate falls, got {value}; for no decay set lr_scheduler_type to constant_with_warmup"
        )
    if not 0 <= value <= 1:
        raise ValueError(
            f"lr_scheduler_kwargs: {key} must be in [0, 1], the last learning rate relative to the peak, got {value}"
        )
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _schedule(
    name: str, multiplier: Callable, optimizer: Optimizer, warmup_steps: int, training_steps: int, options: dict
) -> LambdaLR:
    checked = check_options(name, options, training_steps)
    kinds = ["matrix" if group.get("rule", "adamw") != "adamw" else "adamw" for group in optimizer.param_groups]
    idle = [key for key in options if key.partition("_")[0] in {"matrix", "adamw"} - set(kinds)]
    if idle:
        warnings.warn(f"{name}: the optimizer has no group for {', '.join(idle)} of lr_scheduler_kwargs.", stacklevel=3)
    of_kinds = [_of_kind(kind, checked, warmup_steps, training_steps) for kind in kinds]
    # Partials carry no state of their own: all that a resumed run takes from a checkpoint is the step.
    return LambdaLR(optimizer, [functools.partial(multiplier, **of_kind) for of_kind in of_kinds])


def _of_kind(kind: str, options: dict[str, Any], warmup_steps: int, training_steps: int) -> dict[str, Any]:
    """The multiplier's arguments for groups of one kind, matrix or adamw."""
    steps, ratio = options[f"{kind}_warmup_steps"], options["min_lr_ratio"]
    if steps is None:
        steps = min(_whole_steps("warmup_steps", warmup_steps), training_steps)
    if kind == "adamw" and options["adamw_min_lr_ratio"] is not None:
        ratio = options["adamw_min_lr_ratio"]
    found = {"warmup_steps": steps, "training_steps": training_steps, "min_lr_ratio": ratio}
    return {**found, "decay_fraction": options["decay_fraction"]} if "decay_fraction" in options else found
