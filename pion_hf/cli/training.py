"""What the training commands share: one of TRL's scripts with this package's trainer, and the report at the end."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
import transformers
import trl
from torch import nn
from trl.data_utils import get_dataset_column_names
from trl.scripts import sft as trl_sft

from pion_hf.arguments import OPTIMIZER_CLASSES, warn_of_slow_bfloat16
from pion_hf.cli.adapters import AdapterSFTTrainer, check_adapter, check_start, set_initialisation
from pion_hf.cli.corpus import check_tokens
from pion_hf.cli.flags import FLAGS, ModelArguments, ReportArguments
from pion_hf.cli.older import with_text_column
from pion_hf.cli.outcome import ReportMixin, check_report
from pion_hf.errors import first_line
from pion_hf.integrations.handler import refuse_wrappers
from pion_hf.integrations.trl_config import PionSFTConfig
from pion_hf.routing import FOR_ADAPTERS, refuse_adapters

OF_DATA = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")  # endings
READ_BY_TRL = ("input_ids", "prompt", "messages", "conversations")  # the first of these that is there; then the text
LOOKED_AT = 10_000  # rows
LONGEST_NULL = 80  # bytes of a line
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

    Raises:
        ValueError, FileNotFoundError: input that cannot be trained on; where possible before anything is loaded.
    """
    quiet_without_terminal(training_args)
    warn_of_slow_bfloat16(training_args)
    if (model_args.load_in_4bit or model_args.load_in_8bit) and find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit and load_in_8bit need the package bitsandbytes: pip install bitsandbytes")
    trainers: list[ReportMixin] = []

    def trainer(**kwargs: Any) -> ReportMixin:
        if script is trl_sft:
            column = training_args.dataset_text_field
            _check_columns(kwargs["train_dataset"], script_args.dataset_name, column)
            training_args.dataset_text_field = "text"
            for split in ("train_dataset", "eval_dataset"):
                if kwargs[split] is not None:
                    kwargs[split] = with_text_column(kwargs[split], column)
        if model_args.init_lora_weights is not None:
            set_initialisation(kwargs["peft_config"], model_args.init_lora_weights)
        transformers.set_seed(training_args.seed)  # adapters are drawn by it: TRL does so from 1.15 on
        dataset = kwargs["train_dataset"]
        trainers.append(make_trainer(report=report_args, **kwargs))
        _check_vocabulary(dataset, trainers[-1].model)
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
        data, model = script_args.dataset_name, model_args.model_name_or_path
        names = f"the data ({data}) of dataset_name or the model ({model}) of model_name_or_path"
        if isinstance(error, OSError) and error.errno is None:  # what is no folder here is looked for at the hub
            raise ValueError(f"cannot load {names}: {first_line(error)}") from error
        error.add_note(names)
        raise
    trainers[0].create_model_card(dataset_name=script_args.dataset_name)  # after peft's, which comes with saving
    trainers[0].finish()


def _check_columns(dataset: Any, name: str | None, text_field: str) -> None:
    """Raise ValueError for data that TRL's SFT cannot read."""
    columns = get_dataset_column_names(dataset)
    if {"messages", "conversations", "prompt", "input_ids", text_field}.isdisjoint(columns):
        raise ValueError(
            f"the data ({name}) has the columns {', '.join(columns)}: sft needs messages (chats), prompt and "
            f"completion, or text in {text_field!r} (dataset_text_field)"
        )
    check_tokens(dataset)
    read = next(column for column in (*READ_BY_TRL, text_field) if column in columns)
    if isinstance(dataset, datasets.Dataset):  # a stream would begin to flow
        if empty := dataset.data.column(read).null_count:
            raise ValueError(f"the data ({name}): {empty:,} rows hold nothing in the column {read!r}, which is read")
        chats = [] if read in ("input_ids", text_field) else islice(dataset.select_columns([read]), LOOKED_AT)
        for number, row in enumerate(chats, 1):
            if missing := _missing_in_chat(row[read]):
                raise ValueError(f"the data ({name}): in row {number:,} of {read!r} a message has no {missing}")


def _missing_in_chat(messages: Any) -> str | None:
    """What a message lacks without which it is none; None if nothing, or if these are no messages."""
    for message in messages if isinstance(messages, list) else ():
        held = {key for key, value in message.items() if value is not None} if isinstance(message, Mapping) else set()
        if held and not {"from", "value"} <= held:
            if "role" not in held:
                return "role"
            if held <= {"role", "name"}:
                return "content"
    return None


def _check_vocabulary(dataset: Any, model: nn.Module) -> None:
    """Raise ValueError for tokens, in the first rows of a dataset that holds them, that the model does not have."""
    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names:
        return
    count = model.get_input_embeddings().num_embeddings
    ids = pc.min_max(pc.list_flatten(dataset.data.column("input_ids").slice(0, LOOKED_AT))).as_py()
    for token in filter(None, ids.values()):
        if not 0 <= token < count:
            raise ValueError(f"the data: input_ids holds {token:,}, which is none of the model's {count:,} tokens")


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
            _check_first_rows(Path(script_args.dataset_name))
    check_place("other_dataset", report_args.other_dataset)
    check_report(training_args, report_args)


def _check_first_rows(path: Path) -> None:
    """Raise ValueError for a file of JSON that begins with null: pyarrow's reader would end the process."""
    for file in (path,) if path.is_file() else path.glob("**/*.json*"):
        if file.suffix in (".json", ".jsonl") and file.is_file():
            with file.open("rb") as lines:
                if lines.readline(LONGEST_NULL).strip() == b"null":
                    raise ValueError(f"dataset_name: the first line of {str(file)!r} is null, which is no row")


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
    """Raises ValueError, in one line, where `datasets` cannot read the files of a dataset of chats."""
    try:
        yield
    except datasets.exceptions.DatasetGenerationError as error:  # says nothing, its cause does
        lines = str(error.__cause__ or error).splitlines()
        why = " ... ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))
        raise ValueError(f"cannot read the data ({name}): {why}. All its files need the same columns.") from error


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
    if training_args.optim.value in OPTIMIZER_CLASSES:
        refuse_wrappers(training_args)
        if model_args.use_peft:
            refuse_adapters(training_args.optim.value)
            check_start(training_args, model_args)
        elif training_args.optim.value in FOR_ADAPTERS:
            raise ValueError(f"optim={training_args.optim.value!r} trains LoRA adapters: set use_peft too")


def model_from_config(
    name: str, *, dtype: str | torch.dtype | None = "float32", revision: str | None = None, **options: Any
) -> transformers.PreTrainedModel:
    """A model of the config in a checkpoint folder or hub id, with fresh weights on the current device.

    `dtype` is as in `from_pretrained`: `"auto"` or None is the checkpoint's own. The other options too.

    Raises:
        ValueError: there is no config.
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
    """TRL's scripts look up their trainer and data as names of a module: put ours there for the length of one run."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
