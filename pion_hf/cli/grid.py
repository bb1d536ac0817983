"""The runs of a comparison: contenders x options x learning rates x seeds, each a recipe of its own, checked first."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from pion_hf.cli import TRAINING
from pion_hf.cli.recipe import SECRETS, read_recipe
from pion_hf.integrations.arguments import (
    OPTIMIZER_CLASSES,
    OptimizerFields,
    option_name,
    option_types,
    resolve_options,
)
from pion_hf.runs.files import write_text
from pion_hf.runs.redaction import without_secrets

# What every run must share, or no result says anything about the optimizer: what it may cost, and what measures it.
SHARED = (
    *("max_steps", "num_train_epochs", "max_tokens", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("auto_find_batch_size", "max_length", "packing", "packing_strategy", "truncation_mode"),
    *("num_generations", "generation_batch_size", "steps_per_generation", "num_iterations", "max_completion_length"),
    *("model_name_or_path", "model_revision", "from_config", "reward_funcs", "reward_model_name_or_path"),
    *("datasets", "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"),
    *("validation_fraction", "sample_by", "completion_only_loss", "assistant_only_loss", "eval_packing"),
    *("other_text_file", "other_dataset", "other_dataset_split", "exact_match_samples", "max_new_tokens"),
    *("lm_eval_tasks", "lm_eval_limit", "lm_eval_include_path", "lm_eval_num_fewshot", "lm_eval_apply_chat_template"),
)
# What a comparison sets itself, and what to use instead.
OWN = {
    **{"output_dir": "--output_dir", "seed": "--seeds", "data_seed": "--seeds"},
    **{"optim": "--optim", "learning_rate": "--learning_rate"},
}
CONTENDERS_OWN = ("optim", "learning_rate")  # of these, what a contender says
LONGEST_NAME = 60  # of a contender, in a folder's name


@dataclass(frozen=True)
class Contender:
    """A name, keys that replace the recipe's, and the learning rates to try, rising."""

    name: str
    keys: dict[str, Any]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Trial:
    """One run: all keys of its recipe but `output_dir`. `recipe` and `command` alone say what it does."""

    contender: str
    learning_rate: float
    seed: int
    command: str
    recipe: dict[str, Any]

    @property
    def folder(self) -> str:
        """A name that any file system takes, which differs for every two runs that differ."""
        words = re.sub(r"[^a-z0-9.]+", "-", self.contender.lower()).strip("-.")[:LONGEST_NAME] or "run"
        told = json.dumps([self.contender, {"command": self.command, **self.recipe}], sort_keys=True, default=str)
        return f"{words}_lr{self.learning_rate:g}_seed{self.seed}_{hashlib.sha256(told.encode()).hexdigest()[:8]}"

    def __str__(self) -> str:
        return f"{self.contender}, learning rate {self.learning_rate:g}, seed {self.seed}"


def command_of(recipe: Path, named: str | None) -> str:
    """The command that a recipe is for: `named`, or its folder's name (recipes/<model>/<task>/)."""
    found = named or recipe.absolute().parent.name
    if found not in TRAINING:
        raise ValueError(
            f"{recipe} does not lie in a folder named {', '.join(TRAINING[:-1])} or {TRAINING[-1]}, which would say "
            "what it is for: add --command sft (or another)"
        )
    return found


def contenders_from_flags(recipe: Mapping[str, Any], optims: str | None, rates: str | None) -> list[Contender]:
    """A contender for every optimizer of `optims`, each at all `rates`; what is None is the recipe's."""
    names = [recipe.get("optim", "pion")] if optims is None else listed("--optim", optims)
    tried = recipe.get("learning_rate") if rates is None else listed("--learning_rate", rates)
    return [Contender(str(name), {"optim": name}, _rates("--learning_rate", tried)) for name in names]


def read_contenders(path: Path, recipe: Mapping[str, Any]) -> list[Contender]:
    """The contenders of a YAML file: name -> keys of the recipe, where `learning_rate` is one or a list."""
    if not path.is_file():
        raise FileNotFoundError(f"--contenders: there is no file {str(path)!r}")
    contenders = []
    for name, keys in read_recipe(path).items():
        where = f"{path}: {name}"
        if not isinstance(keys, dict):
            raise ValueError(f"{where} must hold keys of a recipe, as in {{optim: pion, learning_rate: [1e-3, 2e-3]}}")
        for key in keys:
            if key in OWN and key not in CONTENDERS_OWN:
                raise ValueError(f"{where}: {key} is set by {OWN[key]}, for all contenders")
        rates = _rates(f"{where}: learning_rate", keys.pop("learning_rate", recipe.get("learning_rate")))
        contenders.append(Contender(str(name), keys, rates))
    if not contenders:
        raise ValueError(f"{path} names no contenders")
    return contenders


