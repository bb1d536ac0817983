"""LoRA by `pion-hf sft`: training, how adapters start, and that what is saved fits the model as it was downloaded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pion_hf.cli import lora_start, main, training
from pion_hf.cli.sft import parser
from tests.conftest import toy_llama

RECIPES = Path(__file__).parents[1] / "recipes" / "smollm2-135m" / "sft"
CHANGE_THE_BASE = ["pissa", "pissa_niter_4", "olora"]
LEAVE_THE_BASE = ["default", "gaussian", "orthogonal", "eva"]


@pytest.fixture
def recipe(recipe):
    """The shared recipe, for adapters that AdamW trains."""
    adapters_by_adamw = {"optim": "adamw_torch", "optim_adamw_lr": None, "learning_rate": 1e-2, "max_steps": 3}
    lora = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}

    def write(**changes) -> str:
        return recipe(**{**adapters_by_adamw, **lora, **changes})

    return write


@pytest.fixture
def trained(monkeypatch):
    """The models of the trainings that follow, as their trainers hold them."""
    models = []
    finish = training.ReportingSFTTrainer.finish

    def kept(self) -> None:
        models.append(self.model)
        finish(self)

    monkeypatch.setattr(training.ReportingSFTTrainer, "finish", kept)
    return models


def fails(*argv: str) -> str:
    with pytest.raises(SystemExit) as raised:
        main(list(argv))
    assert isinstance(raised.value.code, str), "an exit without a message"
    return raised.value.code


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 45).view(2, 20)
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def loaded(checkpoint: Path, folder: Path) -> PeftModel:
    """The saved adapter on the model as it was before all training."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), folder)


# -- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "pion_lora", "teon_lora", "pion", "pion_ambient", "teon", "muon"])
def test_every_optimizer_trains_adapters_and_reports(optim, recipe, tmp_path, checkpoint, trained, capsys):
    main(["sft", "--config", recipe(optim=optim)])
    folder = tmp_path / "run"
    report = json.loads((folder / "eval.json").read_text())
    assert all(math.isfinite(value) for moment in ("before", "after") for value in report[moment]["task"].values())
    assert report["learnt"] > 0
    assert f"{optim}, 3 steps" in capsys.readouterr().out
    assert ("spectrum_drift" in report) == (optim in ("pion", "pion_ambient", "pion_lora"))
    assert report.get("spectrum_drift", 0.0) < 1e-5
    assert (folder / "routing.json").exists() == (optim != "adamw_torch")
    torch.testing.assert_close(logits(loaded(checkpoint, folder)), logits(trained[0]), rtol=0, atol=1e-5)


def test_the_two_factors_can_be_told_what_to_do(recipe, tmp_path):
    main(["sft", "--config", recipe(optim="pion_lora"), "--optim_lora_a", "adamw", "--optim_lora_b", "orthogonal"])
    rules = {r["name"]: r["rule"] for r in json.loads((tmp_path / "run" / "routing.json").read_text())["parameters"]}
    assert {rule for name, rule in rules.items() if ".lora_A." in name} == {"adamw"}
    assert {rule for name, rule in rules.items() if ".lora_B." in name} == {"pion_lora"}


# -- how adapters start -----------------------------------------------------------------------------


@pytest.mark.parametrize("word", [*LEAVE_THE_BASE, *CHANGE_THE_BASE])
def test_every_initialisation_is_what_peft_makes_of_it(word, recipe, checkpoint, trained):
    """At learning rate zero: the factors after training are those peft starts with."""
    main(["sft", "--config", recipe(learning_rate=0.0), "--init_lora_weights", word])
    config = trained[0].peft_config["default"]
    assert config.init_lora_weights == (True if word == "default" else word)
    torch.testing.assert_close(logits(trained[0]), logits(toy_llama()), rtol=0, atol=1e-5)
    a = trained[0].base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight
    b = trained[0].base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight
    assert b.any() == (word not in ("default", "gaussian", "eva"))
    if word == "eva":  # right singular vectors of the layer's inputs
        torch.testing.assert_close(a @ a.mT, torch.eye(len(a)), rtol=0, atol=1e-4)
        assert config.eva_config.use_label_mask
    else:
        torch.manual_seed(42)  # as TRL does before it loads the model; 42 is the default seed
        reference = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
            LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=config.init_lora_weights),
        )
        expected = dict(reference.named_parameters())
        for name, factor in trained[0].named_parameters():
            if "lora_" in name:
                torch.testing.assert_close(factor, expected[name], rtol=0, atol=1e-6)


