"""`Trainer` and `TrainingArguments` with this package's optimizer as the default and its options as typed fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import Trainer, TrainingArguments

from pion_hf.arguments import PionOptions
from pion_hf.integrations.callbacks import SpectrumCallback


@dataclass
class PionTrainingArguments(PionOptions, TrainingArguments):
    """`TrainingArguments` with `optim="pion"` by default and the optimizer's options as `optim_*` fields."""

    optim: str = field(default="pion", metadata={"help": "The optimizer: pion, or any name transformers knows."})


class PionTrainerMixin:
    """Mix into any Trainer: logs all groups' learning rates, and measures what rotations must not change.

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


class PionTrainer(PionTrainerMixin, Trainer):
    """transformers' `Trainer` with `PionTrainerMixin`."""
