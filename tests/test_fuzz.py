"""Random shapes, precisions, layouts, stacks, options and gradients: an error of ours, or steps that do their work.

The examples are the same at every run (`derandomize`).
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import math
import traceback
import typing
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pion_hf
from pion_hf.optim import MatrixOptimizer, Pion, PionLora, Teon, TeonLora, blocks
from pion_hf.optim.groups import kept_columns
from pion_hf.optim.inputs import Inputs
from tests.conftest import master

FUZZ = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
CLASSES = (Pion, Teon, PionLora, TeonLora)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OURS = Path(pion_hf.__file__).parent
# Of options that take numbers: what is inside the range of most, and what is in that of none.
FRACTIONS = st.sampled_from([0.0, 0.02, 0.5, 0.9])
NO_NUMBERS = st.sampled_from([-1.0, math.nan, math.inf, "much", None])


@pytest.fixture(autouse=True, scope="module")
def traced():
    """What a compiler makes of the elementwise parts takes minutes, and is tried elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        yield


@dataclass
class Setup:
    """What an optimizer is built of: once for every copy of the parameters."""

    cls: type[MatrixOptimizer]
    groups: list[dict[str, Any]]
    options: dict[str, Any]
    params: dict[str, Tensor]
    seed: int = 0

    def build(self) -> tuple[MatrixOptimizer, dict[str, nn.Parameter]]:
        params = {name: nn.Parameter(p.clone()) for name, p in self.params.items()}
        inputs = {"inputs": SomeInputs(kept_columns(self.options))} if self.options.get("keep") else {}
        groups = [{**copy.deepcopy(g), "params": [(name, params[name]) for name in g["params"]]} for g in self.groups]
        return self.cls(groups, **self.options, **inputs), params

    def gradients(self, step: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1000 * self.seed + step)
        return {
            n: torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype) for n, p in self.params.items()
        }

    def __repr__(self) -> str:
        shapes = {name: (tuple(p.shape), p.dtype) for name, p in self.params.items()}
        return f"{self.cls.__name__}({self.groups}, **{self.options}) of {shapes}, seed {self.seed}"


class SomeInputs(Inputs):
    """As of a model whose layers have been called; what they took in shows as many directions as are asked for."""

    def __init__(self, directions: int) -> None:
        super().__init__(nn.Module(), directions)

    def directions(self, name: str, n: int, count: int, device: torch.device, *, half: int | None = None) -> Tensor:
        draw = torch.Generator().manual_seed(n)
        found = torch.linalg.qr(torch.randn(n, min(n, count), generator=draw, dtype=torch.float64)).Q
        if half is not None:
            found *= torch.linspace(1, 0.5, found.shape[1], dtype=torch.float64)
        return nn.functional.pad(found, (0, count - found.shape[1]))


