"""The one `step()` of this package: checks, bucketing by shape, AdamW for everything that is not a matrix."""

from __future__ import annotations

import itertools
import math
import numbers
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pion_hf.errors import unknown
from pion_hf.linalg.precision import full_float32
from pion_hf.optim import blocks, precision
from pion_hf.optim.batches import REST, Block, Plan
from pion_hf.optim.saved import check_saved

# Keys that torch, its schedulers or the routing put into a group, besides the options of a rule.
STRUCTURAL_KEYS = {"params", "param_names", "rule", "layout", "role", "stacks", "method", "reach", "initial_lr"}


class MatrixOptimizer(torch.optim.Optimizer):
    """Updates matrices by a rule of its own and everything else by torch's AdamW.

    A subclass sets `matrix_rules`, checks its options in `check_options`, and overrides `update`.

    A group's `rule` chooses: one of `matrix_rules`, or `"adamw"`. Groups without a rule, `(name, tensor)`
    pairs and bare tensors are divided: 2-D tensors are matrices, the rest goes to AdamW.
    Every hyperparameter lives in the groups; state is created at a parameter's first step, so that a wrapper
    may replace parameters between construction and training.

    A step whose gradients are not all finite is skipped before any state is touched; `skipped_steps` counts.
    """

    matrix_rules: tuple[str, ...] = ()
    isospectral_rules: tuple[str, ...] = ()

    def __init__(self, params: Iterable, defaults: dict[str, Any]) -> None:
        self.skipped_steps = 0
        self._plans: dict[int, Plan] = {}  # by the group's index
        groups = list(itertools.chain.from_iterable(self._divide(entry) for entry in _as_groups(params)))
        for group in groups:
            self._check_rule(group["rule"])
        if not any(group["rule"] in self.matrix_rules for group in groups):
            raise ValueError(
                f"{type(self).__name__} was given no matrix to update: pass at least one 2-D parameter, or a group "
                f"with rule={self.matrix_rules[0]!r}; for a model, use pion_hf.param_groups(model)."
            )
        super().__init__(groups, defaults)

    # -- groups ---------------------------------------------------------------------------------

    def _divide(self, group: dict) -> Iterator[dict]:
        """A group without a rule becomes one of matrices and one for AdamW."""
        if "rule" in group:
            yield group
            return
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        matrices = [p for p in params if _tensor(p).ndim == 2]
        others = [p for p in params if _tensor(p).ndim != 2]
        if matrices:
            yield {**group, "params": matrices, "rule": self.matrix_rules[0]}
        if others:
            yield {**group, "params": others, "rule": "adamw"}

    def add_param_group(self, param_group: dict) -> None:
        """Raises ValueError for unknown keys, bad values, and parameters this optimizer cannot take."""
        rule = param_group.setdefault("rule", self.matrix_rules[0])
        self._check_rule(rule)
        for key in param_group:
            if key not in STRUCTURAL_KEYS and key not in self.defaults:
                raise unknown(f"option of {type(self).__name__}", key, self.defaults)
        param_group.setdefault("layout", "")
        layout = blocks.Layout.parse(param_group["layout"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_common(group)
            for name, p in named_parameters(group):
                _check_parameter(name, p)
                if rule != "adamw":
                    try:
                        blocks.split(p, layout)
                    except ValueError as error:
                        raise ValueError(f"parameter {name}, rule {rule!r}: {error}") from None
            self.check_options(group)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_rule(self, rule: str) -> None:
        rules = (*self.matrix_rules, "adamw")
        if rule not in rules:
            raise unknown(f"rule of {type(self).__name__}", rule, rules)

    def check_options(self, group: dict) -> None:
        """Raise ValueError for options of this algorithm that are wrong or do not combine."""

    # -- the step -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step over all groups. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._gradients_are_finite():
            self.skipped_steps += 1
            if self.skipped_steps == 1:
                warnings.warn(
                    "A gradient is not finite: this step is skipped, weights and optimizer state are untouched. "
                    "Further skipped steps are counted in optimizer.skipped_steps without a warning.",
                    stacklevel=2,
                )
            return loss
        with full_float32():
            for index, group in enumerate(self.param_groups):
                if group["rule"] == "adamw":
                    self._adamw_step(group)
                else:
                    self._matrix_step(index)
        return loss

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], *, group: dict, step: int) -> Tensor:
        """The rule: the new weights of a batch of matrices of one shape, in working precision.

        `weight` and `grad` are `(b, m, n)`, or `(b, K, m, n)` for stacks of `K` (see `stacks_of`); both may be the
        parameter's own memory: the rule may change `weight` in place, `grad` it leaves as it is. `state` is empty at a
        matrix's first step and afterwards holds what the rule put there, each entry with the dimensions of the batch
        first; the rule replaces, adds or changes entries. `step` counts from 1.
        """
        raise NotImplementedError

    def stacks_of(self, group: dict) -> list[list[str]]:
        """Names (`blocks.name_of`) of matrices that are updated as one; what no list names is updated alone."""
        return []

    def state_bytes(self) -> int:
        """Bytes of optimizer state once every parameter has taken a step; takes none, allocates nothing."""
        total = 0
        for group in self.param_groups:
            layout = blocks.Layout.parse(group["layout"])
            shapes = Counter((tuple(p.shape), p.dtype) for p in group["params"])
            for (shape, dtype), count in shapes.items():
                p = torch.empty(shape, dtype=dtype, device="meta")
                if group["rule"] == "adamw":
                    total += count * 2 * p.numel() * p.element_size()
                    continue
                if dtype in precision.HALF:
                    total += count * p.numel() * precision.REST_DTYPES[dtype].itemsize
                for view in blocks.split(p, layout):
                    weight = blocks.merge_rows(view).to(_working_dtype(dtype))
                    state = self.initial_state(0, weight, group)
                    self.update(weight, torch.empty_like(weight), state, group=group, step=1)
                    total += count * sum(value.numel() * value.element_size() for value in state.values())
        return total

    def initial_state(self, position: int, matrices: Tensor, group: dict) -> dict[str, Tensor]:
        """What the state of `matrices`, `(E, m, n)` of a group's parameter at `position`, holds at first."""
        return {}

    def keeps_spectrum(self, group: dict) -> bool:
        """Whether the group's matrices keep their singular values."""
        return group["rule"] in self.isospectral_rules

    def check_matrix(self, name: str, matrix: Tensor, group: dict) -> None:
        """Called once per matrix, `(E, m, n)`, before its first step; raises ValueError if the rule cannot take it."""
        if not torch.isfinite(matrix).all():
            raise ValueError(f"{name} holds values that are not finite: load or initialise it before training.")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its dtype: torch casts it to the parameter's, rounding that of half weights.

        Raises:
            ValueError: the state is of other parameters, or of another rule or option (see `check_saved`).
        """
        check_saved(state_dict, self.param_groups, self.defaults)
        super().load_state_dict(state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, p in zip(saved["params"], group["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor) and value.dtype != self.state[p][key].dtype:
                        self.state[p][key] = value.to(device=p.device, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of loading, copying and unpickling: what is not state starts anew."""
        super().__setstate__(state)
        self._plans = {}
        self.__dict__.setdefault("skipped_steps", 0)

    def _gradients_are_finite(self) -> bool:
        by_kind = defaultdict(list)
        for group in self.param_groups:
            for name, p in named_parameters(group):
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise ValueError(f"the gradient of {name} is sparse: use nn.Embedding(sparse=False).")
                by_kind[p.grad.device, p.grad.dtype].append(p.grad)
        return all(_all_finite(grads) for grads in by_kind.values())

    def _matrix_step(self, index: int) -> None:
        group = self.param_groups[index]
        plan = self._plans.get(index)
        if plan is None or not plan.fits(group["params"]) or any(p not in self.state for p in plan.params):
            plan = self._plans[index] = self._make_plan(group)
        for p in plan.params:
            self.state[p]["step"] += 1
        for batch in plan.batches:
            state = batch.load(self.state)
            step = self.state[batch.first.param]["step"]
            new = self.update(batch.weights(self.state), batch.gradients(), state, group=group, step=step)
            batch.store(state, self.state, by_block=self.per_block_state)
            batch.write(new, self.state)

    def _make_plan(self, group: dict) -> Plan:
        """Which matrices are updated together: stacks, then all others alone; their state, where they have none.

        Matrices of a stack that have no gradient are left out of it, and those that have taken fewer steps than
        others (a layer that was frozen for a while) form a stack of their own.
        """
        layout = blocks.Layout.parse(group["layout"])
        stacked = {name: i for i, names in enumerate(self.stacks_of(group)) for name in names}
        units: dict[tuple, list[Block]] = defaultdict(list)
        for position, (name, p) in enumerate(named_parameters(group)):
            if p.grad is None:
                continue
            state = self.state[p]
            views = blocks.split(p, layout)
            if not state:
                for index, view in enumerate(views):
                    self.check_matrix(name, blocks.merge_rows(view), group)
                    for key, value in self.initial_state(position, blocks.merge_rows(view), group).items():
                        state[f"{key}.{index}"] = value
                if p.dtype in precision.HALF:
                    state[REST] = torch.zeros_like(p, dtype=precision.REST_DTYPES[p.dtype])
                state["step"] = 0
            for index, view in enumerate(views):
                own = blocks.name_of(name, index, len(views))
                units[stacked.get(own, own), state["step"]].append(Block(p, name, index, view))
        return Plan(((tuple(unit), step) for (_, step), unit in units.items()), layout, group["params"])

    per_block_state: frozenset[str] = frozenset()
    """State whose shape may happen to equal the weight's, and is kept by block all the same."""

    def _adamw_step(self, group: dict) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), dtype=torch.float32, device=p.device),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=all(p.device.type in ("cpu", "cuda") for p in params),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _as_groups(params: Iterable) -> list[dict]:
    params = [params] if isinstance(params, (Tensor, dict)) else list(params)
    if not params:
        raise ValueError("the optimizer was given no parameters.")
    if isinstance(params[0], dict):
        return [dict(group) for group in params]
    return [{"params": params}]


