"""TRL's trainers with this package's options as typed fields, and with its report of spectrum and learning rates.

Every other option and default is TRL's, the learning rate too: 2e-5 in SFT, 1e-4 for reward models, 1e-6 else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from pion_hf.integrations.trainer import PionByDefault, PionTrainerMixin


@dataclass
class PionSFTConfig(PionByDefault, SFTConfig):
    """TRL's `SFTConfig` with `PionByDefault`."""


class PionSFTTrainer(PionTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` with `PionTrainerMixin`."""


@dataclass
class PionDPOConfig(PionByDefault, DPOConfig):
    """TRL's `DPOConfig` with `PionByDefault`."""


class PionDPOTrainer(PionTrainerMixin, DPOTrainer):
    """TRL's `DPOTrainer` with `PionTrainerMixin`."""


@dataclass
class PionKTOConfig(PionByDefault, KTOConfig):
    """TRL's `KTOConfig` with `PionByDefault`."""


class PionKTOTrainer(PionTrainerMixin, KTOTrainer):
    """TRL's `KTOTrainer` with `PionTrainerMixin`."""


@dataclass
class PionRewardConfig(PionByDefault, RewardConfig):
    """TRL's `RewardConfig` with `PionByDefault`."""


class PionRewardTrainer(PionTrainerMixin, RewardTrainer):
    """TRL's `RewardTrainer` with `PionTrainerMixin`."""


@dataclass
class PionGRPOConfig(PionByDefault, GRPOConfig):
    """TRL's `GRPOConfig` with `PionByDefault`."""


def __getattr__(name: str) -> Any:
    """`PionGRPOTrainer` when it is asked for: TRL's module of it imports vLLM, where that is installed."""
    if name != "PionGRPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pion_hf.integrations.grpo import PionGRPOTrainer

    return PionGRPOTrainer
