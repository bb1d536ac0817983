"""From a Trainer's arguments and its model to an optimizer of this package: what stands behind `--optim pion`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from typing import Any

from torch import nn
from transformers.utils import logging

from pion_hf.integrations.arguments import (
    GROUP_OPTIONS,
    OPTIMIZER_CLASSES,
    OptimizerFields,
    default_rate,
    parse_optim_args,
    resolve_options,
    warn_of_slow_bfloat16,
)
from pion_hf.integrations.run_writer import recording
from pion_hf.integrations.values import fit_fields
from pion_hf.optim import Inputs
from pion_hf.optim.groups import kept_columns
from pion_hf.optim.options import usual_rates
from pion_hf.optim.sharding import of_first
from pion_hf.routing.adapters import has_adapters
from pion_hf.routing.routes import Routing
from pion_hf.routing.table import LORA_FORMS, param_groups, routing_table
from pion_hf.runs.folder import write_json

logger = logging.get_logger(__name__)


def optimizer_of(args: Any, model: nn.Module | None) -> tuple[type, dict[str, Any]]:
    """As `Trainer.get_optimizer_cls_and_kwargs`: the optimizer's class and its arguments, `params` among them."""
    optim = args.optim.value
    if model is None:
        raise ValueError(f"optim={optim!r} routes a model's parameters by their modules: it needs the model.")
    refuse_wrappers(args)
    fit_fields(args)  # of transformers' own class, which takes text for a number
    warn_of_slow_bfloat16(args)
    optim, options, group_options = choose_form(args, model)
    say_what_it_is(args, optim, options)
    routing, groups = groups_from(args, model, optim, group_options)
    announce(routing, groups, args)
    options = with_inputs(options, model, group_options.get("keep_data"))
    return OPTIMIZER_CLASSES[optim], {"params": groups, "lr": args.learning_rate, **options}


def choose_form(args: Any, model: nn.Module) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """`form_of` with the options of typed fields and of `optim_args`, which wins; a rate that is open is the form's."""
    typed = args.given_options() if isinstance(args, OptimizerFields) else {}
    form, *options = form_of(args.optim.value, model, typed, parse_optim_args(args.optim_args))
    if form != args.optim.value and getattr(args, "rate_is_open", False):
        args.learning_rate = default_rate(form)
    return form, *options


