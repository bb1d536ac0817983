"""TRL's configs with this package's optimizer as the default and its options as typed fields.

Every other option and default is TRL's, the learning rate too: 2e-5 in SFT, 1e-4 for reward models, 1e-6 else.
"""

from __future__ import annotations

from dataclasses import dataclass

from pion_hf.integrations.config import PionByDefault
from pion_hf.needs import needed

with needed("trl"):
    from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig


@dataclass
class PionSFTConfig(PionByDefault, SFTConfig):
    """TRL's `SFTConfig` with `PionByDefault`."""


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
