"""The trainer of GRPO, apart from the others: see `pion_hf.integrations.trl`, which has it under its name too."""

from __future__ import annotations

from trl import GRPOTrainer

from pion_hf.integrations.trainer import PionTrainerMixin


class PionGRPOTrainer(PionTrainerMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` with `PionTrainerMixin`."""
