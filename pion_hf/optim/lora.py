"""LoRA factors: `dW = s B A` with `A`, `(r, in)`, and `B`, `(out, r)`; a rule of its own for each of the two.

Every factor is seen as `(r, n)`, `B` transposed, so that rotations act from the right, on the side of the layer's
inputs or outputs: on the other, of size `r`, they would only mix what the partner can mix as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from pion_hf.errors import unknown
from pion_hf.linalg.polar import ITERATIONS, is_skinny, polar_factor, polar_map
from pion_hf.linalg.rotation import (
    Factors,
    carried,
    extent,
    factorized,
    largest_entry,
    product_of,
    retracted,
    step_size,
    tangent,
    without,
)
from pion_hf.linalg.spectrum import numerical_zero, singular_values
from pion_hf.optim.base import MatrixOptimizer, average
from pion_hf.optim.batches import KEPT, Step
from pion_hf.optim.blocks import Layout
from pion_hf.optim.checks import check_rotatable
from pion_hf.optim.directions import direction_of
from pion_hf.optim.inputs import Inputs
from pion_hf.optim.masters import HALF
from pion_hf.optim.options import FactorMethod, PionLoraOptions, TeonLoraOptions, given
from pion_hf.optim.teon import Teon, evened

# What multiplies the learning rate, so that those that are right for AdamW on adapters are right for these: `c (r /
# 16)^p`, with AdamW's best rates over theirs at rank 16 (examples/benchmarks/lora.py) and at others (rates.py).
RATES = {"pion_lora": (25.0, 0.5), "teon_lora": (15.0, 1.0)}
USUAL_RANK = 16
# What a factor does; `adamw` is the rule of other groups.
METHODS = get_args(FactorMethod)[:2]
# What TEON of whole matrices can choose and that of factors cannot.
UNUSED_BY_STACKS = ("polar_dtype", "compile", "scale", "rms", "keep_soft")


class _Factors(MatrixOptimizer):
    """What optimizers of LoRA factors have in common: how adapters `keep`.

    `dW Q = s B A Q` stays zero if `A Q` is: of `A` all that answers to kept directions is taken away at first, which
    changes nothing while `B` is zero, and steps are orthogonal to them. (`B A Q = 0` is LoRA-Null's construction, arXiv
    2503.02659. KeepLoRA, arXiv 2601.19659, is another method.)
    """

    keeps_by_itself = True

    def keep_of(self, group: dict) -> int:
        """`B`, seen transposed, takes in what `A` gives out."""
        return 0 if Layout.parse(group["layout"]).transposed else super().keep_of(group)

    def most_kept(self, m: int, n: int) -> int:
        """`A` keeps its rank."""
        return n - m

    def kept_inputs(self, name: str, matrix: Tensor, group: dict) -> Tensor:
        kept = super().kept_inputs(name, matrix, group)
        if name in group.get("effective", ()) and kept.any():
            raise ValueError(
                f"keep={group['keep']} is for adapters that begin without an effect, and the partner of {name} is not "
                "zero: set keep=0, or init_lora_weights to true or gaussian."
            )
        return kept

    def initial_state(self, position: int, matrices: Tensor, group: dict) -> dict[str, Tensor]:
        size, dtype = group["unit_step"][position], torch.promote_types(matrices.dtype, torch.float32)
        return {"unit_step": torch.full((len(matrices), 1, 1), size, dtype=dtype, device=matrices.device)}

    def _check_kept(self, keep: int) -> None:
        if keep and not any(self.keep_of(group) for group in self.param_groups if group["rule"] != "adamw"):
            raise ValueError(
                f"keep={keep} is for adapters whose factor A rotates or takes orthogonalised steps, and AdamW trains "
                "all of them here: set lora_a to rotate or orthogonal, or keep=0."
            )


def rate_at(rule: str, rank: int) -> float:
    """What multiplies the learning rate of a rule at a rank."""
    factor, power = RATES[rule]
    return factor * (rank / USUAL_RANK) ** power


class PionLora(_Factors):
    """Pion for adapters: one factor rotates and keeps its singular values, the other grows by orthogonalised steps.

    A fresh adapter has `B = 0`, which no rotation can move: by default `A` rotates and `B` grows. A group of rule
    `pion_lora` says by `method` what its factors do; `pion_hf.param_groups(model, "pion_lora")` makes the groups.

    The scale. A step of either factor acts on the product, `s B A`. With `u = 25 sqrt(r / 16) lr` a factor that rotates
    turns by that angle: `||dA||_F = u ||A||_F`, which moves `s B A` by at most as much of itself, whatever its size. A
    factor that grows steps by

        dB = -u sqrt(16 / r) sqrt(out / in) / (s a) * polar(U),    a = ||A||_F / sqrt(r)  (before training)

    so that each of the `r` singular values of `s dB A` is `u sqrt(16 / r) sqrt(out / in)` where those of `A` are equal,
    as they nearly are after every random init. `sqrt(out / in)` is the spectral condition of arXiv 2310.17813, under
    which steps do not depend on width; neither `s = alpha / r` nor the size of `A` is left. 25 and the root (`RATES`)
    make learning rates right that are right for AdamW on adapters, whose best one falls with the rank, where the best
    `u` hardly does (examples/benchmarks/rates.py). (If the partner is zero, as `B` is when `A` grows too, a step is `u`
    of the factor itself.)

    Args:
        params: groups from `pion_hf.param_groups(model, "pion_lora")`; its `lora_a` and `lora_b` choose the methods.
        lr: learning rate, on AdamW's scale; what it does to a factor is above.
        betas: decay of momentum and second moment. eps: see `Pion`.
        direction: of a rotation, the step without the constraint: `natural` (which learns most and forgets least in
            examples/benchmarks/lora.py), `polar` (one buffer less), `adam` or `gradient`; see `Pion`.
        metric: of a rotation, `lie` or `ambient`; of a factor whose singular values are equal they nearly agree.
        momentum_frame: `transported` (carried along by the rotations) or `ambient` (left where it is).
        polar, polar_steps: how a step is orthogonalised; see `Teon`. `gram` has kernels for ranks of 256 and more only.
        batch_elements: the most elements of the factors that are updated at once; see `Pion`.
        keep: number of leading directions of every adapted layer's inputs whose outputs stay (of `A`: those of adapters
            that begin at zero), as in LoRA-Null (arXiv 2503.02659). inputs: `pion_hf.Inputs(model, keep)`; see `Pion`.
        weight_decay: decoupled, of factors that grow (and AdamW's groups).

    Raises:
        ValueError: an unknown option or value; a factor asked to rotate that is zero or rank-deficient.
    """

    options = PionLoraOptions
    matrix_rules = ("pion_lora",)
    per_block_state = frozenset({"u", "s", "v", "unit_step"})
    of_weights = frozenset({"u", "s", "v"})

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        direction: Literal["gradient", "adam", "natural", "polar"] = "natural",
        metric: Literal["lie", "ambient"] = "lie",
        momentum_frame: Literal["transported", "ambient"] = "transported",
        polar: Literal["express", "quintic", "svd", "gram"] = "express",
        polar_steps: int = 5,
        batch_elements: int | None = None,
        keep: int = 0,
        inputs: Inputs | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = given(PionLoraOptions, locals())
        super().__init__(params, defaults, inputs=inputs)
        self._check_kept(keep)

    def check_options(self, group: dict) -> None:
        if group["rule"] == "adamw":
            return
        _require_unit_steps(group)
        if group["method"] not in METHODS:
            raise unknown("value of method", group["method"], METHODS)

    def keeps_spectrum(self, group: dict) -> bool:
        """With `keep` the factor's changes once, before its first step."""
        return group["rule"] == "pion_lora" and group["method"] == "rotate" and not self.keep_of(group)

    def check_matrix(self, name: str, matrix: Tensor, group: dict) -> None:
        super().check_matrix(name, matrix, group)
        if group["method"] != "rotate":
            return
        # Of stored half precision, what is missing of the rank shows as rounding.
        rounding = torch.finfo(matrix.dtype).eps / 2 if matrix.dtype in HALF else 0.0
        if matrix.shape[-1] == 1:
            raise ValueError(
                f"{name} has one direction only on its layer's side, which no rotation can turn: let it grow (lora_a "
                "or lora_b = 'orthogonal', or 'adamw'), or freeze it (requires_grad_(False))."
            )
        zero = numerical_zero(singular_values(matrix).float(), tolerance=rounding)
        if zero.any():
            what = "zero" if zero.all() else f"of rank {int((~zero).sum(-1).min())} instead of {zero.shape[-1]}"
            raise ValueError(
                f"{name} is {what}, and rotations never change that. Let it grow (lora_a or lora_b = 'orthogonal', or "
                "'adamw'), start it with full rank (init_lora_weights: pissa or olora for both factors, true or "
                "gaussian for A), or freeze it (requires_grad_(False))."
            )
        check_rotatable(name, matrix)

    def is_master(self, group: dict) -> bool:
        return group["method"] == "rotate"

    def masters(self, weights: Tensor, state: dict[str, Tensor]) -> Tensor:
        return product_of(Factors(state["u"], state["s"], state["v"]), transposed=weights.shape[-2] > weights.shape[-1])

    def described(self, weights: Tensor, kept: Tensor | None, group: dict) -> dict[str, Tensor]:
        if group["method"] != "rotate":
            return {}
        return factorized(_wide(weights if kept is None else without(weights, kept)))._asdict()

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], *, group: dict, step: Step) -> Tensor:
        if group["method"] == "rotate":
            return self._rotated(weight, grad, state, group=group, step=step)
        return grown(weight, grad, state, group=group, step=step, mu=group["betas"][0])

    def _rotated(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], *, group: dict, step: Step) -> Tensor:
        if step.first:
            state.update(self.described(weight, state.get(KEPT), group))
        factors, kept = Factors(state["u"], state["s"], state["v"]), state.get(KEPT)
        if step.first and kept is not None:  # before its partner grows, with a gradient or without
            weight = without(weight, kept)
        long = grad.shape[-2] <= grad.shape[-1]
        options = {key: group[key] for key in ("betas", "eps", "polar", "polar_steps")}
        direction = direction_of(grad, state, kind=group["direction"], step=step, **options)
        if kept is not None:  # orthogonal to them, as the factors are, a rotation has no part in them
            direction = without(direction, kept)
        unit, _ = factors.over_norm()
        ambient = group["metric"] == "ambient"
        x = tangent(unit, _wide(direction), largest_entry(direction), long=long, ambient=ambient)
        moved, bound = extent(unit, x)
        # Without a gradient, as A's while B is zero, it stays as it is to the bit.
        length = torch.linalg.vector_norm(unit.s, dim=-1)[..., None, None]
        want = group["lr"] * state["unit_step"] * length / moved
        alpha, clipped = step_size(torch.where(moved > 0, want, 0), bound)
        self.note_clipped(clipped)
        after = retracted(factors.side(long), x, alpha)
        new = factors.turned(long, after if kept is None else without(after, kept))
        if group["momentum_frame"] == "transported":
            m = _wide(state["momentum"])
            m.add_(carried(m, factors.side(long), x, alpha, long=long))
        # `B` is seen transposed, and turns on the side of its layer's outputs.
        side = "out" if Layout.parse(group["layout"]).transposed else "in"
        self.note_rotation(side, factors.side(long), x, alpha)
        state.update(new._asdict())
        return torch.where(alpha > 0, product_of(new, transposed=not long), weight, out=weight)


