"""The hidden matrices of a model, whatever optimizer trains it, and what is measured of them from time to time."""

from __future__ import annotations

import math
import random
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pion_hf.integrations.optimizers import class_name
from pion_hf.linalg.products import full_float32
from pion_hf.linalg.spectrum import leading_singular, singular_values, spectral_drift
from pion_hf.optim import MatrixOptimizer, blocks
from pion_hf.optim.blocks import Layout
from pion_hf.optim.observing import to_host
from pion_hf.routing.adapters import has_adapters
from pion_hf.routing.routes import Route
from pion_hf.routing.stacks import PROJECTIONS, projection_of
from pion_hf.routing.structure import GATE_UP_NAMES
from pion_hf.routing.table import routing_table

# What the projections of a layer are called, beside those of attention that `stacking` knows.
ROLES = {
    **PROJECTIONS,
    "o": {"o_proj", "out_proj", "out_lin", "wo"},
    "gate": {"gate_proj", "w1"},
    "up": {"up_proj", "w3", "fc1", "c_fc", "fc_in", "dense_h_to_4h"},
    "down": {"down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h"},
}
# Lanczos steps for a spectral norm: from scratch, and from the singular vector of the snapshot before.
COLD_STEPS, WARM_STEPS = 24, 4


@dataclass(frozen=True)
class HiddenMatrix:
    """One matrix of a hidden layer (see `blocks.split`); the experts of one tensor count as one, `(E, out, in)`.

    rule: of this package's optimizers, or the name of another. keeps_spectrum: whether its rule rotates it.
    """

    name: str
    parameter: nn.Parameter
    layout: Layout
    index: int
    role: str
    layer: int | None
    rule: str
    keeps_spectrum: bool

    def weights(self) -> Tensor:
        """`(E, out, in)`, in float32 at least."""
        view = blocks.merge_rows(blocks.split(self.parameter.detach(), self.layout)[self.index])
        return view if view.dtype == torch.float64 else view.float()

    def describe(self) -> dict[str, Any]:
        """Its entry in `run.json`."""
        experts, *shape = self.weights().shape
        full = shape if experts == 1 else [experts, *shape]
        return {"name": self.name, "role": self.role, "layer": self.layer, "rule": self.rule, "shape": full}


def hidden_matrices(model: nn.Module, optimizer: Any, ours: MatrixOptimizer | None) -> list[HiddenMatrix]:
    """All trainable ones in the model's order; of a model with adapters their factors.

    None where parameters are sharded: there no process holds a whole matrix.

    ours: the optimizer inside `optimizer`, if it is one of this package's.
    """
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        return []
    form = "pion_lora" if has_adapters(model) else "muon"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer's own routing has said it
            routes = routing_table(model, form).matrices
    except ValueError:  # nothing but embeddings, norms and the like
        return []
    groups = {id(p): group for group in (ours.param_groups if ours else ()) for p in group["params"]}
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for r in routes:
        group, layout = groups.get(id(r.parameter)), Layout.parse(r.layout)
        rule = class_name(optimizer) if group is None else group["rule"]
        keeps = group is not None and ours.keeps_spectrum(group)
        for index, name in enumerate(r.matrix_names):
            role, layer = _role(r, index, layout.pieces, modules), _layer(r.name)
            found.append(HiddenMatrix(name, r.parameter, layout, index, role, layer, rule, keeps))
    return found


def _role(route: Route, index: int, count: int, modules: dict[str, nn.Module]) -> str:
    """`q`, `k`, `v`, `o`, `gate`, `up`, `down`, or the names of the module and its parent; of adapters with A or B."""
    path = route.name.partition(".lora_")[0].removesuffix(".weight").removesuffix(".base_layer")
    parent, leaf = ["", *path.split(".")][-2:]
    role = projection_of(route.name, index, count, modules)
    if role is None and leaf in GATE_UP_NAMES and count == 2:
        role = ("gate", "up")[index]
    if role is None and count == 1:
        role = next((word for word, names in ROLES.items() if leaf in names), None)
    role = role or f"{parent}.{leaf}".strip(".")
    return f"{role} {route.role[-1]}" if route.method else role


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


