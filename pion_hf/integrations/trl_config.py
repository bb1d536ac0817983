"""TRL's configs with this package's optimizer as the default and its options as typed fields.

Every other option and default is TRL's. The learning rate of SFT is the optimizer's own; where TRL's default is for
other losses (1e-4 for reward models, 1e-6 else), it stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from pion_hf.integrations.config import PionByDefault, UsualRate
from pion_hf.needs import needed

with needed("trl"):
    from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig


@dataclass
class PionSFTConfig(UsualRate, SFTConfig):
    """TRL's `SFTConfig` with `UsualRate`."""


@dataclass
class PionDPOConfig(PionByDefault, DPOConfig):
    """TRL's `DPOConfig` with `PionByDefault`."""


@dataclass
class PionKTOConfig(PionByDefault, KTOConfig):
    """TRL's `KTOConfig` with `PionByDefault`."""


@dataclass
class PionRewardConfig(PionByDefault, RewardConfig):
    """TRL's `RewardConfig` with `PionByDefault`."""


@dataclass
class PionGRPOConfig(PionByDefault, GRPOConfig):
    """TRL's `GRPOConfig` with `PionByDefault`."""
