"""`TrainingArguments` with this package's optimizer as the default and its options as typed fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from pion_hf.arguments import OptimizerFields
from pion_hf.optim.checks import check_range


@dataclass
class PionByDefault(OptimizerFields):
    """Mix into any `TrainingArguments`: `optim="pion"` by default, and the optimizer's options as `optim_*` fields."""

    optim: str = field(default="pion", metadata={"help": "The optimizer: pion, or any name transformers knows."})
    max_skipped_steps: int = field(
        default=50,
        metadata={
            "help": "Training ends with an error after so many steps in a row that this package's optimizer skipped, "
            "since a gradient was not finite (those that the scaler of fp16 skips do not count). 0: never."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("max_skipped_steps", self.max_skipped_steps, lambda v: v >= 0, "0 (never) or more", whole=True)


@dataclass
class PionTrainingArguments(PionByDefault, TrainingArguments):
    """transformers' `TrainingArguments` with `PionByDefault`."""
