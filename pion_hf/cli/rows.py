"""Rows that nobody can be trained on, said before TRL or a chat template meets them: what they say is of their code.

Streams are not looked at: they would begin to flow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from reprlib import repr as shortened
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from torch import nn
from trl.data_utils import get_dataset_column_names

from pion_hf.cli.corpus import check_tokens

READ_BY_TRL = ("input_ids", "prompt", "messages", "conversations")  # the first of these that is there; then the text
BESIDE_TOKENS = ("labels", "completion_mask", "assistant_masks", "attention_mask")  # as many of each as tokens
LOOKED_AT = 10_000  # rows

# What is wrong with a value of a column, as the end of a sentence about it; None if nothing.
Fault = Callable[[Any], str | None]


def check_examples(dataset: Any, name: str | None, text_field: str) -> None:
    """Raise ValueError for data that TRL's SFT cannot read."""
    columns = get_dataset_column_names(dataset)
    order = [*(column for column in READ_BY_TRL if column != text_field), text_field]
    read = next((column for column in order if column in columns), None)
    if read is None or (read == "prompt" != text_field and "completion" not in columns):
        raise ValueError(
            f"the data ({name}) has the columns {', '.join(columns)}: sft needs messages (chats), prompt and "
            f"completion, or text in {text_field!r} (dataset_text_field)"
        )
    check_tokens(dataset)
    what = f"the data ({name})"
    if read == "input_ids":
        _check_lengths(dataset, what)
    elif read == text_field:
        check_column(dataset, what, read, _fault_of_text)
        if isinstance(dataset, datasets.Dataset) and not any(row[read].strip() for row in _first_rows(dataset, [read])):
            raise ValueError(f"{what}: no row holds any text in {read!r}")
    else:
        for column in (read, "completion") if read == "prompt" else (read,):
            check_column(dataset, what, column, FORMS[column])
        if read == "prompt":
            _check_completions(dataset, what)
        if "chat_template_kwargs" in columns:  # TRL takes no null for them
            check_column(dataset, what, "chat_template_kwargs", _fault_of_options)
        _check_template_options(dataset, what)


def check_chats(dataset: Any, what: str) -> None:
    """Raise ValueError for chats that no template takes; columns that hold none are not looked at."""
    columns = get_dataset_column_names(dataset)
    for column, fault_of in FORMS.items():
        if column in columns:
            check_column(dataset, what, column, fault_of)
    _check_template_options(dataset, what)


def _check_template_options(dataset: Any, what: str) -> None:
    """Raise ValueError for what is told to a chat template beside the messages, but cannot be."""
    for column, fault in {"tools": _fault_of_tools, "chat_template_kwargs": _fault_of_options}.items():
        if column in get_dataset_column_names(dataset):
            _check_values(dataset, what, column, fault)


def check_column(dataset: Any, what: str, column: str, fault_of: Fault) -> None:
    """Raise ValueError for rows that hold nothing in a column that is read, or, of the first ones, what it cannot be.

    what: the data, as the beginning of a sentence.
    """
    if isinstance(dataset, datasets.Dataset) and (empty := dataset.data.column(column).null_count):
        raise ValueError(f"{what}: {empty:,} rows hold nothing in the column {column!r}, which is read")
    _check_values(dataset, what, column, fault_of)


def check_vocabulary(dataset: Any, model: nn.Module) -> None:
    """Raise ValueError for tokens, in the first rows of a dataset that holds them, that the model does not have."""
    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names:
        return
    count = model.get_input_embeddings().num_embeddings
    ids = pc.min_max(pc.list_flatten(dataset.data.column("input_ids").slice(0, LOOKED_AT))).as_py()
    for token in filter(None, ids.values()):
        if not 0 <= token < count:
            raise ValueError(f"the data: input_ids holds {token:,}, which is none of the model's {count:,} tokens")


def fault_of_prompt(value: Any) -> str | None:
    """Of a prompt or what completes it: text or messages."""
    return None if isinstance(value, str) else _fault_of_chat(value, "neither text nor messages")


def _first_rows(dataset: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    return islice(dataset.select_columns(columns) if isinstance(dataset, datasets.Dataset) else (), LOOKED_AT)


def _check_values(dataset: Any, what: str, column: str, fault_of: Fault) -> None:
    for number, row in enumerate(_first_rows(dataset, [column]), 1):
        if fault := fault_of(row[column]):
            raise ValueError(f"{what}: in row {number:,} of {column!r} {fault}")


def _check_completions(dataset: Any, what: str) -> None:
    for number, row in enumerate(_first_rows(dataset, ["prompt", "completion"]), 1):
        if isinstance(row["prompt"], str) != isinstance(row["completion"], str):
            raise ValueError(f"{what}: in row {number:,} one of 'prompt' and 'completion' is text, the other messages")


def _check_lengths(dataset: Any, what: str) -> None:
    if not isinstance(dataset, datasets.Dataset):
        return
    tokens = dataset.data.column("input_ids")
    for name in BESIDE_TOKENS:
        if name in dataset.column_names and (row := _row_of_another_length(dataset.data.column(name), tokens)) >= 0:
            raise ValueError(f"{what}: row {row + 1:,} holds not as many {name!r} as 'input_ids'")


def _row_of_another_length(column: pa.ChunkedArray, lists: pa.ChunkedArray) -> int:
    """-1 if there is none."""
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return 0
    lengths = pc.fill_null(pc.list_value_length(column), -1)
    return pc.index(pc.equal(lengths, pc.list_value_length(lists)), False).as_py()


def _fault_of_text(value: Any) -> str | None:
    return None if isinstance(value, str) else f"there is {shortened(value)}, which is no text"


def _fault_of_chat(messages: Any, not_a_list: str = "no list of messages") -> str | None:
    if not isinstance(messages, list):
        return f"there is {shortened(messages)}, which is {not_a_list}"
    if not messages:
        return "there are no messages"
    return next(filter(None, map(_fault_of_message, messages)), None)


def _fault_of_message(message: Any) -> str | None:
    if not isinstance(message, Mapping):
        return f"there is {shortened(message)} instead of a message"
    held = {key for key, value in message.items() if value is not None}
    role, content = ("from", "value") if {"from", "value"} <= held else ("role", "content")
    if role not in held:
        return "a message has no role"
    if held <= {"role", "name"}:
        return "a message has no content"
    for key, kinds in ((role, str), (content, (str, list, Mapping))):
        if key in held and not isinstance(message[key], kinds):
            return f"the {key} of a message is {shortened(message[key])}, which is no text"
    return None


def _fault_of_tools(value: Any) -> str | None:
    """They may be JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            return f"there is {shortened(value)}, which is no JSON ({error})"
    return None if isinstance(value, list | None) else f"there is {shortened(value)}, which is no list of tools"


def _fault_of_options(value: Any) -> str | None:
    return None if isinstance(value, Mapping | None) else f"there is {shortened(value)}, which holds no keys and values"


# What holds messages, by column.
FORMS: dict[str, Fault] = {
    "prompt": fault_of_prompt,
    "completion": fault_of_prompt,
    "messages": _fault_of_chat,
    "conversations": _fault_of_chat,
}
