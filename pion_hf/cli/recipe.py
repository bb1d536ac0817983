"""Parsing recipes and command lines: TRL's parser, our typed fields, and errors that name the nearest key."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import transformers
import yaml
from torch.utils.checkpoint import checkpoint
from transformers.hf_argparser import string_to_bool
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames
from transformers.utils import logging
from trl import TrlParser
from trl.scripts.utils import DatasetConfig

from pion_hf.cli import older
from pion_hf.cli.configs import local_config
from pion_hf.errors import unknown
from pion_hf.integrations.arguments import (
    OPTIMIZER_CLASSES,
    OptimizerFields,
    option_name,
    option_types,
    options_of,
    parse_optim_args,
    resolve_options,
)
from pion_hf.integrations.config import RATE
from pion_hf.integrations.schedules import SCHEDULES
from pion_hf.integrations.values import OPTION, check_form, check_ranges, fit
from pion_hf.optim.options import Routed

logger = logging.get_logger(__name__)

SECRETS = "PION_HF_SECRETS"  # the variable by which a comparison tells a run what no file of it should hold: YAML

# Keys of older versions of TRL, transformers and the alignment handbook, and what they are called now.
RENAMED = {
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
    "chat_template": "chat_template_path",
    "dataset_mixer": "datasets",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "include_inputs_for_metrics": "include_for_metrics: [inputs]",
    "lora_target": "lora_target_modules",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "preprocessing_num_workers": "dataset_num_proc",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "target_modules": "lora_target_modules",
    "torch_dtype": "dtype",
    "use_flash_attention_2": "attn_implementation: flash_attention_2",
    "use_liger": "use_liger_kernel",
    "warmup_ratio": "warmup_steps: a fraction below 1",
    "xpu_backend": "ddp_backend",
}
# Keys that are gone without a successor, and why they are not needed.
GONE = {
    "bnb_4bit_compute_dtype": "TRL computes in dtype",
    "dataset_splits": "each entry of datasets has a split",
    "fp16_backend": "there is only one",
    "half_precision_backend": "there is only one",
    "logging_dir": "trackers take their folder from the environment (TENSORBOARD_LOGGING_DIR)",
    "optim_hold": "no benchmark spoke for it",
    "optim_rank_tolerance": "it is always 0.02",
    "optim_share_work": "under DDP the work is divided where that pays",
    "overwrite_output_dir": "a run always writes into output_dir; resume_from_checkpoint continues one",
    "save_safetensors": "nothing else is saved",
    "tokenizer_name": "the tokenizer is the model's",
    "tokenizer_name_or_path": "the tokenizer is the model's",
    "use_mps_device": "it is found by itself",
}
# What `from_pretrained` takes out of its `**kwargs`, beside the parameters in its signature.
LOADER_OPTIONS = (
    *("adapter_kwargs", "allow_all_kernels", "attn_implementation", "code_revision", "device_map", "device_mesh"),
    *("distributed_config", "dtype", "experts_implementation", "generation_config", "gguf_file", "kernel_config"),
    *("key_mapping", "max_memory", "offload_buffers", "offload_folder", "proxies", "quantization_config", "subfolder"),
    *("torch_dtype", "tp_plan", "tp_size", "trust_remote_code", "use_kernels", "variant"),
)
# Of transformers and TRL, and of torch, which takes one more in its `**kwargs`.
CHECKPOINTING_OPTIONS = (
    *older.CHECKPOINTING_OPTIONS,
    "preserve_rng_state",
    *(p.name for p in inspect.signature(checkpoint).parameters.values() if p.kind is p.KEYWORD_ONLY),
)
# Keys that hold a mapping, and what it may hold. (Of schedulers and models it depends on which: see `_check_parsed`.)
MAPPINGS = {
    "accelerator_config": tuple(f.name for f in dataclasses.fields(AcceleratorConfig)),
    "activation_checkpointing_kwargs": CHECKPOINTING_OPTIONS,
    "dataset_kwargs": ("skip_prepare_dataset",),
    "gradient_checkpointing_kwargs": CHECKPOINTING_OPTIONS,
}
# Fields of text that take a flag as well, and one with a check of its own.
OF_ANY_FORM = {"resume_from_checkpoint", "fsdp", "datasets", "init_lora_weights"}
# What the Trainer gives a scheduler itself.
GIVEN_TO_SCHEDULERS = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
# The headings of `--help`.
OURS = "flags of pion-hf"
THEIRS = "flags of TRL and transformers"
# What our optimizers make of those.
EXPLAINED = {
    "learning_rate": RATE,
    "optim_args": "Options of the optimizer in one text: 'keep=16, adamw_lr=3e-5'. Ours are flags of their own too.",
    "optim_target_modules": Routed.__dataclass_fields__["targets"].metadata["help"],
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults beside the help, but None: there the help says what it comes to. And of two spellings of a flag one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        of_words = [
            flag for flag in action.option_strings if "-" not in flag.lstrip("-")
        ]  # not --of-words, taken as well
        return super()._format_action_invocation(argparse.Namespace(**vars(action) | {"option_strings": of_words}))


class RecipeParser(TrlParser):
    """TRL's parser, strict: every mistake in a recipe or on the command line is one line with a suggestion."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=_Help, **kwargs)
        older.know_new_names(self)
        precision = self._by_key().get("bf16")
        if precision is not None:
            precision.type = _flag_or_auto
            precision.help = f"{precision.help} auto, or unset: where the hardware is faster in it."

    def format_help(self) -> str:
        """`--config` first, then the flags of this package and those it explains, then TRL's and transformers'."""
        recipe = argparse.Action(
            ["--config"],
            dest="config",
            metavar="FILE",
            help="A recipe: a YAML file with these flags as keys, without dashes. Flags beside it win.",
        )
        kinds = {kind for of in self.dataclass_types for kind in of.__mro__ if kind.__module__.startswith("pion_hf.")}
        ours = {name for kind in kinds for name in inspect.get_annotations(kind)}
        sections: dict[str, list[argparse.Action]] = {"options": [recipe], OURS: [], THEIRS: []}
        for action in self._actions:
            if action.dest in EXPLAINED.keys() - ours:
                action.help = EXPLAINED[action.dest]
            known = OURS if action.dest in ours | EXPLAINED.keys() else THEIRS
            sections["options" if isinstance(action, argparse._HelpAction) else known].append(action)
        formatter = self._get_formatter()
        formatter.add_usage("%(prog)s [--config FILE] [--FLAG VALUE ...]", [], [])
        formatter.add_text(self.description)
        for heading, actions in sections.items():
            formatter.start_section(heading)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def parse_recipe(
        self, argv: list[str], named: tuple[str, dict[str, Any]] | None = None, *, trains: bool = True
    ) -> tuple[Any, ...]:
        """The dataclasses of `argv`, whose `--config FILE` gives defaults.

        Args:
            named: a recipe, by what errors call it, instead of that file.
            trains: whether the recipe is to be carried out. A model's own Python then runs if its `trust_remote_code`
                says so, else only if `argv` does.
        """
        argv, (path, recipe) = (argv, named) if named else _named_recipe(argv)
        recipe = self._fitting(path, recipe)
        self._check_recipe(path, recipe)
        self._check_flags(argv)
        os.environ.update({name: str(value) for name, value in (recipe.get("env") or {}).items()})  # as TRL
        self.set_defaults_with_config(**{key: value for key, value in recipe.items() if key != "env"})
        parsed = self.parse_args_into_dataclasses(argv)
        for args in parsed:
            check_ranges(vars(args))
        _check_trust(parsed, argv, trains)
        _check_parsed(parsed, lambda key: f"{path}: {key}" if key in recipe else key)
        return parsed

    def set_defaults_with_config(self, **recipe: Any) -> list[str]:
        """As TRL's, where one word stands for a list of one, as on a command line."""
        lists = {key for key, action in self._by_key().items() if action.nargs in ("+", "*")}
        recipe = {key: [value] if key in lists and isinstance(value, str) else value for key, value in recipe.items()}
        return super().set_defaults_with_config(**older.with_old_names(recipe))

    def error(self, message: str) -> NoReturn:
        """argparse would print the usage of all flags, pages of it, and exit."""
        raise ValueError(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, str(unknown("value", value, action.choices)))

    def _check_flags(self, argv: list[str]) -> None:
        """Before the arguments are made, which could fail for another reason and hide this one."""
        flags, rest = self.parse_known_args(argv)
        _check_mappings(vars(flags))
        if rest:
            flag = next((r for r in rest if r.startswith("--")), None)
            if flag is None:
                raise ValueError(
                    f"{rest[0]!r} belongs to no flag; a recipe is named by --config FILE, several expressions of one "
                    "flag are joined by '|'"
                )
            raise _unknown_key("flag", flag.lstrip("-").replace("-", "_").split("=")[0], self._by_key())

    def _by_key(self) -> dict[str, argparse.Action]:
        actions = {a.dest: a for a in self._actions if not isinstance(a, argparse._HelpAction)}
        return {**actions, **{new: actions[old] for new, old in older.OLD_NAMES.items() if old in actions}}

    def _fitting(self, path: str, recipe: dict[str, Any]) -> dict[str, Any]:
        """The recipe with its values as their fields want them; text is converted by argparse, nothing else is."""
        hints = {name: hint for of in self.dataclass_types for name, hint in typing.get_type_hints(of).items()}
        fitting = dict(recipe)
        try:
            for key, value in recipe.items():
                if key not in hints or isinstance(value, str) or key.startswith(OPTION):
                    continue
                optional = type(None) in typing.get_args(hints[key]) or self.get_default(key) is None
                if value is None and not optional:
                    raise ValueError(f"{key} has no value: leave it out for the default, {self.get_default(key)!r}")
                if key not in OF_ANY_FORM:
                    check_form(key, value, hints[key])
                fitting[key] = fit(key, value, hints[key])
            check_ranges(fitting)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return fitting

    def _check_recipe(self, path: str, recipe: dict[str, Any]) -> None:
        actions = self._by_key()
        for key, value in recipe.items():
            if key == "env":
                if not isinstance({} if value is None else value, Mapping):
                    raise ValueError(f"{path}: env must hold variables and their values, got {value!r}")
                bare = [name for name, of in (value or {}).items() if of is None or isinstance(of, (list, dict))]
                if bare:
                    raise ValueError(f"{path}: env: the variable {bare[0]} must have a text or a number")
                continue
            if key not in actions:
                raise ValueError(f"{path}: {_unknown_key('key', key, actions)}")
            # argparse does not hold defaults, which is what a recipe's values become, to the choices.
            choices = actions[key].choices
            if choices is not None and value is not None and value not in choices:
                raise ValueError(f"{path}: {unknown(f'value of {key}', value, choices)}")
        if "datasets" in actions:
            mixture = recipe.get("datasets")
            _check_mixture(f"{path}: datasets", [] if mixture is None else mixture)
        _check_mappings(recipe, f"{path}: ")
        if "optim" in actions:
            _check_optimizer(path, recipe, str(recipe.get("optim", self.get_default("optim"))))


