"""Weights that others write between steps: what is kept beside a weight is always of the weight that is there."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pion_hf import Blend, Pion, PionLora, Teon, TeonLora, param_groups
from pion_hf.linalg.rotation import Factors, factorized, product_of
from pion_hf.optim import MatrixOptimizer
from pion_hf.optim.fingerprints import FINGERPRINT, Part, fingerprint, fingerprints
from pion_hf.optim.masters import REST_DTYPES
from tests.conftest import master, toy_llama

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = (8, 16)


def start(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Pair(nn.Module):
    """Two matrices of one shape, which are updated as a batch."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a, self.b = map(nn.Parameter, start(dtype))


def whole(cls: type, **options: Any) -> Callable[[Pair], MatrixOptimizer]:
    return lambda pair: cls(pair.named_parameters(), lr=1e-2, **options)


def factors(cls: type, rule: str, method: str, **options: Any) -> Callable[[Pair], MatrixOptimizer]:
    stacks = {"stacks": [["a", "b"]]} if cls is TeonLora else {}

    def build(pair: Pair) -> MatrixOptimizer:
        group = {"params": list(pair.named_parameters()), "rule": rule, "method": method, "unit_step": [0.5, 2.0]}
        return cls([{**group, **stacks}], lr=1e-2, **options)

    return build


RULES = {
    "pion": whole(Pion),
    "pion, natural, ambient": whole(Pion, direction="natural", metric="ambient", momentum_frame="transported"),
    "pion, adam, ambient, in": whole(Pion, direction="adam", metric="ambient", side="in", scale="none"),
    "pion, polar, ambient": whole(Pion, direction="polar", metric="ambient"),
    "pion, paper": whole(Pion, preset="paper"),
    "muon": whole(Teon, stack=1),
    "teon": lambda pair: Teon(
        [{"params": list(pair.named_parameters()), "rule": "teon", "stacks": [["a", "b"]]}], lr=1e-2
    ),
    "rotate": factors(PionLora, "pion_lora", "rotate"),
    "rotate, ambient": factors(PionLora, "pion_lora", "rotate", metric="ambient"),
    "grow": factors(PionLora, "pion_lora", "orthogonal"),
    "teon_lora": factors(TeonLora, "teon_lora", "orthogonal"),
}
FROM_THE_RIGHT = {"pion, adam, ambient, in", "rotate", "rotate, ambient"}  # a zero row stays one
DRIFTING = {"muon", "teon", "grow", "teon_lora", "pion, paper"}


def scale(pair: Pair, first: dict) -> None:
    pair.a.data.mul_(0.5)


def negate(pair: Pair, first: dict) -> None:
    pair.a.data.neg_()


def prune_row(pair: Pair, first: dict) -> None:
    pair.a.data[0] = 0


def prune(pair: Pair, first: dict) -> None:
    pair.a.data *= pair.a.data.abs() > pair.a.data.abs().median()


def swap_rows(pair: Pair, first: dict) -> None:
    pair.a.data[[0, 1]] = pair.a.data[[1, 0]]


def copy_other(pair: Pair, first: dict) -> None:
    with torch.no_grad():
        pair.a.copy_(pair.b)


def load(pair: Pair, first: dict) -> None:
    pair.load_state_dict(first)


def replace(pair: Pair, first: dict) -> None:
    pair.a.data = start(pair.a.dtype, seed=5)[0]


def from_vector(pair: Pair, first: dict) -> None:
    vector_to_parameters(parameters_to_vector(pair.parameters()).detach() * 1.25, pair.parameters())


def average(pair: Pair, first: dict) -> None:
    for name, p in pair.named_parameters():
        p.data.lerp_(first[name], 0.5)


WRITES = [scale, negate, prune_row, prune, swap_rows, copy_other, load, replace, from_vector, average]


def train(pair: nn.Module, optimizer: MatrixOptimizer, steps: range) -> None:
    for number in steps:
        draw = torch.Generator().manual_seed(number)
        for p in pair.parameters():
            p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
        optimizer.step()


def masters(pair: Pair, optimizer: MatrixOptimizer) -> list[Tensor]:
    return [master(p, optimizer) for p in pair.parameters()]