def form_of(
    optim: str, model: nn.Module, *sources: dict[str, Any], by_trainer: bool = True
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The optimizer's name and options for `model`, constructor's and groups'; on LoRA adapters those of its form.

    Raises:
        ValueError: as `resolve_options`, also for options that the form for adapters does not have.
    """
    if not (optim in LORA_FORMS and has_adapters(model)):
        return optim, *resolve_options(optim, *sources, by_trainer=by_trainer)
    form, usual = LORA_FORMS[optim]
    what = "".join(f", {key}={value}" for key, value in usual.items())
    logger.warning(f"optim={optim!r} on LoRA adapters is {form!r}{what}: it updates the factors, each by its own rule.")
    return form, *resolve_options(form, usual, *sources, by_trainer=by_trainer)


def say_what_it_is(args: Any, optim: str, options: dict[str, Any]) -> None:
    """One line each where a name has become another rule, and where nobody may have thought of the learning rate."""
    if optim == "pion" and not options.keys() & {"direction", "preset"}:
        logger.warning_once(
            f"optim='pion' is the published rule since 0.13 (direction=gradient, metric=lie; usual learning rates "
            f"{usual_rates('pion')}). Until then it was what optim='pion_ambient' is now, at ten times the rate. "
            "optim_direction=gradient says that you know."
        )
    elif optim == "pion" and options.get("direction") in ("adam", "natural", "polar") and "metric" not in options:
        logger.warning_once(
            "The metric of optim='pion' is 'lie' by default since 0.13, and was 'ambient' until then: optim_metric "
            "says which."
        )
    defaults = [f.default for f in dataclasses.fields(args) if f.name == "learning_rate"]
    if args.learning_rate in defaults and not getattr(args, "rate_is_open", False):
        logger.warning_once(
            f"learning_rate={args.learning_rate:g} is the default of {type(args).__name__}; usual for optim={optim!r} "
            f"in fine-tuning: {usual_rates(optim)}."
        )


def groups_from(args: Any, model: nn.Module, optim: str, options: dict[str, Any]) -> tuple[Routing, list[dict]]:
    """`groups_of` with the rates of `TrainingArguments`; AdamW's settings default to theirs too."""
    settings = {"adamw_betas": (args.adam_beta1, args.adam_beta2), "adamw_eps": args.adam_epsilon, **options}
    settings["targets"] = settings.get("targets") or args.optim_target_modules
    rates = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    return groups_of(model, optim, {**settings, **rates}, zeros=_zeros_at_the_start(args))


def groups_of(
    model: nn.Module, optim: str, options: dict[str, Any], *, zeros: list[str] | None = None
) -> tuple[Routing, list[dict]]:
    """Route `model` and build its groups, by the weights of the first process: the others may not have them yet.

    options: those of `pion_hf.param_groups`. zeros: see `pion_hf.routing_table`.
    """
    choices = {key: options.get(key) for key in GROUP_OPTIONS if not key.startswith("adamw_")}
    routing = routing_table(model, optim, **choices, zeros=zeros)
    (zeros,) = of_first([routing.zeros])
    if zeros != routing.zeros:
        routing = routing_table(model, optim, **choices, zeros=zeros)
    settings = {key: value for key, value in options.items() if key not in (*choices, "keep_data")}
    groups = param_groups(model, optim, routing=routing, **settings)
    measured = [group for group in groups if "unit_step" in group]
    for group, sizes in zip(measured, of_first([group["unit_step"] for group in measured]), strict=True):
        group["unit_step"] = sizes
    return routing, groups


def with_inputs(options: dict[str, Any], model: nn.Module, data: str | None = None) -> dict[str, Any]:
    """A constructor's options, with the inputs of the model's layers where some of their directions are kept.

    data: see `kept_data.show`.
    """
    if not options.get("keep"):
        return options
    inputs = Inputs(model, kept_columns(options))
    if data is not None:
        from pion_hf.integrations import kept_data  # which brings evaluate

        kept_data.show(inputs, model, data)
    return {**options, "inputs": inputs}


def _zeros_at_the_start(args: Any) -> list[str] | None:
    """Of a run to be resumed, by the `routing.json` beside its checkpoint; None where the weights tell.

    Where nobody says that it is resumed, the weights have moved, and the saved groups say it when they are loaded.
    """
    resume = str(args.resume_from_checkpoint or "")
    if resume.lower() in ("", "false"):
        return None
    folder = args.output_dir if resume.lower() == "true" else os.path.dirname(os.path.abspath(resume))
    try:
        with open(os.path.join(folder, "routing.json"), encoding="utf-8") as file:
            return [p["name"] for p in json.load(file)["parameters"] if p["role"] == "zero"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def refuse_wrappers(args: Any) -> None:
    """Raises ValueError under launchers whose parameters are not whole matrices."""
    if getattr(args, "deepspeed", None) or _flag("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            f"optim={args.optim.value!r} does not run under DeepSpeed: ZeRO keeps flat shards, in which no matrix is "
            "whole. Use DDP (accelerate launch --multi_gpu), or adamw_torch with DeepSpeed."
        )
    name = args.optim.value
    version, offloads = _fsdp(args)
    if version == 1:
        raise ValueError(
            f"optim={name!r} does not run under FSDP1: its flat shards hold no whole matrix. Use FSDP2 (fsdp_version: "
            "2, as in recipes/accelerate/fsdp2.yaml) or DDP (accelerate launch --multi_gpu), or adamw_torch with FSDP1."
        )
    if version and offloads:
        raise ValueError(
            f"optim={name!r} does not run under FSDP2 with parameters offloaded to the CPU, where every step would "
            "wait for whole matrices to be updated. Set fsdp_offload_params: false (in fsdp_config: "
            "cpu_offload=false), or use adamw_torch."
        )


def _fsdp(args: Any) -> tuple[int, bool]:
    """FSDP's version, 0 without it, and whether parameters are offloaded.

    TrainingArguments default to version 2, accelerate's environment to 1.
    """
    if getattr(args, "fsdp", None):
        config = args.fsdp_config or {}
        return int(config.get("version", 2)), bool(config.get("cpu_offload", False))
    version = int(os.environ.get("FSDP_VERSION", "1")) if _flag("ACCELERATE_USE_FSDP") else 0
    return version, _flag("FSDP_OFFLOAD_PARAMS")


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def announce(routing: Routing, groups: list[dict], args: Any) -> None:
    """Write `routing.json` and say who updates what, on the first process: a table, or a line where no terminal is."""
    if not args.should_save:
        return
    rates = {group["rule"]: group["lr"] for group in groups}
    if args.output_dir:
        path = os.path.join(args.output_dir, "routing.json")
        with recording(repr(path)):
            write_json(path, routing.record(rates))
    if args.should_log:
        from rich.console import Console

        console = Console(file=sys.stderr)
        if console.is_terminal:
            console.print(routing.table(rates))
        else:
            print(summary(routing, rates), file=sys.stderr)


def summary(routing: Routing, rates: dict[str, float]) -> str:
    """Who updates what, in a line."""
    rows: dict[str, Counter] = {}
    for row in routing.rows(rates):
        rows.setdefault(row["rule"], Counter()).update({key: row[key] for key in ("tensors", "matrices", "parameters")})
    said = [
        f"{rule}: {n['matrices'] or n['tensors']:,} {'matrices' if n['matrices'] else 'tensors'} of "
        f"{n['parameters']:,} parameters, lr {rates[rule]:g}"
        + (f" (usual: {usual_rates(routing.optim)})" if rule != "adamw" else "")
        for rule, n in rows.items()
    ]
    return "; ".join(said) + (f"; frozen: {routing.frozen:,} parameters" if routing.frozen else "")
