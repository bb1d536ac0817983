"""Adds this package's names to transformers, so that `--optim pion` works in any Trainer.

transformers takes seconds to import, and whoever asks for these names imports it anyway: nothing here does.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from pion_hf.integrations.hook import when_imported
from pion_hf.needs import require
from pion_hf.optim import REGISTERED

OPTIMIZER_NAMES = tuple(REGISTERED)

_warned: set[str] = set()


def register() -> None:
    """Make this package's names valid as `optim` and `lr_scheduler_type` of `TrainingArguments`. Safe to call again.

    If transformers is imported, they are at once, else as soon as it is. Where it is another inside than those releases
    that this version was written for, one warning says what is missing and what is left.
    """
    for name, extend in EXTENSIONS.items():
        when_imported(name, functools.partial(_attempt, extend))


def _optimizer_names(training_args: ModuleType) -> None:
    for name in OPTIMIZER_NAMES:
        _add_member(training_args.OptimizerNames, name)


def _schedule_names(trainer_utils: ModuleType) -> None:
    from pion_hf.integrations.schedules import SCHEDULES  # imports torch, as transformers has

    for name in SCHEDULES:
        _add_member(trainer_utils.SchedulerType, name)


def _schedules(optimization: ModuleType) -> None:
    from pion_hf.integrations.schedules import SCHEDULES

    for name, schedule in SCHEDULES.items():
        optimization.TYPE_TO_SCHEDULER_FUNCTION[optimization.SchedulerType(name)] = schedule


def _optimizers(trainer: ModuleType) -> None:
    lookup = trainer.Trainer.get_optimizer_cls_and_kwargs
    if getattr(lookup, "knows_pion_hf", False):
        return
    if list(inspect.signature(lookup).parameters)[:2] != ["args", "model"]:
        raise AttributeError("Trainer.get_optimizer_cls_and_kwargs does not take (args, model)")
    trainer.Trainer.get_optimizer_cls_and_kwargs = staticmethod(_own_names_first(lookup))


# What becomes of modules of transformers, in the order in which they import each other.
EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.trainer_utils": _schedule_names,
    "transformers.training_args": _optimizer_names,
    "transformers.optimization": _schedules,
    "transformers.trainer": _optimizers,
}


def _attempt(extend: Callable[[ModuleType], None], module: ModuleType) -> None:
    """A failure here is no reason for anyone's import to fail: who asks for a name that is missing gets an error."""
    try:
        extend(module)
    except Exception as error:
        version = getattr(sys.modules.get("transformers"), "__version__", "of an unknown version")
        said = (
            f"pion_hf cannot add its optimizers and schedules to transformers {version}: {type(error).__name__}, "
            f"{error}. optim='pion' and the other names may be errors there. What is left: a version of transformers "
            "that setup.cfg allows, loops of your own with pion_hf.Pion(pion_hf.param_groups(model)), and "
            "Trainer(optimizer_cls_and_kwargs=(pion_hf.Pion, {'params': pion_hf.param_groups(model)}))."
        )
        if said not in _warned:
            _warned.add(said)
            warnings.warn(said, stacklevel=2)


def _add_member(enum: Any, value: str) -> None:
    member = str.__new__(enum, value)
    member._name_, member._value_ = value.upper(), value
    # Unpickled where this package is installed and not imported yet, it imports it.
    member.__reduce_ex__ = lambda protocol: (import_module(__name__)._member, (enum.__module__, enum.__name__, value))
    names, by_name = enum._member_names_, enum._member_map_
    if enum._value2member_map_.setdefault(value, member) is member:  # it was not there, another thread's neither
        names.append(member._name_)
        by_name[member._name_] = member
        type.__setattr__(enum, member._name_, member)


def _member(module: str, enum: str, value: str) -> Any:
    return getattr(import_module(module), enum)(value)


def _own_names_first(lookup: Callable) -> Callable:
    """`Trainer.get_optimizer_cls_and_kwargs` that knows our names; for other optimizers nothing changes.

    transformers' own way in, a private table of handlers, is not in every release, and splits `optim_args` at every
    comma before a handler sees it, lists and tuples too.
    """

    @functools.wraps(lookup)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None, *others: Any, **named: Any) -> tuple[Any, Any]:
        if args.optim in OPTIMIZER_NAMES:
            require("transformers")
            from pion_hf.integrations.handler import optimizer_of

            return optimizer_of(args, model)
        return lookup(args, model, *others, **named)

    get_optimizer_cls_and_kwargs.knows_pion_hf = True  # seen through further wrappers: functools.wraps copies it
    return get_optimizer_cls_and_kwargs
