"""TEON (arXiv 2601.23261): Muon whose orthogonalisation spans consecutive layers; with stacks of one it is Muon."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from pion_hf.linalg.polar import polar_factor
from pion_hf.optim import blocks, compiled
from pion_hf.optim.base import MatrixOptimizer, buffer
from pion_hf.optim.batches import Step
from pion_hf.optim.groups import named_parameters
from pion_hf.optim.inputs import Inputs
from pion_hf.optim.options import MuonOptions, TeonOptions, given
from pion_hf.optim.sharding import stand_in


class Teon(MatrixOptimizer):
    """Orthogonalised momentum of K consecutive layers at once (rule `teon`), or of every matrix alone (rule `muon`).

    For K matrices `W_k`, `(m, n)`, of one type with gradients `G_k`:

        M_k <- mu M_k + (1 - mu) G_k,  U_k = (1 - mu) G_k + mu M_k  (Nesterov; without, U_k = M_k)
        Q = polar([U_1 | ... | U_K]),  W_k <- (1 - lr * weight_decay) W_k - lr * f * Q_k

    Groups with rule `adamw` (and tensors that are not 2-D) get torch's AdamW with the group's own `lr`, `betas`, `eps`.

    Args:
        params: groups from `pion_hf.param_groups(model, "teon")`, which finds the stacks, or `"muon"`. A group of rule
            `teon` names its own in `stacks`: lists of `stack` parameter names (`name[i]` for the i-th matrix of a
            parameter that holds several); a matrix in none of them is updated alone. With `stack=1` (Muon), plain
            tensors or `(name, tensor)` pairs will do.
        lr: step size. With `scale="rms"` a matrix's update has the RMS `lr * rms`, as a lone one and in a stack.
        momentum: `mu`. nesterov: look ahead by one step of it.
        stack: K, layers per stack.
        polar: how the polar factor is found, `express` or `quintic` (`polar_steps` iterations), or `svd`; `gram` is
            `express` on the kernels of the package gram-newton-schulz (`pip install 'pion-hf[gram]'`), for NVIDIA GPUs
            from Hopper on, always in float16. It has not been run on a GPU yet.
        polar_dtype: of those iterations; `auto` is bfloat16 where the hardware multiplies it faster.
        scale: the factor `f`. `rms`: `rms / sqrt(min(m, nK) / (m n K))`, AdamW's learning rates carry over; `paper`:
            `sqrt(m / n)`; `original`: `sqrt(max(1, m / n))`, as in `torch.optim.Muon`; its `match_rms_adamw` is `rms`.
        rms: the update's RMS at `lr = 1` (`scale="rms"`); 0.2 is that of a typical AdamW update.
        compile: a step's elementwise passes fused by `torch.compile`.
        batch_elements: the most elements of the matrices that are updated at once; see `Pion`.
        keep: number of leading directions of every layer's inputs whose outputs stay as they are: changes of a matrix
            are projected away from them, as Adam-NSCL's are (arXiv 2103.07113). inputs: `pion_hf.Inputs(model, keep)`;
            see `Pion`.
        keep_soft: of `4 keep` directions, each by the share `s / (s + s_keep)` of its eigenvalue `s`, instead of `keep`
            of them wholly and the others not at all: OWM's projector (arXiv 1810.01256); needs
            `pion_hf.Inputs(model, 4 * keep)`.
        weight_decay: decoupled, of the matrices and of AdamW's groups.
        adamw_betas, adamw_eps: of AdamW's groups that bring none.

    Raises:
        ValueError: an unknown option or value, stacks of unequal shapes or of unknown names, non-finite weights.
    """

    options = TeonOptions
    matrix_rules = ("teon", "muon")
    stacked_rule = "teon"

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
        polar_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        scale: Literal["rms", "paper", "original"] = "rms",
        rms: float = 0.2,
        compile: bool = False,
        batch_elements: int | None = None,
        keep: int = 0,
        keep_soft: bool = False,
        inputs: Inputs | None = None,
        weight_decay: float = 0.0,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        defaults = given(TeonOptions, locals(), without=("adamw_betas", "adamw_eps"))
        defaults["eps"] = adamw_eps
        self.adamw_betas = adamw_betas
        super().__init__(params, defaults, inputs=inputs)
        found = {group["stack"] for group in self.param_groups if group["rule"] == self.stacked_rule} - {stack}
        if found and stack != self.options.stack:
            raise ValueError(
                f"stack={stack} was given, but the groups hold stacks of {found.pop()}: give it to one only."
            )

    def add_param_group(self, param_group: dict) -> None:
        """As ever. No default says `betas`: schedulers that cycle momentum would take them, and not `momentum`."""
        super().add_param_group({"betas": self.adamw_betas, **param_group})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "adamw_betas": self.adamw_betas}

    def _elementwise_step(self, group: dict) -> None:
        """The momentum that a scheduler cycles is that of AdamW's groups too."""
        if "max_momentum" in group:
            group["betas"] = (group["momentum"], group["betas"][1])
        super()._elementwise_step(group)

    def check_options(self, group: dict) -> None:
        if group["rule"] == self.stacked_rule:
            check_stacks(group)
        elif "stacks" in group:
            raise ValueError(
                f"a group of rule {group['rule']!r} has no stacks: its rule must be {self.stacked_rule!r}."
            )

    def stacks_of(self, group: dict) -> list[list[str]]:
        return group.get("stacks", [])

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], *, group: dict, step: Step) -> Tensor:
        mu, lr = group["momentum"], group["lr"]
        ahead = mu if group["nesterov"] else 1.0
        momentum = buffer(state, "momentum", grad)
        direction = compiled.run(_look_ahead, grad, momentum, mu, ahead, compiled=group["compile"])
        factor = _orthogonalised(evened(direction, step, mu=mu, nesterov=group["nesterov"]), group)
        decay, size = 1 - lr * group["weight_decay"], lr * _scale(weight.shape, group)
        return compiled.run(_decay_and_move, weight, factor, decay, size, compiled=group["compile"])