def _tensor(param: Tensor | tuple[str, Tensor]) -> Tensor:
    return param[1] if isinstance(param, tuple) else param


def named_parameters(group: dict) -> Iterator[tuple[str, Tensor]]:
    """A group's parameters with their names, or their positions where it has none."""
    names = group.get("param_names") or [f"parameter {i} of its group" for i in range(len(group["params"]))]
    return zip(names, group["params"], strict=True)


def average(state: dict[str, Tensor], key: str, value: Tensor, beta: float) -> Tensor:
    """`average <- beta average + (1 - beta) value`, starting from zero; kept in `state[key]`."""
    if key in state:
        state[key].lerp_(value, 1 - beta)
    else:
        state[key] = value * (1 - beta)
    return state[key]


def average_of_squares(state: dict[str, Tensor], value: Tensor, beta: float) -> Tensor:
    """`average` of `value^2`, kept in `state["second"]`."""
    if "second" not in state:
        return average(state, "second", value.square(), beta)
    return state["second"].mul_(beta).addcmul_(value, value, value=1 - beta)


def check_choices(group: dict, choices: dict[str, tuple[str, ...]]) -> None:
    """Raises ValueError for an option that is none of its words, with the nearest."""
    for option, known in choices.items():
        if group[option] not in known:
            raise unknown(f"value of {option}", group[option], known)


