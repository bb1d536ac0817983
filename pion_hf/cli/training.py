"""What the training commands share: one of TRL's scripts with this package's trainer, and the report at the end."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import torch
import transformers
import trl
from safetensors import SafetensorError, safe_open
from trl.scripts import sft as trl_sft

import pion_hf
from pion_hf.cli.before_after import ReportMixin, check_report
from pion_hf.cli.faults import in_words, is_of_user
from pion_hf.cli.flags import FLAGS, ModelArguments, ReportArguments
from pion_hf.cli.lora_start import AdapterSFTTrainer, check_adapter, check_start, set_initialisation
from pion_hf.cli.older import with_text_column
from pion_hf.cli.rows import check_examples, check_vocabulary
from pion_hf.errors import first_line
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES, warn_of_slow_bfloat16
from pion_hf.integrations.handler import refuse_wrappers
from pion_hf.integrations.trl_config import PionSFTConfig
from pion_hf.routing.table import FOR_ADAPTERS, refuse_adapters
from pion_hf.runs.files import read_bytes

OF_DATA = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")  # endings
LOADERS = ("from_pretrained", "create_model_from_path")  # functions of transformers and TRL
OTHER_SHAPES = "its weights have other shapes than its config.json says"
CONFIGS = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")
LONGEST_LINE = 2**20  # bytes of a line that is looked at
PREPARED = "models"  # where the examples leave models for the recipes


class ReportingSFTTrainer(ReportMixin, AdapterSFTTrainer):
    """TRL's `SFTTrainer` with this package's optimizer, adapters of every initialisation, and the report."""


def train(
    script_args: trl.ScriptArguments,
    training_args: PionSFTConfig,
    model_args: ModelArguments,
    dataset_args: trl.DatasetMixtureConfig,
    report_args: ReportArguments,
    *,
    make_trainer: Callable[..., ReportMixin] = ReportingSFTTrainer,
    script: ModuleType = trl_sft,
    trainer_name: str = "SFTTrainer",
) -> None:
    """Run TRL's `script` with what `make_trainer` makes of its trainer's arguments, then report.

    trainer_name: what the script imports from `trl` as its trainer.
    """
    quiet_without_terminal(training_args)
    warn_of_slow_bfloat16(training_args)
    if (model_args.load_in_4bit or model_args.load_in_8bit) and find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit and load_in_8bit need the package bitsandbytes: pip install bitsandbytes")
    trainers: list[ReportMixin] = []

    def trainer(**kwargs: Any) -> ReportMixin:
        if script is trl_sft:
            column = training_args.dataset_text_field
            training_args.dataset_text_field = "text"
            for split in ("train_dataset", "eval_dataset"):
                if kwargs[split] is not None:
                    check_examples(kwargs[split], script_args.dataset_name, column)
                    kwargs[split] = with_text_column(kwargs[split], column)
        if model_args.init_lora_weights is not None:
            set_initialisation(kwargs["peft_config"], model_args.init_lora_weights)
        transformers.set_seed(training_args.seed)  # adapters are drawn by it: TRL does so from 1.15 on
        dataset = kwargs["train_dataset"]
        trainers.append(make_trainer(report=report_args, **kwargs))
        check_vocabulary(dataset, trainers[-1].model)
        return trainers[-1]

    splits = {name: getattr(script_args, name) for name in ("dataset_train_split", "dataset_test_split")}
    try:
        with substituted(trl, trainer_name, trainer):
            script.main(script_args, training_args, model_args, dataset_args)
    except Exception as error:
        if trainers:
            raise
        for name, split in splits.items():  # TRL's script looks one up without a check
            if isinstance(error, KeyError) and error.args == (split,):
                raise ValueError(f"the dataset has no split {split!r}: set {name}") from error
        data, reward = script_args.dataset_name, getattr(script_args, "reward_model_name_or_path", None)
        model = " or ".join(filter(None, (model_args.model_name_or_path, reward)))
        if fault := _fault_of(error, data, model):
            raise ValueError(fault) from error
        raise
    trainers[0].create_model_card(dataset_name=script_args.dataset_name)  # after peft's, which comes with saving
    trainers[0].finish()


def _fault_of(error: Exception, data: str | None, model: str) -> str | None:
    """What libraries could not read, and why; None where they did not try, or say it: then with a note of the names."""
    functions = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    loads = not functions.isdisjoint(LOADERS)
    names = f"the model ({model}) of model_name_or_path"
    names = names if loads else f"the data ({data}) of dataset_name or {names}"
    if isinstance(error, OSError) and error.errno is None:  # what is no folder here is looked for at the hub
        return f"cannot load {names}: {first_line(error)}"
    if not (isinstance(error, OSError) or is_of_user(error)):
        if "apply_chat_template" in functions:
            return f"the chat template of {model} fails on the data ({data}): {in_words(error)}"
        if loads:
            of_shapes = "ignore_mismatched_sizes" in str(error)
            return f"cannot load {names}: {OTHER_SHAPES if of_shapes else in_words(error)}"
    error.add_note(names)
    return None


def check(parsed: Sequence[Any], *, reads_files: bool = False) -> None:
    """Raise ValueError or FileNotFoundError for what can be told of a command's arguments before anything is loaded.

    reads_files: whether `dataset_name` may be a file; `datasets` reads folders of them.
    """
    script_args, training_args, model_args, dataset_args, report_args = parsed[: len(FLAGS["sft"])]
    check_model(training_args, model_args)
    check_place("model_name_or_path", model_args.model_name_or_path)
    if not dataset_args.datasets:
        check_place("dataset_name", script_args.dataset_name)
        if not reads_files and os.path.isfile(script_args.dataset_name or ""):
            raise ValueError(f"dataset_name: {script_args.dataset_name!r} is a file: name the folder that it lies in")
        if script_args.dataset_name:
            _check_files("dataset_name", Path(script_args.dataset_name))
    check_place("other_dataset", report_args.other_dataset)
    if report_args.other_dataset:
        _check_files("other_dataset", Path(report_args.other_dataset))
    check_report(training_args, report_args)


def _check_files(key: str, path: Path) -> None:
    """Raise ValueError for data files that are all empty, and for JSON whose first line is null or nested by the
    thousand, at which pyarrow's reader ends the process or does not end at all.
    """
    files = [file for file in ((path,) if path.is_file() else path.glob("**/*")) if file.suffix in OF_DATA]
    files = [file for file in files if file.is_file()]
    if files and not any(file.stat().st_size for file in files):
        raise ValueError(f"{key}: {str(files[0])!r} is empty")
    for file in files:
        if file.suffix in (".json", ".jsonl"):
            with file.open("rb") as lines:
                fault = _fault_of_line(lines.readline(LONGEST_LINE))
            if fault:
                raise ValueError(f"{key}: the first line of {str(file)!r} {fault}")


def _fault_of_line(line: bytes) -> str | None:
    try:
        return "is null, which is no row" if json.loads(line) is None else None
    except RecursionError:
        return "is nested too deeply"
    except ValueError:  # what is no JSON is for `datasets` to say
        return None


def check_place(key: str, name: str | None) -> None:
    """Raise FileNotFoundError for what can only be a file or folder here, not a name at the hub, and is not there."""
    if not name or os.path.exists(name) or "://" in name:
        return
    path = Path(name)
    if path.parts[0] == PREPARED:
        by = "examples/prepare_smollm2.py" if path.name.startswith("smollm2") else "an example of this package"
        raise FileNotFoundError(f"{key}: there is no folder {name!r}: {by} makes it")
    if name[0] in "./~" or name.count("/") > 1 or not {*path.suffixes}.isdisjoint(OF_DATA):
        raise FileNotFoundError(f"{key}: there is no file or folder {name!r}")


@contextlib.contextmanager
def readable(name: str | None) -> Iterator[None]:
    """Raises ValueError, in one line, where `datasets` cannot read a dataset of chats."""
    try:
        yield
    except datasets.exceptions.DatasetGenerationError as error:  # says nothing, its cause does
        lines = str(error.__cause__ or error).splitlines()
        why = " ... ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))
        raise ValueError(f"cannot read the data ({name}): {why}. All its files need the same columns.") from error
    except Exception as error:
        if isinstance(error, OSError) or is_of_user(error) or not _is_of_data(error):
            raise
        raise ValueError(f"cannot read the data ({name}): {in_words(error)}") from error


def _is_of_data(error: Exception) -> bool:
    """Whether `datasets` ended with it, and not what it applies to every row."""
    homes = [Path(file).parent for file in (datasets.__file__, trl.__file__, pion_hf.__file__)]
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    passed = [home for file in files for home in homes if file.is_relative_to(home)]
    return passed[-1:] == homes[:1]


def quiet_without_terminal(training_args: PionSFTConfig) -> None:
    """No progress bars in a log file or a pipe."""
    if not sys.stderr.isatty():
        training_args.disable_tqdm = True
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def check_model(training_args: PionSFTConfig, model_args: ModelArguments) -> None:
    """Raise ValueError, before anything is loaded, for what the optimizer could not train."""
    if not model_args.model_name_or_path:
        raise ValueError("name the model: --model_name_or_path FOLDER_OR_ID, or --config RECIPE")
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        raise ValueError("load_in_4bit and load_in_8bit freeze the model: set use_peft too, or leave them out")
    check_adapter(model_args)
    _check_model_files(Path(model_args.model_name_or_path))
    if training_args.optim.value in OPTIMIZER_CLASSES:
        refuse_wrappers(training_args)
        if model_args.use_peft:
            refuse_adapters(training_args.optim.value)
            check_start(training_args, model_args)
        elif training_args.optim.value in FOR_ADAPTERS:
            raise ValueError(f"optim={training_args.optim.value!r} trains LoRA adapters: set use_peft too")


def _check_model_files(folder: Path) -> None:
    """Raise ValueError for files of a model folder that are cut off or damaged: libraries name neither."""
    for path in (folder / name for name in CONFIGS):
        if path.is_file():
            try:
                fault = None if isinstance(json.loads(read_bytes(path)), dict) else "it holds no keys and values"
            except (ValueError, RecursionError) as error:
                fault = str(error)
            if fault:
                raise ValueError(f"model_name_or_path: {str(path)!r} is damaged: {fault}")
    for path in folder.glob("*.safetensors"):
        if path.is_file():
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"model_name_or_path: {str(path)!r} is damaged: {error}") from None


def model_from_config(
    name: str, *, dtype: str | torch.dtype | None = "float32", revision: str | None = None, **options: Any
) -> transformers.PreTrainedModel:
    """A model of the config in a checkpoint folder or hub id, with fresh weights on the current device.

    `dtype` is as in `from_pretrained`: `"auto"` or None is the checkpoint's own. The other options too.
    """
    remote = options.get("trust_remote_code", False)
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=remote)
    except OSError as error:
        raise ValueError(f"no model config at {name!r}: {first_line(error)}") from None
    dtype = config.dtype if dtype in (None, "auto") else dtype
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32, **options)


@contextlib.contextmanager
def substituted(module: Any, name: str, value: Any) -> Iterator[None]:
    """`value` under this name of a module or object, for a while: TRL's scripts look up trainer and data by theirs."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
