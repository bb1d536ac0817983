"""What a model must not forget: texts whose inputs an optimizer with `keep` leaves as they are; its own answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm, trange
from transformers import AutoTokenizer

from pion_hf.integrations.evaluation import (
    answer_tokens,
    continuations,
    evaluating,
    opening_of,
    padded_left,
    padded_right,
)
from pion_hf.optim import Inputs

LONGEST, MOST, BATCH = 512, 1000, 4  # tokens of a row, rows, and rows of which the logits are in memory at once
ANSWERED = 50  # instructions that are answered at once


def show(inputs: Inputs, model: nn.Module, path: str) -> None:
    """Show a file to `inputs`: rows of chats (`messages`, or `prompt` and `completion`) or of `text`, or one text.

    The tokenizer is that of the model's name; `MOST` parts of `LONGEST` tokens are read at most.

    Raises:
        ValueError: there is no such file, no tokenizer of the model's name, or nothing in the file that can be read.
    """
    if not Path(path).is_file():
        raise ValueError(f"keep_data={path!r} is no file: name one of chats or texts (.jsonl), or of one text")
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"keep_data={path!r} is for causal models, and this one has an encoder: show them batches by "
            "pion_hf.Inputs.show"
        )
    try:
        rows = _rows(AutoTokenizer.from_pretrained(model.config.name_or_path), path)
    except (OSError, ValueError, KeyError, TypeError) as error:  # of the tokenizer, or of the rows
        raise ValueError(f"keep_data={path!r} cannot be read for {model.config.name_or_path!r}: {error}") from None
    inputs.show(model, _batches(rows, next(model.parameters()).device))


def _rows(tokenizer: Any, path: str) -> list[Tensor]:
    """Token ids of every row that has some, the shortest first."""
    text = Path(path).read_text(encoding="utf-8")
    rows = [{"text": text}]
    if path.endswith(".jsonl"):
        rows = [json.loads(line) for line in text.splitlines() if line.strip()][:MOST]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("some of its rows are no objects")
    if rows and "text" not in rows[0]:
        found = [ids for ids, _ in answer_tokens(tokenizer, rows, max_length=LONGEST)]
    else:
        tokens = [torch.tensor(tokenizer(row["text"], verbose=False).input_ids, dtype=torch.long) for row in rows]
        found = [part for ids in tokens for part in ids.split(LONGEST)][:MOST]
    if not any(map(len, found)):
        raise ValueError("there is no text in it")
    return sorted(filter(len, found), key=len)


def _batches(rows: list[Tensor], device: torch.device) -> Iterator[dict[str, Tensor]]:
    for start in trange(0, len(rows), BATCH, desc="Reading what is kept", leave=False):
        yield {key: value.to(device) for key, value in padded_right(rows[start : start + BATCH]).items()}


def own_answers(
    model: nn.Module, tokenizer: Any, instructions: Sequence[str], *, new_tokens: int
) -> list[dict[str, Any]]:
    """What `model` answers to each of `instructions`, as rows that `show` reads: chats, or texts if it has no template.

    Answers are sampled at temperature 1 from all tokens, at most `new_tokens` of them, and cut behind their last whole
    sentence.
    """
    chats = tokenizer.chat_template is not None
    rows = []
    with evaluating(model), padded_left(tokenizer):
        for start in tqdm(range(0, len(instructions), ANSWERED), desc="Answering"):
            asked = instructions[start : start + ANSWERED]
            prompts = [[{"role": "user", "content": text}] for text in asked]
            texts = [opening_of(tokenizer, prompt) for prompt in prompts] if chats else [f"{text}\n" for text in asked]
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": new_tokens}
            made = continuations(model, tokenizer, texts, add_special_tokens=not chats, **options)
            answers = map(_whole_sentences, tokenizer.batch_decode(made, skip_special_tokens=True))
            if chats:
                said = [[{"role": "assistant", "content": answer}] for answer in answers]
                rows += [{"prompt": prompt, "completion": c} for prompt, c in zip(prompts, said, strict=True)]
            else:
                rows += [{"text": text + answer} for text, answer in zip(texts, answers, strict=True)]
    return rows


def _whole_sentences(text: str) -> str:
    return text[: max(map(text.rfind, ".!?\n")) + 1].strip() or text
