"""`pion_hf.factory`: the optimizer of a Trainer whose arguments do not name it."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.trainer import is_optimizer_factory

import pion_hf
from pion_hf import PionTrainer, PionTrainingArguments
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES
from tests.conftest import toy_llama

# Of the names for whole matrices: what `--optim_args` and `factory` are told alike.
OPTIONS = {
    "pion": {"side": "in", "betas": (0.8, 0.9), "adamw_lr": 2e-3},
    "pion_ambient": {"eps": 1e-6, "exclude": ["q_proj"]},
    "teon": {"stack": 2, "stack_targets": ["v"], "momentum": 0.9},
    "muon": {"nesterov": False, "targets": ["mlp"]},
    "adamw_routed": {"adamw_betas": (0.8, 0.95), "adamw_eps": 1e-6},
    "pion_lora": {"lora_a": "orthogonal", "direction": "polar"},
    "teon_lora": {"stack": 1, "polar_steps": 4},
}


@pytest.fixture
def build(tmp_path):
    """The optimizer that transformers' own Trainer makes."""

    def make(model, pair=None, **arguments) -> torch.optim.Optimizer:
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **arguments)
        return Trainer(model=model, args=args, optimizer_cls_and_kwargs=pair).create_optimizer()

    return make


def adapted():
    return get_peft_model(toy_llama(), LoraConfig(r=4, target_modules="all-linear"))


def model_for(name: str):
    return adapted() if name.endswith("_lora") else toy_llama()