def _flag_or_auto(value: str | bool) -> bool | None:
    """A flag whose third value, None, leaves the choice to the hardware."""
    return None if value == "auto" else string_to_bool(value)


class _StrictLoader(yaml.SafeLoader):
    """YAML in which no mapping has a key twice, of which PyYAML takes the last, and nothing holds itself."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.deep_construct = True  # then an alias within its own anchor is an error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} is given twice")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


def named_keys(argv: list[str]) -> set[str]:
    """All keys and flags that `argv` names, those of its `--config FILE` too.

    Raises:
        ValueError, FileNotFoundError: as `RecipeParser.parse_recipe`, of a recipe that cannot be read.
    """
    argv, (_, recipe) = _named_recipe(argv)
    flags = (a.lstrip("-").partition("=")[0].replace("-", "_") for a in argv if a.startswith("--"))
    return {*recipe, *flags}


def _named_recipe(argv: list[str]) -> tuple[list[str], tuple[str, dict[str, Any]]]:
    """The flags without the recipe's, its path, and what it holds."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", nargs="?", type=Path)
    named, rest = parser.parse_known_args(argv)
    if not named.config:
        return argv, ("", {})
    if len(named.config) > 1:
        raise ValueError("--config names one recipe, and is given twice")
    (path,) = named.config
    if path is None:
        raise ValueError("--config needs the path of a recipe")
    secrets = yaml.safe_load(os.environ.pop(SECRETS, "{}"))
    return rest, (str(path), {**read_recipe(path), **secrets})


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe.

    Raises:
        ValueError: no YAML, no mapping, or a key given twice. FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {str(path)!r}")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold keys and values (a YAML mapping)")
    return recipe