class Muon(Teon):
    """Muon: the momentum of every matrix is orthogonalised alone (rule `muon`). `Teon` with stacks of one.

    Args:
        params: groups from `pion_hf.param_groups(model, "muon")`, tensors or `(name, tensor)` pairs. All others: see
            `Teon`.

    Raises:
        ValueError: an unknown option or value, non-finite weights.
    """

    options = MuonOptions
    matrix_rules = ("muon",)

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        polar: Literal["express", "quintic", "svd", "gram"] = "express",
        polar_steps: int = 5,
        polar_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        scale: Literal["rms", "paper", "original"] = "rms",
        rms: float = 0.2,
        compile: bool = False,
        batch_elements: int | None = None,
        keep: int = 0,
        keep_soft: bool = False,
        inputs: Inputs | None = None,
        weight_decay: float = 0.0,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        options = given(MuonOptions, locals())
        super().__init__(params, stack=1, inputs=inputs, **options)


def _look_ahead(grad: Tensor, momentum: Tensor, mu: float, ahead: float) -> Tensor:
    momentum.lerp_(grad, 1 - mu)
    return momentum if ahead == 1 else grad.lerp(momentum, ahead)


def evened(direction: Tensor, step: Step, *, mu: float, nesterov: bool) -> Tensor:
    """Of a stack whose matrices have taken different numbers of steps, as if their momenta had begun together.

    A young one is small, and would get next to nothing of a polar factor that it shares.
    """
    if direction.ndim == 3 or not step.mixed:
        return direction
    return direction / step.weight(mu, direction, ahead=int(nesterov))


def _decay_and_move(weight: Tensor, factor: Tensor, decay: float, size: float) -> Tensor:
    # Not `add_(alpha=...)`, which is compiled anew for every learning rate.
    return (weight if decay == 1 else weight.mul_(decay)).sub_(factor.mul_(size))


def _orthogonalised(x: Tensor, group: dict) -> Tensor:
    """`(b, m, n)`: each one's polar factor; `(b, K, m, n)`: that of the K side by side, `(m, nK)`, cut apart again."""
    wide = x.transpose(1, 2).flatten(2) if x.ndim == 4 else x
    factor = polar_factor(wide, method=group["polar"], steps=group["polar_steps"], dtype=group["polar_dtype"])
    return factor.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2) if x.ndim == 4 else factor


def _scale(shape: torch.Size, group: dict) -> float:
    (m, n), k = shape[-2:], shape[1] if len(shape) == 4 else 1
    if group["scale"] == "rms":
        return group["rms"] / math.sqrt(min(m, n * k) / (m * n * k))
    return math.sqrt(m / n if group["scale"] == "paper" else max(1.0, m / n))


def check_stacks(group: dict) -> None:
    """Raises ValueError for stacks of unknown names or unequal shapes, or for none where `stack` asks for some."""
    stacks, size = group.get("stacks"), group["stack"]
    if not stacks:
        if size == 1:
            return
        raise ValueError(
            f"stack={size}, but the group names no stacks, and tensors do not tell which of them lie in consecutive "
            'layers: use pion_hf.param_groups(model, "teon"), add stacks=[[name, name], ...] to the group, or set '
            "stack=1 (Muon)."
        )
    layout, shapes = blocks.Layout.parse(group["layout"]), {}
    for name, p in named_parameters(group):
        views = [blocks.merge_rows(view) for view in blocks.split(stand_in(p), layout)]
        shapes.update({blocks.name_of(name, i, len(views)): tuple(v.shape) for i, v in enumerate(views)})
    for names in stacks:
        missing = [name for name in names if name not in shapes]
        if missing:
            raise ValueError(
                f"stacks: the group has no matrix {missing[0]!r}; it has {', '.join(list(shapes)[:6])} ..."
            )
        if len(names) != size:
            raise ValueError(f"stacks: {names} are {len(names)} matrices, stack is {size}.")
        if len({shapes[name] for name in names}) > 1:
            forms = ", ".join(f"{name} {shapes[name][1:]}" for name in names)
            raise ValueError(f"stacks: only matrices of one shape can be stacked, not {forms}.")
    name, count = Counter(name for names in stacks for name in names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"stacks: {name} is in {count} places; a matrix can be in one stack only.")