def check_range(option: str, value: Any, ok: Callable[[float], bool], wanted: str, *, whole: bool = False) -> None:
    """Raises ValueError unless `value` is a finite number, a whole one where that is `wanted`, and `ok`."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(number, bool) or not isinstance(number, kind) or not (math.isfinite(number) and ok(number)):
        raise ValueError(f"{option} must be {wanted}, got {value!r}")


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Rotations are formed in float32 at least, whatever the weight is stored in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _all_finite(grads: list[Tensor]) -> bool:
    """Whether all entries are finite, and their squares too: those of larger ones would stay in second moments."""
    squares = torch._foreach_norm(grads, dtype=torch.float64 if grads[0].dtype == torch.float64 else torch.float32)
    return torch.stack(squares).sum().isfinite().item()


def _check_common(group: dict) -> None:
    for option in ("lr", "eps", "weight_decay"):
        check_range(option, group[option], lambda v: v >= 0, "at least 0")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    for beta in betas:
        check_range("betas", beta, lambda v: 0 <= v < 1, "two numbers in [0, 1)")


def _check_parameter(name: str, p: Tensor) -> None:
    if p.is_complex():
        raise ValueError(f"{name} is complex; only real parameters can be optimized here.")
    if p.is_sparse or p.layout != torch.strided:
        raise ValueError(f"{name} is sparse; only dense parameters can be optimized here.")
    if not p.is_floating_point():
        raise ValueError(f"{name} has dtype {p.dtype}; freeze quantised weights (requires_grad_(False)).")
    if type(p).__name__ == "FlatParameter" or getattr(p, "_is_flat_param", False):
        raise ValueError(
            f"{name} is a flat shard of FSDP1, which holds no whole matrix: use FSDP2 (fsdp_version: 2) or DDP."
        )
    if hasattr(p, "device_mesh"):
        raise ValueError(
            f"{name} is a DTensor (FSDP2 or tensor parallel), which this version does not update: use DDP or one "
            "process."
        )
