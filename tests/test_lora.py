"""PionLora and TeonLora: literal float64 formulas, what a step keeps and how far it goes, and training with peft."""

from __future__ import annotations

import math
import re

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pion_hf import Pion, PionLora, PionTrainer, PionTrainingArguments, TeonLora, param_groups
from tests.conftest import master, toy_llama
from tests.reference import trajectory
from tests.test_adapters import adapted, copies, factor_names, train

EXACT = {"polar": "svd"}
LAYOUTS = {"A": "", "B": "transposed"}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def optimizer_of(params: list[nn.Parameter], method: str = "rotate", *, unit=None, layout="", **options) -> PionLora:
    names = [f"layers.{i}.lora" for i in range(len(params))]
    group = {"rule": "pion_lora", "method": method, "layout": layout, "unit_step": unit or [1.0] * len(params)}
    return PionLora([{**group, "params": list(zip(names, params, strict=True))}], **options)


def teon_of(params: list[nn.Parameter], *, stack: int, unit=None, layout="", **options) -> TeonLora:
    names = [f"layers.{i}.lora" for i in range(len(params))]
    group = {"rule": "teon_lora", "method": "orthogonal", "layout": layout, "unit_step": unit or [1.0] * len(params)}
    group |= {"stacks": [names[i : i + stack] for i in range(0, len(names), stack)] if stack > 1 else []}
    return TeonLora([{**group, "params": list(zip(names, params, strict=True))}], stack=stack, **options)


def step(params: list[nn.Parameter], grads, optimizer: torch.optim.Optimizer) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.to(p.dtype, copy=True)
    optimizer.step()


def polar(x: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


# -- rotations: the literal formula -----------------------------------------------------------------------------------


def literal_rotations(w, grads, *, direction, metric="lie", momentum_frame="transported", **options):
    """Of `w`, seen from its layer: turns of the size of `w`."""
    options |= {"rms": w.norm().item() / math.sqrt(w.numel()), "momentum_frame": momentum_frame}
    return trajectory(w, grads, side="in", direction=direction, metric=metric, **options)


@pytest.mark.parametrize("shape", [(3, 10), (4, 40), (5, 5), (6, 4)])
@pytest.mark.parametrize("metric", ["lie", "ambient"])
@pytest.mark.parametrize("direction", ["polar", "gradient", "adam", "natural"])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_rotation_is_the_dense_one(exact_rank, shape, metric, direction, side):
    w, grads = draw(*shape), draw(6, *shape, seed=1)
    p = nn.Parameter(w.clone() if side == "A" else w.T.clone())
    options = {"metric": metric, "direction": direction, "layout": LAYOUTS[side]}
    optimizer = optimizer_of([p], lr=1e-2, **options, **EXACT)
    expected = literal_rotations(w, grads, lr=1e-2, metric=metric, direction=direction)
    for grad, want in zip(grads, expected, strict=True):
        step([p], [grad if side == "A" else grad.T], optimizer)
        got = p.detach() if side == "A" else p.detach().T
        assert (got - want).norm() <= 1e-8 * want.norm()


def test_the_momentum_may_stay_where_it_is():
    w, grads = draw(3, 10), draw(6, 3, 10, seed=1)
    p = nn.Parameter(w.clone())
    optimizer = optimizer_of([p], lr=5e-2, momentum_frame="ambient", direction="polar", **EXACT)
    expected = literal_rotations(w, grads, lr=5e-2, direction="polar", momentum_frame="ambient")
    for grad, want in zip(grads, expected, strict=True):
        step([p], [grad], optimizer)
        assert (p.detach() - want).norm() <= 1e-8 * want.norm()


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("metric", ["lie", "ambient"])
def test_a_rotation_turns_by_the_learning_rate_whatever_the_size(metric, size):
    w, lr = size * draw(4, 30), 1e-4
    p = nn.Parameter(w.clone())
    step([p], [1e-6 * draw(4, 30, seed=1)], optimizer_of([p], lr=lr, metric=metric))
    assert ((p.detach() - w).norm() / w.norm()).item() == pytest.approx(lr, rel=1e-3)


class Largest(TorchDispatchMode):
    """The most elements that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("metric", ["lie", "ambient"])
@pytest.mark.parametrize("method", ["rotate", "orthogonal"])
def test_nothing_of_size_n_by_n_is_formed(method, metric):
    r, n = 4, 2000
    p = nn.Parameter(draw(r, n).float())
    optimizer = optimizer_of([p], method, metric=metric)
    for seed in (1, 2):
        p.grad = draw(r, n, seed=seed).float()
        with Largest() as largest:
            optimizer.step()
        assert r * n <= largest.elements <= 4 * r * n


RULES = {
    "default": {},
    "ambient": {"metric": "ambient"},
    "gradient": {"direction": "gradient"},
    "natural, ambient": {"direction": "natural", "metric": "ambient", "momentum_frame": "transported"},
    "adam": {"direction": "adam"},
    "momentum left where it is": {"momentum_frame": "ambient"},
}


@pytest.mark.parametrize("shape", [(4, 40), (6, 6), (8, 5)])
@pytest.mark.parametrize("rule", RULES)
def test_80_steps_keep_every_singular_value(rule, shape):
    w = (torch.linspace(0.5, 1.5, shape[0]).unsqueeze(1) * polar(draw(*shape))).float()
    p, target = nn.Parameter(w.clone()), draw(*shape, seed=1).float()
    optimizer = optimizer_of([p], lr=2e-2, **RULES[rule])
    for t in range(80):
        step([p], [p.detach() - target + 0.3 * draw(*shape, seed=t).float()], optimizer)
    old, new = torch.linalg.svdvals(w.double()), torch.linalg.svdvals(p.detach().double())
    torch.testing.assert_close(new, old, rtol=1e-5, atol=0)
    assert (p - w).norm() > 0.5 * w.norm(), "the factor hardly moved: this shows nothing"


# -- growing steps ----------------------------------------------------------------------------------------------------


def one_layer(width: int, out: int, *, size: float, **options) -> nn.Module:
    """A linear layer whose adapter has `B = 0` and an `A` with all singular values `size`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, out, bias=False))
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], **options)).double()
    a = model.base_model.model[0].lora_A["default"].weight
    with torch.no_grad():
        a.copy_(size * torch.linalg.qr(draw(width, a.shape[0]))[0].T)
    return model


