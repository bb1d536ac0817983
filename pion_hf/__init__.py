"""Pion and TEON for Hugging Face users. Importing this package registers its optimizers with transformers."""

from pion_hf._version import __version__
from pion_hf.initialization import spectral_init_
from pion_hf.integrations.blend import Blend
from pion_hf.integrations.callbacks import watch
from pion_hf.integrations.registry import register
from pion_hf.integrations.trainer import PionTrainer, PionTrainerMixin, PionTrainingArguments
from pion_hf.optim import Inputs, Pion, PionLora, RoutedAdamW, Teon, TeonLora
from pion_hf.routing import param_groups, routing_table

__all__ = [
    "Blend",
    "Inputs",
    "Pion",
    "PionLora",
    "PionTrainer",
    "PionTrainerMixin",
    "PionTrainingArguments",
    "RoutedAdamW",
    "Teon",
    "TeonLora",
    "__version__",
    "param_groups",
    "register",
    "routing_table",
    "spectral_init_",
    "watch",
]

register()
