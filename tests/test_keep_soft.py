"""`keep_soft`: more directions of a layer's inputs, each kept by the share that its eigenvalue suggests."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pion_hf import Inputs, Pion, PionTrainer, PionTrainingArguments, RoutedAdamW, Teon, TeonLora, param_groups
from pion_hf.linalg.sketch import leading_directions, sketch_of
from pion_hf.linalg.sketch import test_matrix as random_test_matrix
from pion_hf.optim import base
from pion_hf.optim.base import MatrixOptimizer
from pion_hf.optim.groups import SOFT_DIRECTIONS
from tests.conftest import toy_llama
from tests.test_keep import matrices, train

KEEP = 3
COLUMNS = KEEP * SOFT_DIRECTIONS


def muon(model: nn.Module, **options) -> MatrixOptimizer:
    return Teon(param_groups(model, "muon"), lr=1e-2, stack=1, polar_dtype="float32", **options)


def adamw_routed(model: nn.Module, **options) -> MatrixOptimizer:
    return RoutedAdamW(param_groups(model, "adamw_routed"), lr=1e-3, **options)


BOTH = pytest.mark.parametrize("build", [muon, adamw_routed])


def soft(build, model: nn.Module) -> MatrixOptimizer:
    return build(model, keep=KEEP, keep_soft=True, inputs=Inputs(model, COLUMNS))


def test_lengths_are_the_roots_of_the_shares():
    draws = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=draws, dtype=torch.float64)).Q
    values = torch.logspace(0, -4, 20, dtype=torch.float64)
    rows = values.sqrt().unsqueeze(-1) * basis.mT
    test = random_test_matrix(20, 20, rows.device).double()
    found = leading_directions(sketch_of(rows, test), test, 8, half=3)
    shares = values[:8] / (values[:8] + values[2])
    torch.testing.assert_close(found.norm(dim=0).square(), shares)
    assert shares[2] == 0.5
    torch.testing.assert_close(found @ found.mT, basis[:, :8] * shares @ basis[:, :8].mT, atol=1e-9, rtol=0)
    assert not leading_directions(torch.zeros(20, 20), test.float(), 8, half=3).any()


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 2**-8)])
@BOTH
def test_a_step_is_the_free_one_less_these_shares(build, dtype, rounding, monkeypatch):
    """Shares are taken out in bfloat16 where the hardware is faster in it, which rounds what is taken."""
    monkeypatch.setattr(base, "product_dtype", lambda *_: dtype)
    model, free = toy_llama(), toy_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = soft(build, model)
    train(model, optimizer, steps=1)
    train(free, build(free), steps=1)
    unkept = dict(free.named_parameters())
    for name, p in matrices(optimizer).items():
        kept = optimizer.state[p]["kept.0"][0]
        assert kept.shape == (p.shape[1], COLUMNS)
        shares = kept.square().sum(0)
        assert (shares.diff() <= 1e-6).all()
        assert pytest.approx(shares[KEEP - 1].item(), abs=1e-5) == 0.5
        change = unkept[name].detach() - before[name]
        expected = change - change @ kept @ kept.mT
        assert (p.detach() - before[name] - expected).norm() < rounding * change.norm()


@BOTH
def test_its_state_is_counted_and_saved(build):
    model = toy_llama()
    optimizer = soft(build, model)
    planned = optimizer.state_bytes()
    train(model, optimizer, steps=2)
    held = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor) and v.ndim]
    assert planned == sum(v.numel() * v.element_size() for v in held)
    other = copy.deepcopy(model)
    resumed = soft(build, other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, steps=2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    hard = build(toy_llama(), keep=KEEP, inputs=Inputs(model, KEEP))
    with pytest.raises(ValueError, match=r"keep_soft of \S+ was True and is False"):
        hard.load_state_dict(optimizer.state_dict())


@BOTH
def test_what_it_needs(build):
    model = toy_llama()
    with pytest.raises(ValueError, match="keep_soft=True says how directions are kept, and keep=0 keeps none"):
        build(model, keep_soft=True)
    with pytest.raises(ValueError, match="keep_soft must be True or False, got 'yes'"):
        build(model, keep=KEEP, keep_soft="yes")
    with pytest.raises(ValueError, match=rf"inputs=pion_hf\.Inputs\(model, {COLUMNS}\) before the first forward pass"):
        train(model, build(model, keep=KEEP, keep_soft=True, inputs=Inputs(model, KEEP)), steps=1)


def test_rotations_and_adapters_have_none():
    with pytest.raises(ValueError, match="'keep_soft' is not a known option of Pion"):
        Pion([{"params": [nn.Parameter(torch.eye(4))], "rule": "pion", "keep_soft": True}])
    group = {
        "params": [nn.Parameter(torch.ones(2, 4))],
        "rule": "teon_lora",
        "method": "orthogonal",
        "unit_step": [1.0],
    }
    with pytest.raises(ValueError, match="keep_soft=True is no option of rule 'teon_lora': leave it out"):
        TeonLora([{**group, "stack": 1, "keep": 1, "keep_soft": True}], stack=1)


@pytest.mark.parametrize("optim", ["muon", "teon", "adamw_routed"])
def test_a_trainer_watches_as_many_as_it_needs(optim, tmp_path):
    model = toy_llama()
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(100, (8, 24)).tolist()]
    args = PionTrainingArguments(
        output_dir=str(tmp_path),
        optim=optim,
        optim_keep=KEEP,
        optim_keep_soft=True,
        max_steps=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = PionTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    state = trainer.optimizer.optimizer.state[model.model.layers[0].mlp.up_proj.weight]
    assert state["kept.0"].shape[-1] == COLUMNS
    assert 0 < state["kept.0"].norm() < COLUMNS**0.5