@pytest.mark.parametrize("optim", ["pion_lora", "teon_lora"])
@settings(max_examples=25, deadline=None)
@given(
    r=st.integers(1, 6),
    width=st.integers(6, 20),
    out=st.integers(6, 20),
    alpha=st.integers(1, 64),
    size=st.floats(1e-3, 1e3),
    rslora=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_a_growing_step_has_the_spectral_size(optim, r, width, out, alpha, size, rslora, seed):
    """Singular values of `s dB A`, `r` of them: alpha and the size of `A` are out."""
    model, lr = one_layer(width, out, size=size, r=r, lora_alpha=alpha, use_rslora=rslora), 1e-3
    options = {"stack": 1} if optim == "teon_lora" else {}
    groups = param_groups(model, optim, lr=lr, **options)
    optimizer = {"pion_lora": PionLora, "teon_lora": TeonLora}[optim](groups, **options, **EXACT)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    before = a.detach().clone()
    a.grad, b.grad = torch.zeros_like(a), draw(*b.shape, seed=seed)
    optimizer.step()
    assert torch.equal(a, before)
    scaling = alpha / (math.sqrt(r) if rslora else r)
    values = torch.linalg.svdvals(scaling * b.detach() @ a.detach())[:r]
    want = {"pion_lora": 25, "teon_lora": 15 * math.sqrt(r / 16)}[optim] * lr * math.sqrt(out / width)
    torch.testing.assert_close(values, torch.full_like(values, want), rtol=1e-6, atol=0)


def literal_muon(w, grads, *, lr, unit, mu, nesterov, decay):
    m = torch.zeros_like(w)
    for g in grads:
        m = mu * m + (1 - mu) * g
        u = mu * m + (1 - mu) * g if nesterov else m
        w = (1 - lr * decay) * w - lr * unit * polar(u)
        yield w


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("side", ["A", "B"])
def test_stacks_of_one_are_muon_on_every_factor(side, nesterov):
    w, grads = draw(3, 8), draw(5, 3, 8, seed=1)
    p = nn.Parameter(w.clone() if side == "A" else w.T.clone())
    common = {"lr": 1e-2, "nesterov": nesterov}
    optimizer = teon_of(
        [p], stack=1, unit=[0.7], layout=LAYOUTS[side], momentum=0.9, weight_decay=0.1, **common, **EXACT
    )
    for grad, want in zip(grads, literal_muon(w, grads, unit=0.7, mu=0.9, decay=0.1, **common), strict=True):
        step([p], [grad if side == "A" else grad.T], optimizer)
        got = p.detach() if side == "A" else p.detach().T
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_growing_factor_of_pion_lora_is_that_formula_too():
    w, grads = draw(8, 3), draw(5, 8, 3, seed=1)
    p = nn.Parameter(w.clone())
    optimizer = optimizer_of(
        [p], "orthogonal", unit=[0.7], layout="transposed", lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, **EXACT
    )
    expected = literal_muon(w, grads, lr=1e-2, unit=0.7, mu=0.8, nesterov=True, decay=0.1)
    for grad, want in zip(grads, expected, strict=True):
        step([p], [grad], optimizer)
        torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("r", "n"), [(3, 10), (4, 6), (5, 3)])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_stack_is_orthogonal_along_the_rank(side, r, n):
    """`[A_1; A_2]` and `[B_1 | B_2]`: slices of one polar factor, on average as long as those of lone factors."""
    shape = (r, n) if side == "A" else (n, r)
    grads, unit, lr = draw(2, *shape), [0.5, 2.0], 1e-2
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(2)]
    optimizer = teon_of(params, stack=2, unit=unit, layout=LAYOUTS[side], lr=lr, **EXACT)
    step(params, grads, optimizer)
    dim = 0 if side == "A" else 1
    slices = polar(torch.cat(list(grads), dim=dim)).split(r, dim=dim)
    size = lr * math.sqrt(2 * min(r, n) / min(2 * r, n))
    for p, q, own in zip(params, slices, unit, strict=True):
        torch.testing.assert_close(p.detach(), -size * own * q, rtol=0, atol=1e-12)
    mean = sum((p.detach() / own).square().mean() for p, own in zip(params, unit, strict=True)) / 2
    alone = (lr * polar(grads[0])).square().mean()
    torch.testing.assert_close(mean, alone, rtol=1e-10, atol=0)


