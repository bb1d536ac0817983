"""What was learnt and what was kept: loss on the task, answers that match, loss on another domain."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from pion_hf.integrations.metrics import EXACT_MATCH

Measures = dict[str, dict[str, float]]
"""What a model can do at one moment: domain (`task`, `other_text`, ...), metric (`loss`, ...), value."""

IGNORED = -100  # the label of a token that counts for no loss
BATCH_TOKENS = 2048  # of which the logits are in memory at once

# The metric that says how far a domain has come, the first that is there, and the sign of an improvement.
PROGRESS = {"reward": 1, "loss": -1}


def perplexity(loss: float) -> float:
    """`exp` of a mean next-token loss in nats; inf, not an error, where training has diverged.

    The metric of this name of the package `evaluate` loads and runs a model of its own, from the hub.
    """
    return torch.tensor(loss, dtype=torch.float64).exp().item()


def progress(before: dict[str, float], after: dict[str, float]) -> float | None:
    """How far a domain's loss fell, or its reward rose; None where neither was measured twice."""
    metric = next((m for m in PROGRESS if before.get(m) is not None and after.get(m) is not None), None)
    return None if metric is None else PROGRESS[metric] * (after[metric] - before[metric])


def prompts_and_answers(rows: Sequence[dict[str, Any]]) -> list[tuple[list[dict[str, str]], str]]:
    """`(messages up to the last answer, answer)` of chat rows: `prompt`/`completion` or `messages`, as for TRL.

    Raises:
        ValueError: rows of another form.
    """
    pairs = []
    for row in rows:
        parts = [row["messages"]] if "messages" in row else [row.get("prompt"), row.get("completion")]
        chat = [message for part in parts for message in part] if all(isinstance(p, list) for p in parts) else []
        if not chat or chat[-1]["role"] != "assistant" or not isinstance(chat[-1]["content"], str):
            raise ValueError(
                "these are no chats with an answer, rows of messages in 'prompt' and 'completion' or in 'messages' "
                f"that end with the assistant's text: one has the columns {sorted(row)}."
            )
        pairs.append((chat[:-1], chat[-1]["content"]))
    return pairs


def template_options(row: dict[str, Any]) -> dict[str, Any]:
    """What a row tells its chat template beside the messages, as TRL's SFT reads it: `tools` (a list, or JSON of one)
    and whatever stands in `chat_template_kwargs`."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def opening_of(tokenizer: Any, prompt: list[dict], **options: Any) -> str:
    """What the chat template, with its `options`, writes before an answer to `prompt`."""
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options)


def around_answer(tokenizer: Any, prompt: list[dict], **options: Any) -> tuple[str, str]:
    """What the chat template, with its `options`, writes between what opens the assistant's turn and the answer (an
    empty thought, say), and behind the answer: training teaches the model to write both."""
    opening = opening_of(tokenizer, prompt, **options)
    chat = [*prompt, {"role": "assistant", "content": "ANSWER"}]
    before, found, after = tokenizer.apply_chat_template(chat, tokenize=False, **options).rpartition("ANSWER")
    return (before[len(opening) :] if before.startswith(opening) else "", after) if found else ("", "")


def ends_of_answers(model: nn.Module, tokenizer: Any, after: str) -> list[int]:
    """Tokens that end an answer: those of the model's generation config, the tokenizer's, and the one that the chat
    template writes `after` an answer."""
    following = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"][:1]
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [*(own if isinstance(own, (list, tuple)) else [own]), tokenizer.eos_token_id]
    ids += [i for i in following if i in special]
    return list(dict.fromkeys(i for i in ids if i is not None))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode, and afterwards in the one it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def keeping_random_numbers() -> Iterator[None]:
    """Afterwards Python, NumPy and torch draw what they would have drawn."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextlib.contextmanager
def padded_left(tokenizer: Any) -> Iterator[None]:
    """`tokenizer` pads as generation needs it, on the left (with the end of a text, lacking a pad), then as before."""
    side, token = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side, tokenizer.pad_token = "left", token or tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, token


