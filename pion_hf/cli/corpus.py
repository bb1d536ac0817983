"""The text of `pion-hf cpt`: where documents come from, which are held out, and in what order they are read.

`datasets` reads everything; here is which of its ways fits a name, and what is wrong with a corpus, in one line.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import trl
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from datasets.table import CastError
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging
from trl import get_dataset
from trl.data_utils import get_dataset_column_names

from pion_hf.cli.flags import STREAM_BUFFER, STREAM_HELD_OUT, CorpusArguments
from pion_hf.errors import first_line
from pion_hf.integrations.trl_config import PionSFTConfig

logger = logging.get_logger(__name__)

# By the ending of a file (`.jsonl.gz` too), the word of `load_dataset` for it.
FORMATS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
ENDINGS = ", ".join(FORMATS)

Corpus = datasets.Dataset | datasets.IterableDataset


class NoText(ValueError):
    """A document without text."""


# What reading files can raise, at once or, from a stream, at any step.
UNREADABLE = (DatasetsError, pyarrow.ArrowInvalid, CastError, UnicodeDecodeError, NoText)


def set_budget(args: TrainingArguments, corpus_args: CorpusArguments) -> None:
    """Turn `max_tokens` into `args.max_steps`, and say so."""
    if corpus_args.max_tokens is None:
        return
    rows, step = _step_of_budget(args, corpus_args.max_tokens)
    args.max_steps = corpus_args.max_tokens // step
    logger.warning(
        f"max_tokens={corpus_args.max_tokens:,}: {args.max_steps:,} steps of {step:,} tokens, {rows} rows each"
    )


def _step_of_budget(args: TrainingArguments, tokens: int) -> tuple[int, int]:
    """Rows and tokens of one step; raises ValueError as `set_budget`."""
    if args.max_steps > 0:
        raise ValueError(
            f"max_tokens={tokens} and max_steps={args.max_steps} both set the length: leave one out (max_steps=-1)"
        )
    if args.max_length is None:
        raise ValueError("max_tokens counts rows of max_length tokens: set max_length")
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    step = rows * args.max_length
    if tokens < step:
        raise ValueError(
            f"max_tokens={tokens} is less than one step, {rows} rows of max_length={args.max_length}, {step} tokens: "
            "raise it, or lower per_device_train_batch_size or gradient_accumulation_steps"
        )
    return rows, step


def check_corpus(
    script_args: trl.ScriptArguments,
    args: PionSFTConfig,
    dataset_args: trl.DatasetMixtureConfig,
    corpus_args: CorpusArguments,
) -> None:
    """Raise ValueError or FileNotFoundError for what can be told before anything is loaded."""
    fraction, buffer = corpus_args.validation_fraction, corpus_args.shuffle_buffer
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {fraction}")
    if fraction is not None and args.eval_strategy == "no":
        raise ValueError("validation_fraction holds out documents for evaluation: set eval_strategy, or leave it out")
    if corpus_args.max_tokens is not None:
        if not args.packing:
            raise ValueError("max_tokens counts full rows: leave packing on, or set max_steps instead")
        _step_of_budget(args, corpus_args.max_tokens)
    if _streaming(script_args, dataset_args):
        if args.max_steps <= 0 and corpus_args.max_tokens is None:
            raise ValueError("a stream has no length to count epochs of: set max_steps or max_tokens")
        if args.shuffle_dataset:
            raise ValueError("shuffle_dataset is for data that are no stream: set shuffle_buffer instead")
        if buffer is not None and buffer < 0:
            raise ValueError(f"shuffle_buffer must be at least 0, got {buffer}")
    elif buffer is not None:
        raise ValueError("shuffle_buffer is for streams, other data are shuffled whole: set dataset_streaming too")
    name = script_args.dataset_name
    if name and not dataset_args.datasets:
        path = Path(name)
        if not path.exists() and (path.is_absolute() or name.startswith(".") or _ending(path)):
            raise FileNotFoundError(f"dataset_name: there is no file or folder {name!r}")
        _check_files(path, args.dataset_text_field)


def load_corpus(
    script_args: trl.ScriptArguments,
    args: PionSFTConfig,
    dataset_args: trl.DatasetMixtureConfig,
    corpus_args: CorpusArguments,
) -> dict[str, Corpus]:
    """The splits to train and, if any, to evaluate on, by their names: rows of one column of text, or of tokens."""
    streaming = _streaming(script_args, dataset_args)
    splits = get_dataset(dataset_args) if dataset_args.datasets else _load(script_args, corpus_args)
    train_name, test_name = script_args.dataset_train_split, script_args.dataset_test_split
    train = _documents(_split(splits, train_name, "dataset_train_split"), args.dataset_text_field)
    fraction = corpus_args.validation_fraction
    found = {}
    if args.eval_strategy != "no":
        if test_name not in splits and fraction is not None:
            train, found[test_name] = _hold_out(train, fraction, args)
        else:
            if fraction is not None:
                logger.warning(f"The data have a split {test_name!r} to evaluate on: validation_fraction is not used.")
            test = _split(splits, test_name, "dataset_test_split, or validation_fraction to hold documents out")
            found[test_name] = _documents(test, args.dataset_text_field)
    buffer = STREAM_BUFFER if corpus_args.shuffle_buffer is None else corpus_args.shuffle_buffer
    if streaming and buffer:
        seed = args.seed if args.data_seed is None else args.data_seed
        train = train.shuffle(seed=seed, buffer_size=buffer)
    return {train_name: train, **found}


def rows_to_train(dataset: Corpus, tokenizer: PreTrainedTokenizerBase, args: PionSFTConfig) -> Corpus:
    """`dataset`; a stream begins again when it ends.

    So every batch is full, all processes have as many of them, and the position in the stream is the number of batches
    since its beginning, which is what `resume_from_checkpoint` skips. (Trainer would count the passes as epochs, and
    resumes in the first.)
    """
    if args.packing and args.max_length is not None:
        tokens = 0
        for row in dataset:
            ids = row["input_ids"] if "input_ids" in row else tokenizer(row[args.dataset_text_field])["input_ids"]
            tokens += len(ids) + ("input_ids" not in row)  # the end-of-text token
            if tokens >= args.max_length:
                break
        else:
            raise ValueError(
                f"dataset_name: the documents to train on have {tokens} tokens, fewer than one row of "
                f"max_length={args.max_length}: lower it, or add text"
            )
    return dataset.repeat(None) if isinstance(dataset, datasets.IterableDataset) else dataset


def check_tokens(dataset: Corpus) -> None:
    """Raise ValueError for `input_ids` that are no lists of whole numbers; those of a stream are not looked at."""
    kind = (dataset.features or {}).get("input_ids")
    if kind is not None and "int" not in getattr(getattr(kind, "feature", None), "dtype", ""):
        raise ValueError(f"the column 'input_ids' holds {kind}, no lists of tokens, which are whole numbers")


def text_only(dataset: Corpus, column: str) -> Corpus:
    """`dataset` without its other columns, which TRL might take for chats or prompts; tokenised rows as they are."""
    columns = get_dataset_column_names(dataset)
    if "input_ids" in columns:
        check_tokens(dataset)
        return dataset
    if column not in columns:
        raise ValueError(f"the dataset has {_no_column(column, columns)}")
    kind = dataset.features[column] if dataset.features else datasets.Value("string")
    if not isinstance(kind, datasets.Value) or kind.dtype not in ("string", "large_string"):
        raise ValueError(f"dataset_text_field: the column {column!r} holds {kind}, not text")
    empty = dataset.data.column(column).null_count if isinstance(dataset, datasets.Dataset) else 0
    if empty:
        raise NoText(f"dataset_text_field: {empty:,} rows of the dataset have no text in the column {column!r}")
    return dataset.select_columns([column])


def is_held_out(text: str | None, fraction: float) -> bool:
    """Whether a document is for evaluation: so is `fraction` of all texts, by hash."""
    if text is None:
        raise NoText("dataset_text_field: a row of the dataset has no text")
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@contextlib.contextmanager
def located(script_args: trl.ScriptArguments, args: PionSFTConfig) -> Iterator[None]:
    """What cannot be read in the files of `dataset_name` becomes a ValueError that says where, now or at any step."""
    column = args.dataset_text_field  # of the files: TRL is given another name
    try:
        yield
    except (*UNREADABLE, TypeError) as error:
        if isinstance(error, TypeError) and not str(error).startswith("Couldn't cast"):  # by `datasets`: see CastError
            raise
        name = script_args.dataset_name
        files = _files(Path(name)) if name and Path(name).exists() else []
        fault = next(filter(None, (_fault(file, column) for file in files)), None)
        if fault is None and isinstance(error, NoText):
            raise
        reason = fault or f"cannot read {name!r}: {' '.join(str(error.__cause__ or error).split())}"
        raise ValueError(f"dataset_name: {reason}") from error


def _streaming(script_args: trl.ScriptArguments, dataset_args: trl.DatasetMixtureConfig) -> bool:
    return dataset_args.streaming if dataset_args.datasets else script_args.dataset_streaming


def _load(script_args: trl.ScriptArguments, corpus_args: CorpusArguments) -> dict[str, Corpus]:
    name, streaming = script_args.dataset_name, script_args.dataset_streaming
    path, split = Path(name), script_args.dataset_train_split
    options = {"name": script_args.dataset_config, "streaming": streaming}
    if _is_saved(path):
        saved = datasets.load_from_disk(name)
        splits = saved if isinstance(saved, datasets.DatasetDict) else {split: saved}
        return {n: d.to_iterable_dataset() if streaming else d for n, d in splits.items()}
    if path.exists():
        files = _files(path)
        ending = _ending(files[0]) if files else None
        if ending == ".txt":
            options["sample_by"] = corpus_args.sample_by
        if path.is_file() or (files and not _has_card(path) and not _names_are_splits(path, len(files))):
            data_files = {split: [glob.escape(str(file.resolve())) for file in files]}
            return load_dataset(FORMATS[ending], data_files=data_files, **options)
    try:
        return load_dataset(name, **options)
    except OSError as error:
        if not path.exists():
            reason = f"is no file or folder here and not at the hub: {first_line(error)}"
        elif isinstance(error, FileNotFoundError):
            reason = f"is a folder without data files ({ENDINGS})"
        else:
            raise
        raise ValueError(f"dataset_name: {name!r} {reason}") from error


def _names_are_splits(folder: Path, files: int) -> bool:
    """Whether all files are of a split by their names, as `datasets` sees it, and not just some of many documents."""
    found = datasets.load_dataset_builder(str(folder)).config.data_files
    named = sum(map(len, found.values()))
    if named < files:
        splits = ", ".join(repr(str(split)) for split in found)
        logger.warning(
            f"{folder}: {named:,} of {files:,} files are called as those of a split ({splits}). All are taken as one."
        )
    return named >= files


def _split(splits: dict[str, Corpus], name: str, keys: str) -> Corpus:
    if name not in splits:
        there = ", ".join(repr(str(split)) for split in splits)
        raise ValueError(f"the dataset has no split {name!r} (it has {there}): set {keys}")
    if next(iter(splits[name]), None) is None:
        raise ValueError(f"dataset_name: the split {name!r} is empty")
    return splits[name]


def _documents(dataset: Corpus, column: str) -> Corpus:
    dataset = text_only(dataset, column)
    if isinstance(dataset, datasets.IterableDataset) and "input_ids" not in get_dataset_column_names(dataset):
        return _side(dataset, 0.0, held_out=False)  # all of them, if they have text
    return dataset


def _hold_out(dataset: Corpus, fraction: float, args: PionSFTConfig) -> tuple[Corpus, datasets.Dataset]:
    """`(rest, held out)`."""
    if "input_ids" in get_dataset_column_names(dataset):
        raise ValueError("validation_fraction: rows of tokens may be parts of documents; give a dataset_test_split")
    options = {} if isinstance(dataset, datasets.IterableDataset) else {"num_proc": args.dataset_num_proc}
    rest, held_out = (_side(dataset, fraction, held_out=side, **options) for side in (False, True))
    if isinstance(dataset, datasets.IterableDataset):
        # From several files at once; a buffer of one leaves their order.
        found = held_out.shuffle(seed=0, buffer_size=1).take(STREAM_HELD_OUT)
        held_out = datasets.Dataset.from_list(list(found))
    for part, name in ((rest, "to train on"), (held_out, "to evaluate")):
        if next(iter(part), None) is None:
            raise ValueError(
                f"validation_fraction={fraction} leaves no document {name}: choose another, or give more documents. A "
                ".txt file is one, whatever its length: cut it into several files, or into rows of a .jsonl; without "
                "evaluation set eval_strategy: no"
            )
    return rest, held_out


def _side(dataset: Corpus, fraction: float, *, held_out: bool, **options: Any) -> Corpus:
    (column,) = get_dataset_column_names(dataset)
    arguments = {"fraction": fraction, "held_out": held_out}
    return dataset.filter(_on_side, input_columns=[column], fn_kwargs=arguments, **options)


def _on_side(text: str | None, fraction: float, held_out: bool) -> bool:
    return is_held_out(text, fraction) == held_out


# -- files --------------------------------------------------------------------------------------------


def _ending(path: Path) -> str | None:
    return next((suffix for suffix in path.suffixes if suffix in FORMATS), None)


def _files(path: Path) -> list[Path]:
    """The file `path`, or those in the folder that are of a known format and, for `datasets`, not hidden."""
    if path.is_file():
        return [path]
    files = sorted(p for p in path.rglob("*") if _ending(p) and p.is_file())
    return [f for f in files if not any(part.startswith((".", "__")) for part in f.relative_to(path).parts)]


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    names = (datasets.config.DATASET_STATE_JSON_FILENAME, datasets.config.DATASETDICT_JSON_FILENAME)
    return any((path / name).is_file() for name in names)


def _has_card(path: Path) -> bool:
    """Whether this is a dataset as at the hub, whose card may say what its splits are."""
    return (path / datasets.config.REPOCARD_FILENAME).is_file()


def _check_files(path: Path, column: str) -> None:
    """Raise ValueError for local files of no known or of several formats, empty ones, Parquet without the column."""
    if not path.exists() or _is_saved(path) or _has_card(path):
        return
    files = _files(path)
    examples = {_ending(file): file for file in files}
    if None in examples:
        raise ValueError(f"dataset_name: {str(path)!r} is of no known format ({ENDINGS}, or a folder of them)")
    if len(examples) > 1:
        listing = ", ".join(str(file.relative_to(path)) for file in examples.values())
        raise ValueError(
            f"dataset_name: the folder {str(path)!r} holds files of several formats ({listing}): keep those of one"
        )
    for file in files:
        if ".txt" not in examples and not file.stat().st_size:
            raise ValueError(f"dataset_name: {str(file)!r} is empty: add rows, or remove it")
        fault = _fault(file, column) if ".parquet" in examples else None
        if fault:
            raise ValueError(f"dataset_name: {fault}")


def _fault(file: Path, column: str) -> str | None:
    """The first thing wrong with a file, and where; None if nothing is."""
    ending = _ending(file)
    if ending == ".parquet":
        try:
            metadata = pyarrow.parquet.read_metadata(file)
        except pyarrow.ArrowInvalid as error:
            return f"{file} is no Parquet file: {error}"
        columns = metadata.schema.to_arrow_schema().names
        if column not in columns and "input_ids" not in columns:
            return f"{file} has {_no_column(column, columns)}"
        return None if metadata.num_rows else f"{file} has no rows: remove it"
    with fsspec.open(str(file), "rb", compression="infer") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8")
                row = json.loads(text) if ending == ".jsonl" and text.strip() else {column: text}
            except ValueError as error:
                kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
                return f"{file}, line {number} is not {kind}: {error}"
            if not isinstance(row, dict) or (row.get(column) is None and "input_ids" not in row):
                return f"{file}, line {number} has no text in {column!r}: set dataset_text_field, or mend the line"
    return None


def _no_column(column: str, columns: list[str]) -> str:
    there = ", ".join(map(repr, columns))
    return f"no column {column!r} (it has {there}): set dataset_text_field to its text"
