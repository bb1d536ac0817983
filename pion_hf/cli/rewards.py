"""Rewards that need no model of their own, for TRL's `GRPOTrainer(reward_funcs=...)` and `pion-hf grpo`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from difflib import SequenceMatcher
from typing import Any

from pion_hf.errors import unknown

Completion = str | list[dict[str, str]]


def reasoning_gym_reward(completions: list[Completion], entry: list[str], **columns: Any) -> list[float]:
    """How right each completion is, from 0 to 1, as `reasoning_gym` itself scores answers to its entries.

    Some of its datasets give wrong answers a part of the score. The answer is what stands in the last
    `<answer>...</answer>`, or else the whole text; space around it does not count.

    Args:
        completions: texts, or chats whose last message is the answer.
        entry: the column of that name, which `examples/prepare_reasoning.py` writes: entries of reasoning-gym as JSON
            (`question`, `answer`, `metadata`; the latter's `source_dataset` is the one that scores). In JSON tuples
            are lists: `arc_agi` and `rearc` take those for wrong.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
        ValueError: an entry that is none, or of a dataset that the installed reasoning-gym does not have.
    """
    pairs = _answers_and_entries(completions, entry)
    return [_scorer(asked["metadata"]["source_dataset"])(answer, asked) for answer, asked in pairs]


def answer_similarity_reward(completions: list[Completion], entry: list[str], **columns: Any) -> list[float]:
    """The share of characters that each completion and its entry's answer have in common (`difflib`'s `ratio`).

    A help for models whose answers `reasoning_gym_reward` finds all alike, mostly 0: without a difference between
    them there is nothing to learn. Arguments and errors are those of `reasoning_gym_reward`.
    """
    pairs = _answers_and_entries(completions, entry)
    return [SequenceMatcher(None, str(asked["answer"]), answer, autojunk=False).ratio() for answer, asked in pairs]


def _answers_and_entries(completions: list[Completion], texts: list[str]) -> list[tuple[str, dict[str, Any]]]:
    try:
        from reasoning_gym.utils import extract_answer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("these rewards need the package reasoning-gym: install it") from error

    pairs = []
    for completion, text in zip(completions, texts, strict=True):
        content = completion if isinstance(completion, str) else completion[-1]["content"]
        answer = extract_answer(content)
        pairs.append((content.strip() if answer is None else answer, _entry(text)))
    return pairs


def _entry(text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
        _ = entry["answer"], entry["metadata"]["source_dataset"]
    except (TypeError, KeyError, json.JSONDecodeError):
        raise ValueError(
            "the column 'entry' must hold JSON with 'answer' and 'metadata' (with 'source_dataset'), as "
            f"examples/prepare_reasoning.py writes it, got {text!r:.80}"
        ) from None
    return entry


@functools.cache
def _scorer(name: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    if name not in DATASETS:
        raise unknown("dataset of reasoning-gym", name, DATASETS)
    return get_score_answer_fn(name)
