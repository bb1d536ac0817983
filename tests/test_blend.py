"""Weights between those that a model began with and those that were trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from pion_hf import Blend, Inputs, PionLora, param_groups
from pion_hf.cli import main
from pion_hf.cli.before_after import ReportArguments, ReportMixin
from pion_hf.integrations.hidden_matrices import hidden_matrices
from pion_hf.linalg.spectrum import singular_values, spectral_drift, with_singular_values
from pion_hf.optim import Pion, Teon
from tests.conftest import toy_llama
from tests.test_cli import fails
from tests.test_spectrum import SHAPES, draw

OPTIMIZERS = {"pion": lambda groups: Pion(groups, lr=0.05), "muon": lambda groups: Teon(groups, lr=0.05, stack=1)}


def toy_gpt2() -> GPT2LMHeadModel:
    """Its projections are stored transposed, queries, keys and values in one."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=32, n_layer=2, n_head=4))


def trained(model, optim="pion", steps=3):
    optimizer = OPTIMIZERS[optim](param_groups(model, optim, lr=0.05, adamw_lr=0.01))
    for step in range(steps):
        ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def spectra(model, optimizer) -> dict[str, torch.Tensor]:
    return {m.name: singular_values(m.weights()) for m in hidden_matrices(model, optimizer, optimizer)}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_nearest_matrix_of_a_spectrum(shape):
    w, spectrum = draw(2, *shape), draw(2, min(shape), seed=1).abs().sort(descending=True).values
    found = with_singular_values(w, spectrum)
    torch.testing.assert_close(singular_values(found), spectrum, atol=1e-9, rtol=1e-9)
    for seed in range(20):  # no other comes nearer
        u, v = (torch.linalg.qr(draw(2, n, n, seed=seed + n)).Q for n in shape)
        k = min(shape)
        other = (u[..., :k] * spectrum.unsqueeze(-2)) @ v[..., :k].mT
        assert (torch.linalg.matrix_norm(other - w) >= torch.linalg.matrix_norm(found - w)).all()
    torch.testing.assert_close(with_singular_values(w, torch.linalg.svdvals(w)), w)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_ends_are_kept_to_the_bit_and_the_middle_is_between(optim):
    model = toy_llama()
    start, blend = weights(model), Blend(model)
    optimizer = trained(model, optim)
    end = weights(model)
    for share, expected in ((1.0, end), (0.0, start), (1.0, end)):
        blend.apply(share, optimizer)
        assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    blend.apply(0.25)  # of any optimizer
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), 0.75 * start[name] + 0.25 * end[name])


@pytest.mark.parametrize("build", [toy_llama, toy_gpt2])
def test_rotated_matrices_get_their_spectrum_back(build):
    model = build()
    start, blend = weights(model), Blend(model)
    optimizer = trained(model)
    blend.apply(0.5)
    mean = weights(model)
    lost = spectra(model, optimizer)
    blend.apply(0.5, optimizer)
    restored = spectra(model, optimizer)
    blend.apply(0.0, optimizer)
    assert len(restored) > 10
    for name, before in spectra(model, optimizer).items():
        assert spectral_drift(before, lost[name]) > 1e-4
        assert spectral_drift(before, restored[name]) < 1e-6
    blend.apply(0.5, optimizer)
    for name, p in model.named_parameters():
        rotated = any(m.parameter is p for m in hidden_matrices(model, optimizer, optimizer))
        assert torch.equal(p, mean[name]) != rotated
        # The nearest of that spectrum, which the start has too.
        assert (p - mean[name]).norm() <= (start[name] - mean[name]).norm()


def test_what_does_not_rotate_is_a_mean():
    model = toy_llama()
    blend = Blend(model)
    optimizer = trained(model, "muon")
    blend.apply(0.5)
    mean = weights(model)
    blend.apply(0.5, optimizer)
    assert all(torch.equal(p, mean[name]) for name, p in model.named_parameters())


def adapted(**options):
    torch.manual_seed(0)
    return get_peft_model(toy_llama(), LoraConfig(r=4, target_modules="all-linear", **options))


def effects(model) -> dict[str, torch.Tensor]:
    """What each adapter adds to its layer's weight."""
    layers = (m for m in model.modules() if isinstance(m, LoraLayer))
    return {id(layer): layer.get_delta_weight("default").detach().clone() for layer in layers}


def test_an_adapter_that_began_at_zero_goes_back_by_its_effect():
    model = adapted()
    start, blend = weights(model), Blend(model)
    inputs = Inputs(model, 2)
    optimizer = PionLora(param_groups(model, "pion_lora", lr=0.05), keep=2, inputs=inputs)
    for step in range(3):
        ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    end, whole = weights(model), effects(model)
    names = {p: name for name, p in model.named_parameters()}
    kept = {p: state["kept.0"] for p, state in optimizer.state.items() if "lora_A" in names[p]}
    assert len(kept) == 14
    blend.apply(0.6, optimizer)
    for layer, effect in effects(model).items():
        torch.testing.assert_close(effect, 0.6 * whole[layer])
    for p, directions in kept.items():  # and so nothing of what was kept comes back
        assert (p @ directions[0]).norm() < 1e-5 * p.norm()
    for share, expected in ((1.0, end), (0.0, start)):
        blend.apply(share, optimizer)
        assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_an_adapter_that_began_with_an_effect_goes_back_factor_by_factor():
    model = adapted(init_lora_weights="orthogonal")
    start, blend = weights(model), Blend(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * p.requires_grad)
    end = weights(model)
    blend.apply(0.25)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), 0.75 * start[name] + 0.25 * end[name])


