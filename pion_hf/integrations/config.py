"""`TrainingArguments` with this package's optimizer as the default and its options as typed fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from pion_hf.integrations.arguments import OPTIMIZER_CLASSES, OptimizerFields, by_optimizer, default_rate
from pion_hf.optim.checks import check_range
from pion_hf.optim.options import usual_rates

RATE = (
    "Learning rate of the hidden matrices, and of all else where optim_adamw_lr is unset. Usual in fine-tuning: "
    f"{by_optimizer({name: usual_rates(name) for name in OPTIMIZER_CLASSES})}. The RMS of an update of pion, teon and "
    "muon is a fifth of it; the others take what is right for AdamW."
)
DEFAULT_RATES = by_optimizer({name: f"{default_rate(name):g}" for name in OPTIMIZER_CLASSES})


@dataclass
class PionByDefault(OptimizerFields):
    """Mix into any `TrainingArguments`: `optim="pion"` by default, and the optimizer's options as `optim_*` fields."""

    optim: str = field(
        default="pion",
        metadata={
            "help": f"The optimizer: one of this package, {', '.join(OPTIMIZER_CLASSES)}, or any name of "
            "transformers, as adamw_torch."
        },
    )
    max_skipped_steps: int = field(
        default=50,
        metadata={
            "help": "Training ends with an error after so many steps in a row that this package's optimizer skipped, "
            "since a gradient was not finite (those that the scaler of fp16 skips do not count). 0: never."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("max_skipped_steps", self.max_skipped_steps, lambda v: v >= 0, "0 (never) or more", whole=True)


@dataclass
class UsualRate(PionByDefault):
    """`PionByDefault` with a learning rate that suits the optimizer, where none is given."""

    learning_rate: float | None = field(
        default=None,
        metadata={"help": f"{RATE} (default: {DEFAULT_RATES}; of others that of TRL or transformers)"},
    )

    def __post_init__(self) -> None:
        self.rate_is_open = self.learning_rate is None  # until the model says which form an optimizer takes
        if self.rate_is_open:
            optim = getattr(self.optim, "value", self.optim)
            self.learning_rate = default_rate(optim) if optim in OPTIMIZER_CLASSES else inherited_rate(type(self))
        super().__post_init__()


def inherited_rate(cls: type) -> float:
    """The default learning rate of a config class, or of the first one above it that has one."""
    defaults = (vars(base).get("__dataclass_fields__", {}).get("learning_rate") for base in cls.__mro__)
    return next(f.default for f in defaults if f is not None and f.default is not None)


@dataclass
class PionTrainingArguments(UsualRate, TrainingArguments):
    """transformers' `TrainingArguments` with `UsualRate`."""