def _wide(x: Tensor) -> Tensor:
    return x if x.shape[-2] <= x.shape[-1] else x.mT


def _require_unit_steps(group: dict) -> None:
    if "method" not in group or len(group.get("unit_step", ())) != len(group["params"]):
        rule = group["rule"]
        raise ValueError(
            f"a group of rule {rule!r} needs to know its factors: make it with pion_hf.param_groups(model, {rule!r})."
        )


def grown(
    weight: Tensor, grad: Tensor, state: dict[str, Tensor], *, group: dict, step: Step, mu: float, nesterov: bool = True
) -> Tensor:
    """An orthogonalised step of factors `(b, r, n)`, or of stacks `(b, K, r, n)` along the rank, `(K r, n)`.

    It is `lr * unit_step` times the polar factor, whose mean square does not depend on the stack.
    """
    momentum = average(state, "momentum", grad, mu)
    direction = evened(grad.lerp(momentum, mu) if nesterov else momentum, step, mu=mu, nesterov=nesterov)
    kept = state.get(KEPT)
    if kept is not None:
        weight, direction = (without(x, kept) for x in (weight, direction))
    k = weight.shape[1] if weight.ndim == 4 else 1
    r, n = weight.shape[-2:]
    tall, start = direction.reshape(-1, k * r, n), weight.reshape(-1, k * r, n)
    size = -group["lr"] * math.sqrt(k * min(r, n) / min(k * r, n)) * _by_row(state["unit_step"], r)
    decay = 1 - group["lr"] * group["weight_decay"]
    if group["polar"] in ITERATIONS and is_skinny(tall) and k * r <= n:
        factor = polar_map(tall, method=group["polar"], steps=group["polar_steps"])
        stepped = torch.baddbmm(start, size * factor, tall, beta=decay).view(weight.shape)
    else:
        factor = polar_factor(tall, method=group["polar"], steps=group["polar_steps"])
        stepped = (start * decay).addcmul_(size, factor).view(weight.shape)
    # The polar factor of a stack mixes the rows of layers that keep other directions each.
    return stepped if kept is None else without(stepped, kept)


