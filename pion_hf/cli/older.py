"""What older releases of Hugging Face's libraries lack or call otherwise.

Everything here names the release that needs it no more, and goes when setup.cfg asks for that one.
"""

from __future__ import annotations

import inspect
from argparse import ArgumentParser
from typing import Any

import torch
import trl.models
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

# transformers 5.23: what it calls activation checkpointing was gradient checkpointing. By the new name, the old one.
OLD_NAMES = {
    name: name.replace("activation", "gradient")
    for name in ("activation_checkpointing", "activation_checkpointing_kwargs")
    if not hasattr(TrainingArguments, name)
}
# Options of checkpointing beside torch's: two of transformers 5.23, one of TRL 1.15.
_ENABLE = getattr(PreTrainedModel, "activation_checkpointing_enable", PreTrainedModel.gradient_checkpointing_enable)
CHECKPOINTING_OPTIONS = (
    *(name for name in ("every_n_layers", "offload") if name in inspect.signature(_ENABLE).parameters),
    *("selective" for name in dir(trl.models) if name == "enable_selective_activation_checkpointing"),
)

# TRL 1.15: the loss in tiles of tokens and vocabulary.
TILED_LOSS = Version(trl.__version__) >= Version("1.15")


def know_new_names(parser: ArgumentParser) -> None:
    """Let the flags of `OLD_NAMES` be given by their new names too."""
    for action in parser._actions:
        if action.dest in OLD_NAMES.values():
            flags = [flag.replace("gradient", "activation") for flag in action.option_strings]
            action.option_strings += flags
            parser._option_string_actions.update(dict.fromkeys(flags, action))


def with_old_names(recipe: dict[str, Any]) -> dict[str, Any]:
    """`recipe` by the names that this release knows; where both are given, the new one counts, as in later releases."""
    given = {OLD_NAMES[key]: value for key, value in recipe.items() if key in OLD_NAMES}
    return {**{key: value for key, value in recipe.items() if key not in OLD_NAMES}, **given}


def loss_bytes(tokens: int, head: Tensor, computed: torch.dtype) -> int:
    """What TRL's loss takes before 1.15: all logits of 256 tokens, three or four times, and copies of the head.

    Measured with 1.9 and 1.14. Before 1.13 a head in half precision is copied to float32, and for autocast back. Each
    chunk's gradient of the head is added to the sum of those before it, which makes three of them.
    """
    vocabulary, width = head.shape
    logits, half = 4 * min(tokens, 256) * vocabulary, 2 * head.numel()
    if computed == torch.float32:
        held = 4 * logits
    elif Version(trl.__version__) < Version("1.13"):
        held = max(3 * logits + half, logits + 3 * half if head.dtype != torch.float32 else 0)
    else:
        held = 4 * logits + (half if head.dtype == torch.float32 else 0)
    if head.requires_grad:
        held = max(held + head.nbytes, 3 * head.nbytes)
    return held + 8 * tokens * width


def with_text_column(dataset: Any, column: str) -> Any:
    """`dataset` with the text of `column` in `text`: TRL before 1.15 puts end-of-text tokens into no other column."""
    from trl.data_utils import get_dataset_column_names  # datasets, not before there are data

    columns = get_dataset_column_names(dataset)
    if column == "text" or column not in columns:
        return dataset
    return (dataset.remove_columns("text") if "text" in columns else dataset).rename_column(column, "text")
