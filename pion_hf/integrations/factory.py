"""This package's optimizers as `optimizer_cls_and_kwargs`, for a Trainer whose arguments cannot name them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import transformers
from accelerate import PartialState
from torch import nn
from transformers import TrainingArguments

from pion_hf.errors import unknown
from pion_hf.integrations.arguments import FIXED_OPTIONS, OPTIMIZER_CLASSES, resolve_options
from pion_hf.integrations.handler import form_of, groups_of, refuse_wrappers, summary, with_inputs
from pion_hf.optim import MatrixOptimizer


class Factory:
    """What a Trainer makes without arguments and then calls with its model (transformers' `is_optimizer_factory`)."""

    def __call__(self, model: nn.Module, *_: Any, optim: str, **options: Any) -> MatrixOptimizer:
        """The optimizer `optim` for `model`, routed as `--optim` routes it; options: see `factory`.

        What else a Trainer hands over is not read (axolotl's: its arguments).
        """
        refuse_wrappers(SimpleNamespace(optim=SimpleNamespace(value=optim)))  # by what launchers set in the environment
        form, own, choices = form_of(optim, model, options, by_trainer=False)
        usual = {
            "adamw_betas": (TrainingArguments.adam_beta1, TrainingArguments.adam_beta2),
            "adamw_eps": TrainingArguments.adam_epsilon,
        }
        rates = {key: own[key] for key in ("lr", "weight_decay") if key in own}
        routing, groups = groups_of(model, form, {**usual, **choices, **rates})
        if PartialState().is_main_process:
            print(summary(routing, {group["rule"]: group["lr"] for group in groups}), file=sys.stderr)
        return OPTIMIZER_CLASSES[form](groups, **with_inputs(own, model, choices.get("keep_data")))


def factory(name: str, *, lr: float, **options: Any) -> tuple[type[Factory], dict[str, Any]]:
    """`Trainer(optimizer_cls_and_kwargs=pion_hf.factory("pion", lr=2e-4))`: what `--optim pion` makes, without args.

    The Trainer hands over its model and nothing else: `learning_rate`, `weight_decay`, `optim` and `optim_args` of its
    arguments are not asked. Its schedule acts on the rates that are given here.

    Args:
        name: an optimizer as `--optim` has it. On a model with LoRA adapters, one for whole matrices becomes its form
            for adapters, and says so.
        lr: learning rate of the matrices, and of AdamW's groups where no `adamw_lr` is given.
        options: `weight_decay` (0), and every option of `--optim_args` by its own name. AdamW's groups have the betas
            and epsilon that `TrainingArguments` have by default.

    Raises:
        ValueError: a name or option that does not exist (with the nearest that does), a value of the wrong type.
        ImportError: transformers before 5.2, whose Trainer calls no factories.
    """
    if name not in OPTIMIZER_CLASSES:
        raise unknown("optimizer", name, OPTIMIZER_CLASSES)
    resolve_options(name, {"lr": lr, **options}, by_trainer=False)
    if not hasattr(transformers.trainer, "is_optimizer_factory"):
        given = {"params": f"pion_hf.param_groups(model, {name!r}, lr={lr!r})"}
        given |= {key: repr(value) for key, value in FIXED_OPTIONS.get(name, {}).items()}
        pairs = ", ".join(f"{key!r}: {value}" for key, value in given.items())
        raise ImportError(
            f"pion_hf.factory needs transformers 5.2 or newer, and {transformers.__version__} is here, whose Trainer "
            f"calls no factories. Use optim={name!r}, or pion_hf.param_groups: "
            f"optimizer_cls_and_kwargs=(pion_hf.{OPTIMIZER_CLASSES[name].__name__}, {{{pairs}}})."
        )
    return Factory, {"optim": name, "lr": lr, **options}
