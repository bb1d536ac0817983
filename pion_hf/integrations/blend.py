"""Between the weights that a model began with and those that training has made of them.

Of what training changes, much is forgetting and little of it learning: part of the way back costs less of the task than
it gives back of everything else (Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pion_hf.integrations.hidden_matrices import hidden_matrices
from pion_hf.integrations.optimizers import unwrap
from pion_hf.linalg.spectrum import singular_values, with_singular_values
from pion_hf.optim import blocks
from pion_hf.optim.checks import check_range
from pion_hf.routing.adapters import idle_factors


class Blend:
    """A model's weights at any share of the way that training has taken them: `W_0 + share (W - W_0)`.

    Made before training, applied after it, as often as one likes:

        blend = Blend(model)
        trainer.train()
        blend.apply(0.8, trainer.optimizer)

    Only trainable parameters move. Of an adapter that began without effect (`B = 0`) the effect `B A` goes back: `B`
    does, and `A` stays as trained. Of others each factor goes back. Both ends are kept on the CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._start = _copies(model)
        self._trained: dict[str, Tensor] | None = None
        self._stay = idle_factors(model)  # their partners alone take the effect back

    @torch.no_grad()
    def apply(self, share: float, optimizer: Any = None) -> None:
        """Put the weights there: 0 is where they began, 1 what was trained, which is what they are at the first call.

        optimizer: what trained them. A matrix that it has rotated gets the singular values that it began with, by the
        nearest matrix that has them: a mean of rotations is not one.

        Raises:
            ValueError: a share outside [0, 1], or parameters that are sharded or others than before training.
        """
        check_range("share", share, lambda v: 0 <= v <= 1, "in [0, 1]")
        if self._trained is None:
            self._trained = _copies(self._model)
            if self._trained.keys() != self._start.keys():
                raise ValueError(
                    "the model's trainable parameters are not those it had when Blend(model) was made: freeze and add "
                    "adapters before."
                )
        for name, p in _trainable(self._model).items():
            start, end = (end_of[name].to(p.device) for end_of in (self._start, self._trained))
            precise = torch.promote_types(p.dtype, torch.float32)
            own = 1.0 if share > 0 and p in self._stay else share
            p.copy_(torch.lerp(start.to(precise), end.to(precise), own))
        ours = unwrap(optimizer)
        if ours is not None and 0 < share < 1:
            self._restore_spectra(optimizer, ours)

    def _restore_spectra(self, optimizer: Any, ours: Any) -> None:
        names = {id(p): name for name, p in _trainable(self._model).items()}
        for matrix in hidden_matrices(self._model, optimizer, ours):
            if not matrix.keeps_spectrum or matrix.parameter in self._stay:
                continue
            began = blocks.split(self._start[names[id(matrix.parameter)]], matrix.layout)[matrix.index]
            now = matrix.weights()
            spectrum = singular_values(blocks.merge_rows(began)).to(now.device)
            view = blocks.split(matrix.parameter.detach(), matrix.layout)[matrix.index]
            view.copy_(with_singular_values(now, spectrum).reshape(view.shape))


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _copies(model: nn.Module) -> dict[str, Tensor]:
    found = _trainable(model)
    if any(hasattr(p, "device_mesh") for p in found.values()):
        raise ValueError("a blend needs whole parameters, and these are sharded (FSDP2): train with DDP, or without.")
    return {name: p.detach().to("cpu", copy=True) for name, p in found.items()}
