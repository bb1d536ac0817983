"""Adds this package's names to transformers, so that `--optim pion` works in any Trainer."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers.utils import logging

from pion_hf.adapters import has_adapters
from pion_hf.arguments import (
    LORA_OPTIONS,
    OPTIMIZER_CLASSES,
    STACK_OPTIONS,
    PionOptions,
    parse_optim_args,
    resolve_options,
)
from pion_hf.optim import Inputs
from pion_hf.optim.groups import kept_columns
from pion_hf.optim.sharding import of_first
from pion_hf.routing import LORA_FORMS, Routing, param_groups, routing_table
from pion_hf.schedules import SCHEDULES

OPTIMIZER_NAMES = tuple(OPTIMIZER_CLASSES)

logger = logging.get_logger(__name__)


def register() -> None:
    """Make this package's names valid as `optim` and `lr_scheduler_type` of `TrainingArguments`. Safe to call again.

    Raises:
        RuntimeError: transformers' internals differ from those this version was written for.
    """
    names, handlers, trainer_class, context_class, scheduler_types, schedulers = _host_internals()
    for name in OPTIMIZER_NAMES:
        if name not in names._value2member_map_:
            _add_member(names, name)
        handlers[names(name)] = _handle
    for name, schedule in SCHEDULES.items():
        if name not in scheduler_types._value2member_map_:
            _add_member(scheduler_types, name)
        schedulers[scheduler_types(name)] = schedule
    lookup = trainer_class.get_optimizer_cls_and_kwargs
    if not getattr(lookup, "knows_pion_hf", False):
        trainer_class.get_optimizer_cls_and_kwargs = staticmethod(_own_names_first(lookup, context_class))


def _host_internals() -> tuple[Any, Any, Any, Any, Any, Any]:
    try:
        from transformers import Trainer
        from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
        from transformers.trainer import _OPTIMIZER_HANDLERS
        from transformers.trainer_optimizer import OptimizerContext
        from transformers.trainer_utils import SchedulerType
        from transformers.training_args import OptimizerNames

        if list(inspect.signature(Trainer.get_optimizer_cls_and_kwargs).parameters) != ["args", "model"]:
            raise AttributeError("Trainer.get_optimizer_cls_and_kwargs does not take (args, model)")
        for enum in (OptimizerNames, SchedulerType):
            _ = enum._value2member_map_, enum._member_map_, enum._member_names_
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"pion_hf cannot add its optimizers to transformers {transformers.__version__}: {error}. Install a "
            "version that setup.cfg allows, or pass Trainer(optimizer_cls_and_kwargs=(pion_hf.Pion, {'params': "
            "pion_hf.param_groups(model)}))."
        ) from error
    return OptimizerNames, _OPTIMIZER_HANDLERS, Trainer, OptimizerContext, SchedulerType, TYPE_TO_SCHEDULER_FUNCTION


def _add_member(enum: Any, value: str) -> None:
    member = str.__new__(enum, value)
    member._name_, member._value_ = value.upper(), value
    enum._member_names_.append(member._name_)
    enum._member_map_[member._name_] = member
    enum._value2member_map_[value] = member
    type.__setattr__(enum, member._name_, member)


def _own_names_first(lookup: Callable, context_class: type) -> Callable:
    """transformers splits `optim_args` at every comma before any handler sees it, and so fails on lists and tuples.

    Our handler parses the string itself. For other optimizers nothing changes, errors included.
    """

    @functools.wraps(lookup)
    def get_optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[Any, Any]:
        if args.optim in OPTIMIZER_NAMES:
            empty = {"optimizer_kwargs": {}, "adam_kwargs": {}, "optim_args": {}}
            return _handle(context_class(args=args, model=model, **empty))
        return lookup(args, model)

    get_optimizer_cls_and_kwargs.knows_pion_hf = True  # seen through further wrappers: functools.wraps copies it
    return get_optimizer_cls_and_kwargs


def _handle(context: Any) -> tuple[type, dict[str, Any]]:
    """transformers' handler contract: the optimizer's class and its keyword arguments, `params` among them."""
    args, model = context.args, context.model
    optim = args.optim.value
    if model is None:
        raise ValueError(f"optim={optim!r} routes a model's parameters by their modules: it needs the model.")
    refuse_wrappers(args)
    optim, options, group_options = choose_form(args, model)
    routing, groups = groups_from(args, model, optim, group_options)
    # Measured of weights of which the first process's count: DDP and FSDP2 give them to the others, but only later.
    measured = [group for group in groups if "reach" in group]
    for group, reach in zip(measured, of_first([group["reach"] for group in measured]), strict=True):
        group["reach"] = reach
    announce(routing, groups, args)
    if options.get("keep"):
        options["inputs"] = Inputs(model, kept_columns(options))
    return OPTIMIZER_CLASSES[optim], {"params": groups, "lr": args.learning_rate, **options}


def choose_form(args: Any, model: nn.Module) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The optimizer's name and options for `model`: on LoRA adapters, that of the form for adapters.

    Raises:
        ValueError: as `resolve_options`, also for options that the form for adapters does not have.
    """
    optim, fixed = args.optim.value, {}
    if optim in LORA_FORMS and has_adapters(model):
        form, fixed = LORA_FORMS[optim]
        what = "".join(f", {key}={value}" for key, value in fixed.items())
        logger.warning(
            f"optim={optim!r} on LoRA adapters is {form!r}{what}: it updates the factors, each by its own rule."
        )
        optim = form
    options, group_options = options_from(args, optim)
    return optim, options, {**group_options, **fixed}