def fresh(build: Callable, pair: Pair, optimizer: MatrixOptimizer, written: set[Tensor]) -> tuple[Pair, Any]:
    """The same weights, and an optimizer with the same averages that knows nothing else of them."""
    other = copy.deepcopy(pair)
    found = build(other)
    for p, q in zip(pair.parameters(), other.parameters(), strict=True):
        found.state[q] = copy.deepcopy(optimizer.state[p])
        if p not in written:
            continue
        found.state[q].pop(FINGERPRINT, None)
        if "rest" in found.state[q]:
            found.state[q]["rest"].zero_()
        if "u.0" in found.state[q]:
            factors = factorized(q.detach().float().unsqueeze(0))
            found.state[q].update({f"{key}.0": value for key, value in factors._asdict().items()})
    return other, found


@pytest.mark.parametrize(
    ("rule", "write", "dtype"),
    [  # every two of them
        pytest.param(rule, write, DTYPES[(i + j) % 3], id=f"{rule}-{write.__name__}-{DTYPES[(i + j) % 3]}")
        for i, rule in enumerate(RULES)
        for j, write in enumerate(WRITES)
    ],
)
def test_what_others_write_is_trained_as_if_it_were_new(rule, write, dtype):
    pair = Pair(dtype)
    optimizer, first = RULES[rule](pair), copy.deepcopy(pair.state_dict())
    train(pair, optimizer, range(4))
    before = [p.detach().clone() for p in pair.parameters()]
    write(pair, first)
    written = {p for p, old in zip(pair.parameters(), before, strict=True) if not torch.equal(p, old)}
    assert written
    spectra = [torch.linalg.svdvals(p.detach().double()) for p in pair.parameters()]
    other, expected = fresh(RULES[rule], pair, optimizer, written)
    train(pair, optimizer, range(4, 12))
    train(other, expected, range(4, 12))
    for p, q in zip(pair.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.isfinite().all()
        assert p.all() or (rule in FROM_THE_RIGHT and write is prune_row)
    if rule not in DRIFTING:
        for w, values, p in zip(masters(pair, optimizer), spectra, pair.parameters(), strict=True):
            now = torch.linalg.svdvals(w.double())
            tolerance = 1e-5 if p in written or dtype == torch.float32 else 1e-2  # its master is not what is stored
            assert (now - values).abs().max() < tolerance * values[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_state_without_fingerprints_is_trusted_once(rule, dtype):
    """As of a version that had none; with weights that are not its own nothing becomes of them that is not a number."""
    pair = Pair(dtype)
    optimizer = RULES[rule](pair)
    train(pair, optimizer, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        del state[FINGERPRINT]
    same, other = copy.deepcopy(pair), copy.deepcopy(pair)
    other.a.data[0] = 0
    train(pair, optimizer, range(4, 24))
    for resumed in (same, other):
        going_on = RULES[rule](resumed)
        going_on.load_state_dict(copy.deepcopy(saved))
        train(resumed, going_on, range(4, 24))
        assert all(p.isfinite().all() and (p.all() or rule in FROM_THE_RIGHT) for p in resumed.parameters())
    assert all(torch.equal(p, q) for p, q in zip(pair.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize("way", ["load", "copy", "pickle"])
@pytest.mark.parametrize("rule", ["pion", "teon", "rotate, ambient"])
def test_fingerprints_are_saved_with_the_state(rule, way):
    pair = Pair(torch.bfloat16)
    optimizer = RULES[rule](pair)
    train(pair, optimizer, range(3))
    first = copy.deepcopy(pair.state_dict())
    train(pair, optimizer, range(3, 6))
    if way == "load":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = copy.deepcopy(pair)
        found = RULES[rule](other)
        found.load_state_dict(torch.load(file, weights_only=True))
    else:
        both = copy.deepcopy((pair, optimizer)) if way == "copy" else pickle.loads(pickle.dumps((pair, optimizer)))
        other, found = both
    other.load_state_dict(first)  # the state is not of these
    expected_pair, expected = fresh(RULES[rule], other, found, set(other.parameters()))
    train(other, found, range(6, 9))
    train(expected_pair, expected, range(6, 9))
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), expected_pair.parameters(), strict=True))


def test_what_is_written_at_every_step_is_said_once():
    pair = Pair(torch.bfloat16)
    optimizer = RULES["pion"](pair)

    def decayed(steps: range) -> None:
        for number in steps:
            pair.b.data.mul_(0.99)
            train(pair, optimizer, range(number, number + 1))

    decayed(range(3))
    with pytest.warns(UserWarning, match="Something else than the optimizer writes b between steps"):
        decayed(range(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decayed(range(4, 8))


def test_a_skipped_step_leaves_the_matter_for_the_next():
    pair = Pair(torch.bfloat16)
    optimizer = RULES["pion"](pair)
    train(pair, optimizer, range(3))
    pair.a.data[0] = 0
    other, expected = fresh(RULES["pion"], pair, optimizer, {pair.a})
    pair.a.grad[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="this step is skipped"):
        optimizer.step()
    train(pair, optimizer, range(3, 6))
    train(other, expected, range(3, 6))
    assert torch.equal(pair.a, other.a)


def test_weights_that_are_not_finite_are_named():
    pair = Pair(torch.float32)
    optimizer = RULES["pion"](pair)
    train(pair, optimizer, range(2))
    pair.b.data[1, 1] = torch.inf
    with pytest.raises(ValueError, match=r"^b holds values that are not finite"):
        train(pair, optimizer, range(2, 3))
    for p in pair.parameters():
        p.grad.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"^b holds values that are not finite, and so do the gradients"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_blend_goes_on_training(dtype):
    """It writes weights with the optimizer's knowledge, of what it rotates with the spectrum of the start."""
    model = toy_llama().to(dtype)
    optimizer, blend = Pion(param_groups(model), lr=1e-2), Blend(model)
    train(model, optimizer, range(3))
    blend.apply(0.5, optimizer)
    w = model.model.layers[0].mlp.up_proj.weight
    values = torch.linalg.svdvals(w.detach().double())
    train(model, optimizer, range(3, 23))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (torch.linalg.svdvals(w.detach().double()) - values).abs().max() < tolerance * values[0]


def test_fused_matrices_and_experts_are_made_anew_together():
    draw = torch.Generator().manual_seed(0)
    shapes = {"fused": (10, 9), "experts": (3, 6, 9), "conv": (9, 6)}
    layouts = {"fused": "rows=4,6", "experts": "", "conv": "transposed"}

    def build(model: nn.ParameterDict) -> Pion:
        groups = [
            {"params": [(n, model[n])], "rule": "pion", "layout": layouts[n], "batch_elements": 60} for n in shapes
        ]
        return Pion(groups, lr=1e-2)

    model = nn.ParameterDict({n: torch.randn(s, generator=draw).bfloat16() for n, s in shapes.items()})
    optimizer = build(model)
    train(model, optimizer, range(4))
    for p in model.values():
        p.data.mul_(-0.5)
    before = {n: p.detach().clone() for n, p in model.items()}
    train(model, optimizer, range(4, 24))
    for name, p in model.items():
        views = {"fused": lambda x: x.split((4, 6)), "experts": lambda x: x.unbind(), "conv": lambda x: [x]}[name]
        for now, old in zip(views(p.detach()), views(before[name]), strict=True):
            old, now = (torch.linalg.svdvals(x.double()) for x in (old, now))
            assert (now - old).abs().max() < 4e-3 * old[0]  # as bfloat16 rounds


# -- another precision, other options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("before", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_weights_go_on_in_another_precision(rule, before, after):
    pair = Pair(before)
    optimizer = RULES[rule](pair)
    train(pair, optimizer, range(3))
    momentum = optimizer.state[pair.a].get("momentum")
    pair.to(after)
    spectrum = torch.linalg.svdvals(pair.a.detach().double())
    train(pair, optimizer, range(3, 6))
    state = optimizer.state[pair.a]
    assert state["step"] == 6, "it has begun anew"
    # The others' factors are their masters.
    assert (state["rest"].dtype if "rest" in state else None) == (REST_DTYPES.get(after) if rule in DRIFTING else None)
    assert momentum is None or state["momentum"].any()
    if rule not in DRIFTING:
        tolerance = 1e-2 if before != after and after in REST_DTYPES else 1e-5
        now = torch.linalg.svdvals(masters(pair, optimizer)[0].double())
        assert (now - spectrum).abs().max() < max(
            tolerance, 1e-2 if before == after != torch.float32 else 0
        ) * spectrum[0]


def test_adamw_goes_on_in_another_precision_between_steps():
    pair, bias = Pair(torch.float32), nn.Parameter(torch.ones(5))
    optimizer = Pion([{"params": [pair.a], "rule": "pion"}, {"params": [bias], "rule": "adamw"}], lr=1e-2)
    model = nn.ParameterList([pair.a, bias])
    train(model, optimizer, range(3))
    model.to(torch.bfloat16)
    train(model, optimizer, range(3, 6))
    assert optimizer.state[bias]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[bias]["step"] == 6


CHANGES = {
    "to ambient": ({}, {"metric": "ambient"}, 6),
    "to lie": ({"metric": "ambient"}, {"metric": "lie"}, 6),
    "to adam": ({"direction": "natural"}, {"direction": "adam"}, 6),
    "to gradient": ({"direction": "natural"}, {"direction": "gradient"}, 6),
    "to natural": ({}, {"direction": "natural"}, 3),
    "to our own rule": ({}, {"direction": "natural", "metric": "ambient", "momentum_frame": "transported"}, 3),
    "to lie momentum": ({}, {"momentum_frame": "lie"}, 3),
    "to a second moment": ({}, {"second_moment": True}, 3),
    "to one side": ({}, {"side": "in"}, 6),
}


@pytest.mark.parametrize(("before", "change", "step"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_option_may_change_between_steps(before, change, step, dtype):
    pair = Pair(dtype)
    optimizer = Pion(pair.named_parameters(), lr=1e-2, **before)
    train(pair, optimizer, range(3))
    spectrum = torch.linalg.svdvals(masters(pair, optimizer)[0].double())
    optimizer.param_groups[0].update(change)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(pair, optimizer, range(3, 6))
    assert optimizer.state[pair.a]["step"] == step
    assert len([w for w in said if "begins anew" in str(w.message)]) == (2 if step == 3 else 0)
    now = torch.linalg.svdvals(masters(pair, optimizer)[0].double())
    tolerance = 1e-2 if dtype == torch.bfloat16 and step == 3 else 1e-5
    assert (now - spectrum).abs().max() < tolerance * spectrum[0]


@pytest.mark.parametrize("rule", ["pion", "pion, natural, ambient", "rotate"])
def test_a_matrix_that_others_made_zero_leaves_its_state_finite(rule):
    pair = Pair(torch.float32)
    optimizer = RULES[rule](pair)
    train(pair, optimizer, range(2))
    pair.a.data.zero_()
    train(pair, optimizer, range(2, 4))
    assert all(value.isfinite().all() for value in optimizer.state[pair.a].values() if torch.is_tensor(value))
    pair.a.data.copy_(start()[0])
    train(pair, optimizer, range(4, 6))
    now, before = (torch.linalg.svdvals(x.double()) for x in (pair.a.detach(), start()[0]))
    assert (now - before).abs().max() < 1e-4 * before[0]


def test_a_metric_that_comes_back_goes_on_with_its_factors():
    pair = Pair(torch.float32)
    optimizer = RULES["pion"](pair)
    for number, metric in enumerate(["ambient", "lie", "ambient", "lie", "ambient"]):
        optimizer.param_groups[0]["metric"] = metric
        train(pair, optimizer, range(3 * number, 3 * number + 3))
    factors = Factors(*(optimizer.state[pair.a][f"{key}.0"] for key in "usv"))
    torch.testing.assert_close(product_of(factors)[0], pair.a.detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "lei"}, "metric"),
        ({"side": "both", "metric": "ambient"}, "side='both' is not for"),
        ({"keep": 2}, "keep=2 needs the inputs"),
    ],
)
@pytest.mark.filterwarnings("ignore:The optimizer state of")
def test_a_change_that_cannot_be_is_refused_in_a_line(change, message):
    pair = Pair(torch.float32)
    optimizer = RULES["pion"](pair)
    train(pair, optimizer, range(3))
    before = copy.deepcopy(pair.state_dict())
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=message):
        train(pair, optimizer, range(3, 4))
    assert all(torch.equal(p, before[name]) for name, p in pair.named_parameters())


# -- fingerprints -----------------------------------------------------------------------------------------------------


def moved(x: Tensor, index: Any, by: Callable[[Tensor], Tensor]) -> Tensor:
    x = x.clone()
    x[index] = by(x[index])
    return x


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("n", [24, 25])
def test_fingerprints_tell_weights_apart(dtype, n):
    x = torch.randn(24, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    zero = torch.zeros_like(x)
    others = [x, -x, x / 2, x * 2, x + 1, x.flip(0), x.flip(1), x.roll(1, 0), x.roll(1, 1), zero, -zero]
    others += [x.T.contiguous().reshape(24, n), x.tril(), x.triu(), x[torch.randperm(24)], x[:, torch.randperm(n)]]
    others += [moved(x, (slice(None), i), torch.neg) for i in range(n)] + [moved(x, i, torch.neg) for i in range(24)]
    others += [moved(x, (3, i), torch.zeros_like) for i in range(n)] + [
        moved(zero, (3, i), torch.neg) for i in range(n)
    ]
    others += [moved(x, [i, i + 1], lambda rows: rows.flip(0)) for i in range(23)]
    others += [moved(x, (slice(None), [i, i + 1]), lambda columns: columns.flip(1)) for i in range(n - 1)]
    others += [moved(x, (slice(0, 12), slice(0, 12)), lambda block: block.T)]
    found = [fingerprint(other).item() for other in others]
    assert len(set(found)) == len(found)
    assert all(a.dtype == torch.int64 and not a.ndim for a in map(fingerprint, others))
    signs = [moved(x, ([2, 5], [i, j]), torch.neg) for i in range(n) for j in range(n)]
    signs += [moved(x, (4, [i, j]), torch.neg) for i in range(n) for j in range(i)]
    assert fingerprint(x) not in torch.stack([fingerprint(other) for other in signs])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_fingerprints_of_parts_add_up(dtype):
    for shape in ((7, 9), (5, 8), (3, 5, 7), (2, 517)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for dim, size in enumerate(shape):
            for cut in {0, 1, size // 2, size - 1, size}:
                first, second = x.split([cut, size - cut], dim)
                start = [(0,) * dim + (begin,) + (0,) * (len(shape) - dim - 1) for begin in (0, cut)]
                parts = [Part(first, shape, start[0]), Part(second, shape, start[1])]
                assert fingerprints([[part] for part in parts]).sum() == fingerprint(x), (shape, dim, cut)
                assert fingerprints([parts]) == fingerprint(x), (shape, dim, cut)


def test_fingerprints_do_not_depend_on_memory_or_company():
    draw = torch.Generator().manual_seed(0)
    xs = [torch.randn(shape, generator=draw) for shape in ((4, 6), (6, 4), (4, 6), (3, 4, 6), (700, 900), (4, 6))]
    xs[2] = xs[2].bfloat16()
    together = fingerprints([[Part(x, tuple(x.shape))] for x in xs])
    assert together.tolist() == [fingerprint(x).item() for x in xs]
    assert fingerprint(xs[1].T.contiguous().T) == fingerprint(xs[1])
    shifted = torch.cat((torch.zeros(1), xs[0].flatten()))[1:].view(4, 6)  # begins in the middle of 64 bits
    assert fingerprint(shifted) == fingerprint(xs[0])
    strange = torch.randint(-(2**31), 2**31, (40, 50), generator=draw).int()
    strange[0], strange[1] = 2**31 - 1, -(2**31)
    assert fingerprint(strange.view(torch.float32)) == fingerprint(strange.view(torch.float32).clone())
