"""What was learnt and what was kept: loss on the task, answers that match, loss on unrelated text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import evaluate
import torch
from torch import nn
from tqdm.auto import tqdm

from pion_hf.metrics import EXACT_MATCH


def prompts_and_answers(rows: Sequence[dict[str, Any]]) -> list[tuple[list[dict[str, str]], str]]:
    """`(messages up to the last answer, answer)` of chat rows: `prompt`/`completion` or `messages`, as TRL takes them.

    Raises:
        ValueError: rows of another form.
    """
    pairs = []
    for row in rows:
        if "messages" in row and row["messages"] and row["messages"][-1]["role"] == "assistant":
            pairs.append((row["messages"][:-1], row["messages"][-1]["content"]))
        elif isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
            pairs.append((row["prompt"], row["completion"][-1]["content"]))
        else:
            raise ValueError(
                "exact match needs chat data, rows of 'prompt' and 'completion' or of 'messages' that end with the "
                f"assistant; this row has the columns {sorted(row)}."
            )
    return pairs


@torch.no_grad()
def exact_match(
    model: nn.Module, tokenizer: Any, rows: Sequence[dict[str, Any]], *, batch_size: int = 16, max_new_tokens: int = 32
) -> float:
    """Share of `rows` whose greedily generated answer equals the reference (`evaluate` metric `exact_match`)."""
    pairs = prompts_and_answers(rows)
    metric = evaluate.load(EXACT_MATCH)
    was_training = model.training
    model.eval()
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        order = sorted(range(len(pairs)), key=lambda i: len(str(pairs[i][0])))
        for start in tqdm(range(0, len(order), batch_size), desc="Answering", leave=False):
            batch = [pairs[i] for i in order[start : start + batch_size]]
            texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p, _ in batch]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
            produced = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            answers = tokenizer.batch_decode(produced[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            metric.add_batch(predictions=answers, references=[answer for _, answer in batch])
    finally:
        tokenizer.padding_side = side
        model.train(was_training)
    return metric.compute()["exact_match"]


@torch.no_grad()
def text_loss(
    model: nn.Module, tokenizer: Any, text: str, *, window: int = 256, windows: int = 32, batch_size: int = 8
) -> float:
    """Mean next-token loss (nats) over up to `windows` evenly spaced stretches of `window` tokens of `text`.

    Raises:
        ValueError: the text is shorter than one window.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    available = len(ids) // window
    if not available:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {window}.")
    count = min(windows, available)
    starts = [math.floor(i * available / count) * window for i in range(count)]
    stretches = torch.stack([ids[s : s + window] for s in starts])
    was_training = model.training
    model.eval()
    losses = []
    for batch in tqdm(stretches.split(batch_size), desc="Reading", leave=False):
        batch = batch.to(model.device)
        losses += [model(input_ids=batch, labels=batch, use_cache=False).loss.item()] * len(batch)
    model.train(was_training)
    return sum(losses) / len(losses)
