"""Pion: reference trajectories, the spectrum, options, and what it refuses."""

import itertools
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pion_hf.linalg.spectrum import singular_values, spectral_drift
from pion_hf.optim import Pion
from tests.reference import trajectory

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "pion_teon_cases.json").read_text())
AMBIENT = {"direction": "natural", "metric": "ambient", "momentum_frame": "transported"}

# Every rule, at the learning rate 1e-2 of the spectrum test.
RULES = {
    "default": {},
    "lie momentum": {"momentum_frame": "lie"},
    "lie momentum, second moment": {"momentum_frame": "lie", "second_moment": True},
    "both sides": {"side": "both"},
    "second moment": {"second_moment": True},
    "transported momentum": {"momentum_frame": "transported"},
    "msign": {"direction": "msign"},
    "polar": {"direction": "polar"},
    "polar, ambient": {"direction": "polar", "metric": "ambient"},
    "adam, ambient": {"direction": "adam", "metric": "ambient", "scale": "none"},
    "adam, lie": {"direction": "adam"},
    "natural, ambient": AMBIENT,
    "natural, lie": {"direction": "natural"},
    "spectral scale": {"scale": "spectral"},
    "spectral scale, natural, ambient": {**AMBIENT, "scale": "spectral"},
    "bfloat16 generators": {"generator_dtype": "bfloat16"},
    "bfloat16 generators, natural, ambient": {**AMBIENT, "generator_dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def trajectories():
    return load_file(DATA / "pion_teon_trajectories.safetensors")


def reference_options(config: dict) -> dict:
    names = {"second": "second_moment", "momentum": "momentum_frame"}
    options = {names.get(key, key): value for key, value in config.items()}
    return {"polar": "svd", "generator_dtype": "float32", **options}


@pytest.mark.parametrize("case", [i for i, c in enumerate(CASES["pion_configs"]) if c["retraction"] == "taylor"])
@pytest.mark.parametrize("shape", range(len(CASES["pion_shapes"])))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_reference_trajectories(trajectories, shape, case, dtype, tolerance):
    """Of the paper's rule and its variants."""
    options = reference_options(CASES["pion_configs"][case])
    expected = trajectories[f"pion.{shape}.{case}.trajectory"]
    p = nn.Parameter(trajectories[f"pion.{shape}.weight"].to(dtype, copy=True))
    optimizer = Pion([p], **options)
    steps = CASES["steps"]
    for t, grad in enumerate(trajectories[f"pion.{shape}.grads"]):
        p.grad = grad.to(dtype)
        optimizer.step()
        want = expected[len(expected) - steps + t]
        assert (p.double() - want).abs().max() <= tolerance * want.abs().max()


FIXED = {"scale": "none", "lr": 1e-3}
SIDES = ("in", "out", "alternate")
LITERAL = [
    {},
    {"side": "both"},
    {"second_moment": True},
    {"momentum_frame": "transported"},
    {"momentum_frame": "transported", "side": "both"},
    {"momentum_frame": "lie"},
    {"momentum_frame": "lie", "second_moment": True, "side": "both"},
    {"momentum_frame": "lie", **FIXED, "lr": 1e-4},
    *({"direction": d, "side": side} for d in ("polar", "msign") for side in ("alternate", "both")),
    {"direction": "msign", "momentum_frame": "lie"},
    *({"direction": "adam", **FIXED, "lr": 1e-4, "side": side} for side in ("in", "out", "both")),
    *({**AMBIENT, "direction": d, "side": side} for d in ("natural", "gradient", "polar", "adam") for side in SIDES),
    {**AMBIENT, "momentum_frame": "ambient"},
    *({**AMBIENT, "direction": "adam", **FIXED, "side": side} for side in SIDES),
]


@pytest.mark.parametrize("options", LITERAL, ids=str)
@pytest.mark.parametrize("shape", [(9, 9), (14, 6), (6, 14), (5, 30)])
def test_rules_follow_their_literal_reference(exact_rank, options, shape):
    draw = torch.Generator().manual_seed(3)
    w, grads = (torch.randn(size, dtype=torch.float64, generator=draw) for size in (shape, (8, *shape)))
    options = {"lr": 3e-3, **options}
    expected = trajectory(w, grads, **options)
    # A polar factor of a generator of low rank depends on what counts as zero.
    exact = 1e-5 if options.get("direction") == "msign" else 1e-8
    for dtype, tolerance in ((torch.float64, exact), (torch.float32, 1e-4)):
        p = nn.Parameter(w.to(dtype, copy=True))
        optimizer = Pion([p], polar="svd", generator_dtype="float32", **options)
        for grad, want in zip(grads, expected, strict=True):
            p.grad = grad.to(dtype)
            optimizer.step()
            assert (p.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("metric", ["lie", "ambient"])
@pytest.mark.parametrize("side", ["in", "out"])
def test_the_spectral_scale_turns_by_the_learning_rate(exact_rank, metric, side):
    for shape in ((9, 9), (14, 6), (6, 14)):
        draw = torch.Generator().manual_seed(3)
        w, grads = (torch.randn(size, dtype=torch.float64, generator=draw) for size in (shape, (1, *shape)))
        options = {"lr": 1e-2, "scale": "spectral", "metric": metric, "direction": "gradient", "side": side}
        (want,) = trajectory(w, grads, **options)
        p = nn.Parameter(w.clone())
        p.grad = grads[0]
        Pion([p], **options).step()
        assert (p - want).norm() <= 0.05 * (w - want).norm()  # the largest angle is estimated


def drifts(shapes: list[tuple[int, int]], steps: int, **options) -> list[float]:
    """Of matrices that follow a quadratic with noise, all by one optimizer: directions persist, as in training."""
    draw = torch.Generator().manual_seed(7)
    starts = [torch.randn(shape, generator=draw) * 0.05 for shape in shapes]
    targets = [torch.randn(shape, generator=draw) * 0.05 for shape in shapes]
    params = [nn.Parameter(w.clone()) for w in starts]
    optimizer = Pion(params, **options)
    for _ in range(steps):
        for p, target in zip(params, targets, strict=True):
            p.grad = p.detach() - target + 0.015 * torch.randn(p.shape, generator=draw)
        optimizer.step()
    for p, w in zip(params, starts, strict=True):
        assert (p - w).norm() > 0.5 * w.norm(), "the matrix hardly moved: this shows nothing"
    return [
        spectral_drift(singular_values(w), singular_values(p.detach())).item()
        for p, w in zip(params, starts, strict=True)
    ]


@pytest.mark.parametrize("rule", RULES)
def test_a_hundred_steps_keep_the_spectrum(rule):
    """What rounding does to it is there after fifty steps, and half of what a thousand may do."""
    lr = 0.1 if "spectral" in rule else 1e-2  # which turns by so much
    assert max(drifts([(32, 32), (30, 12), (12, 30)], 100, lr=lr, **RULES[rule])) < 5e-6


@pytest.mark.parametrize("rule", ["default", "both sides", "natural, ambient"])
def test_a_thousand_steps_keep_the_spectrum(rule):
    assert max(drifts([(30, 12)], 1000, lr=1e-2, **RULES[rule])) < 1e-5


def test_taylor_of_degree_two_drifts_where_the_polar_retraction_does_not():
    (taylor,), (polar,) = (drifts([(32, 32)], 300, lr=5e-2, retraction=name) for name in ("taylor", "polar"))
    assert polar < 1e-4
    assert taylor > 1e-2


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_factors_that_moved_for_long_are_those_of_the_weight(exact_rank, shape):
    """150 steps on carried factors equal 150 steps with a fresh decomposition in each."""
    torch.manual_seed(0)
    w = torch.randn(shape, dtype=torch.float64) * 0.1
    options = {"direction": "adam", "metric": "ambient", "scale": "none", "lr": 1e-3}
    carried, fresh = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    first, second = Pion([carried], **options), Pion([fresh], **options)
    for _ in range(150):
        carried.grad = fresh.grad = torch.randn(shape, dtype=torch.float64)
        first.step()
        second.step()
        second.state[fresh]["fingerprint"] += 1  # as if somebody had written the weight
    torch.testing.assert_close(carried, fresh, atol=1e-9, rtol=1e-8)


def test_batch_equals_slices():
    """Matrices updated together move as each would alone, also those inside one tensor."""
    torch.manual_seed(0)
    stack, grad = torch.randn(3, 10, 6), torch.randn(3, 10, 6)
    together = nn.Parameter(stack.clone())
    fused = nn.Parameter(stack.reshape(30, 6).clone())
    alone = [nn.Parameter(w.clone()) for w in stack]
    options = {"lr": 1e-2, "generator_dtype": "float32"}
    optimizers = [
        Pion([{"params": [together], "rule": "pion"}], **options),
        Pion([{"params": [fused], "rule": "pion", "layout": "rows=10,10,10"}], **options),
        Pion(alone, **options),
    ]
    together.grad, fused.grad = grad, grad.reshape(30, 6)
    for p, g in zip(alone, grad, strict=True):
        p.grad = g
    for _ in range(4):
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(fused.reshape(3, 10, 6), torch.stack(alone), atol=1e-6, rtol=1e-5)


def test_transposed_storage_moves_as_its_transpose():
    torch.manual_seed(0)
    w, grad = torch.randn(12, 5), torch.randn(12, 5)
    plain, stored = nn.Parameter(w.clone()), nn.Parameter(w.T.contiguous())
    optimizers = Pion([plain], lr=1e-2), Pion([{"params": [stored], "rule": "pion", "layout": "transposed"}], lr=1e-2)
    plain.grad, stored.grad = grad, grad.T.contiguous()
    for _ in range(4):
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(plain, stored.T, atol=1e-6, rtol=1e-5)


def test_other_groups_are_exactly_torch_adamw():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(7)), None
    theirs = nn.Parameter(ours.detach().clone())
    matrix = nn.Parameter(torch.randn(4, 4))
    settings = {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = Pion([{"params": [matrix], "rule": "pion"}, {"params": [ours], "rule": "adamw", **settings}])
    reference = torch.optim.AdamW([theirs], fused=True, **settings)
    for _ in range(5):
        grad = torch.randn(7)
        ours.grad, theirs.grad, matrix.grad = grad.clone(), grad.clone(), torch.randn(4, 4)
        optimizer.step()
        reference.step()
        assert torch.equal(ours, theirs)


def test_bare_tensors_are_divided_and_names_kept():
    layer = nn.Linear(4, 3)
    optimizer = Pion(layer.named_parameters())
    assert [(g["rule"], g["param_names"]) for g in optimizer.param_groups] == [
        ("pion", ["weight"]),
        ("adamw", ["bias"]),
    ]
    assert len(Pion(layer.parameters()).param_groups) == 2


def test_groups_without_a_rule_are_divided_with_their_names_whenever_they_come():
    layer, later = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizer = Pion([{"params": list(layer.parameters()), "param_names": ["weight", "bias"], "lr": 1e-2}])
    optimizer.add_param_group({"params": [(f"later.{n}", p) for n, p in later.named_parameters()]})
    assert [(g["rule"], g["param_names"]) for g in optimizer.param_groups] == [
        ("pion", ["weight"]),
        ("adamw", ["bias"]),
        ("pion", ["later.weight"]),
        ("adamw", ["later.bias"]),
    ]
    assert {g["lr"] for g in optimizer.param_groups[:2]} == {1e-2}


def test_state_is_lazy_and_in_parameter_shape():
    p = nn.Parameter(torch.randn(6, 4))
    optimizer = Pion([("w", p)], **AMBIENT)
    assert not optimizer.state
    p.grad = torch.randn(6, 4)
    optimizer.step()
    shapes = {k: tuple(v.shape) for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
    assert shapes == {
        "momentum": (6, 4),
        "second": (6, 4),
        "u.0": (1, 4, 4),
        "s.0": (1, 4),
        "v.0": (1, 4, 6),
        "fingerprint": (),
    }


def test_non_finite_gradients_skip_the_whole_step_and_are_counted():
    torch.manual_seed(0)
    p, q = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    optimizer = Pion([p, q], lr=1e-2)
    for bad in (torch.nan, torch.inf, -torch.inf):
        p.grad, q.grad = torch.randn(4, 4), torch.randn(4)
        q.grad[1] = bad
        before = p.detach().clone(), q.detach().clone()
        expectation = pytest.warns(UserWarning, match="not finite") if bad is torch.nan else warnings.catch_warnings()
        with expectation:
            if bad is not torch.nan:
                warnings.simplefilter("error")
            optimizer.step()
        assert torch.equal(p, before[0])
        assert torch.equal(q, before[1])
        assert not any(optimizer.state.values())
    assert optimizer.skipped_steps == 3
    q.grad[1] = 0.0
    optimizer.step()
    assert not torch.equal(p, before[0])


def test_parameters_without_gradient_are_left_alone():
    moved, still = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    before = still.detach().clone()
    optimizer = Pion([moved, still])
    moved.grad = torch.randn(4, 4)
    optimizer.step()
    assert torch.equal(still, before)


def test_a_closure_is_called_with_gradients_before_the_step():
    p = nn.Parameter(torch.randn(4, 4))
    optimizer, before = Pion([p], lr=1e-2), p.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == before.sum().item()
    assert p.sum() < before.sum()


def test_paper_preset_is_the_papers_set_of_choices():
    group = Pion([nn.Parameter(torch.eye(3))], preset="paper").param_groups[0]
    paper = {
        "momentum_frame": "lie",
        "direction": "gradient",
        "metric": "lie",
        "scale": "rms",
        "side": "alternate",
        "retraction": "taylor",
        "degree": 2,
        "second_moment": False,
    }
    assert {key: group[key] for key in paper} == paper


def test_the_default_is_the_published_rule_with_an_exact_retraction_and_a_momentum_of_gradients():
    default, paper = (Pion([nn.Parameter(torch.eye(3))], **o).param_groups[0] for o in ({}, {"preset": "paper"}))
    assert {key for key, value in paper.items() if key != "params" and value != default[key]} == {
        "momentum_frame",
        "retraction",
    }
    assert (default["momentum_frame"], default["retraction"], default["rms"]) == ("ambient", "polar", 0.2)


def test_the_ambient_preset_is_our_own_rule():
    default, ambient = (Pion([nn.Parameter(torch.eye(3))], **o).param_groups[0] for o in ({}, {"preset": "ambient"}))
    differs = {key: value for key, value in ambient.items() if key != "params" and value != default[key]}
    assert differs == {**AMBIENT, "rms": 2.0}


def test_options_that_say_what_a_preset_sets_are_no_clash():
    group = Pion([nn.Parameter(torch.eye(3))], preset="ambient", rms=2.0, metric="ambient", side="in").param_groups[0]
    assert (group["rms"], group["metric"], group["side"]) == (2.0, "ambient", "in")


MATRIX = [nn.Parameter(torch.eye(3))]
BAD_OPTIONS = [
    ({"side": "inn"}, "Did you mean 'in'"),
    ({"direction": "adamw"}, "Did you mean 'adam'"),
    ({"metric": "ambiant"}, "Did you mean 'ambient'"),
    ({"momentum_frame": "transport"}, "Did you mean 'transported'"),
    ({"retraction": "poler"}, "Did you mean 'polar'"),
    ({"preset": "papers"}, "Did you mean 'paper'"),
    ({"preset": "paper", "scale": "none"}, "preset='paper' sets scale='rms'"),
    ({"preset": "ambient", "rms": 0.1}, r"preset='ambient' sets rms=2\.0, but rms=0\.1 was given"),
    ({"preset": "ambient", "direction": "adam"}, "preset='ambient' sets direction='natural'"),
    ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
    ({"lr": float("nan")}, "lr must be at least 0"),
    ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
    ({"betas": (0.9,)}, "betas must be two numbers"),
    ({"eps": -1e-8}, "eps must be"),
    ({"rms": 0.0}, "rms must be above 0"),
    ({"degree": 0}, "degree must be in"),
    ({"polar_steps": 0}, "polar_steps must be in"),
    ({"weight_decay": -0.1}, "weight_decay must be"),
    ({"side": "both", "metric": "ambient"}, "side='both' is not for metric='ambient'"),
    ({"momentum_frame": "lie", "direction": "adam"}, "momentum_frame='lie' averages generators"),
    ({"momentum_frame": "lie", "metric": "ambient"}, "metric='lie'"),
    ({"second_moment": True, "direction": "adam"}, "second_moment=True is a variant of direction='gradient'"),
    ({"direction": "msign", "metric": "ambient"}, "direction='msign'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(o) for o, _ in BAD_OPTIONS])
def test_wrong_options_name_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        Pion(MATRIX, **options)


def test_wrong_groups_and_parameters_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'rms'"):
        Pion([{"params": MATRIX, "rmss": 0.1}])
    with pytest.raises(ValueError, match="Did you mean 'pion'"):
        Pion([{"params": MATRIX, "rule": "pionn"}])
    with pytest.raises(ValueError, match="no matrix"):
        Pion([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="no parameters"):
        Pion([])
    with pytest.raises(ValueError, match="complex"):
        Pion([nn.Parameter(torch.eye(3, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="sparse"):
        Pion([nn.Parameter(torch.eye(3).to_sparse())])
    with pytest.raises(ValueError, match="sum to 5"):
        Pion([{"params": [nn.Parameter(torch.randn(4, 4))], "rule": "pion", "layout": "rows=2,3"}])
    flat = nn.Parameter(torch.eye(3))
    flat._is_flat_param = True
    with pytest.raises(ValueError, match="FSDP1"):
        Pion([flat])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3, 3), "zero matrix"),
        (torch.full((3, 3), torch.nan), "not finite"),
        (torch.full((3, 3), 1e-30), "is 1e-30, and rotations"),
        (torch.full((3, 3), 1e20), r"is 1e\+20, and rotations"),
    ],
)
def test_matrices_that_cannot_rotate_are_named(matrix, message):
    p = nn.Parameter(matrix)
    optimizer = Pion([("layers.0.q_proj.weight", p)])
    p.grad = torch.ones(3, 3)
    with pytest.raises(ValueError, match=rf"layers\.0\.q_proj\.weight.*{message}"):
        optimizer.step()


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    matrix = nn.Parameter(torch.eye(3))
    optimizer = Pion(
        [{"params": [("w", matrix)], "rule": "pion"}, {"params": [("table", table.weight)], "rule": "adamw"}]
    )
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="table is sparse"):
        optimizer.step()


def test_double_precision_is_kept_where_few_rows_are_rotated():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(24, 32, dtype=torch.float64))
    start = torch.linalg.svdvals(p.detach())
    optimizer = Pion([p], lr=1e-2, side="in")
    for _ in range(50):
        p.grad = torch.randn_like(p)
        optimizer.step()
    assert (torch.linalg.svdvals(p.detach()) / start - 1).abs().max() < 1e-13


# -- tensors without groups -------------------------------------------------------------------------------------------


def test_a_models_tensors_without_groups_are_pointed_out():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 6))
    for params in (model.parameters(), model.named_parameters()):
        with pytest.warns(UserWarning, match=r"embeddings and heads.*param_groups") as said:
            Pion(params)
        assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pion([p for p in model.parameters() if p.ndim == 2])  # somebody has chosen
        Pion(model[1].parameters())


def test_groups_with_and_without_decay_are_pointed_out_once():
    """As a Trainer makes them of `optimizer_cls_and_kwargs=(Pion, {...})`."""
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 6))
    groups = [
        {"params": (p for p in model.parameters() if p.ndim > 1), "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    with pytest.warns(UserWarning, match=r"embeddings and heads.*param_groups") as said:
        optimizer = Pion(groups)
    assert len(said) == 1
    assert [(len(group["params"]), group["rule"]) for group in optimizer.param_groups] == [(2, "pion"), (1, "adamw")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pion([groups[1] | {"rule": "adamw"}, {"params": [p for p in model.parameters() if p.ndim > 1]}])


def test_biases_and_norms_have_no_decay_of_the_constructors():
    optimizer = Pion(nn.Linear(4, 6).parameters(), weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert Pion([{"params": nn.Linear(4, 6).parameters(), "weight_decay": 0.2}]).param_groups[1]["weight_decay"] == 0.2


def test_a_group_that_is_refused_in_part_is_refused():
    optimizer = Pion([nn.Parameter(torch.eye(4))])
    with pytest.raises(ValueError, match="complex"):
        optimizer.add_param_group({"params": [torch.randn(4, 4), torch.randn(4, dtype=torch.complex64)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("options", [{"compile": "no"}, {"second_moment": 0.5}])
def test_flags_are_true_or_false(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} must be True or False, got"):
        Pion([nn.Parameter(torch.eye(4))], **options)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (None, "got None"),
        (3, "got 3"),
        ("weights", "got 'weights'"),
        ([1, 2], "got int among them"),
        ([{"lr": 1.0}], "got None"),
        ([("a", nn.Parameter(torch.ones(2, 2))), ("a", nn.Parameter(torch.ones(2, 2)))], "of one name: 'a'"),
        ([{"params": [nn.Parameter(torch.ones(2, 2))], "param_names": ["a", "b"]}], "1 params and 2 param_names"),
        ([(nn.Parameter(torch.ones(2, 2)), "a")], "got (Parameter, str) among"),
        ([nn.Parameter(torch.ones(2, 2))] * 2, "more than once"),
    ],
    ids=str,
)
def test_what_are_no_parameters_is_said(params, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Pion(params)


FORMS = [
    {},
    {"preset": "paper"},
    {"preset": "ambient"},
    {"second_moment": True},
    {"side": "both"},
    {"direction": "adam", "metric": "ambient", "scale": "none"},
    {"direction": "polar"},
    {"direction": "msign"},
    {"scale": "spectral"},
    {**AMBIENT, "scale": "spectral"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e6, 1e14])
def test_matrices_of_any_size_that_is_taken_stay_finite(form, size):
    cases = list(itertools.product([(8, 8), (6, 20), (20, 6)], (1e-6, 1.0, 1e6)))
    weights = [nn.Parameter(torch.randn(shape) * size) for shape, _ in cases]
    optimizer = Pion(weights, lr=1e-3, **form)
    for _ in range(4):
        for w, (_, large) in zip(weights, cases, strict=True):
            w.grad = torch.randn_like(w) * large
        optimizer.step()
    assert all(w.isfinite().all() for w in weights)


def test_adamw_in_float16_is_pointed_out():
    tensors = {"adamw": torch.ones(4, dtype=torch.float16), "pion": torch.eye(4, dtype=torch.float16)}
    groups = [{"params": [(f"{rule}.weight", nn.Parameter(t))], "rule": rule} for rule, t in tensors.items()]
    with pytest.warns(UserWarning, match="float16, in which eps=1e-08 .* are zero.*: adamw.weight. Load the model"):
        Pion(groups, lr=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps_without_a_gradient_leave_a_weight_to_the_bit(steps):
    """The product of its factors is another one, by rounding."""
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((24, 16), (16, 24))]
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = Pion(params, lr=1e-2)
    for _ in range(steps):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
