"""Direct calls of the optimizers: what they are made of, weights and gradients of any size, and writes of others."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pion_hf import Pion, RoutedAdamW, Teon
from tests.field.trial import Input
from tests.field.world import World
from tests.test_faults import OPTIMIZERS, draw, groups_of, parameters

# Of them, those whose matrix `a` keeps its singular values.
ROTATES = ("pion", "pion-paper", "pion-ambient", "pion-polar", "pion_lora")
EXACT = ("pion", "pion-ambient", "pion-polar")  # not those with the paper's retraction, which grows them
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def build(optim: str, params: dict[str, nn.Parameter], **changes: Any) -> torch.optim.Optimizer:
    cls, first, second, options = OPTIMIZERS[optim]
    return cls(groups_of(params, first, second), **{"lr": 1e-2, **options, **changes})


def step(optimizer: Any, params: dict[str, nn.Parameter], seed: int, *, size: float = 1.0) -> None:
    for i, p in enumerate(params.values()):
        p.grad = (draw(*p.shape, seed=100 * seed + i) * size).to(p.dtype)
    optimizer.step()


def finite(params: dict[str, nn.Parameter], optimizer: Any) -> bool:
    state = (v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor))
    return all(x.isfinite().all() for x in (*params.values(), *state))


def bits(params: dict[str, nn.Parameter], optimizer: Any) -> list[Tensor]:
    state = [v.detach().clone() for p in params.values() for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    return [*(p.detach().clone() for p in params.values()), *state]


def drift(before: Tensor, after: Tensor) -> float:
    old, new = (torch.linalg.svdvals(w.detach().double()) for w in (before, after))
    return ((new - old).abs().max() / old.max()).item()


def yes(world: World, result: bool) -> bool:
    return result is True


# -- what they are made of --------------------------------------------------------------------------------------------


def matrix(*shape: int, dtype: torch.dtype = F32) -> nn.Parameter:
    return nn.Parameter(draw(*(shape or (6, 9)), seed=0).to(dtype))


def twice() -> list[nn.Parameter]:
    p = matrix()
    return [p, p]


CLASSES = {"Pion": Pion, "Teon": partial(Teon, stack=1), "RoutedAdamW": RoutedAdamW}
# What each of them is given -> what a refusal names.
GIVEN: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "nothing": (lambda: [], ("no parameters",)),
    "None": (lambda: None, ("param",)),
    "a number": (lambda: 3, ("param",)),
    "text": (lambda: "weights", ("param",)),
    "numbers": (lambda: [1, 2], ("param",)),
    "None in a list": (lambda: [matrix(), None], ("param",)),
    "an empty group": (lambda: [{"params": []}], ("param", "matrix")),
    "a group without params": (lambda: [{"lr": 1.0}], ("params",)),
    "a group of None": (lambda: [{"params": None}], ("params",)),
    "vectors only": (lambda: [nn.Parameter(torch.ones(3))], ("matrix",)),
    "a scalar only": (lambda: [nn.Parameter(torch.ones(()))], ("matrix",)),
    "the same one twice": (twice, ("more than once",)),
    "a tensor that is no leaf": (lambda: [matrix() * 2], ("leaf",)),
    "whole numbers": (lambda: [nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)], ("dtype",)),
    "complex numbers": (lambda: [nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))], ("complex",)),
    "a sparse matrix": (lambda: [nn.Parameter(torch.eye(3).to_sparse())], ("sparse",)),
    "an unknown key": (lambda: [{"params": [matrix()], "learning_rate": 1}], ("learning_rate",)),
    "an unknown rule": (lambda: [{"params": [matrix()], "rule": "poin"}], ("poin",)),
    "a rule that is no text": (lambda: [{"params": [matrix()], "rule": 3}], ("3", "rule")),
    "an unknown layout": (lambda: [{"params": [matrix()], "rule": None, "layout": "sideways"}], ("sideways",)),
    "a layout that does not fit": (lambda: [{"params": [matrix()], "rule": None, "layout": "rows=4,9"}], ("rows",)),
    "names of another number": (lambda: [{"params": [matrix()], "param_names": ["a", "b"]}], ("param_names",)),
    "a name twice": (lambda: [("a", matrix()), ("a", matrix())], ("a",)),
    "a pair the wrong way round": (lambda: [(matrix(), "a")], ("param", "name", "tuple")),
    "no matrix in its group": (lambda: [{"params": [nn.Parameter(torch.ones(3))], "rule": None}], ("param",)),
}
VALUES: dict[str, list[Any]] = {
    "lr": [-1.0, math.nan, math.inf, "fast", None, [1e-3], True, 1j],
    "weight_decay": [-1.0, math.nan, math.inf, "much", None, True],
    "eps": [-1.0, math.nan, "small", None],
    "keep": [-1, 0.5, "all", None, 100, True],
    "rms": [0.0, -1.0, math.nan, "x", None],
    "polar_steps": [0, 1.5, "x", None, 1000],
    "batch_elements": [0, 1.5, "x", True],
    "side": ["left", 3, None],
    "compile": [3, "yes", None],
    "inputs": ["x", 3],
    "betas": [0.9, (0.9,), ("a", 0.9), (0.9, 1.0), None, (math.nan, 0.9)],
}
OWN = {"eps", "rms", "polar_steps", "side", "betas", "compile", "batch_elements"}  # Pion's


def make(cls: Callable[..., Any], given: Callable[[], Any], world: World, folder: Path) -> Any:
    """Make it of what is given, and take a step."""
    params = given()
    if isinstance(params, list):
        for group in params:
            if isinstance(group, dict) and group.get("rule", "") is None:
                group["rule"] = (cls.func if isinstance(cls, partial) else cls).matrix_rules[0]
    optimizer = cls(params, lr=1e-3)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return "taken"


def make_with(cls: Callable[..., Any], option: str, value: Any, world: World, folder: Path) -> Any:
    params = parameters(F32)
    optimizer = cls([(n, p) for n, p in params.items() if p.ndim == 2], **{"lr": 1e-3, option: value})
    step(optimizer, {n: p for n, p in params.items() if p.ndim == 2}, 1)
    return "taken"


# -- weights and gradients --------------------------------------------------------------------------------------------

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "an entry NaN": lambda w: w.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.nan)),
    "an entry infinite": lambda w: w.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.inf)),
    "all NaN": lambda w: w * math.nan,
    "zero": lambda w: w * 0,
    "1e-12": lambda w: w * 1e-12,
    "1e-22": lambda w: w * 1e-22,
    "1e-30": lambda w: w * 1e-30,
    "1e-40": lambda w: w * 1e-40,
    "1e12": lambda w: w * 1e12,
    "1e18": lambda w: w * 1e18,
    "1e30": lambda w: w * 1e30,
    "of rank one": lambda w: w[:, :1] @ w[:1],
    "a zero row": lambda w: w * (torch.arange(len(w)) > 0)[:, None],
    "ones": torch.ones_like,
}
SHAPES = [(0, 9), (6, 0), (0, 0), (1, 1), (1, 9), (6, 1), (2, 2), (1, 4000), (4000, 1), (2, 3, 4), (3, 0, 4)]


def with_weights(optim: str, change: Callable[[Tensor], Tensor], world: World, folder: Path) -> bool:
    """All stays finite, and what rotates keeps its singular values."""
    params = parameters(F32)
    with torch.no_grad():
        for name in ("a", "b", "fused"):
            params[name].copy_(change(params[name]))
    before = params["a"].detach().clone()
    optimizer = build(optim, params)
    for t in range(4):
        step(optimizer, params, t)
    kept = optim not in EXACT or drift(before, params["a"]) < 1e-4
    return finite(params, optimizer) and kept and optimizer.skipped_steps == 0


def of_shape(cls: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype, world: World, folder: Path) -> bool:
    rule = (cls.func if isinstance(cls, partial) else cls).matrix_rules[0]
    p = matrix(*shape, dtype=dtype)
    optimizer = cls([{"params": [("w", p)], "rule": rule}], lr=1e-3)
    for t in range(3):
        step(optimizer, {"w": p}, t)
    return bool(p.isfinite().all())


# The large ones are powers of two, by which no rounding changes.
GRADIENTS = [1e-45, 1e-38, 1e-30, 1e-22, 1e-12, *(2.0**e for e in (20, 40, 53, 66, 100, 120))]


def with_gradients(optim: str, size: float, world: World, folder: Path) -> bool:
    """All stays finite and no finite gradient is skipped; where it is large, the step is that of one of size 1."""
    params, usual = parameters(F32), parameters(F32)
    optimizer, other = build(optim, params), build(optim, usual)
    step(optimizer, params, 1, size=size)
    step(other, usual, 1)
    if optimizer.skipped_steps or not finite(params, optimizer):
        return False
    start = parameters(F32)
    large = [torch.dist(p, usual[n]) <= 1e-2 * torch.dist(usual[n], start[n]) + 1e-7 for n, p in params.items()]
    return size < 1 or all(large)


PLACES = ("a", "fused", "bias")
POISONS = (math.nan, math.inf, -math.inf)


def with_poison(optim: str, dtype: torch.dtype, place: str, poison: float, world: World, folder: Path) -> bool:
    """A step whose gradient is not finite might not have been: the bits of weights and state are those of before."""
    params = parameters(dtype)
    optimizer = build(optim, params)
    for t in range(2):
        step(optimizer, params, t)
    before = bits(params, optimizer)
    for i, p in enumerate(params.values()):
        p.grad = draw(*p.shape, seed=i).to(dtype)
    params[place].grad.view(-1)[1] = poison
    optimizer.step()
    same = all(torch.equal(x, y) for x, y in zip(before, bits(params, optimizer), strict=True))
    return same and optimizer.skipped_steps == 1


# -- what others do between two steps ---------------------------------------------------------------------------------


@torch.no_grad()
def in_place(p: nn.Parameter) -> None:
    p[0] = 0


@torch.no_grad()
def halve(p: nn.Parameter) -> None:
    p.mul_(0.5)


@torch.no_grad()
def load(p: nn.Parameter) -> None:
    p.copy_(draw(*p.shape, seed=77).to(p.dtype))


def data_row(p: nn.Parameter) -> None:
    p.data[0] = 0


def data_halve(p: nn.Parameter) -> None:
    p.data.mul_(0.5)


def data_noise(p: nn.Parameter) -> None:
    p.data.add_(draw(*p.shape, seed=78).to(p.dtype), alpha=0.3)


def data_replaced(p: nn.Parameter) -> None:
    p.data = draw(*p.shape, seed=79).to(p.dtype)


def flip(p: nn.Parameter) -> None:
    p.data = p.data.flip(-1).clone()


def one_entry(p: nn.Parameter) -> None:
    p.data[-1, -1] = 3


def swap(p: nn.Parameter) -> None:
    p.data[[0, 1]] = p.data[[1, 0]].clone()


WRITES = (in_place, halve, load, data_row, data_halve, data_noise, data_replaced, flip, one_entry, swap)


def written(optim: str, dtype: torch.dtype, write: Callable[[nn.Parameter], None], world: World, folder: Path) -> bool:
    """What was written is what trains on: hardly another after a step of no length, then of its singular values."""
    params = parameters(dtype)
    optimizer = build(optim, params)
    for t in range(3):
        step(optimizer, params, t)
    for name in ("a", "b", "fused"):
        write(params[name])
    put = {name: p.detach().clone() for name, p in params.items()}
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 1e-9
    step(optimizer, params, 4)
    half = dtype in (BF16, F16)
    near = all((p - put[n]).abs().max() <= (8e-3 if half else 1e-5) * put[n].abs().max() for n, p in params.items())
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for t in range(5, 25):
        step(optimizer, params, t)
    kept = optim not in EXACT or drift(put["a"], params["a"]) < (2e-2 if half else 1e-3)
    alive = all(params[name].abs().sum() > 0.1 * put[name].abs().sum() for name in ("a", "b", "fused"))
    return near and kept and alive and finite(params, optimizer)


def to_bfloat16(optimizer: Any, params: dict[str, nn.Parameter]) -> None:
    for p in params.values():
        p.data = p.data.to(BF16)


def to_double(optimizer: Any, params: dict[str, nn.Parameter]) -> None:
    for p in params.values():
        p.data = p.data.double()


def to_float(optimizer: Any, params: dict[str, nn.Parameter]) -> None:
    for p in params.values():
        p.data = p.data.float()


def another_rate(optimizer: Any, params: dict[str, nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 2e-2


def another_metric(optimizer: Any, params: dict[str, nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        if "metric" in group:
            group["metric"] = "lie" if group["metric"] == "ambient" else "ambient"


def another_direction(optimizer: Any, params: dict[str, nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        if "direction" in group:
            group["direction"] = "gradient" if group["direction"] != "gradient" else "adam"


def no_state(optimizer: Any, params: dict[str, nn.Parameter]) -> None:
    optimizer.state.clear()


def state_of_one(optimizer: Any, params: dict[str, nn.Parameter]) -> None:
    optimizer.state.pop(params["a"], None)


CHANGES = (to_bfloat16, to_double, to_float, another_rate, another_metric, another_direction, no_state, state_of_one)


def changed(optim: str, dtype: torch.dtype, change: Callable[..., None], world: World, folder: Path) -> bool:
    """Training goes on, of what there is: all is finite, and what rotates keeps its singular values."""
    params = parameters(dtype)
    optimizer = build(optim, params)
    for t in range(3):
        step(optimizer, params, t)
    change(optimizer, params)
    put = params["a"].detach().clone()
    for t in range(4, 8):
        step(optimizer, params, t)
    half = BF16 in (dtype, params["a"].dtype)
    kept = optim not in EXACT or drift(put, params["a"]) < (2e-2 if half else 1e-3)
    return finite(params, optimizer) and kept and not torch.equal(put, params["a"])


def through_file(optim: str, dtype: torch.dtype, how: str, world: World, folder: Path) -> bool:
    """A copy of weights and optimizer goes on with the same bits."""
    params = parameters(dtype)
    optimizer = build(optim, params)
    for t in range(3):
        step(optimizer, params, t)
    if how == "deepcopy":
        copies, other = copy.deepcopy((params, optimizer))
    else:
        file = io.BytesIO()
        torch.save((params, optimizer), file)
        file.seek(0)
        copies, other = torch.load(file, weights_only=False)
    for t in range(4, 7):
        step(optimizer, params, t)
        step(other, copies, t)
    return all(torch.equal(x, y) for x, y in zip(bits(params, optimizer), bits(copies, other), strict=True))


MADE = "optimizers: what they are made of"
SIZES = "optimizers: weights and gradients of any size"
POISONED = "optimizers: gradients that are not finite"
OTHERS = "optimizers: weights and state changed by others"
IN_PYTHON = {"call": True, "alone": True}
ANY = ("matrix", "not finite", "zero", "a ", "fused", "parameter")
INPUTS = [
    *(
        Input(MADE, f"{name} of {given}", partial(make, cls, of), names, **IN_PYTHON)
        for name, cls in CLASSES.items()
        for given, (of, names) in GIVEN.items()
    ),
    *(
        Input(
            MADE,
            f"{name}({option}={value!r})",
            partial(make_with, cls, option, value),
            (option,),
            **IN_PYTHON,
        )
        for name, cls in CLASSES.items()
        for option, values in VALUES.items()
        for value in values
        if name == "Pion" or option not in OWN
    ),
    *(
        Input(SIZES, f"{optim}: weights {words}", partial(with_weights, optim, change), ANY, yes, **IN_PYTHON)
        for optim in OPTIMIZERS
        for words, change in WEIGHTS.items()
    ),
    *(
        Input(
            SIZES,
            f"{name}: {shape} {dtype}",
            partial(of_shape, cls, shape, dtype),
            ("w ", "empty"),
            yes,
            **IN_PYTHON,
        )
        for name, cls in CLASSES.items()
        for shape in SHAPES
        for dtype in (F32,)
    ),
    *(
        Input(
            SIZES,
            f"{optim}: gradients {s:g}",
            partial(with_gradients, optim, s),
            ("too large",),
            yes,
            **IN_PYTHON,
        )
        for optim in OPTIMIZERS
        for s in GRADIENTS
    ),
    *(
        Input(
            POISONED,
            f"{optim} {dtype}: {poison} in {place}",
            partial(with_poison, optim, dtype, place, poison),
            (),
            yes,
            **IN_PYTHON,
        )
        for optim in OPTIMIZERS
        for dtype in (F32, BF16)
        for place in PLACES
        for poison in POISONS
    ),
    *(
        Input(
            OTHERS,
            f"{optim} {dtype}: {write.__name__}",
            partial(written, optim, dtype, write),
            ANY,
            yes,
            **IN_PYTHON,
        )
        for optim in OPTIMIZERS
        for dtype in (F32, BF16)
        for write in WRITES
    ),
    *(
        Input(
            OTHERS,
            f"{optim} {dtype}: {change.__name__}",
            partial(changed, optim, dtype, change),
            ("metric", "direction", "momentum", "combine"),
            yes,
            **IN_PYTHON,
        )
        for optim in OPTIMIZERS
        for dtype in (BF16,)
        for change in CHANGES
    ),
    *(
        Input(OTHERS, f"{optim} {dtype}: {how}", partial(through_file, optim, dtype, how), (), yes, **IN_PYTHON)
        for optim in OPTIMIZERS
        for dtype in (BF16,)
        for how in ("deepcopy", "pickle")
    ),
]