def _by_row(sizes: Tensor, r: int) -> Tensor:
    """`(b, K r, 1)` of `(b, K, 1, 1)`, or `(b, 1, 1)` as it is."""
    return sizes if sizes.ndim == 3 else sizes.expand(-1, -1, r, 1).flatten(1, 2)


class TeonLora(_Factors, Teon):
    """TEON for adapters: the factors of consecutive layers are orthogonalised together, both grow.

    Two adapters share their layers' spaces of inputs and outputs, as far as these are one residual stream, but not the
    space of size `r` between their factors, where the first direction of one has nothing to do with the first of
    another. So factors are stacked along the rank: `[A_1; ...; A_K]`, `(K r, in)`, and `[B_1 | ... | B_K]`,
    `(out, K r)`, which for `B` is the unfolding of TEON and for `A` its transpose. The size of a step is that of a
    factor that grows in `PionLora`, with `u = 15 (r / 16) lr`. With `stack=1` it is Muon on both factors.

    Args:
        params: groups from `pion_hf.param_groups(model, "teon_lora")`, which finds the stacks.
        lr: size of a step; see `PionLora`. momentum, nesterov, stack, polar, polar_steps, batch_elements: see
            `Teon`. keep, inputs: see `PionLora`.
        weight_decay: decoupled, of the factors and AdamW's groups. adamw_betas, adamw_eps: of AdamW's groups.

    Raises:
        ValueError: an unknown option or value.
    """

    options = TeonLoraOptions
    matrix_rules = ("teon_lora",)
    stacked_rule = "teon_lora"
    per_block_state = frozenset({"unit_step"})

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        stack: int = 2,
        polar: Literal["express", "quintic", "svd", "gram"] = "express",
        polar_steps: int = 5,
        batch_elements: int | None = None,
        keep: int = 0,
        inputs: Inputs | None = None,
        weight_decay: float = 0.0,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        options = given(TeonLoraOptions, locals())
        super().__init__(params, polar_dtype="float32", inputs=inputs, **options)
        self._check_kept(keep)

    def check_options(self, group: dict) -> None:
        if group["rule"] == "teon_lora":
            _require_unit_steps(group)
            for option in UNUSED_BY_STACKS:
                if group[option] != self.defaults[option]:
                    raise ValueError(f"{option}={group[option]!r} is no option of rule 'teon_lora': leave it out.")
        super().check_options(group)

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], *, group: dict, step: Step) -> Tensor:
        return grown(weight, grad, state, group=group, step=step, mu=group["momentum"], nesterov=group["nesterov"])
