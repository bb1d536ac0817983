"""`TrainingArguments` with this package's optimizer as the default and its options as typed fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from pion_hf.arguments import PionOptions


@dataclass
class PionByDefault(PionOptions):
    """Mix into any `TrainingArguments`: `optim="pion"` by default, and the optimizer's options as `optim_*` fields."""

    optim: str = field(default="pion", metadata={"help": "The optimizer: pion, or any name transformers knows."})


@dataclass
class PionTrainingArguments(PionByDefault, TrainingArguments):
    """transformers' `TrainingArguments` with `PionByDefault`."""
