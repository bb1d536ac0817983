"""TRL's trainers with this package's options as typed fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import SFTConfig, SFTTrainer

from pion_hf.arguments import PionOptions
from pion_hf.integrations.trainer import PionTrainerMixin


@dataclass
class PionSFTConfig(PionOptions, SFTConfig):
    """TRL's `SFTConfig` with `optim="pion"` by default and the optimizer's options as `optim_*` fields."""

    optim: str = field(default="pion", metadata={"help": "The optimizer: pion, or any name transformers knows."})


class PionSFTTrainer(PionTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` with `PionTrainerMixin`."""