def option_values(hint: Any, *, valid: bool) -> st.SearchStrategy:
    """Values for an option of this type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in arguments:
        (hint,) = (a for a in arguments if a is not type(None))
        return option_values(hint, valid=valid)
    if origin is Literal:
        return st.sampled_from(arguments) if valid else st.sampled_from([arguments[0].upper(), "", 3, None])
    if origin is tuple:
        return (
            st.tuples(FRACTIONS, FRACTIONS) if valid else st.sampled_from([(1.0, 0.5), (0.9,), 0.9, ("a", 0.5), None])
        )
    if hint is bool:
        return st.booleans() if valid else st.sampled_from(["no", None])
    if hint is int:
        return st.integers(1, 6) if valid else st.sampled_from([0, -1, 2.5, 100, "two", None])
    return FRACTIONS if valid else NO_NUMBERS


@st.composite
def options_of(draw: st.DrawFn, cls: type, *, invalid: bool) -> dict[str, Any]:
    """Some of the options of a class, one of them invalid if that is wanted."""
    hints = typing.get_type_hints(cls.__init__)
    elsewhere = ("self", "params", "stack", "inputs")
    names = [name for name in inspect.signature(cls.__init__).parameters if name not in elsewhere]
    chosen = draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
    options = {name: draw(option_values(hints[name], valid=True)) for name in chosen if name != "lr"}
    options["lr"] = draw(st.sampled_from([1e-3, 1e-2, 0.1, 1.0]))
    if invalid:
        name = draw(st.sampled_from(names))
        options[name] = draw(option_values(hints[name], valid=False))
    return options


@st.composite
def layouts(draw: st.DrawFn, rows: int) -> str:
    """A layout that fits so many output rows."""
    parts = ["transposed"] if draw(st.booleans()) else []
    if rows > 1 and draw(st.booleans()):
        cut = draw(st.integers(1, rows - 1))
        parts.append(f"rows={cut},{rows - cut}")
    elif rows % 2 == 0 and draw(st.booleans()):
        parts.append(
            f"interleaved={draw(st.sampled_from([d for d in range(1, rows // 2 + 1) if rows // 2 % d == 0]))},2"
        )
    return ";".join(parts)


@st.composite
def setups(draw: st.DrawFn, *, dtypes: tuple = DTYPES, invalid: bool = False) -> Setup:
    cls = draw(st.sampled_from(CLASSES))
    seed = draw(st.integers(0, 9))
    random = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from(dtypes))
    params, groups = {}, []
    for _ in range(draw(st.integers(1, 3))):
        count, m, n = draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
        layout = draw(layouts(m))
        shape = (n, m) if "transposed" in layout else (m, n)
        experts = draw(st.sampled_from([0, 0, 0, 1, 3]))
        names = [f"matrix{len(params) + i}" for i in range(count)]
        for name in names:
            params[name] = torch.randn((*((experts,) if experts else ()), *shape), generator=random).to(dtype)
        rule = draw(st.sampled_from(cls.matrix_rules))
        group = {"params": names, "rule": rule, "layout": layout}
        if rule in ("pion_lora", "teon_lora"):
            group |= {"method": draw(st.sampled_from(["rotate", "orthogonal"])), "unit_step": [0.5] * count}
        if issubclass(cls, Teon):
            group["stack"] = 1
            if rule == cls.stacked_rule and count > 1 and blocks.Layout.parse(layout).pieces == 1:
                group |= {"stack": 2, "stacks": [names[i : i + 2] for i in range(0, count - 1, 2)]}
        groups.append(group)
    if draw(st.booleans()):
        params["bias"] = torch.randn(draw(st.integers(1, 9)), generator=random).to(dtype)
        groups.append({"params": ["bias"], "rule": "adamw"})
    return Setup(cls, groups, draw(options_of(cls, invalid=invalid)), params, seed=seed)


def attempt(setup: Setup, steps: int) -> tuple[MatrixOptimizer, dict[str, nn.Parameter], set[str]] | None:
    """The optimizer after its steps, and the matrices that no step moved.

    None where it says, at the latest at the first step, that it will not take them.
    """
    try:
        optimizer, params = setup.build()
        step(optimizer, params, setup.gradients(0))
    except ValueError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        event(f"refused: {str(refusal)[:50]}")
        raised_in = traceback.extract_tb(refusal.__traceback__)[-1].filename
        assert Path(raised_in).is_relative_to(OURS), f"no error of ours, but {refusal} of {raised_in}"
        assert len(str(refusal)) > 20, "an error that does not say what to do"
        assert "\n" not in str(refusal)
        return None
    still = unmoved(setup, optimizer)
    for t in range(1, steps):
        step(optimizer, params, setup.gradients(t))
        still &= unmoved(setup, optimizer)
    return optimizer, params, still


def step(optimizer: MatrixOptimizer, params: dict[str, nn.Parameter], grads: dict[str, Tensor | None]) -> None:
    for name, p in params.items():
        p.grad = grads[name]
    optimizer.step()


def pairs(setup: Setup, optimizer: MatrixOptimizer) -> Iterator[tuple[str, dict, Tensor, Tensor]]:
    """Every matrix at the start and now, `(E, m, n)`, with its name and group."""
    for group in optimizer.param_groups:
        if group["rule"] == "adamw":
            continue
        layout = blocks.Layout.parse(group["layout"])
        for name, p in zip(group["param_names"], group["params"], strict=True):
            now = master(p, optimizer)
            views = (blocks.split(x, layout) for x in (setup.params[name].to(now.dtype), now))
            for i, (before, after) in enumerate(zip(*views, strict=True)):
                yield f"{name}[{i}]", group, blocks.merge_rows(before), blocks.merge_rows(after)


def unmoved(setup: Setup, optimizer: MatrixOptimizer) -> set[str]:
    """Names of matrices that are as they were at the start, but for rounding, and their shapes."""
    return {
        f"{name} {tuple(before.shape)}"
        for name, _, before, after in pairs(setup, optimizer)
        if not ((after - before).flatten(1).norm(dim=1) > 1e-6 * before.flatten(1).norm(dim=1)).all()
    }


def check(setup: Setup, optimizer: MatrixOptimizer, params: dict[str, nn.Parameter]) -> None:
    """Everything is finite, and rotated matrices have kept their singular values."""
    for name, p in params.items():
        assert p.isfinite().all(), f"{name} is not finite"
        for key, value in optimizer.state[p].items():
            assert torch.as_tensor(value).isfinite().all(), f"{key} of {name} is not finite"
    for name, group, before, after in pairs(setup, optimizer):
        if optimizer.keeps_spectrum(group) and group.get("retraction") != "taylor":
            old, new = (torch.linalg.svdvals(w.double()) for w in (before, after))
            drift = ((new - old).abs().amax(-1) / old[..., 0]).max().item()
            assert drift < 1e-4, f"the spectrum of {name} drifted by {drift:.1e}"


@pytest.mark.tried("models, shapes, dtypes and options at random (hypothesis)", 200, "examples")
@settings(FUZZ, max_examples=200)
@given(setups())
def test_steps_move_every_matrix_and_keep_every_spectrum(setup):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = attempt(setup, steps=4)
    if result is not None:
        optimizer, params, still = result
        assert not still
        check(setup, optimizer, params)


@pytest.mark.tried("models, shapes, dtypes and options at random (hypothesis)", 200, "examples")
@settings(FUZZ, max_examples=200)
@given(setups(invalid=True))
def test_an_invalid_option_is_an_error_of_ours_or_harmless(setup):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = attempt(setup, steps=2)
    if result is not None:
        check(setup, *result[:2])


def absent(setup: Setup, step: int) -> dict[str, Tensor | None]:
    """The step's gradients, of which about one in four is missing."""
    lot = torch.randint(4, (len(setup.params),), generator=torch.Generator().manual_seed(step)).tolist()
    return {name: g if keep else None for (name, g), keep in zip(setup.gradients(step).items(), lot, strict=True)}