def settings(optimizer: torch.optim.Optimizer) -> list[dict]:
    """All that its groups say; parameters by their names."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


@pytest.mark.parametrize("name", OPTIMIZER_CLASSES)
def test_groups_are_those_of_the_name(name, build):
    torch.manual_seed(0)
    made = build(model_for(name), pion_hf.factory(name, lr=1e-3, weight_decay=0.1, **OPTIONS[name]))
    torch.manual_seed(0)
    named = build(model_for(name), optim=name, optim_args=OPTIONS[name], learning_rate=1e-3, weight_decay=0.1)
    assert type(made) is type(named) is OPTIMIZER_CLASSES[name]
    assert settings(made) == settings(named)
    assert len(settings(made)) > 1 or name.endswith("_lora")


@pytest.mark.parametrize(
    ("name", "form", "found"),
    [
        ("pion", "pion_lora", {"direction": "gradient"}),
        ("pion_ambient", "pion_lora", {"direction": "natural"}),
        ("teon", "teon_lora", {"stack": 2}),
        ("muon", "teon_lora", {"stack": 1}),
    ],
)
def test_whole_matrix_names_become_their_lora_forms(name, form, found, build, monkeypatch):
    said = []
    monkeypatch.setattr("pion_hf.integrations.handler.logger.warning", said.append)
    optimizer = build(adapted(), pion_hf.factory(name, lr=1e-3))
    assert type(optimizer) is OPTIMIZER_CLASSES[form]
    assert [f"optim={name!r} on LoRA adapters is {form!r}" in line for line in said] == [True]
    assert all({key: group[key] for key in found} == found for group in optimizer.param_groups)


@pytest.mark.parametrize("trainer_class", [Trainer, PionTrainer])
@pytest.mark.parametrize("name", ["pion", "muon", "adamw_routed", "pion_lora"])
def test_training_moves_what_it_should_and_keeps_outputs(trainer_class, name, tmp_path, token_rows, capsys):
    """Two steps with `keep`: its inputs are seen from the first forward pass on."""
    torch.manual_seed(0)
    model = model_for(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    kind = TrainingArguments if trainer_class is Trainer else PionTrainingArguments
    args = kind(output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    pair = pion_hf.factory(name, lr=1e-2, keep=4)
    trainer = trainer_class(model=model, args=args, train_dataset=token_rows, optimizer_cls_and_kwargs=pair)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is OPTIMIZER_CLASSES[name]
    assert not optimizer.inputs.open
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    assert f"{optimizer.matrix_rules[-1]}: " in capsys.readouterr().err
    held = 0
    for group in optimizer.param_groups:
        for n, p in zip(group["param_names"], group["params"], strict=True):
            kept = optimizer.state[p].get("kept.0")
            if kept is not None:
                held += 1
                change = (p.detach() - before[n]) @ kept[0]
                start = before[n] @ kept[0] if name == "pion_lora" else 0  # which A loses
                torch.testing.assert_close(change + start, torch.zeros_like(change), atol=1e-5, rtol=0)
    assert held == 14  # hidden matrices, or factors A


def test_the_schedule_acts_on_the_factorys_rates(tmp_path, token_rows):
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, use_cpu=True, report_to="none", learning_rate=7.0, save_strategy="no"
    )
    pair = pion_hf.factory("muon", lr=1e-3, adamw_lr=1e-4)
    trainer = Trainer(model=toy_llama(), args=args, train_dataset=token_rows, optimizer_cls_and_kwargs=pair)
    trainer.train()
    assert {g["rule"]: g["initial_lr"] for g in trainer.optimizer.param_groups} == {"muon": 1e-3, "adamw": 1e-4}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pin", {}, "'pin' is not a known optimizer. Did you mean 'pion'?"),
        ("pion", {"sid": "in"}, "Did you mean 'side'?"),
        ("pion", {"weight_dekay": 0.1}, "Did you mean 'weight_decay'?"),
        ("pion", {"learning_rate": 1e-3}, "has no option 'learning_rate': it is called 'lr' here."),
        ("pion", {"side": "inn"}, "Did you mean 'in'?"),
        ("pion", {"stack": 2}, "'stack' is an option of optim='teon' and 'teon_lora', not of optim='pion'."),
        ("pion", {"lora_a": "rotate"}, "'lora_a' is an option of optim='pion_lora', not of optim='pion'."),
        ("pion_ambient", {"metric": "lie"}, "optim='pion_ambient' means metric='ambient', but metric='lie' was given"),
        ("muon", {"keep": -1}, "keep must be a whole number of directions, 0 or more, got -1"),
        ("muon", {"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ("muon", {"lr": "fast"}, "lr must be of type float, got 'fast'"),
        ("teon", {"inputs": None}, "'inputs' is not a known option of optim='teon'"),
    ],
)
def test_wrong_options_fail_at_once(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pion_hf.factory(name, **{"lr": 1e-3, **options})


def test_a_trainer_may_hand_over_its_arguments_too():
    kind, options = pion_hf.factory("muon", lr=1e-3)
    assert settings(kind()(toy_llama(), object(), **options)) == settings(kind()(toy_llama(), **options))


def test_a_rate_must_be_given():
    with pytest.raises(TypeError, match="lr"):
        pion_hf.factory("pion")


def test_options_that_the_lora_form_lacks_are_errors(build):
    pair = pion_hf.factory("pion", lr=1e-3, side="in")
    with pytest.raises(ValueError, match=r"'side' is an option of optim='pion'.* not of optim='pion_lora'"):
        build(adapted(), pair)


@pytest.mark.parametrize(
    ("environment", "what"),
    [({"ACCELERATE_USE_DEEPSPEED": "true"}, "under DeepSpeed"), ({"ACCELERATE_USE_FSDP": "true"}, "under FSDP1")],
)
def test_launchers_that_shard_flat_are_refused(environment, what, monkeypatch):
    kind, options = pion_hf.factory("pion", lr=1e-3)
    assert is_optimizer_factory(kind)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=what):
        kind()(toy_llama(), **options)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("teon", "(pion_hf.Teon, {'params': pion_hf.param_groups(model, 'teon', lr=0.001)})"),
        (
            "pion_ambient",
            "(pion_hf.Pion, {'params': pion_hf.param_groups(model, 'pion_ambient', lr=0.001), 'preset': 'ambient'})",
        ),
    ],
)
def test_without_the_hook_it_names_the_way(name, instead, monkeypatch, build):
    monkeypatch.delattr(transformers.trainer, "is_optimizer_factory")
    with pytest.raises(ImportError, match=re.escape(instead)) as raised:
        pion_hf.factory(name, lr=1e-3)
    assert transformers.__version__ in str(raised.value)
    monkeypatch.undo()
    model = toy_llama()
    pair = eval(instead, {"pion_hf": pion_hf, "model": model})  # what it says works
    assert {g["rule"] for g in build(model, pair).param_groups} >= {"adamw"}