# -- batches and state ------------------------------------------------------------------------------------------------


def assert_stays(p: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    before = p.detach().clone()
    for _ in range(4):
        step([p], [torch.zeros_like(p)], optimizer)
        assert torch.equal(p, before)


@pytest.mark.parametrize("metric", ["lie", "ambient"])
@pytest.mark.parametrize("direction", ["polar", "natural"])
def test_a_zero_gradient_leaves_a_rotated_factor_as_it_is(metric, direction):
    w = draw(4, 30).float()
    p = nn.Parameter(w.clone())
    optimizer = optimizer_of([p], lr=0.3, metric=metric, direction=direction)
    assert_stays(p, optimizer)
    step([p], [draw(4, 30, seed=1)], optimizer)
    assert p.isfinite().all()
    assert not torch.equal(p, w)


@pytest.mark.parametrize("options", [{}, {"metric": "lie", "direction": "gradient", "scale": "spectral"}])
def test_a_zero_gradient_leaves_a_wide_matrix_of_pion_as_it_is(options):
    w = draw(4, 64).float()
    p = nn.Parameter(w.clone())
    assert_stays(p, Pion([p], lr=1e-2, **options))


# -- what cannot rotate -----------------------------------------------------------------------------------------------


def test_a_groups_options_that_are_not_read_are_refused():
    groups = teon_of([nn.Parameter(draw(4, 6))], stack=1).param_groups
    with pytest.raises(ValueError, match=r"^scale='paper' is no option of rule 'teon_lora': leave it out"):
        TeonLora([{**groups[0], "scale": "paper"}])


@pytest.mark.parametrize("option", ["side", "generator_dtype", "second_moment", "compile"])
def test_options_of_whole_matrices_are_none_of_factors(option):
    group = optimizer_of([nn.Parameter(draw(4, 6))]).param_groups[0]
    assert option not in group
    with pytest.raises(ValueError, match=f"^'{option}' is not a known option of PionLora"):
        PionLora([{**group, option: 0.1}])


def test_factors_with_more_rows_than_columns_are_orthogonalised_exactly():
    b = nn.Parameter(draw(64, 8).float())
    before = b.detach().clone()
    step([b], [draw(64, 8, seed=1)], optimizer_of([b], "orthogonal", lr=1.0, polar_steps=10))
    values = torch.linalg.svdvals((before - b.detach()).double())
    assert (values / values.mean() - 1).abs().max() < 1e-5


WAYS_OUT = ("lora_a or lora_b = 'orthogonal'", "init_lora_weights", "requires_grad_(False)")


def assert_refused(optimizer: torch.optim.Optimizer, model: nn.Module, message: str) -> None:
    before = copies(model)
    with pytest.raises(ValueError, match=message) as caught:
        train(model, optimizer, steps=1)
    assert all(way in str(caught.value) for way in WAYS_OUT)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if ".lora_" in n)


def test_a_zero_factor_that_is_asked_to_rotate():
    model = adapted()
    optimizer = PionLora(param_groups(model, "pion_lora", lora_a="orthogonal", lora_b="rotate"))
    assert_refused(optimizer, model, r"q_proj\.lora_B\.default\.weight is zero, and rotations")


def test_pefts_orthogonal_factors_have_half_the_rank():
    model = adapted(init_lora_weights="orthogonal")
    optimizer = PionLora(param_groups(model, "pion_lora"))
    assert_refused(optimizer, model, r"q_proj\.lora_A\.default\.weight is of rank 2 instead of 4")