def test_half_precision_is_rounded_once():
    model = toy_llama().to(torch.bfloat16)
    start, blend = weights(model), Blend(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    end = weights(model)
    blend.apply(0.3)
    for name, p in model.named_parameters():
        exact = torch.lerp(start[name].float(), end[name].float(), 0.3)
        assert torch.equal(p, exact.to(torch.bfloat16))


def test_frozen_parameters_stay():
    model = toy_llama()
    model.model.embed_tokens.requires_grad_(False)
    blend = Blend(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    embeddings = model.model.embed_tokens.weight.clone()
    blend.apply(0.5)
    assert torch.equal(model.model.embed_tokens.weight, embeddings)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_are_shares(share):
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
        Blend(toy_llama()).apply(share)


def test_other_parameters_than_before_are_refused():
    model = toy_llama()
    blend = Blend(model)
    model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(ValueError, match="not those it had"):
        blend.apply(0.5)


def test_sharded_parameters_are_refused():
    model = toy_llama()
    model.model.norm.weight.device_mesh = "of several processes"
    with pytest.raises(ValueError, match="whole parameters"):
        Blend(model)


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_command_refuses_them_before_it_trains(kind):
    trainer = ReportMixin.__new__(ReportMixin)
    trainer.report_arguments = ReportArguments(blend=0.5)
    trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
    setattr(trainer, kind, True)
    with pytest.raises(ValueError, match="not under FSDP or DeepSpeed"):
        trainer._begin_blend()
    trainer.report_arguments = ReportArguments()
    assert trainer._begin_blend() is None


# -- commands ---------------------------------------------------------------------------------------


def result(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "eval.json").read_text()), load_file(folder / "model.safetensors")


@pytest.fixture
def other_text(tmp_path) -> dict[str, str]:
    path = tmp_path / "other.txt"
    path.write_text("Sphinx of black quartz, judge my vow. " * 20, encoding="utf-8")
    return {"other_text_file": str(path)}


def test_a_run_ends_with_the_share_that_was_asked_for(recipe, other_text, checkpoint, tmp_path, capsys):
    main(["sft", "--config", recipe(optim="muon", **other_text)])
    plain, end = result(tmp_path / "run")
    assert "blends" not in plain
    assert "Shares of what training changed" not in capsys.readouterr().out
    blended = recipe(optim="muon", **other_text, blend=0.5, blend_shares=[0.25], output_dir=str(tmp_path / "half"))
    main(["sft", "--config", blended])
    measured, half = result(tmp_path / "half")
    start = load_file(checkpoint / "model.safetensors")
    for name, weight in half.items():
        torch.testing.assert_close(weight, (start[name] + end[name]) / 2, rtol=1e-5, atol=1e-7)
    assert [blend["share"] for blend in measured["blends"]] == [0.25, 0.5, 1.0]
    by_share = {blend.pop("share"): blend for blend in measured["blends"]}
    assert by_share[1.0] == plain["after"]
    assert by_share[0.5] == measured["after"] != plain["after"]
    assert measured["learnt"] == pytest.approx(measured["before"]["task"]["loss"] - by_share[0.5]["task"]["loss"])
    losses = [by_share[share]["task"]["loss"] for share in (1.0, 0.5, 0.25)]
    assert losses == sorted(losses)
    assert "Shares of what training changed" in capsys.readouterr().out
    assert "those before training and 0.5 of what it changed" in (tmp_path / "half" / "README.md").read_text()
    assert "of what it changed" not in (tmp_path / "run" / "README.md").read_text()
    # What is measured of blends is no entry of training.
    lines = {run: (tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("run", "half")}
    assert len(lines["run"]) == len(lines["half"])


def test_shares_are_measured_and_the_trained_model_stays(recipe, other_text, tmp_path):
    main(["sft", "--config", recipe(optim="muon", **other_text)])
    plain, end = result(tmp_path / "run")
    main(["sft", "--config", recipe(optim="muon", **other_text), "--blend_shares", "0.9", "0.5"])
    measured, after = result(tmp_path / "run")
    assert all(torch.equal(after[name], weight) for name, weight in end.items())
    assert measured["after"] == plain["after"]
    losses = {blend["share"]: blend["task"]["loss"] for blend in measured["blends"]}
    assert list(losses) == [0.5, 0.9, 1.0]
    assert losses[1.0] == plain["after"]["task"]["loss"] < losses[0.9] < losses[0.5]


def test_a_resumed_run_blends_with_the_model_it_began_with(recipe, checkpoint, tmp_path):
    keys = {"optim": "muon", "blend": 0.5, "save_strategy": "steps", "save_steps": 1}
    main(["sft", "--config", recipe(**keys)])
    _, at_once = result(tmp_path / "run")
    last = tmp_path / "run" / "checkpoint-2"
    assert not torch.equal(load_file(last / "model.safetensors")["model.norm.weight"], at_once["model.norm.weight"])
    main(["sft", "--config", recipe(**keys), "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-1")])
    _, resumed = result(tmp_path / "run")
    for name, weight in at_once.items():
        torch.testing.assert_close(resumed[name], weight)


def test_a_rotated_model_keeps_its_spectrum(recipe, checkpoint, tmp_path):
    main(["sft", "--config", recipe(blend=0.5)])
    _, after = result(tmp_path / "run")
    before = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before[name], after[name])
    assert spectral_drift(singular_values(before[name]), singular_values(after[name])) < 1e-6


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"blend": 0.0}, "blend is a share of what training changes, above 0 and up to 1, got 0.0"),
        (
            {"blend_shares": [0.5, 1.5]},
            "blend_shares is a share of what training changes, above 0 and up to 1, got 1.5",
        ),
    ],
)
def test_wrong_shares_stop_a_command(keys, message, recipe):
    assert message in fails("sft", "--config", recipe(**keys))
