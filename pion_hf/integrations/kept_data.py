"""What a model must not forget, from a file: texts whose inputs an optimizer with `keep` leaves as they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import trange
from transformers import AutoTokenizer

from pion_hf.integrations.evaluation import answer_tokens, text_stretches
from pion_hf.optim import Inputs

LONGEST, MOST, BATCH = 512, 1000, 4  # tokens of a row, rows, and rows of which the logits are in memory at once
READING = "Reading what is kept"


def show(inputs: Inputs, model: nn.Module, path: str) -> None:
    """Show a file to `inputs`: rows of chats (`messages`, or `prompt` and `completion`) or of `text`, or one text.

    The tokenizer is that of the model's name; at most `MOST` rows of at most `LONGEST` tokens are read.

    Raises:
        ValueError: there is no such file, no tokenizer of the model's name, or nothing to read in it.
    """
    if not Path(path).is_file():
        raise ValueError(f"keep_data={path!r} is no file: name one of chats or texts (.jsonl), or of one text")
    name = model.config.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"keep_data={path!r} needs the tokenizer of the model, and {name!r} has none: {error}"
        ) from None
    rows, device = _rows(tokenizer, path), next(model.parameters()).device
    inputs.show(
        model, map(partial(_batch, rows, device=device), trange(0, len(rows), BATCH, desc=READING, leave=False))
    )


def _rows(tokenizer: Any, path: str) -> list[Tensor]:
    """Token ids of every row, the shortest first."""
    if Path(path).suffix not in (".json", ".jsonl"):
        return text_stretches(tokenizer, Path(path).read_text(encoding="utf-8"), window=LONGEST, windows=MOST)
    table = load_dataset("json", data_files=path, split="train")
    table = table.select(range(min(MOST, len(table))))
    if "text" in table.column_names:
        found = [tokenizer(row, return_tensors="pt").input_ids[0][:LONGEST] for row in table["text"]]
    else:
        found = [ids for ids, _ in answer_tokens(tokenizer, list(table), max_length=LONGEST)]
    return sorted(found, key=len)


def _batch(rows: list[Tensor], start: int, *, device: torch.device) -> dict[str, Tensor]:
    some = rows[start : start + BATCH]
    mask = pad_sequence([torch.ones_like(ids) for ids in some], batch_first=True)
    return {"input_ids": pad_sequence(some, batch_first=True).to(device), "attention_mask": mask.to(device)}