def _unknown_key(what: str, key: str, known: Collection[str]) -> ValueError:
    if key in RENAMED:
        return ValueError(f"{key!r} is outdated: it is now {RENAMED[key]!r}.")
    if key in GONE:
        return ValueError(f"{key!r} is outdated: leave it out, {GONE[key]}.")
    return unknown(what, key, known)


def _check_mapping(where: str, given: Any, known: Collection[str]) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must hold keys and values, got {given!r}")
    for key in given:
        if key not in known:
            what = f"key of {where.rpartition(' ')[2]}"
            raise ValueError(f"{where}: {unknown(what, key, known) if known else f'{key!r} would be ignored.'}")


def _check_mappings(values: Mapping[str, Any], where: str = "") -> None:
    """Raise ValueError for keys of `MAPPINGS` that hold something else, or a key of it that is not known.

    Text is JSON, or names the file of an `accelerator_config`.
    """
    for key, known in MAPPINGS.items():
        given = values.get(key)
        if given is None:
            continue
        if isinstance(given, str):
            names_file = key == "accelerator_config" and os.path.isfile(given)
            with contextlib.suppress(ValueError):  # what is no JSON is no mapping
                given = json.loads(Path(given).read_text() if names_file else given)
        _check_mapping(f"{where}{key}", given, known)


