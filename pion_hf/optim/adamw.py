"""AdamW with the routing of this package: hidden matrices at one learning rate, everything else at another."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from pion_hf.linalg.rotation import along
from pion_hf.optim import blocks, elementwise, sharding
from pion_hf.optim.base import MatrixOptimizer
from pion_hf.optim.batches import KEPT
from pion_hf.optim.checks import check_finite
from pion_hf.optim.groups import kept_columns, named_parameters
from pion_hf.optim.inputs import Inputs
from pion_hf.optim.observing import Update
from pion_hf.optim.options import RoutedAdamWOptions, given
from pion_hf.optim.rewritten import working_dtype

KEY = f"{KEPT}.0"  # as of the first of a parameter's matrices: all of them have its inputs


class RoutedAdamW(MatrixOptimizer):
    """torch's AdamW for every parameter; that of matrices (rule `adamw_routed`) is the same as of groups `adamw`.

    What differs is what `pion_hf.param_groups` gives the two kinds of groups: a learning rate each, as beside every
    other matrix rule. Half-precision weights are trained as torch's AdamW trains them, without masters.

    With `keep` it is AdamW less what each step changes of the outputs of shared inputs (see `Pion`).

    Args:
        params: groups from `pion_hf.param_groups(model, "adamw_routed")`, tensors or `(name, tensor)` pairs.
        lr, weight_decay (decoupled), adamw_betas, adamw_eps: of every group, of matrices or not, that has none itself.
        keep: number of leading directions of the inputs of every layer with a hidden matrix whose outputs stay.
        keep_soft: see `Teon`. inputs: `pion_hf.Inputs(model, keep)`; see `Pion`.

    Raises:
        ValueError: an unknown option or a value out of range.
    """

    options = RoutedAdamWOptions
    matrix_rules = ("adamw_routed",)
    elementwise_rules = ("adamw", "adamw_routed")

    def __init__(
        self,
        params: Iterable,
        lr: float = 2e-4,
        *,
        weight_decay: float = 0.0,
        keep: int = 0,
        keep_soft: bool = False,
        inputs: Inputs | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
    ) -> None:
        defaults = given(RoutedAdamWOptions, locals(), without=("adamw_betas", "adamw_eps"))
        defaults |= {"betas": adamw_betas, "eps": adamw_eps}
        super().__init__(params, defaults, inputs=inputs)

    def _start_anew(self) -> None:
        super()._start_anew()
        self._laid_out: set[Tensor] = set()  # parameters whose kept directions are none yet

    def _prepare(self, index: int) -> None:
        """As ever; weights before their first step are such as can be trained."""
        super()._prepare(index)
        for name, p in named_parameters(self.param_groups[index]):
            if p.grad is not None and not self.state.get(p) and not sharding.is_sharded(p):
                check_finite(name, p)

    def _elementwise_step(self, group: dict) -> None:
        """All parameters at once, or one after the other where somebody keeps the weights before the step."""
        routed = group["rule"] in self.matrix_rules
        observers = [observer for observer in self.observers if routed and observer.wants(group)]
        if not observers:
            self._kept_step(group, routed=routed)
            return
        layout = blocks.Layout.parse(group["layout"])
        for name, p in named_parameters(group):
            if p.grad is None:
                continue
            kept = [[observer.before(matrix) for matrix in _matrices(p, layout)] for observer in observers]
            self._kept_step({**group, "params": [p], "param_names": [name]}, routed=routed)
            after, grads = _matrices(p, layout), _matrices(p.grad, layout)
            for i, (new, grad) in enumerate(zip(after, grads, strict=True)):
                names = [blocks.name_of(name, i, len(after))] * len(new)
                for observer, old in zip(observers, kept, strict=True):
                    observer.see(Update(names, group, old[i], new, grad, {}))

    def _lay_out_state(self) -> None:
        super()._lay_out_state()
        for group in self.param_groups:
            transposed = blocks.Layout.parse(group["layout"]).transposed
            for p in group["params"] if group["rule"] in self.matrix_rules and group["keep"] else ():
                if p.grad is not None:
                    w, columns = p.mT if transposed else p, kept_columns(group)
                    form = torch.empty(1, w.shape[-1], columns, dtype=working_dtype(p.dtype), device="meta")
                    self.state[p][KEY] = sharding.zeros(form, p)
                    self._laid_out.add(p)

    def _state_forms(self, shape: torch.Size, dtype: torch.dtype, group: dict) -> dict[str, Tensor]:
        forms = super()._state_forms(shape, dtype, group)
        if group["rule"] in self.matrix_rules and group["keep"]:
            n = shape[-2 if blocks.Layout.parse(group["layout"]).transposed else -1]
            forms[KEY] = torch.empty(1, n, kept_columns(group), dtype=working_dtype(dtype), device="meta")
        return forms

    def _kept_step(self, group: dict, *, routed: bool) -> None:
        """torch's step; of matrices less what it does to the outputs of kept directions."""
        if not (routed and group["keep"]):
            super()._elementwise_step(group)
            return
        transposed = blocks.Layout.parse(group["layout"]).transposed
        for name, p in named_parameters(group):
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p].update(elementwise.begin(p))
            kept = self.state[p].get(KEY)
            if kept is None or p in self._laid_out:
                kept = self.kept_inputs(name, p.mT if transposed else p, group).unsqueeze(0)
                self._laid_out.discard(p)
            self.state[p][KEY] = sharding.placed(kept, p, KEY)  # sharded with it
            kept, old = sharding.whole(kept)[0], p.to(kept.dtype, copy=True)
            super()._elementwise_step({**group, "params": [p]})
            of_rows = functools.partial(along, columns=kept, dtype=self.dtype_of_keep(group, kept))
            back = sharding.by_rows(of_rows, old.sub_(p), transposed=transposed)
            sharding.local(p).add_(back.to(p.dtype))


def _matrices(p: Tensor, layout: blocks.Layout) -> list[Tensor]:
    """What `p` holds, each `(E, m, n)`, in float32 at least; of a sharded parameter this process's part, if any."""
    part = sharding.local(p)
    if sharding.is_sharded(p):
        views = [part.reshape(-1, *part.shape[-2:])] if part.numel() else []
    else:
        views = [blocks.merge_rows(view) for view in blocks.split(part, layout)]
    return [view if view.element_size() > 2 else view.float() for view in views]