def test_an_expert_whose_factor_is_zero_is_refused():
    p = nn.Parameter(torch.cat((draw(4, 8), torch.zeros(4, 8, dtype=torch.float64))))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=re.escape("layers.0.lora is zero, and rotations never change that")):
        optimizer_of([p], layout="rows=4,4").step()


# -- with peft --------------------------------------------------------------------------------------------------------

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FORMS = {
    "rotate A, grow B": ("pion_lora", {}),
    "rotate A, B to AdamW": ("pion_lora", {"lora_b": "adamw"}),
    "both grow": ("pion_lora", {"lora_a": "orthogonal"}),
    "stacks": ("teon_lora", {}),
    "alone": ("teon_lora", {"stack": 1}),
}


def build(model: nn.Module, form: str, lr: float = 5e-3) -> torch.optim.Optimizer:
    optim, options = FORMS[form]
    groups = param_groups(model, optim, lr=lr, adamw_lr=1e-2, **options)
    return {"pion_lora": PionLora, "teon_lora": TeonLora}[optim](groups)


@pytest.mark.parametrize("form", FORMS)
def test_training_reduces_the_loss_and_the_adapter_merges(form):
    model = adapted(target_modules=ALL)
    losses = train(model, build(model, form), steps=15)
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        base = toy_llama()(input_ids=ids).logits
        got = model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert (want - base).abs().max() > 1e-2


def test_the_first_step_moves_b_alone():
    """`B = 0`: the gradient of `A` is zero."""
    model = adapted()
    before, optimizer = copies(model), build(model, "rotate A, grow B")
    train(model, optimizer, steps=1)
    for name, p in model.named_parameters():
        assert p.isfinite().all()
        assert torch.equal(p, before[name]) == (".lora_B." not in name), name
    train(model, optimizer, steps=1)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if ".lora_" in n)


def test_both_factors_of_a_pissa_adapter_may_rotate():
    model = adapted(init_lora_weights="pissa")
    groups = param_groups(model, "pion_lora", lr=4e-3, lora_a="rotate", lora_b="rotate")
    before = copies(model)
    losses = train(model, PionLora(groups), steps=15)
    assert losses[-1] < losses[0]
    for name in factor_names(model):
        old, new = (torch.linalg.svdvals(p[name].detach().double()) for p in (before, dict(model.named_parameters())))
        torch.testing.assert_close(new, old, rtol=1e-5, atol=0)
        assert not torch.equal(before[name], dict(model.named_parameters())[name])


@pytest.mark.parametrize("optim", ["pion", "pion_ambient", "teon"])
def test_the_trainer_reports_the_drift_of_rotated_factors(optim, token_rows, tmp_path):
    model = adapted()
    quiet = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    args = PionTrainingArguments(str(tmp_path), optim=optim, max_steps=3, learning_rate=1e-3, **quiet)
    before = copies(model)
    trainer = PionTrainer(model=model, args=args, train_dataset=token_rows)
    metrics = trainer.train().metrics
    rates = {key for entry in trainer.state.log_history for key in entry if key.startswith("learning_rate/")}
    assert rates == {f"learning_rate/{'teon' if optim == 'teon' else 'pion'}_lora"}
    after = dict(model.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in factor_names(model))
    if optim == "teon":
        assert "spectrum_drift" not in metrics
        return
    assert metrics["rotated_matrices"] == 4
    assert 0 < metrics["spectrum_drift"] < 1e-5
    drift = max(
        (torch.linalg.svdvals(after[n].detach().double()) - torch.linalg.svdvals(before[n].double())).abs().max()
        / torch.linalg.svdvals(before[n].double())[0]
        for n in factor_names(model)
        if ".lora_A." in n
    )
    assert metrics["spectrum_drift"] == pytest.approx(drift.item(), rel=1e-2)


@pytest.mark.parametrize("form", ["rotate A, grow B", "stacks"])
def test_bfloat16_adapters_move(form):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(toy_llama().bfloat16(), config, autocast_adapter_dtype=False)
    optimizer, before = build(model, form, lr=1e-4), copies(model)
    train(model, optimizer, steps=10)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        assert p.dtype == torch.bfloat16
        assert not torch.equal(p, before[name]), name
        kept = master(p, optimizer)
        assert (kept - before[name].float()).norm() > 1e-4
        if form == "rotate A, grow B" and ".lora_A." in name:
            old, new = torch.linalg.svdvals(before[name].double()), torch.linalg.svdvals(kept.double())
            torch.testing.assert_close(new, old, rtol=1e-5, atol=0)