def _check_mixture(where: str, entries: Any) -> None:
    known = [f.name for f in dataclasses.fields(DatasetConfig)]
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"{where} must be a list of mappings, each with a path, got {entries!r}")
    for entry in entries:
        _check_mapping(where, entry, known)
        if "path" not in entry:
            raise ValueError(f"{where}: {dict(entry)!r} has no path, which names the data")


def _check_optimizer(path: str, recipe: dict[str, Any], optim: str) -> None:
    """Raise ValueError for options, in the recipe itself, that its optimizer does not have, or not with this value."""
    if optim not in OptimizerNames._value2member_map_:  # OptimizerFields names the nearest
        return
    own = options_of(optim) if optim in OPTIMIZER_CLASSES else {}
    for field in dataclasses.fields(OptimizerFields):
        option, value = option_name(field.name), recipe.get(field.name)
        if value is not None and option not in own:
            owners = ", ".join(name for name in OPTIMIZER_CLASSES if option in option_types(name))
            renamed = ", or say optim_momentum_frame, its name since 0.13" if option == "momentum" else ""
            raise ValueError(
                f"{path}: {field.name} is an option of optim: {owners}, not of optim: {optim}: leave out one of the "
                f"two{renamed if 'momentum_frame' in own else ''}"
            )
        allowed = own[option].metadata["allowed"] if option in own else None
        numbers = [v for v in (value if isinstance(value, list) else [value]) if type(v) in (int, float)]
        if allowed and not all(math.isfinite(v) and allowed.holds(v) for v in numbers):
            raise ValueError(f"{path}: {field.name} must be {allowed.words}, got {value!r}")
    text = recipe.get("optim_args")
    if text is not None and not isinstance(text, str):
        raise ValueError(f'{path}: optim_args must be a string, as in optim_args: "rms=0.2, side=in", got {text!r}')
    if own:
        try:
            resolve_options(optim, parse_optim_args(text))
        except ValueError as error:
            raise ValueError(f"{path}: optim_args: {str(error).removeprefix('optim_args: ')}") from None


def _check_trust(parsed: tuple[Any, ...], argv: list[str], trains: bool) -> None:
    """Say that a model's own Python will run; ValueError where only the recipe allows it and nothing is trained."""
    if not any(getattr(args, "trust_remote_code", False) for args in parsed):
        return
    model = next((args.model_name_or_path for args in parsed if hasattr(args, "model_name_or_path")), None)
    if trains:
        logger.warning(f"trust_remote_code: Python that comes with {model} is run.")
    elif not any(flag.partition("=")[0].replace("-", "_") == "__trust_remote_code" for flag in argv):
        raise ValueError(
            f"the recipe says trust_remote_code: true, so that Python which comes with {model} would run: add "
            "--trust_remote_code to the command if you trust it"
        )


def _check_parsed(parsed: tuple[Any, ...], where: Callable[[str], str]) -> None:
    """Raise ValueError for options that the chosen scheduler or model does not have; `where` names a key's place."""
    args = next((a for a in parsed if isinstance(a, transformers.TrainingArguments)), None)
    schedule = getattr(args, "lr_scheduler_type", None)
    if schedule is not None and schedule.value not in SCHEDULES:  # of ours OptimizerFields has checked them
        scheduler = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[schedule]).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in scheduler.values()):
            known = [name for name in scheduler if name not in GIVEN_TO_SCHEDULERS]
            _check_mapping(where("lr_scheduler_kwargs"), args.lr_scheduler_kwargs or {}, known)
    model = next((a.model_name_or_path for a in parsed if hasattr(a, "model_name_or_path")), None)
    options = getattr(args, "model_init_kwargs", None) or {}
    source = local_config(model, trust_remote_code=args.trust_remote_code) if options and model else None
    if source is not None:  # else `from_pretrained` says which options it does not know
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=args.trust_remote_code)
        signature = inspect.signature(transformers.PreTrainedModel.from_pretrained).parameters
        _check_mapping(where("model_init_kwargs"), options, (*signature, *LOADER_OPTIONS, *config.to_dict()))
