"""torch optimizers. Imports `pion_hf.linalg` and torch, never transformers, peft or trl."""

from pion_hf.optim.base import MatrixOptimizer
from pion_hf.optim.pion import Pion

__all__ = ["MatrixOptimizer", "Pion"]