def parse_axes(settings: Iterable[str]) -> dict[str, list[Any]]:
    """`["key=v1,v2"]` as values by key. A scalar stays text, as on a command line; `[a, b]` and `{a: b}` are YAML."""
    axes: dict[str, list[Any]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not equals or not key:
            raise ValueError(f"--set {setting}: write --set key=value, or key=value1,value2 to compare them")
        if key in axes:
            raise ValueError(f"--set {key} is given twice: write --set {key}=value1,value2")
        if key in OWN:
            raise ValueError(f"--set {key}: that is what {OWN[key]} is for")
        axes[key] = listed(f"--set {key}", text)
    return axes


def listed(where: str, text: str) -> list[Any]:
    """`"a,b"` as a list of distinct values: text, or what YAML makes of brackets."""
    try:
        words = yaml.load(f"[{text}]", yaml.BaseLoader)
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise ValueError(
            f"{where}: {text!r} is no list of values: part them by commas, quote those with commas"
        ) from None
    chosen = [word if isinstance(word, str) else value for word, value in zip(words, values, strict=True)]
    if not chosen or "" in chosen:
        raise ValueError(f"{where}: {text!r} holds an empty value")
    twice = [value for i, value in enumerate(chosen) if value in chosen[:i]]
    if twice:
        raise ValueError(f"{where}: {twice[0]!r} is given twice")
    return chosen


def make_grid(
    recipe: Mapping[str, Any],
    command: str,
    contenders: Iterable[Contender],
    axes: Mapping[str, list[Any]],
    seeds: int,
) -> tuple[list[Trial], list[str]]:
    """All runs, seed after seed, and remarks on what was left out for whom.

    An option of an optimizer (`optim_*`, `optim_args`) that comes from the recipe or an axis is left out for contenders
    whose optimizer does not take it; axes that say nothing to a contender do not multiply it.
    """
    contenders = list(contenders)
    for key, contender in itertools.product(axes, contenders):
        if key in contender.keys:
            raise ValueError(f"--set {key}: the contender {contender.name!r} sets it already: leave out one")
    trials: dict[str, Trial] = {}  # by folder: what is alike runs once
    left_out: dict[str, dict[str, None]] = {}  # key -> contenders
    for seed, contender, values in itertools.product(range(seeds), contenders, itertools.product(*axes.values())):
        chosen = dict(zip(axes, values, strict=True))
        base = {**_defaults(recipe), **recipe, **chosen}
        optim = str(contender.keys.get("optim", recipe.get("optim", "pion")))
        foreign = {key for key, value in base.items() if not _suits(key, value, optim, recipe, chosen)}
        for key in foreign:
            left_out.setdefault(key, {})[contender.name] = None
        base = {key: value for key, value in base.items() if key not in foreign and key != "output_dir"}
        told = [f"{key}={value}" for key, value in chosen.items() if key not in foreign and len(axes[key]) > 1]
        for rate in contender.rates:
            keys = {**base, **contender.keys, "learning_rate": rate, "seed": seed, "data_seed": seed}
            keys = {key: value for key, value in keys.items() if value is not None}
            trial = Trial(", ".join([contender.name, *told]), rate, seed, command, keys)
            trials.setdefault(trial.folder, trial)
    for key in axes:
        if len(left_out.get(key, ())) == len(contenders):
            raise ValueError(f"--set {key}: none of the optimizers that are compared takes it")
    grid = list(trials.values())
    _check_shared(grid)
    return grid, [f"{key} is left out for {'; '.join(names)}." for key, names in sorted(left_out.items())]


def check_grid(grid: Iterable[Trial], path: Path, output_dir: Path, *, trusted: bool = False) -> None:
    """Raise ValueError or FileNotFoundError for what a contender would stumble over, before any run begins.

    path: the recipe, to be named beside the contender. trusted: whether a model's own Python may run for it.
    """
    trials: dict[str, Trial] = {}
    for trial in grid:
        trials.setdefault(trial.contender, trial)
    environment = dict(os.environ)
    checks: list[Callable[[Trial, str], Any]] = [
        lambda trial, where: _check_recipe(trial, where, output_dir / trial.folder, trusted)
    ]
    if any(trial.command == "grpo" for trial in trials.values()):  # last, since it runs modules of the user's
        rewards = import_module("pion_hf.cli.grpo").import_rewards
        checks.append(lambda trial, _: rewards(trial.recipe.get("reward_funcs")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each run's log has them
        try:
            for check, trial in itertools.product(checks, trials.values()):
                where = f"{path}, {trial.contender}"
                try:
                    check(trial, where)
                except (ValueError, FileNotFoundError) as error:
                    raise type(error)(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error
        finally:  # arguments leave traces in it, which the runs would inherit
            os.environ.clear()
            os.environ.update(environment)


def write_recipe(path: Path, trial: Trial, output_dir: Path) -> dict[str, str]:
    """Write the recipe of one run, which `pion-hf <command> --config` takes; the variable with what it keeps secret."""
    recipe = {**trial.recipe, "output_dir": str(output_dir)}
    secrets = {key: value for key, value in recipe.items() if without_secrets({key: value}) != {key: value}}
    left_out = f"# Not written, since they are secrets or hold some: {', '.join(secrets)}.\n" if secrets else ""
    write_text(path, left_out + _yaml(without_secrets(recipe)))
    return {SECRETS: _yaml(secrets)} if secrets else {}


def _yaml(recipe: dict[str, Any]) -> str:
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def _check_recipe(trial: Trial, where: str, folder: Path, trusted: bool) -> None:
    module = import_module(f"pion_hf.cli.{trial.command}")
    recipe = copy.deepcopy({**trial.recipe, "output_dir": str(folder)})
    # Nothing runs: a recipe for a GPU (bf16) can be checked where there is none.
    flags = ["--use_cpu", "true"]
    if trusted and recipe.get("trust_remote_code"):
        flags.append("--trust_remote_code")
    parsed = module.parser().parse_recipe(flags, (where, recipe), trains=False)
    module.check(parsed)
    if parsed[1].eval_strategy == "no":
        raise ValueError(
            "without evaluation there is nothing to compare: set eval_strategy: epoch, and dataset_test_split"
        )


def _defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Where a recipe says nothing: no checkpoints, and logs rather than progress bars."""
    checkpoints = {} if recipe.get("load_best_model_at_end") else {"save_strategy": "no"}
    return {"disable_tqdm": True, **checkpoints}


def _suits(key: str, value: Any, optim: str, recipe: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    """Whether `optim` takes an option that was meant for the recipe's optimizer, or for one of several."""
    if key == "optim_args" and key not in chosen:
        return optim == str(recipe.get("optim", "pion"))
    if key not in (f.name for f in fields(OptimizerFields)) or value is None:
        return True
    if optim not in OPTIMIZER_CLASSES:
        return False
    option = option_name(key)
    if option not in option_types(optim):
        return False
    if key in chosen or optim == str(recipe.get("optim", "pion")):
        return True  # a value that is wrong is told as such
    try:
        resolve_options(optim, {option: value})
    except ValueError:
        return False  # the same word means something else: momentum is a number for Muon
    return True


def _rates(where: str, given: Any) -> tuple[float, ...]:
    if given is None:
        raise ValueError(f"{where}: name learning rates, as in 1e-5,3e-5,1e-4")
    rates = []
    for value in given if isinstance(given, list) else [given]:
        try:
            rates.append(float(value))
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {value!r} is no learning rate") from None
        if not math.isfinite(rates[-1]) or rates[-1] <= 0:
            raise ValueError(f"{where}: a learning rate is above 0, got {value!r}")
    if len(set(rates)) < len(rates) or not rates:
        raise ValueError(f"{where}: needs learning rates, each once, got {given!r}")
    return tuple(sorted(rates))


def _check_shared(grid: list[Trial]) -> None:
    """Raise ValueError where runs differ in what makes them comparable."""
    for key in SHARED:
        first = grid[0]
        other = next((t for t in grid if str(t.recipe.get(key)) != str(first.recipe.get(key))), None)
        if other is not None:
            raise ValueError(
                f"{key} is {first.recipe.get(key)!r} for {first.contender} and {other.recipe.get(key)!r} for "
                f"{other.contender}: that is no comparison under equal budget. Give all the same (in the recipe), or "
                "compare under each of them on its own, with an --output_dir each"
            )