@torch.no_grad()
def continuations(
    model: nn.Module, tokenizer: Any, texts: list[str], *, add_special_tokens: bool = False, **options: Any
) -> Tensor:
    """The tokens `(len(texts), new)` by which `model.generate`, with its `options`, goes on after each of `texts`."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=add_special_tokens)
    produced = model.generate(**batch.to(model.device), pad_token_id=tokenizer.pad_token_id, **options)
    return produced[:, batch["input_ids"].shape[1] :]


def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    template_kwargs: dict[str, Any] | None = None,
) -> list[str]:
    """The answers that `model` generates greedily to chat `rows`, in their order.

    Prompts are rendered as in training (see `template_options`); an answer ends with any of `ends_of_answers`, and is
    what stands between the two texts of `around_answer`.

    template_kwargs: what training gives the chat template for every row, as GRPO's `chat_template_kwargs`.
    """
    prompts = [prompt for prompt, _ in prompts_and_answers(rows)]
    options = [{**template_options(row), **(template_kwargs or {})} for row in rows]
    around = [around_answer(tokenizer, prompt, **own) for prompt, own in zip(prompts, options, strict=True)]
    ends = ends_of_answers(model, tokenizer, around[0][1]) if prompts else []
    answers = [""] * len(prompts)
    with evaluating(model), padded_left(tokenizer):
        order = sorted(range(len(prompts)), key=lambda i: len(str(prompts[i])))
        for start in tqdm(range(0, len(order), batch_size), desc="Answering", leave=False):
            batch = order[start : start + batch_size]
            texts = [opening_of(tokenizer, prompts[i], **options[i]) for i in batch]
            ending = ends[0] if len(ends) == 1 else ends or None
            generated = continuations(
                model, tokenizer, texts, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ending
            )
            for i, tokens in zip(batch, generated.tolist(), strict=True):
                own = list(itertools.takewhile(lambda token: token not in ends, tokens))
                opening = tokenizer(around[i][0], add_special_tokens=False)["input_ids"]
                text, opening = tokenizer.batch_decode([own, opening], skip_special_tokens=True)
                answers[i] = text.removeprefix(opening)
    return answers


def exact_match(answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> float:
    """Share of `answers` to chat `rows` that equal the reference (`evaluate` metric `exact_match`)."""
    references = [reference for _, reference in prompts_and_answers(rows)]
    return evaluate.load(EXACT_MATCH).compute(predictions=answers, references=references)["exact_match"]


def text_loss(
    model: nn.Module, tokenizer: Any, text: str, *, window: int = 256, windows: int = 32, batch_size: int = 8
) -> float:
    """Mean next-token loss (nats) over up to `windows` evenly spaced stretches of `window` tokens of `text`.

    Raises:
        ValueError: the text is shorter than one window.
    """
    stretches = text_stretches(tokenizer, text, window=window, windows=windows)
    return token_loss(model, [(ids, ids) for ids in stretches], batch_size=batch_size)


def text_stretches(tokenizer: Any, text: str, *, window: int = 256, windows: int = 32) -> list[Tensor]:
    """Token ids `(window,)` of up to `windows` evenly spaced stretches of `text`.

    Raises:
        ValueError: the text is shorter than one window.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    available = len(ids) // window
    if not available:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {window}.")
    count = min(windows, available)
    starts = [i * available // count * window for i in range(count)]
    return [ids[s : s + window] for s in starts]


def answer_tokens(
    tokenizer: Any, rows: Sequence[dict[str, Any]], *, max_length: int = 1024
) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels `(length,)` of chat rows: the last answer is labelled, what leads to it is not.

    Rows of more than `max_length` tokens are left out.

    Raises:
        ValueError: rows that are no chat (see `prompts_and_answers`), or all too long.
    """
    found = []
    for (prompt, answer), row in zip(prompts_and_answers(rows), rows, strict=True):
        chat, options = [*prompt, {"role": "assistant", "content": answer}], template_options(row)
        opening = opening_of(tokenizer, prompt, **options)
        whole = tokenizer.apply_chat_template(chat, tokenize=False, **options)
        start, ids = (
            tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
            for text in (opening, whole)
        )
        if len(start) < len(ids) <= max_length:
            labels = ids.clone()
            labels[: len(start)] = IGNORED
            found.append((ids, labels))
    if not found:
        raise ValueError(f"no row of the chat data has an answer within {max_length} tokens.")
    return found


def padded_right(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Token ids `(length,)` as a batch, padded where causal models do not look."""
    mask = pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True)
    return {"input_ids": pad_sequence(rows, batch_first=True), "attention_mask": mask}


@torch.no_grad()
def token_loss(model: nn.Module, rows: Sequence[tuple[Tensor, Tensor]], *, batch_size: int | None = None) -> float:
    """Mean loss (nats) over all labelled tokens of `rows`, pairs of ids and labels `(length,)`.

    batch_size: by default so many rows that a batch has at most `BATCH_TOKENS` tokens.
    """
    batch_size = batch_size or max(1, BATCH_TOKENS // max(len(ids) for ids, _ in rows))
    total, count = 0.0, 0
    with evaluating(model):
        for start in tqdm(range(0, len(rows), batch_size), desc="Reading", leave=False):
            ids, labels = zip(*rows[start : start + batch_size], strict=True)
            labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
            predicted = (labels[:, 1:] != IGNORED).sum().item()
            batch = {key: value.to(model.device) for key, value in {**padded_right(ids), "labels": labels}.items()}
            total += model(**batch, use_cache=False).loss.item() * predicted
            count += predicted
    return total / count
