"""Pion (arXiv 2605.12492): every matrix moves by rotations from the left and the right, `W <- R W P`."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pion_hf.linalg.polar import polar_factor
from pion_hf.linalg.products import product_dtype
from pion_hf.linalg.rotation import (
    Factors,
    Fixed,
    anchored,
    carried,
    extent,
    factorized,
    largest_entry,
    product_of,
    retracted,
    skew,
    spectral_norm,
    step_size,
    tangent,
    taylor_change,
)
from pion_hf.optim import compiled
from pion_hf.optim.base import MatrixOptimizer, average
from pion_hf.optim.batches import KEPT, Step
from pion_hf.optim.checks import check_rotatable
from pion_hf.optim.directions import direction_of, seen_from
from pion_hf.optim.inputs import Inputs
from pion_hf.optim.masters import rounded_on_average
from pion_hf.optim.options import PionOptions, given, preset_options

# Entries of state that average what gradients were.
AVERAGES = ("momentum", "second", "lie_in", "lie_out", "lie_in_sq", "lie_out_sq")


class Pion(MatrixOptimizer):
    """Isospectral optimizer: a step rotates every matrix, so that its singular values never change.

    A step is `W <- W E(alpha A_in)` and/or `W <- E(alpha A_out) W` with skew generators `A` and an orthogonal
    retraction `E`. The state holds the factors of `W = U diag(s) V^T` in float32; a step moves one of them, and the
    weight is their product (see `linalg.rotation`).

    Matrices of a group with rule `pion` are rotated; groups with rule `adamw` (and tensors that are
    not 2-D) get torch's AdamW with the group's own `lr`, `betas`, `eps`, `weight_decay`. A rotated matrix has no
    weight decay: it would change the spectrum.

    Args:
        params: tensors, `(name, tensor)` pairs or groups; for a model, `pion_hf.param_groups(model)`.
        lr: step size. With `scale="rms"` a matrix's update has the RMS `lr * rms`; with `none` the direction's own.
            The published rule's usual rates are 1e-4 to 3e-4 in fine-tuning.
        betas: decay of the momentum and of the second moment (and AdamW's).
        eps: added to the root of the second moment; under `natural` its square, to the second moment itself.
        rms: the update's RMS at `lr = 1` (`scale="rms"`); 0.2 is that of a typical AdamW update.
        side: `in` (rotates input space), `out`, `alternate` (odd steps in, even ones out), `both`.
        momentum_frame: where the momentum lives. `ambient` (of the gradient, left where it is), `transported` (of the
            gradient, carried along by the rotations), `lie` (of both generators, as in the paper; three times the
            weight's memory). Under the published rule all three learn and forget alike in our runs; under the preset
            `ambient` what is carried along forgets less.
        second_moment: divide by the root of a second moment (`direction="gradient"` only; the paper's variant).
        direction: the step without the constraint: `gradient`, `adam` (AdamW's step), `natural` (the gradient divided
            by its second moment, not by the root: a diagonal natural gradient), `polar` (Muon's step), or `msign` (as
            `gradient`, but each generator is replaced by its polar factor).
        metric: which rotation stands for the direction: `lie` (steepest descent in the generators, the paper's) or
            `ambient` (the rotation whose first-order effect is nearest to the direction).
        scale: `rms`, `none` (`alpha = lr`, for `adam`, which carries a scale of its own), or `spectral` (the largest
            rotation angle is `lr`).
        polar: `express`, `quintic`, `svd` or `gram` (see `Teon`), for `polar` and `msign`; polar_steps: its iterations.
        retraction: `polar`, the polar factor of singular vectors that were moved along, is orthogonal to rounding, and
            a step that would turn by more than 0.25 rad is clipped to that (`clipped_steps` counts); `taylor` of
            `degree`, the paper's, has no bound and grows singular values by `theta^4 / 8` a step at degree 2.
        generator_dtype: of the products that form a generator and carry the momentum, which the spectrum does not
            notice. `auto` is bfloat16 where the hardware multiplies it faster.
        state_dtype: of the averages of gradients; `bfloat16` halves their memory, rounded so that nothing is lost on
            average.
        compile: a step's elementwise passes fused by `torch.compile`, which takes some seconds for every kind of shape.
        batch_elements: the most elements of equal matrices that are updated at once, which bounds the extra memory of
            a step; a larger matrix is updated alone, experts of one parameter some at a time. None: what is fastest on
            the device.
        keep: number of leading directions of every layer's inputs (eigenvectors of their second moment `sum x x^T`)
            whose outputs stay as they are: the rotations fix them. It lets a model learn more before it forgets. The
            projection is Adam-NSCL's (arXiv 2103.07113).
        inputs: `pion_hf.Inputs(model, keep)`, made before the first forward pass, in which it sees them; a Trainer
            makes it.
        weight_decay: decoupled, of the AdamW groups.
        preset: `paper` sets momentum_frame, direction, metric, scale, side, retraction and degree to the letter of the
            paper; `ambient` is our own rule, registered as `pion_ambient`: direction `natural`, metric `ambient`, a
            momentum that is transported, and an `rms` of 2, under which learning rates that are right for AdamW are
            right for it.

    Raises:
        ValueError: an unknown option or value, options that do not combine, a zero or non-finite matrix.
    """

    options = PionOptions
    matrix_rules = ("pion",)
    per_block_state = frozenset({"u", "s", "v", "outputs", "coupling", "lie_in", "lie_out", "lie_in_sq", "lie_out_sq"})
    of_weights = frozenset({"u", "s", "v", "outputs", "coupling"})
    keeps_by_itself = True

    def __init__(
        self,
        params: Iterable,
        lr: float = 2e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        rms: float = 0.2,
        side: Literal["alternate", "in", "out", "both"] = "alternate",
        momentum_frame: Literal["ambient", "transported", "lie"] = "ambient",
        second_moment: bool = False,
        direction: Literal["gradient", "adam", "natural", "polar", "msign"] = "gradient",
        metric: Literal["lie", "ambient"] = "lie",
        scale: Literal["rms", "none", "spectral"] = "rms",
        polar: Literal["express", "quintic", "svd", "gram"] = "express",
        polar_steps: int = 5,
        retraction: Literal["polar", "taylor"] = "polar",
        degree: int = 2,
        generator_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        state_dtype: Literal["float32", "bfloat16"] = "float32",
        compile: bool = False,
        batch_elements: int | None = None,
        keep: int = 0,
        inputs: Inputs | None = None,
        weight_decay: float = 0.0,
        preset: Literal["paper", "ambient"] | None = None,
    ) -> None:
        defaults = given(PionOptions, locals(), without=("preset",))
        if preset is not None:
            defaults.update(preset_options(preset, defaults))
        super().__init__(params, defaults, inputs=inputs)

    def check_options(self, group: dict) -> None:
        lie, ambient = group["momentum_frame"] == "lie", group["metric"] == "ambient"
        gradient, msign = group["direction"] == "gradient", group["direction"] == "msign"
        clashes = (
            (
                lie and not (gradient or msign),
                "momentum_frame='lie' averages generators: set direction='gradient' or 'msign'",
            ),
            (lie and ambient, "momentum_frame='lie' averages generators of the lie metric: set metric='lie'"),
            (
                ambient and group["side"] == "both",
                "side='both' is not for metric='ambient', where each side alone comes as near to the direction as it "
                "can and their sum overshoots: set side='alternate'",
            ),
            (
                group["second_moment"] and not gradient,
                "second_moment=True is a variant of direction='gradient'; 'adam' and 'natural' have one of their own",
            ),
            (msign and ambient, "direction='msign' replaces generators of the lie metric: set metric='lie'"),
            (
                group["keep"] > 0 and (lie or msign),
                "keep chooses generators that fix what is kept, which averages and polar factors of generators do not: "
                "set keep=0",
            ),
            (
                group["retraction"] == "taylor" and (ambient or group["keep"] > 0),
                "retraction='taylor' is for metric='lie' without keep: set retraction='polar'",
            ),
        )
        for clash, message in clashes:
            if clash:
                raise ValueError(f"These options do not combine: {message}.")

    def turn_of(self, group: dict, number: int) -> tuple[str, ...]:
        """The sides that move."""
        return _sides(group["side"], number)

    def keeps_spectrum(self, group: dict) -> bool:
        return group["rule"] == "pion"

    def is_master(self, group: dict) -> bool:
        return group["retraction"] == "polar"

    def masters(self, weights: Tensor, state: dict[str, Tensor]) -> Tensor:
        tall = _is_tall(weights)
        return product_of(_factors(state), _fixed(state, tall), transposed=tall)

    def described(self, weights: Tensor, kept: Tensor | None, group: dict) -> dict[str, Tensor]:
        if group["retraction"] == "taylor":
            return {}
        tall = _is_tall(weights)
        wide = weights.mT if tall else weights
        if kept is None:
            return factorized(wide)._asdict()
        # Directions that the inputs did not show are zero, and come last.
        outputs = torch.linalg.qr(weights @ kept).Q * kept.any(-2, keepdim=True)
        stays = outputs if tall else kept
        factors = factorized(wide, stays)
        return {**factors._asdict(), "outputs": outputs, "coupling": factors.u @ (wide @ stays)}

    def most_kept(self, m: int, n: int) -> int:
        """A rotation needs a plane, on either side."""
        return min(m, n) - 2

    def check_matrix(self, name: str, matrix: Tensor, group: dict) -> None:
        super().check_matrix(name, matrix, group)
        if not matrix.flatten(1).any(dim=1).all():
            raise ValueError(
                f"{name} is (or holds) a zero matrix, which no rotation can move. Initialise it, train it with AdamW "
                "(exclude it from the rotated matrices), or freeze it."
            )
        check_rotatable(name, matrix)
        if not _can_move(*matrix.shape[-2:], group["side"]):
            form = " x ".join(map(str, matrix.shape[-2:]))
            raise ValueError(
                f"{name} is {form}, which no rotation with side={group['side']!r} can move. "
                "Train it with AdamW (exclude it from the rotated matrices), freeze it, or set another side."
            )

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], *, group: dict, step: Step) -> Tensor:
        rotate = self._published if group["retraction"] == "taylor" else self._rotated
        if group["state_dtype"] == "float32":
            return rotate(weight, grad, state, group=group, step=step)
        state.update({key: state[key].to(grad.dtype) for key in AVERAGES if key in state})
        new = rotate(weight, grad, state, group=group, step=step)
        state.update({key: rounded_on_average(state[key], step.numbers) for key in AVERAGES if key in state})
        return new

    def _rotated(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], *, group: dict, step: Step) -> Tensor:
        if step.first:
            state.update(self.described(weight, state.get(KEPT), group))
        tall = _is_tall(grad)
        if group["momentum_frame"] == "lie" or group["direction"] == "msign":
            source = self._generators(weight, grad, state, group=group, step=step)
        else:
            source = _direction(grad, state, group=group, step=step)
        turned = compiled.run(
            _turned,
            weight,
            source,
            _factors(state),
            _fixed(state, tall),
            state["momentum"] if group["momentum_frame"] == "transported" else None,
            group["lr"],
            compiled=group["compile"],
            sides=step.turn,
            ambient=group["metric"] == "ambient",
            scale=group["scale"],
            rms=group["rms"],
            dtype=group["generator_dtype"],
        )
        self.note_clipped(turned.clipped)
        for side, x in turned.tangents.items():
            self.note_rotation(side, _factors(state).side(_is_long(side, tall)), x, turned.alpha)
        state.update(turned.factors._asdict())
        return weight

    def _generators(
        self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], *, group: dict, step: Step
    ) -> dict[str, Tensor]:
        """By side in full, `(n, n)` or `(m, m)`, in the frame in which it acts from the right: for who needs that."""
        if group["momentum_frame"] == "lie":
            averages = _lie_averages(weight, grad, state, group=group)
            generators = {side: -averages[side] for side in step.turn}
        else:
            direction = _direction(grad, state, group=group, step=step)
            generators = {side: -skew(seen_from(weight, side).mT @ seen_from(direction, side)) for side in step.turn}
        if group["direction"] == "msign":
            options = {"method": group["polar"], "steps": group["polar_steps"], "dtype": group["generator_dtype"]}
            generators = {side: skew(polar_factor(a, **options)) / 2 for side, a in generators.items()}
        return generators

    def _published(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], *, group: dict, step: Step) -> Tensor:
        """The paper's step: generators in full, its Taylor retraction, no factors."""
        generators = self._generators(weight, grad, state, group=group, step=step)
        identity = {side: torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) for side, a in generators.items()}
        if group["scale"] == "spectral":
            alpha = _angled([spectral_norm(identity[side], a) for side, a in generators.items()], group["lr"])
        else:
            moved = sum(seen_from(seen_from(weight, side) @ a, side) for side, a in generators.items())
            norm = torch.linalg.matrix_norm(moved, keepdim=True)
            alpha = _wanted(norm, 1.0, moved[0].numel(), group["lr"], scale=group["scale"], rms=group["rms"])
        for side, a in generators.items():
            x, w = a * alpha, seen_from(weight, side)
            w.add_(taylor_change(w, x, group["degree"]))
            if group["momentum_frame"] == "transported":
                m = seen_from(state["momentum"], side)
                m.add_(taylor_change(m, x, group["degree"]))
            self.note_rotation(side, identity[side], a, alpha)
        return weight


def _sides(side: str, number: int) -> tuple[str, ...]:
    if side == "alternate":
        return ("in",) if number % 2 else ("out",)
    return ("in", "out") if side == "both" else (side,)


def _can_move(m: int, n: int, side: str) -> bool:
    """Whether a rotation of some side turns at least two directions."""
    return any({"in": n, "out": m}[each] > 1 for number in (1, 2) for each in _sides(side, number))


def _direction(grad: Tensor, state: dict[str, Tensor], *, group: dict, step: Step) -> Tensor:
    options = {key: group[key] for key in ("betas", "eps", "polar", "polar_steps", "second_moment", "compile")}
    kind, polar_dtype = group["direction"], group["generator_dtype"]
    return direction_of(grad, state, kind=kind, step=step, polar_dtype=polar_dtype, **options)


def _is_tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def _is_long(side: str, tall: bool) -> bool:
    """Whether the rotation of a side acts on the longer dimension, the inputs' unless the matrix is tall."""
    return side == ("out" if tall else "in")


def _factors(state: dict[str, Tensor]) -> Factors:
    return Factors(state["u"], state["s"], state["v"])


def _fixed(state: dict[str, Tensor], tall: bool) -> Fixed | None:
    if KEPT not in state:
        return None
    kept, outputs = state[KEPT], state["outputs"]
    return Fixed(outputs, kept, state["coupling"]) if tall else Fixed(kept, outputs, state["coupling"])


def _lie_averages(weight: Tensor, grad: Tensor, state: dict[str, Tensor], *, group: dict) -> dict[str, Tensor]:
    """Averages of what the generators descend, of both sides at every step, whichever moves."""
    beta1, beta2 = group["betas"]
    averages = {}
    for side in ("in", "out"):
        s = skew(seen_from(weight, side).mT @ seen_from(grad, side))
        mean = average(state, f"lie_{side}", s, beta1)
        if group["second_moment"]:
            mean = mean / (average(state, f"lie_{side}_sq", s.square(), beta2).sqrt() + group["eps"])
        averages[side] = mean
    return averages


class Turned(NamedTuple):
    """What a step has made: the new factors, its size `alpha` and whether that was clipped, `(b, 1, 1)`, and the
    tangent of every side."""

    factors: Factors
    alpha: Tensor
    clipped: Tensor
    tangents: dict[str, Tensor]


def _turned(
    weight: Tensor,
    source: Tensor | dict[str, Tensor],
    factors: Factors,
    fixed: Fixed | None,
    momentum: Tensor | None,
    lr: float,
    *,
    sides: tuple[str, ...],
    ambient: bool,
    scale: str,
    rms: float,
    dtype: str,
) -> Turned:
    """A step of `weight`, and of a `momentum` that is carried along, in place.

    source: the direction, or of every side its generator in full.
    """
    tall = _is_tall(weight)
    unit, size = factors.over_norm()
    if isinstance(source, dict):
        peak = torch.stack([largest_entry(a) for a in source.values()]).amax(0)
        low = product_dtype(weight, dtype)
        tangents = {side: (factors.side(_is_long(side, tall)) @ (a / peak)).to(low) for side, a in source.items()}
    else:
        d, options = source.mT if tall else source, {"ambient": ambient, "dtype": dtype, "fixed": fixed}
        peak = largest_entry(d)
        tangents = {side: tangent(unit, d, peak, long=_is_long(side, tall), **options) for side in sides}
        # A generator grows with the direction, and in one metric with the weight, in the other with its inverse.
        peak = peak / size if ambient else peak * size
    extents = [extent(unit, x) for x in tangents.values()]
    bound = functools.reduce(torch.maximum, [each.bound for each in extents])
    if scale == "spectral":
        norms = [spectral_norm(unit.side(_is_long(side, tall)), x.to(unit.u.dtype)) for side, x in tangents.items()]
        wanted = _angled(norms, lr)
    else:
        moved = extents[0].moved if len(extents) == 1 else _moved(unit, tangents, tall)
        wanted = _wanted(moved * size, peak, weight[0].numel(), lr, scale=scale, rms=rms)
    alpha, clipped = step_size(wanted, bound)
    new = factors
    for side, x in tangents.items():
        long = _is_long(side, tall)
        before = factors.side(long)
        after = retracted(before, x, alpha)
        new = new.turned(long, after if fixed is None else anchored(after, before, fixed, long=long))
        if momentum is not None:
            m = momentum.mT if tall else momentum
            m.add_(carried(m, before, x, alpha, long=long))
    torch.where(alpha > 0, product_of(new, fixed, transposed=tall), weight, out=weight)
    return Turned(new, alpha, clipped, tangents)


def _moved(unit: Factors, tangents: dict[str, Tensor], tall: bool) -> Tensor:
    """`||dW||_F` of two sides together, as `U^T dW`."""
    s, tangents = unit.s.unsqueeze(-1), {side: x.to(unit.s.dtype) for side, x in tangents.items()}
    both = sum(s * x if _is_long(side, tall) else (s * (x @ unit.u.mT)).mT @ unit.v for side, x in tangents.items())
    return torch.linalg.matrix_norm(both, keepdim=True)


def _angled(norms: list[Tensor], lr: float) -> Tensor:
    """The step whose largest angle is `lr`, of generators of these spectral norms."""
    norm = torch.stack(norms).amax(0)
    return torch.where(norm > 0, lr / norm, 0)


def _wanted(moved: Tensor, peak: Tensor | float, numel: int, lr: float, *, scale: str, rms: float) -> Tensor:
    """The step that is wanted of a generator that is `peak` times too small, and moves the weight by `moved`."""
    want = lr * peak if scale == "none" else lr * rms * math.sqrt(numel) / (moved + 1e-12)
    return torch.where(moved > 0, want, 0)
