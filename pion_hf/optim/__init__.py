"""torch optimizers. Imports `pion_hf.linalg` and torch, never transformers, peft or trl."""

from pion_hf.optim.adamw import RoutedAdamW
from pion_hf.optim.base import MatrixOptimizer
from pion_hf.optim.inputs import Inputs
from pion_hf.optim.lora import PionLora, TeonLora
from pion_hf.optim.pion import Pion
from pion_hf.optim.teon import Teon

__all__ = ["Inputs", "MatrixOptimizer", "Pion", "PionLora", "RoutedAdamW", "Teon", "TeonLora"]
