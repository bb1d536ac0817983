"""`Trainer` and `TrainingArguments` with this package's optimizer as the default and its options as typed fields."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from pion_hf.arguments import PionOptions
from pion_hf.integrations import model_card
from pion_hf.integrations.callbacks import SpectrumCallback
from pion_hf.integrations.checkpoints import CheckpointMixin


@dataclass
class PionByDefault(PionOptions):
    """Mix into any `TrainingArguments`: `optim="pion"` by default, and the optimizer's options as `optim_*` fields."""

    optim: str = field(default="pion", metadata={"help": "The optimizer: pion, or any name transformers knows."})


@dataclass
class PionTrainingArguments(PionByDefault, TrainingArguments):
    """transformers' `TrainingArguments` with `PionByDefault`."""


class PionTrainerMixin(CheckpointMixin):
    """Mix into any Trainer: all groups' learning rates in the logs, a measurement of what rotations must not change,
    and a model card that tells of both.

    `class MyTrainer(PionTrainerMixin, SomeTrainer): ...`. The optimizer itself comes by name, `args.optim`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.spectrum = SpectrumCallback()
        self.add_callback(self.spectrum)

    def log(self, logs, *args, **kwargs) -> None:
        """As `Trainer.log`; beside `learning_rate`, the first group's, also those of all groups."""
        if "learning_rate" in logs:
            logs.update(self.spectrum.rates)
        super().log(logs, *args, **kwargs)

    def train(self, *args, **kwargs):
        """As `Trainer.train`; the returned metrics also hold `spectrum_drift` and `optimizer_share`."""
        output = super().train(*args, **kwargs)
        if self.spectrum.summary:
            self.log(dict(self.spectrum.summary))
            output.metrics.update(self.spectrum.summary)
        return output

    def run_summary(self) -> dict[str, Any]:
        """What a run says of itself: its optimizer, the steps it has taken, and what `spectrum` measured."""
        return {"optimizer": model_card.describe(self), "steps": self.state.global_step, **self.spectrum.summary}

    def create_model_card(self, *args, **kwargs) -> None:
        """As the Trainer's own, which transformers and TRL call when they save or push, and what `model_card` adds."""
        if not args and kwargs.get("model_name") is None:
            kwargs["model_name"] = Path(self.args.hub_model_id or self.args.output_dir).absolute().name
        if os.path.isdir(kwargs.get("dataset_name") or ""):  # TRL would link to the hub's of that name
            kwargs["dataset_name"] = None
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir, "README.md")
            model_card.extend(path, self.run_summary(), dataset_name=kwargs.get("dataset_name"))


class PionTrainer(PionTrainerMixin, Trainer):
    """transformers' `Trainer` with `PionTrainerMixin`."""
