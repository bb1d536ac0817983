"""The trainer of GRPO, apart from the others: see `pion_hf.integrations.trl`, which has it under its name too."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl import GRPOTrainer

from pion_hf.integrations.trainer import PionTrainerMixin


class PionGRPOTrainer(PionTrainerMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` with `PionTrainerMixin`; a run that is resumed reads the prompts that it would have read.

    Answers are drawn anew where a checkpoint was saved between their generation and their last use (with
    `num_iterations` above 1, or `steps_per_generation` other than `gradient_accumulation_steps`).
    """

    train_sampler: Sampler | None = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_GoesOn(self))

    def _get_train_sampler(self, *args, **kwargs) -> Sampler:
        self.train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self.train_sampler


class _GoesOn(TrainerCallback):
    """What TRL counts by itself, and begins from nothing at a checkpoint: steps of generation, permutations of rows."""

    def __init__(self, trainer: PionGRPOTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        self._trainer._step = round((state.epoch or 0) * len(train_dataloader)) if state.global_step else 0
        self._trainer._buffered_inputs = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The permutation of this epoch is the next one."""
        sampler = self._trainer.train_sampler
        if getattr(sampler, "generator", None) is not None and sampler.seed is not None:
            sampler.generator.manual_seed(sampler.seed)
            for _ in range(int(state.epoch or 0)):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
