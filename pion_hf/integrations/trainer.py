"""transformers' `Trainer` with what this package measures, records and keeps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.utils import logging

from pion_hf.integrations import model_card
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES, OptimizerFields
from pion_hf.integrations.callbacks import watch
from pion_hf.integrations.checkpoints import CheckpointMixin
from pion_hf.integrations.config import PionByDefault, PionTrainingArguments
from pion_hf.integrations.run_writer import recording

__all__ = ["PionByDefault", "PionTrainer", "PionTrainerMixin", "PionTrainingArguments"]

logger = logging.get_logger(__name__)


class PionTrainerMixin(CheckpointMixin):
    """Mix into any Trainer: `RunCallback`, which logs and records what training does, and a model card to tell of it.

    `class MyTrainer(PionTrainerMixin, SomeTrainer): ...`. The optimizer itself comes by name, `args.optim`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.run_callback = watch(self)
        chosen = isinstance(self.args, OptimizerFields) or self.optimizer or self.optimizer_cls_and_kwargs
        if not chosen and self.args.optim not in OPTIMIZER_CLASSES:
            logger.warning(
                f"{type(self).__name__} measures, its args choose the optimizer, and theirs is "
                f"{self.args.optim.value!r}: for Pion pass args of a class with PionByDefault (PionTrainingArguments, "
                "PionSFTConfig, ...) or with optim='pion'."
            )

    def train(self, *args, **kwargs):
        """As `Trainer.train`; the returned metrics also hold what `RunCallback` sums up, `spectrum_drift` among it."""
        self.run_callback.waits = True
        self.run_callback.forget()
        try:
            output = super().train(*args, **kwargs)
        except BaseException as error:
            self.run_callback.failed(error)
            raise
        self.run_callback.finished()
        output.metrics.update(self.run_callback.summary)
        return output

    def train_from(self, checkpoint: str | None, trial: Any = None, *args, **kwargs):
        """As `CheckpointMixin`'s; trials of a search each have their own folder."""
        self.run_callback.folder = self._get_output_dir(trial)
        return super().train_from(checkpoint, trial, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; where it fails after training, the run has not finished, and its record says so."""
        try:
            super().save_model(output_dir, _internal_call)
        except BaseException as error:
            self.run_callback.failed(error)
            raise

    def run_summary(self) -> dict[str, Any]:
        """What a run says of itself: its optimizer, the steps it has taken, and what was measured."""
        described = model_card.describe(self.args, self.optimizer, self.model)
        return {"optimizer": described, "steps": self.state.global_step, **self.run_callback.summary}

    def create_model_card(self, *args, **kwargs) -> None:
        """As the Trainer's own, which transformers and TRL call when they save or push, and what `model_card` adds."""
        if not args and kwargs.get("model_name") is None:
            kwargs["model_name"] = Path(self.args.hub_model_id or self.args.output_dir).absolute().name
        data = kwargs.get("dataset_name") or ""
        if os.path.exists(data) or os.path.isabs(data) or "://" in data:  # TRL would link to the hub's of that name
            kwargs["dataset_name"] = None
        path = Path(self.args.output_dir, "README.md")
        with recording(repr(str(path))):
            if self.is_world_process_zero() and path.is_symlink():  # which theirs would write through
                path.unlink()
            super().create_model_card(*args, **kwargs)
            if self.is_world_process_zero():
                model_card.extend(path, self.run_summary(), dataset_name=kwargs.get("dataset_name"))


class PionTrainer(PionTrainerMixin, Trainer):
    """transformers' `Trainer` with `PionTrainerMixin`."""
