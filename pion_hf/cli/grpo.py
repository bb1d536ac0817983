"""`pion-hf grpo`: TRL's GRPO script with this package's optimizer, rewards by rule, and a report at the end."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from trl.data_utils import get_dataset_column_names
from trl.import_utils import is_vllm_available
from trl.scripts import grpo as trl_grpo
from trl.trainer.utils import get_callable_name

from pion_hf.cli import flags, training
from pion_hf.cli.before_after import ReportMixin, wants_blend
from pion_hf.cli.flags import OWN, REWARDS
from pion_hf.cli.lora_start import changes_base, initialisation
from pion_hf.cli.recipe import RecipeParser
from pion_hf.cli.rows import check_column, fault_of_prompt
from pion_hf.cli.training import readable, train
from pion_hf.errors import unknown

PACKAGES = {
    **dict.fromkeys(OWN, "reasoning-gym"),
    "accuracy_reward": "math-verify",
    "reasoning_accuracy_reward": "math-verify",
}
# What the trainer gives to reward functions besides the columns of the data.
GIVEN = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


class RewardReport(ReportMixin):
    """The task is the reward: its mean over evaluation data, of answers sampled as in training; of several, each."""

    def __init__(self, *args: Any, reward_funcs: list, train_dataset: Any, eval_dataset: Any, **kwargs: Any) -> None:
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        for dataset in data.values():
            if dataset is not None:
                check_columns(dataset, [reward for reward in reward_funcs if callable(reward)])
        super().__init__(*args, reward_funcs=reward_funcs, **data, **kwargs)

    def measure_task(self) -> dict[str, float]:
        values = {}
        if self.eval_dataset is not None:
            metrics = self.evaluation()
            values["reward"] = metrics["eval_reward"]
            if len(self.reward_func_names) > 1:
                values.update({name: metrics[f"eval_rewards/{name}/mean"] for name in self.reward_func_names})
        return values


def parser() -> RecipeParser:
    """Every flag of `trl grpo`, the optimizer's `--optim_*`, and the report's."""
    return flags.parser("grpo")


def main(argv: list[str]) -> None:
    """Train; ends with a table, and `eval.json` in the output folder."""
    parsed = parser().parse_recipe(argv)
    script_args, training_args, model_args, *others = parsed
    if script_args.reward_funcs:  # until 0.13 ours had this path
        script_args.reward_funcs = [name.removeprefix("pion_hf.rewards.") for name in script_args.reward_funcs]
    check(parsed)
    import_rewards(script_args.reward_funcs)
    # TRL's script knows its own by name, and imports the rest.
    script_args.reward_funcs = [OWN.get(name, name) for name in script_args.reward_funcs or []]

    from pion_hf.integrations.trl import PionGRPOTrainer  # not before it is needed: see there

    class ReportingGRPOTrainer(RewardReport, PionGRPOTrainer):
        """TRL's `GRPOTrainer` with this package's optimizer, and the report."""

    with readable(script_args.dataset_name):
        train(
            script_args,
            training_args,
            model_args,
            *others,
            make_trainer=ReportingGRPOTrainer,
            script=trl_grpo,
            trainer_name="GRPOTrainer",
        )


def check_reward(name: str) -> None:
    """Raise ValueError for an entry of `reward_funcs` that is no import path, or whose package is not installed."""
    if "." not in REWARDS.get(name, name):
        raise ValueError(f"{unknown('reward function', name, REWARDS)} Or give an import path: package.function.")
    package = PACKAGES.get(name)
    if package is not None and find_spec(package.replace("-", "_")) is None:
        raise ValueError(f"reward_funcs: {name} needs the package {package}: pip install {package}")


def import_rewards(names: str | Iterable[str] | None) -> None:
    """Import the modules of `reward_funcs`, which runs them; raise ValueError for an entry that is no function."""
    sys.path.insert(0, os.getcwd())  # as TRL's script does
    for name in [names] if isinstance(names, str) else names or ():
        module_name, _, function = REWARDS.get(name, name).rpartition(".")
        try:
            module = import_module(module_name)
        except ImportError as error:
            raise ValueError(f"reward_funcs: cannot import {module_name!r} of {name!r}: {error}") from error
        if not callable(getattr(module, function, None)):
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise ValueError(f"reward_funcs: {unknown(f'function of {module_name}', function, known)}")


def check_columns(dataset: Any, rewards: Iterable[Callable]) -> None:
    """Raise ValueError for rows without a prompt, or without a column that one of `rewards` takes."""
    columns = get_dataset_column_names(dataset)
    there = ", ".join(map(repr, columns))
    if "prompt" not in columns:
        raise ValueError(f"the dataset has no column 'prompt' (it has {there}), a text or messages to be answered")
    check_column(dataset, "the dataset", "prompt", fault_of_prompt)
    for reward in rewards:
        name = get_callable_name(reward)
        for parameter in inspect.signature(reward).parameters.values():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            needed = named and parameter.default is parameter.empty and parameter.name not in GIVEN
            if needed and parameter.name not in columns:
                made = "; examples/prepare_reasoning.py writes it" if name in OWN else ""
                raise ValueError(
                    f"the dataset has no column {parameter.name!r} (it has {there}), which {name} needs{made}"
                )


def check(parsed: Sequence[Any]) -> None:
    """Raise ValueError or FileNotFoundError for what can be told of the arguments before anything is loaded."""
    script_args, args, model_args, _, report_args = parsed
    rewards = len(script_args.reward_funcs or []) + bool(script_args.reward_model_name_or_path)
    if not rewards:
        raise ValueError(f"name a reward: reward_funcs: [{next(iter(REWARDS))}], or reward_model_name_or_path")
    for name in script_args.reward_funcs or []:
        check_reward(name)
    if args.reward_weights is not None and len(args.reward_weights) != rewards:
        raise ValueError(f"reward_weights: {len(args.reward_weights)} weights for {rewards} rewards: one for each")
    if args.use_vllm and wants_blend(report_args):
        raise ValueError(
            "blend and blend_shares do not go with use_vllm, which would answer with the trained weights: leave one out"
        )
    if args.use_vllm and not is_vllm_available():
        raise ValueError("use_vllm needs the package vllm: install it, or leave use_vllm out")
    if args.sync_ref_model and (args.beta == 0 or model_args.use_peft):
        why = "beta=0 keeps no reference model" if args.beta == 0 else "the reference of an adapter is the bare model"
        raise ValueError(f"sync_ref_model has nothing to update: {why}; leave it out")
    if model_args.init_lora_weights is not None:
        start = initialisation(model_args.init_lora_weights)
        if start == "eva" or changes_base(start):
            raise ValueError(f"init_lora_weights={start!r} is for sft and cpt alone: choose another, or leave it out")
    training.check(parsed)
