"""Pion (arXiv 2605.12492): every matrix moves by rotations from the left and the right, `W <- R W P`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from pion_hf.errors import unknown
from pion_hf.linalg.ambient import ambient_tangent, has_long_side, is_well_conditioned
from pion_hf.linalg.polar import polar_factor
from pion_hf.linalg.precision import product_dtype
from pion_hf.linalg.rotation import Generator, rms_scale, skew, without
from pion_hf.linalg.spectrum import Basis, singular_basis
from pion_hf.optim.base import MatrixOptimizer, average
from pion_hf.optim.batches import KEPT
from pion_hf.optim.checks import check_polar, check_range, check_rotatable
from pion_hf.optim.directions import BASIS_REFRESH, basis_side, direction_of, generator_of, seen_from
from pion_hf.optim.inputs import Inputs

# The set of choices of arXiv 2605.12492.
PRESETS = {
    "paper": {
        "momentum": "lie",
        "direction": "gradient",
        "metric": "lie",
        "hold": 0.0,
        "scale": "rms",
        "side": "alternate",
        "retraction": "taylor",
        "degree": 2,
    }
}


class Pion(MatrixOptimizer):
    """Isospectral optimizer: a step rotates every matrix, so that its singular values never change.

    A step is `W <- W E(alpha A_in)` and/or `W <- E(alpha A_out) W` with skew generators `A` and an orthogonal
    retraction `E`. Matrices of a group with rule `pion` are rotated; groups with rule `adamw` (and tensors that are
    not 2-D) get torch's AdamW with the group's own `lr`, `betas`, `eps`, `weight_decay`. A rotated matrix has no
    weight decay: it would change the spectrum.

    Args:
        params: tensors, `(name, tensor)` pairs or groups; for a model, `pion_hf.param_groups(model)`.
        lr: step size. With `scale="rms"` a matrix's update has the RMS `lr * rms`; with `none` the direction's own.
        betas: decay of the momentum and of the second moment (and AdamW's).
        eps: added to the root of the second moment; under `natural` its square, to the second moment itself.
        rms: the update's RMS at `lr = 1` (`scale="rms"`); 0.2 is that of a typical AdamW update.
        side: `in` (rotates input space), `out`, `alternate` (odd steps in, even ones out), `both`.
        momentum: `transported` (of the gradient, carried along by the rotations), `lie` (of both generators, as in the
            paper; three times the weight's memory), `ambient` (of the gradient, left where it is).
        second_moment: divide by the root of a second moment (`direction="gradient"` only; the paper's variant).
        direction: the step without the constraint: `gradient`, `adam` (AdamW's step), `natural` (the gradient divided
            by its second moment, not by the root: a diagonal natural gradient), `polar` (Muon's step), or `msign` (as
            `gradient`, but each generator is replaced by its polar factor).
        metric: which rotation stands for the direction: `lie` (steepest descent in the generators, the paper's) or
            `ambient` (the rotation whose first-order effect is nearest to the direction).
        scale: `rms`, `none` (`alpha = lr`, for `adam`, which carries a scale of its own), or `spectral` (the largest
            rotation angle is `lr`).
        hold: fraction of leading singular directions left alone (`metric="ambient"` only).
        rank_tolerance: singular values below this fraction of the largest count as zero in the ambient metric: pairs of
            them would turn by large angles to move almost nothing.
        polar: `express`, `quintic`, `svd` or `gram` (see `Teon`), for `polar` and `msign`; polar_steps: its iterations.
        retraction: `root` and `cayley` are orthogonal to rounding; `taylor` of `degree` grows singular values by
            `theta^4 / 8` a step at degree 2. In the ambient metric a side one and a half times as long as the other or
            longer has, for `root`, the polar retraction, as exact: nothing of that size is formed (`linalg.ambient`).
        generator_dtype: of the products that form a generator and carry the momentum; they are skewed exactly
            afterwards, so the spectrum does not notice. `auto` is bfloat16 where the hardware multiplies it faster.
        compile: the elementwise part of `adam` and `natural` through `torch.compile`.
        batch_elements: the most elements of equal matrices that are updated at once, which bounds the extra memory of
            a step; a larger matrix is updated alone, experts of one parameter some at a time. None: what is fastest on
            the device.
        keep: number of leading directions of every layer's inputs (eigenvectors of their second moment `sum x x^T`)
            whose outputs stay as they are: the rotations fix them. It lets a model learn more before it forgets.
        inputs: `pion_hf.Inputs(model, keep)`, made before the first forward pass, in which it sees them; a Trainer
            makes it.
        weight_decay: decoupled, of the AdamW groups.
        preset: `"paper"` sets momentum, direction, metric, hold, scale, side, retraction and degree as published.
        share_work: under DDP, each process updates a share of the matrices and tells the others.

    Raises:
        ValueError: an unknown option or value, options that do not combine, a zero or non-finite matrix.
    """

    matrix_rules = ("pion",)
    per_block_state = frozenset({"basis", "values", "lie_in", "lie_out", "lie_in_sq", "lie_out_sq"})
    of_weights = frozenset({"basis", "values"})
    keeps_by_itself = True

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        rms: float = 0.2,
        side: Literal["alternate", "in", "out", "both"] = "alternate",
        momentum: Literal["transported", "lie", "ambient"] = "transported",
        second_moment: bool = False,
        direction: Literal["gradient", "adam", "natural", "polar", "msign"] = "natural",
        metric: Literal["lie", "ambient"] = "ambient",
        scale: Literal["rms", "none", "spectral"] = "rms",
        hold: float = 0.0,
        rank_tolerance: float = 0.02,
        polar: Literal["express", "quintic", "svd", "gram"] = "express",
        polar_steps: int = 5,
        retraction: Literal["root", "cayley", "taylor"] = "root",
        degree: int = 2,
        generator_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        compile: bool = False,
        batch_elements: int | None = None,
        keep: int = 0,
        inputs: Inputs | None = None,
        weight_decay: float = 0.0,
        preset: Literal["paper"] | None = None,
        share_work: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "rms": rms,
            "side": side,
            "momentum": momentum,
            "second_moment": second_moment,
            "direction": direction,
            "metric": metric,
            "scale": scale,
            "hold": hold,
            "rank_tolerance": rank_tolerance,
            "polar": polar,
            "polar_steps": polar_steps,
            "retraction": retraction,
            "degree": degree,
            "generator_dtype": generator_dtype,
            "compile": compile,
            "batch_elements": batch_elements,
            "keep": keep,
            "weight_decay": weight_decay,
        }
        if preset is not None:
            defaults.update(_preset_options(preset, defaults))
        super().__init__(params, defaults, share_work=share_work, inputs=inputs)

    def check_options(self, group: dict) -> None:
        check_polar(group)
        check_range("rms", group["rms"], lambda v: v > 0, "above 0")
        for option in ("hold", "rank_tolerance"):
            check_range(option, group[option], lambda v: 0 <= v < 1, "in [0, 1)")
        check_range("degree", group["degree"], lambda v: 1 <= v <= 20, "in 1..20", whole=True)
        lie, ambient = group["momentum"] == "lie", group["metric"] == "ambient"
        gradient, msign = group["direction"] == "gradient", group["direction"] == "msign"
        clashes = (
            (
                lie and not (gradient or msign),
                "momentum='lie' averages generators: set direction='gradient' or 'msign'",
            ),
            (lie and ambient, "momentum='lie' averages generators of the lie metric: set metric='lie'"),
            (
                ambient and group["side"] == "both",
                "side='both' is not for metric='ambient', where each side alone comes as near to the direction as it "
                "can and their sum overshoots: set side='alternate'",
            ),
            (
                group["hold"] > 0 and not ambient,
                "hold needs metric='ambient', which knows singular directions: set hold=0",
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
        )
        for clash, message in clashes:
            if clash:
                raise ValueError(f"These options do not combine: {message}.")

    def keeps_spectrum(self, group: dict) -> bool:
        return group["rule"] == "pion"

    def described(self, weights: Tensor, kept: Tensor | None, group: dict) -> dict[str, Tensor]:
        if group["metric"] != "ambient":
            return {}
        basis = singular_basis(_free_part(weights, _fixed_directions(weights, kept)))
        return {"basis": basis.rows, "values": basis.values}

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
        if not _can_move(*matrix.shape[-2:], group):
            form = " x ".join(map(str, matrix.shape[-2:]))
            raise ValueError(
                f"{name} is {form}, which no rotation with side={group['side']!r} and hold={group['hold']} can move. "
                "Train it with AdamW (exclude it from the rotated matrices), freeze it, or change these options."
            )

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], *, group: dict, step: int) -> Tensor:
        sides, fixed = _sides(group["side"], step), _fixed_directions(weight, state.get(KEPT))
        if group["momentum"] == "lie":
            generators = _lie_momentum_generators(weight, grad, state, group=group, sides=sides)
        else:
            direction = _direction(grad, state, group=group, step=step)
            free = _free_part(weight, fixed)
            if group["metric"] == "ambient":
                if (step - 1) % BASIS_REFRESH == 0:
                    state.update(self.described(weight, state.get(KEPT), group))
                stepped = self._move_long_side(weight, free, fixed, direction, state, side=sides[0], group=group)
                if stepped is not None:
                    return stepped
            generators = _generators(free, direction, state, group=group, sides=sides, fixed=fixed)
        if group["direction"] == "msign":
            options = {"method": group["polar"], "steps": group["polar_steps"], "dtype": group["generator_dtype"]}
            polars = {side: polar_factor(a.core, **options) for side, a in generators.items()}
            generators = {side: Generator(skew(polar) / 2) for side, polar in polars.items()}
        # What a lone dense generator moves at first order gives the size of the step, and is the rotation's first term.
        moved = {side: a.moved(weight, side=side) for side, a in generators.items() if len(generators) == 1}
        alpha = _step_size(weight, generators, moved, group=group)
        for side, a in generators.items():
            self.note_rotation(side, a, alpha)
            rows = seen_from(weight, side).shape[-2]
            reader = self.reader(side, group)
            increment = a.increment(
                alpha, retraction=group["retraction"], degree=group["degree"], rows=rows, reader=reader
            )
            weight.add_(increment.change(weight, side=side, first=moved.get(side)))
            if group["momentum"] == "transported":
                state["momentum"].add_(increment.change(state["momentum"], side=side, low=True))
            if "basis" in state and side == basis_side(weight):
                state["basis"].add_(increment.change(state["basis"], name="basis"))
            if side in fixed and side == "in":
                # A rounded generator turns a little of what is kept, and the basis belongs to the weight less that.
                state[KEPT].add_(increment.change(state[KEPT].mT, name="kept").mT)
        return weight

    def _move_long_side(
        self,
        weight: Tensor,
        free: Tensor,
        fixed: dict[str, Tensor],
        direction: Tensor,
        state: dict[str, Tensor],
        *,
        side: str,
        group: dict,
    ) -> Tensor | None:
        """The step through a `Tangent`; None where `side` is not long, or the options ask for a generator."""
        basis = Basis(state["basis"], state["values"])
        if weight.is_meta or group["retraction"] != "root" or group["scale"] == "spectral":
            return None
        reader = self.reader(side, group)
        zeros = group["keep"] if fixed and side == "out" else 0
        if not has_long_side(weight.shape, side) or not is_well_conditioned(basis, zeros=zeros, reader=reader):
            return None
        direction = _without_fixed(direction, fixed, side)
        tangent = ambient_tangent(
            free,
            direction,
            basis,
            tall=side == "out",
            hold=group["hold"],
            tolerance=group["rank_tolerance"],
            dtype=product_dtype(weight, group["generator_dtype"]),
        )
        change = tangent.change(reader=reader)
        alpha = _alpha(change, group)
        step = tangent.retract(free, change, alpha, reader=reader)
        if step is None:
            return None
        if self._rotations is not None:
            self.note_rotation(side, tangent.generator(), alpha)
        if group["momentum"] == "transported":
            state["momentum"].add_(tangent.carry(state["momentum"], alpha))
        # Rounding turns what is fixed too, on either side, and its cross terms would change singular values.
        return weight.add_(_without_fixed(_without_fixed(step, fixed, side), fixed, "in"))


def _preset_options(preset: str, given: dict) -> dict:
    """The options of `preset`; a ValueError where another value than the default was given for one of them."""
    signature = inspect.signature(Pion.__init__).parameters
    check_preset(preset, {name: value for name, value in given.items() if value != signature[name].default})
    return PRESETS[preset]


def check_preset(preset: str, given: dict) -> None:
    """Raises ValueError for a preset that does not exist, or that sets one of the options `given` to another value."""
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    for option, value in PRESETS[preset].items():
        if given.get(option, value) != value:
            raise ValueError(
                f"preset={preset!r} sets {option}={value!r}, but {option}={given[option]!r} was given: "
                "leave out one of the two."
            )


def _sides(side: str, step: int) -> tuple[str, ...]:
    if side == "alternate":
        return ("in",) if step % 2 else ("out",)
    return ("in", "out") if side == "both" else (side,)


def _can_move(m: int, n: int, group: dict) -> bool:
    """Whether a rotation of some side turns at least two directions of which not both are held."""
    k = min(m, n)
    free = k - int(group["hold"] * k)
    sizes = {"in": n, "out": m}
    sides = {side for step in (1, 2) for side in _sides(group["side"], step)}
    return any(size > 1 and free > (0 if size > k else 1) for side, size in sizes.items() if side in sides)


def _direction(grad: Tensor, state: dict[str, Tensor], *, group: dict, step: int) -> Tensor:
    return direction_of(
        grad,
        state,
        kind=group["direction"],
        betas=group["betas"],
        eps=group["eps"],
        step=step,
        polar=group["polar"],
        polar_steps=group["polar_steps"],
        polar_dtype=group["generator_dtype"],
        second_moment=group["second_moment"],
        compile=group["compile"],
    )


def _fixed_directions(weight: Tensor, kept: Tensor | None) -> dict[str, Tensor]:
    """By side, what rotations leave as it is for outputs of kept inputs to stay; nothing where nothing is kept.

    Of inputs these themselves, of outputs what the weight makes of them: orthonormal columns `(b, n, j)`, `(b, m, j)`.
    """
    if kept is None:
        return {}
    # Directions that the inputs did not show are zero, and come last.
    shown = kept.any(-2, keepdim=True)
    return {"in": kept, "out": torch.linalg.qr(weight @ kept).Q * shown}


def _free_part(weight: Tensor, fixed: dict[str, Tensor]) -> Tensor:
    """The weight less the side's part that stays, of which the rotations keep the singular values too.

    It has the basis that is carried: on the smaller side, as the whole weight's (see `_basis_side`).
    """
    return _without_fixed(weight, fixed, "out" if basis_side(weight) == "in" else "in")


def _without_fixed(x: Tensor, fixed: dict[str, Tensor], side: str) -> Tensor:
    return seen_from(without(seen_from(x, side), fixed[side]), side) if fixed else x


def _generators(
    weight: Tensor,
    direction: Tensor,
    state: dict[str, Tensor],
    *,
    group: dict,
    sides: tuple[str, ...],
    fixed: dict[str, Tensor],
) -> dict[str, Generator]:
    """By side, of the rotations that stand for `direction`."""
    basis = Basis(state["basis"], state["values"]) if group["metric"] == "ambient" else None
    return {
        side: generator_of(
            weight,
            direction,
            side=side,
            basis=basis,
            hold=group["hold"],
            tolerance=group["rank_tolerance"],
            dense=True if group["direction"] == "msign" else None,
            dtype=group["generator_dtype"],
            fixed=fixed.get(side),
        )
        for side in sides
    }


def _lie_momentum_generators(
    weight: Tensor, grad: Tensor, state: dict[str, Tensor], *, group: dict, sides: tuple[str, ...]
) -> dict[str, Generator]:
    """Averages of the generators themselves; both are updated at every step, whichever side moves."""
    beta1, beta2 = group["betas"]
    generators = {}
    for side in ("in", "out"):
        w, g = seen_from(weight, side), seen_from(grad, side)
        s = skew(w.mT @ g)
        mean = average(state, f"lie_{side}", s, beta1)
        if group["second_moment"]:
            mean = mean / (average(state, f"lie_{side}_sq", s.square(), beta2).sqrt() + group["eps"])
        if side in sides:
            generators[side] = Generator(-mean)
    return generators


def _step_size(
    weight: Tensor, generators: dict[str, Generator], moved: dict[str, Tensor | None], *, group: dict
) -> Tensor | float:
    if group["scale"] == "none":
        return group["lr"]
    if group["scale"] == "spectral":
        norm = torch.stack([a.spectral_norm() for a in generators.values()]).amax(0)
        return torch.where(norm > 0, group["lr"] / norm.clamp_min(1e-12), 0)
    if len(generators) > 1:
        return _alpha(sum(seen_from(a.act(seen_from(weight, side)), side) for side, a in generators.items()), group)
    ((side, a),) = generators.items()
    if moved[side] is not None:
        return _alpha(moved[side], group)
    norm = a.act_norm(seen_from(weight, side))
    return rms_scale(norm, lr=group["lr"], rms=group["rms"], numel=weight.shape[-2] * weight.shape[-1])


def _alpha(change: Tensor, group: dict) -> Tensor | float:
    """The step size of a change `(..., m, n)` at `alpha = 1`."""
    if group["scale"] == "none":
        return group["lr"]
    norm = torch.linalg.matrix_norm(change, keepdim=True)
    return rms_scale(norm, lr=group["lr"], rms=group["rms"], numel=change.shape[-2] * change.shape[-1])
