"""Pion and TEON for Hugging Face users. Importing this package registers its optimizers with transformers.

It imports neither torch nor transformers: names load when they are asked for, and the optimizers are registered as soon
as somebody imports transformers.
"""

from typing import TYPE_CHECKING

from pion_hf._version import __version__
from pion_hf.integrations.registry import register
from pion_hf.lazy import attach

if TYPE_CHECKING:
    from pion_hf.integrations.blend import Blend
    from pion_hf.integrations.callbacks import watch
    from pion_hf.integrations.config import PionTrainingArguments
    from pion_hf.integrations.factory import factory
    from pion_hf.integrations.initialization import spectral_init_
    from pion_hf.integrations.trainer import PionTrainer, PionTrainerMixin
    from pion_hf.optim import Inputs, Muon, Pion, PionLora, RoutedAdamW, Teon, TeonLora
    from pion_hf.routing.table import param_groups, routing_table

__all__ = [
    "Blend",
    "Inputs",
    "Muon",
    "Pion",
    "PionLora",
    "PionTrainer",
    "PionTrainerMixin",
    "PionTrainingArguments",
    "RoutedAdamW",
    "Teon",
    "TeonLora",
    "__version__",
    "factory",
    "param_groups",
    "register",
    "routing_table",
    "spectral_init_",
    "watch",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "spectral_init_": "pion_hf.integrations.initialization",
        "Blend": "pion_hf.integrations.blend",
        "watch": "pion_hf.integrations.callbacks",
        "PionTrainingArguments": "pion_hf.integrations.config",
        "factory": "pion_hf.integrations.factory",
        **dict.fromkeys(("PionTrainer", "PionTrainerMixin"), "pion_hf.integrations.trainer"),
        **dict.fromkeys(("Inputs", "Muon", "Pion", "PionLora", "RoutedAdamW", "Teon", "TeonLora"), "pion_hf.optim"),
        **dict.fromkeys(("param_groups", "routing_table"), "pion_hf.routing.table"),
    },
)

register()