def options_from(args: Any, optim: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constructor's and the groups' options from typed fields and `optim_args` (which wins)."""
    typed = args.given_options() if isinstance(args, PionOptions) else {}
    return resolve_options(optim, typed, parse_optim_args(args.optim_args))


def groups_from(args: Any, model: nn.Module, optim: str, options: dict[str, Any]) -> tuple[Routing, list[dict]]:
    """Route `model` and build its groups; AdamW's settings default to those of `TrainingArguments`."""
    options = {"adamw_betas": (args.adam_beta1, args.adam_beta2), "adamw_eps": args.adam_epsilon, **options}
    choices = {key: options.pop(key, None) for key in ("targets", "exclude", *STACK_OPTIONS, *LORA_OPTIONS)}
    choices["targets"] = choices["targets"] or args.optim_target_modules
    routing = routing_table(model, optim, **choices)
    groups = param_groups(
        model, optim, lr=args.learning_rate, weight_decay=args.weight_decay, routing=routing, **options
    )
    return routing, groups


def refuse_wrappers(args: Any) -> None:
    """Raises ValueError under launchers whose parameters are not whole matrices."""
    if getattr(args, "deepspeed", None) or _flag("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            f"optim={args.optim.value!r} does not run under DeepSpeed: ZeRO keeps flat shards, in which no matrix is "
            "whole. Use DDP (accelerate launch --multi_gpu), or adamw_torch with DeepSpeed."
        )
    name = args.optim.value
    if _fsdp_version(args) == 1:
        raise ValueError(
            f"optim={name!r} does not run under FSDP1: its flat shards hold no whole matrix. Use FSDP2 (fsdp_version: "
            "2, as in recipes/accelerate/fsdp2.yaml) or DDP (accelerate launch --multi_gpu), or adamw_torch with FSDP1."
        )
    if _fsdp_version(args) and _fsdp_offloads(args):
        raise ValueError(
            f"optim={name!r} does not run under FSDP2 with parameters offloaded to the CPU, where every step would "
            "wait for whole matrices to be updated. Set fsdp_offload_params: false (in fsdp_config: "
            "cpu_offload=false), or use adamw_torch."
        )


def _fsdp_version(args: Any) -> int:
    """0 without FSDP; TrainingArguments default to version 2, accelerate's environment to 1."""
    if getattr(args, "fsdp", None):
        return int((args.fsdp_config or {}).get("version", 2))
    return int(os.environ.get("FSDP_VERSION", "1")) if _flag("ACCELERATE_USE_FSDP") else 0


def _fsdp_offloads(args: Any) -> bool:
    if getattr(args, "fsdp", None):
        return bool((args.fsdp_config or {}).get("cpu_offload", False))
    return _flag("FSDP_OFFLOAD_PARAMS")


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def announce(routing: Routing, groups: list[dict], args: Any) -> None:
    """Write `routing.json` and say who updates what, on the first process: a table, or a line where no terminal is."""
    if not args.should_save:
        return
    rates = {group["rule"]: group["lr"] for group in groups}
    if args.output_dir:
        routing.save(os.path.join(args.output_dir, "routing.json"), rates)
    if args.should_log:
        from rich.console import Console

        console = Console(file=sys.stderr)
        if console.is_terminal:
            console.print(routing.table(rates))
        else:
            print(_summary(routing, rates), file=sys.stderr)


def _summary(routing: Routing, rates: dict[str, float]) -> str:
    rows: dict[str, Counter] = {}
    for row in routing.rows(rates):
        rows.setdefault(row["rule"], Counter()).update({key: row[key] for key in ("tensors", "matrices", "parameters")})
    said = [
        f"{rule}: {n['matrices'] or n['tensors']:,} {'matrices' if n['matrices'] else 'tensors'} of "
        f"{n['parameters']:,} parameters, lr {rates[rule]:g}"
        for rule, n in rows.items()
    ]
    return "; ".join(said) + (f"; frozen: {routing.frozen:,} parameters" if routing.frozen else "")
