"""TRL's trainers with this package's optimizer, and with its report of spectrum and learning rates."""

from __future__ import annotations

from typing import Any

from pion_hf.integrations.trainer import PionTrainerMixin
from pion_hf.integrations.trl_config import (
    PionDPOConfig,
    PionGRPOConfig,
    PionKTOConfig,
    PionRewardConfig,
    PionSFTConfig,
)
from pion_hf.needs import needed

with needed("trl"):
    from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer

__all__ = [
    "PionDPOConfig",
    "PionDPOTrainer",
    "PionGRPOConfig",
    "PionKTOConfig",
    "PionKTOTrainer",
    "PionRewardConfig",
    "PionRewardTrainer",
    "PionSFTConfig",
    "PionSFTTrainer",
]


class PionSFTTrainer(PionTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` with `PionTrainerMixin`."""


class PionDPOTrainer(PionTrainerMixin, DPOTrainer):
    """TRL's `DPOTrainer` with `PionTrainerMixin`."""


class PionKTOTrainer(PionTrainerMixin, KTOTrainer):
    """TRL's `KTOTrainer` with `PionTrainerMixin`."""


class PionRewardTrainer(PionTrainerMixin, RewardTrainer):
    """TRL's `RewardTrainer` with `PionTrainerMixin`."""


def __getattr__(name: str) -> Any:
    """`PionGRPOTrainer` when it is asked for: TRL's module of it imports vLLM, where that is installed."""
    if name != "PionGRPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pion_hf.integrations.trl_grpo import PionGRPOTrainer

    return PionGRPOTrainer