def test_adapters_are_measured_as_models_are(recipe, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Sphinx of black quartz, judge my vow. " * 20, encoding="utf-8")
    main(["sft", "--config", recipe(other_text_file=str(other), exact_match_samples=3, max_new_tokens=4)])
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    for moment in ("before", "after"):
        assert {domain: set(values) for domain, values in report[moment].items()} == {
            "task": {"loss", "perplexity", "exact_match"},
            "other_text": {"loss", "perplexity"},
        }
        assert all(math.isfinite(value) for values in report[moment].values() for value in values.values())


@pytest.mark.parametrize(
    ("word", "optim"),
    [
        ("pissa", "adamw_torch"),
        ("pissa", "pion_lora"),
        ("pissa_niter_4", "pion_lora"),
        ("olora", "pion_lora"),
        ("eva", "adamw_torch"),
    ],
)
def test_a_saved_adapter_loads_onto_the_untouched_base(word, optim, recipe, tmp_path, checkpoint, trained):
    main(["sft", "--config", recipe(optim=optim, init_lora_weights=word)])
    model = loaded(checkpoint, tmp_path / "run")
    torch.testing.assert_close(logits(model), logits(trained[0]), rtol=0, atol=1e-4)
    base = dict(toy_llama().named_parameters())
    for name, p in model.get_base_model().named_parameters():
        if "lora_" not in name:  # peft would decompose them again, were the adapter not converted
            assert torch.equal(p, base[name.replace(".base_layer", "")]), name
    assert (logits(trained[0]) - logits(toy_llama())).abs().max() > 1e-3, "nothing was trained"


def test_only_the_final_adapter_is_converted_and_checkpoints_resume(recipe, tmp_path, checkpoint, trained):
    folder = tmp_path / "run"
    path = recipe(init_lora_weights="pissa", save_strategy="steps", save_steps=2, max_steps=4)
    main(["sft", "--config", path])
    ranks = {
        where: load_file(where / "adapter_model.safetensors")[
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
        ].shape[0]
        for where in (folder, folder / "checkpoint-2")
    }
    assert list(ranks.values()) == [8, 4]
    main(["sft", "--config", path, "--resume_from_checkpoint", str(folder / "checkpoint-2")])
    torch.testing.assert_close(logits(trained[1]), logits(trained[0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(loaded(checkpoint, folder)), logits(trained[1]), rtol=0, atol=1e-4)


@pytest.mark.skipif(Version(peft.__version__) < Version("0.20"), reason="peft before 0.20 always uses the prompts too")
def test_eva_uses_prompts_where_the_answers_are_too_short(recipe, trained):
    """14 directions, from batches of 4 answers of two or three tokens."""
    main(["sft", "--config", recipe(init_lora_weights="eva", lora_r=7)])
    assert not trained[0].peft_config["default"].eva_config.use_label_mask


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sft", "cpt", "plan"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pisa"}, "'pisa' is not a known value of init_lora_weights. Did you mean 'pissa'"),
        ({"init_lora_weights": "pissa_niter_x"}, "Did you mean 'pissa_niter_N'"),
        ({"init_lora_weights": False}, "'false' is not a known value of init_lora_weights"),
        ({"init_lora_weights": "pissa", "use_peft": False}, "init_lora_weights is for LoRA adapters: set use_peft"),
        ({"init_lora_weight": "pissa"}, "'init_lora_weight' is not a known key. Did you mean 'init_lora_weights'"),
    ],
)
def test_initialisations_that_do_not_exist_or_do_not_apply(command, changes, message, recipe):
    said = fails(command, "--config", recipe(optim="pion_lora", **changes))
    assert said.startswith(f"pion-hf {command}: ")
    assert message in said


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_modules_to_save": ["lm_head"]}])
def test_what_would_be_lost_in_the_conversion_is_refused(changes, recipe):
    said = fails("sft", "--config", recipe(init_lora_weights="olora", **changes))
    assert "init_lora_weights='olora' changes the base model, and an adapter that also trains" in said


def test_quantization_without_its_package_is_refused_before_anything_is_loaded(recipe, monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    said = fails("sft", "--config", recipe(load_in_4bit=True, use_peft=True, model_name_or_path="no/such-model"))
    assert "load_in_4bit and load_in_8bit need the package bitsandbytes" in said


def test_eva_without_enough_tokens_is_refused(recipe):
    said = fails("sft", "--config", recipe(init_lora_weights="eva", lora_r=16, per_device_train_batch_size=1))
    assert "init_lora_weights='eva' needs batches of 32 tokens or more (2 lora_r)" in said


def test_adapters_under_sharding_are_refused_before_anything_is_loaded(recipe):
    flat = {"fsdp": True, "fsdp_config": {"version": 1}}
    said = fails("sft", "--config", recipe(optim="pion_lora", model_name_or_path="no/such-model", **flat))
    assert "optim='pion_lora' does not run under FSDP1" in said


# -- recipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "teon_lora"])
def test_recipes_for_adapters_parse(name):
    _, args, model_args, _, report_args = parser().parse_recipe(["--config", str(RECIPES / f"{name}.yaml")])
    assert args.optim.value == {"lora": "pion_lora", "teon_lora": "teon_lora"}[name]
    assert (model_args.use_peft, model_args.lora_r, model_args.lora_alpha) == (True, 16, 32)
    assert model_args.lora_target_modules == "all-linear"
    assert report_args.exact_match_samples == 32
    lora_start.check_adapter(model_args)
