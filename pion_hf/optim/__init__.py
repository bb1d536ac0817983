"""torch optimizers. Imports `pion_hf.linalg` and torch, never transformers, peft or trl; names load when asked for."""

from typing import TYPE_CHECKING

from pion_hf.lazy import attach

if TYPE_CHECKING:
    from pion_hf.optim.adamw import RoutedAdamW
    from pion_hf.optim.base import MatrixOptimizer
    from pion_hf.optim.inputs import Inputs
    from pion_hf.optim.lora import PionLora, TeonLora
    from pion_hf.optim.pion import Pion
    from pion_hf.optim.teon import Muon, Teon

__all__ = ["Inputs", "MatrixOptimizer", "Muon", "Pion", "PionLora", "RoutedAdamW", "Teon", "TeonLora"]

# The optimizers by the names that they have in transformers. `pion_ambient` is a preset of Pion.
REGISTERED = {
    "pion": "Pion",
    "pion_ambient": "Pion",
    "teon": "Teon",
    "muon": "Muon",
    "adamw_routed": "RoutedAdamW",
    "pion_lora": "PionLora",
    "teon_lora": "TeonLora",
}

__getattr__, __dir__ = attach(
    __name__,
    {
        "RoutedAdamW": "pion_hf.optim.adamw",
        "MatrixOptimizer": "pion_hf.optim.base",
        "Inputs": "pion_hf.optim.inputs",
        "PionLora": "pion_hf.optim.lora",
        "TeonLora": "pion_hf.optim.lora",
        "Pion": "pion_hf.optim.pion",
        "Muon": "pion_hf.optim.teon",
        "Teon": "pion_hf.optim.teon",
    },
)
