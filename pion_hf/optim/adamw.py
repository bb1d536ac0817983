"""AdamW with the routing of this package: hidden matrices at one learning rate, everything else at another."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pion_hf.optim import blocks, sharding
from pion_hf.optim.base import MatrixOptimizer, named_parameters
from pion_hf.optim.observing import Update


class RoutedAdamW(MatrixOptimizer):
    """torch's AdamW for every parameter; that of matrices (rule `adamw_routed`) is the same as of groups `adamw`.

    What differs is what `pion_hf.param_groups` gives the two kinds of groups: a learning rate each, as beside every
    other matrix rule. Half-precision weights are trained as torch's AdamW trains them, without masters.

    Args:
        params: groups from `pion_hf.param_groups(model, "adamw_routed")`, tensors or `(name, tensor)` pairs.
        lr: of groups that bring none.
        weight_decay: decoupled, of such groups too.
        adamw_betas, adamw_eps: of such groups too, matrices or not.

    Raises:
        ValueError: an unknown option or a value out of range.
    """

    matrix_rules = ("adamw_routed",)
    elementwise_rules = ("adamw", "adamw_routed")

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        *,
        weight_decay: float = 0.0,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": adamw_betas, "eps": adamw_eps})

    def _adamw_step(self, group: dict) -> None:
        """All parameters at once, or one after the other where somebody keeps the weights before the step."""
        routed = group["rule"] in self.matrix_rules
        observers = [observer for observer in self.observers if routed and observer.wants(group)]
        if not observers:
            super()._adamw_step(group)
            return
        layout = blocks.Layout.parse(group["layout"])
        for name, p in named_parameters(group):
            if p.grad is None:
                continue
            kept = [[observer.keep(matrix) for matrix in _matrices(p, layout)] for observer in observers]
            super()._adamw_step({**group, "params": [p]})
            after, grads = _matrices(p, layout), _matrices(p.grad, layout)
            for i, (new, grad) in enumerate(zip(after, grads, strict=True)):
                names = [blocks.name_of(name, i, len(after))] * len(new)
                for observer, old in zip(observers, kept, strict=True):
                    observer.see(Update(names, group, old[i], new, grad, {}))


def _matrices(p: Tensor, layout: blocks.Layout) -> list[Tensor]:
    """What `p` holds, each `(E, m, n)`, in float32 at least; of a sharded parameter this process's part, if any."""
    part = sharding.local(p)
    if sharding.is_sharded(p):
        views = [part.reshape(-1, *part.shape[-2:])] if part.numel() else []
    else:
        views = [blocks.merge_rows(view) for view in blocks.split(part, layout)]
    return [view if view.element_size() > 2 else view.float() for view in views]