class Norms:
    """Spectral norm and stable rank of matrices, each time from the singular vectors of the last."""

    def __init__(self, matrices: list[HiddenMatrix]) -> None:
        self.matrices = matrices
        self._vectors: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def measure(self) -> dict[str, list[float]]:
        """`spectral_norm` and `stable_rank`, `||W||_F^2 / ||W||_2^2`, of every matrix; of experts largest and mean."""
        measured = []
        with full_float32():
            for matrix in self.matrices:
                experts = matrix.weights()
                starts = self._vectors.get(matrix.name)
                steps = COLD_STEPS if starts is None else WARM_STEPS
                found = [
                    leading_singular(w, start, steps=steps)
                    for w, start in zip(experts, starts or [None] * len(experts), strict=True)
                ]
                self._vectors[matrix.name] = [vector for _, vector in found]
                norms, sizes = torch.stack([norm for norm, _ in found]), experts.flatten(1).norm(dim=1)
                measured.append(torch.stack((norms.double(), sizes.double().square())))
        values = to_host(measured)
        return {
            "spectral_norm": [n.max().item() for n, _ in values],
            "stable_rank": [(s / n.square()).mean().item() if n.all() else math.nan for n, s in values],
        }


def spread(matrices: list[HiddenMatrix]) -> list[HiddenMatrix]:
    """The same, shuffled, rotated ones first: of them a spectrum says whether the optimizer keeps its word."""
    shuffled = random.Random(0).sample(matrices, len(matrices))
    return sorted(shuffled, key=lambda matrix: not matrix.keeps_spectrum)


def _values(matrix: HiddenMatrix) -> Tensor:
    """Singular values `(E, k)`, NaN of weights that are not finite: of those eigenvalues do not exist."""
    weights = matrix.weights()
    found = singular_values(weights.nan_to_num(0, 0, 0)).cpu()
    return found if weights.isfinite().all() else torch.full_like(found, math.nan)


class Spectra:
    """Singular values of as many matrices as time allows, before training and after; `(E, k)` by name."""

    def __init__(self, matrices: list[HiddenMatrix]) -> None:
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}
        self._order = spread(matrices)
        self._costs: dict[str, float] = {}

    @torch.no_grad()
    def measure_before(self, seconds: float) -> None:
        """Take as many as `seconds` allow, at least one."""
        end = time.perf_counter() + seconds
        for matrix in self._order:
            began = time.perf_counter()
            self.before[matrix.name] = _values(matrix)
            self._costs[matrix.name] = time.perf_counter() - began
            if time.perf_counter() + self._costs[matrix.name] > end:
                return

    @property
    def known(self) -> list[HiddenMatrix]:
        """The matrices that have been measured before."""
        return [matrix for matrix in self._order if matrix.name in self.before]

    def affordable(self, seconds: float) -> list[HiddenMatrix]:
        """As many of `known` as can be measured again in `seconds`."""
        chosen, cost = [], 0.0
        for matrix in self.known:
            cost += self._costs.get(matrix.name, 0.0)
            if cost > seconds:
                break
            chosen.append(matrix)
        return chosen

    @torch.no_grad()
    def drift(self, matrices: list[HiddenMatrix], *, keep: bool = False) -> float | None:
        """Largest change of a singular value relative to its matrix's norm: of rotated matrices, where there are any.

        What was zero is left out. keep: as the spectra after training, of all.
        """
        rotated = [matrix for matrix in matrices if matrix.keeps_spectrum]
        drifts = []
        for matrix in matrices if keep else (rotated or matrices):
            values = _values(matrix)
            if keep:
                self.after[matrix.name] = values
            before = self.before[matrix.name].double()
            if before.any() and (matrix.keeps_spectrum or not rotated):
                drifts.append(spectral_drift(before, values)[before.any(-1)].max().item())
        return torch.tensor(drifts, dtype=torch.float64).max().item() if drifts else None  # NaN if one is


@torch.no_grad()
def orthogonality_error(optimizer: MatrixOptimizer, matrices: list[HiddenMatrix]) -> float | None:
    """Largest entry of `|Q Q^T - I|` of the singular vectors that rotations carry along; None without."""
    errors = []
    for matrix in matrices:
        state = optimizer.state.get(matrix.parameter, {})
        for q in (state[key] for key in (f"u.{matrix.index}", f"v.{matrix.index}") if key in state):
            with full_float32():
                gram = q @ q.mT
            gram.diagonal(dim1=-2, dim2=-1).sub_(q.any(-1).to(q.dtype))  # what `keep` leaves out are rows of zeros
            errors.append(gram.abs().max())
    return torch.stack([error.double().cpu() for error in errors]).max().item() if errors else None