@pytest.mark.tried("models, shapes, dtypes and options at random (hypothesis)", 60, "examples")
@settings(FUZZ, max_examples=60)
@given(setups())
def test_saving_and_loading_between_any_two_steps_changes_nothing(setup):
    """Whatever an optimizer keeps beside its state is made anew, with parameters that have taken fewer steps.

    Before the first one it says how many bytes its state will have.
    """
    try:
        optimizer, params = setup.build()
        planned = optimizer.state_bytes()
        step(optimizer, params, setup.gradients(0))
    except ValueError:
        assume(False)
    entries = [entry for state in optimizer.state.values() for entry in state.items() if entry[0] != "step"]
    assert planned == sum(value.nbytes for _, value in entries if isinstance(value, Tensor))
    second, copies = setup.build()
    step(second, copies, setup.gradients(0))
    for t in range(1, 4):
        file = io.BytesIO()
        torch.save(second.state_dict(), file)
        file.seek(0)
        current = copies
        second, copies = setup.build()
        for name, p in copies.items():
            p.data.copy_(current[name].detach())
        second.load_state_dict(torch.load(file, weights_only=True))
        step(optimizer, params, absent(setup, t))
        step(second, copies, absent(setup, t))
        for name, p in params.items():
            assert torch.equal(p, copies[name]), f"{name} at step {t + 1}"


@pytest.mark.tried("models, shapes, dtypes and options at random (hypothesis)", 60, "examples")
@settings(FUZZ, max_examples=60)
@given(setups(dtypes=(torch.float64,)))
def test_matrices_together_move_as_each_alone(setup):
    try:
        together, params = setup.build()
        step(together, params, setup.gradients(0))
    except ValueError:
        assume(False)
    for t in range(1, 4):
        step(together, params, absent(setup, t))
    for group in setup.groups:
        stacks = group.get("stacks", [])
        single = [[name] for name in group["params"] if not any(name in names for names in stacks)]
        for names in [*stacks, *single] if group["rule"] != "adamw" else []:
            one = {**group, "params": names}
            if "unit_step" in group:
                one["unit_step"] = group["unit_step"][: len(names)]  # they are all the same
            if "stack" in group:
                one |= {"stack": len(names), **({"stacks": [names] if len(names) > 1 else []} if stacks else {})}
            options = dict(setup.options)
            if "unit_step" in group and blocks.Layout.parse(group["layout"]).transposed:
                options.pop("keep", None)  # B keeps nothing, and is refused where it is alone
            params_of_one = {n: setup.params[n] for n in names}
            alone, copies = replace(setup, groups=[one], params=params_of_one, options=options).build()
            for t in range(4):
                grads = setup.gradients(t) if t == 0 else absent(setup, t)
                step(alone, copies, {n: grads[n] for n in names})
            for n, p in copies.items():
                assert (p - params[n]).norm() <= 1e-6 * p.norm(), f"{n} alone and among others"
