"""`--optim pion` in transformers: registration, what the handler builds, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import re
import sys
import warnings
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from pion_hf import Pion, PionTrainingArguments, register
from pion_hf.integrations import arguments as arguments_room
from pion_hf.integrations import registry
from pion_hf.integrations.handler import refuse_wrappers
from pion_hf.integrations.registry import OPTIMIZER_NAMES


@pytest.fixture
def arguments(tmp_path):
    """transformers' own `TrainingArguments` with given options, on a CPU."""

    def build(optim: str = "pion", **options) -> TrainingArguments:
        return TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True, report_to="none", **options)

    return build


def optimizer_of(args: TrainingArguments, model) -> torch.optim.Optimizer:
    return Trainer(model=model, args=args).create_optimizer()


def groups_by_rule(optimizer) -> dict[str, list[dict]]:
    found = {}
    for group in optimizer.param_groups:
        found.setdefault(group["rule"], []).append(group)
    return found


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_the_name_is_a_full_member(name):
    member = OptimizerNames(name)
    assert member is getattr(OptimizerNames, name.upper())
    assert member is OptimizerNames[name.upper()]
    assert member == name
    assert list(OptimizerNames).count(member) == 1
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member


def test_registering_again_changes_nothing():
    members, lookup, finders = list(OptimizerNames), Trainer.get_optimizer_cls_and_kwargs, list(sys.meta_path)
    register()
    assert list(OptimizerNames) == members
    assert Trainer.get_optimizer_cls_and_kwargs is lookup
    assert sys.meta_path == finders


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (transformers.trainer_utils, "SchedulerType"),
        (transformers.training_args, "OptimizerNames"),
        (transformers.optimization, "TYPE_TO_SCHEDULER_FUNCTION"),
        (Trainer, "get_optimizer_cls_and_kwargs"),
    ],
)
def test_other_internals_are_one_warning(owner, name, monkeypatch):
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.delattr(owner, name)
    version = re.escape(transformers.__version__)
    with pytest.warns(UserWarning, match=rf"to transformers {version}: AttributeError.*{name}.*What is left: "):
        register()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register()


def test_another_signature_is_a_warning(monkeypatch):
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda self: None)
    with pytest.warns(UserWarning, match=r"does not take \(args, model\)"):
        register()


def test_another_enum_is_a_warning_and_no_half_a_member(monkeypatch):
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(transformers.training_args, "OptimizerNames", object())
    with pytest.warns(UserWarning, match="What is left"):
        register()


def test_asking_for_a_name_that_could_not_be_added_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(arguments_room, "OptimizerNames", Enum("OptimizerNames", {"ADAMW_TORCH": "adamw_torch"}))
    with pytest.raises(ValueError, match=r"optim='pion' could not be added .* pion_hf\.register\(\) said why"):
        PionTrainingArguments(output_dir=str(tmp_path), use_cpu=True)


def test_an_optional_argument_of_a_later_release_is_passed_on(monkeypatch):
    seen = []

    def later(args, model=None, *, more=None):
        seen.append((args, model, more))

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(later))
    register()
    args = SimpleNamespace(optim="adamw_torch")
    Trainer.get_optimizer_cls_and_kwargs(args, "model", more=1)
    assert seen == [(args, "model", 1)]


def test_handler_routes_the_model(arguments, model, tmp_path):
    args = arguments(learning_rate=1e-3, weight_decay=0.1, adam_beta2=0.97, adam_epsilon=1e-7)
    optimizer = optimizer_of(args, model)
    assert type(optimizer) is Pion
    groups = groups_by_rule(optimizer)
    rotated = {name for group in groups["pion"] for name in group["param_names"]}
    assert rotated == {n for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
    assert all(g["lr"] == 1e-3 and g["weight_decay"] == 0 for g in groups["pion"])
    decay = {name: g["weight_decay"] for g in groups["adamw"] for name in g["param_names"]}
    assert decay["model.embed_tokens.weight"] == 0.1
    assert {decay[n] for n, p in model.named_parameters() if p.ndim == 1} == {0.0}
    assert all((g["lr"], g["betas"], g["eps"]) == (1e-3, (0.9, 0.97), 1e-7) for g in groups["adamw"])
    record = json.loads((tmp_path / "routing.json").read_text())
    assert {r["name"]: r["rule"] for r in record["parameters"]} == {
        n: "pion" if n in rotated else "adamw" for n, _ in model.named_parameters()
    }


def test_pion_ambient_is_our_own_rule_at_its_own_scale(arguments, model):
    for optim, words in (("pion_ambient", None), ("pion", "preset=ambient")):
        optimizer = optimizer_of(arguments(optim, optim_args=words), model)
        assert type(optimizer) is Pion
        for group in groups_by_rule(optimizer)["pion"]:
            assert (group["direction"], group["metric"], group["rms"]) == ("natural", "ambient", 2.0)
    for group in groups_by_rule(optimizer_of(arguments(), model))["pion"]:
        assert (group["direction"], group["metric"], group["rms"]) == ("gradient", "lie", 0.2)


@pytest.mark.parametrize("word", ["rms=0.2", "metric=lie", "direction=adam"])
def test_what_pion_ambient_sets_is_no_option_of_it(word, arguments, model):
    with pytest.raises(ValueError, match=f"'pion_ambient' means {word.split('=')[0]}="):
        optimizer_of(arguments("pion_ambient", optim_args=word), model)


def test_optim_args_reach_the_optimizer(arguments, model):
    text = "betas=(0.8, 0.9), adamw_lr=2e-3, adamw_betas=[0.7,0.8], exclude=[q_proj, k_proj], scale=none,"
    groups = groups_by_rule(optimizer_of(arguments(optim_args=text), model))
    assert all(g["betas"] == (0.8, 0.9) and g["scale"] == "none" for g in groups["pion"])
    assert all(g["lr"] == 2e-3 and g["betas"] == (0.7, 0.8) for g in groups["adamw"])
    taken = {name for g in groups["adamw"] for name in g["param_names"]}
    assert sum("q_proj" in n or "k_proj" in n for n in taken) == 4


def test_optim_args_win_over_typed_fields(model, tmp_path):
    args = PionTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, optim_rms=0.3, optim_eps=1e-5, optim_args="rms=0.1"
    )
    (group, *_) = groups_by_rule(optimizer_of(args, model))["pion"]
    assert (group["rms"], group["eps"]) == (0.1, 1e-5)


def test_target_modules_choose_the_matrices(arguments, model):
    groups = groups_by_rule(optimizer_of(arguments(optim_target_modules=["mlp"]), model))
    assert all("mlp" in name for g in groups["pion"] for name in g["param_names"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim_args": "beta=(0.9,0.95)"}, "Did you mean 'betas'"),
        ({"optim_args": "side=inn"}, "Did you mean 'in'"),
        ({"optim": "pion_ambient", "optim_args": "side=both"}, "do not combine"),
        ({"optim_args": "exclude=[q_prj]"}, "Did you mean 'q_proj'"),
        ({"optim_target_modules": ["q_prj"]}, "Did you mean 'q_proj'"),
    ],
)
def test_wrong_options_fail_when_the_optimizer_is_built(options, message, arguments, model):
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer_of(arguments(**options), model)


def test_misspelt_constructor_values_name_the_right_one():
    with pytest.raises(ValueError, match="Did you mean 'taylor'"):
        Pion([torch.eye(3)], retraction="tailor")


def test_no_model(arguments):
    with pytest.raises(ValueError, match="it needs the model"):
        Trainer.get_optimizer_cls_and_kwargs(arguments())


def test_unknown_optimizer_lists_ours(arguments):
    with pytest.raises(ValueError, match=r"pin is not a valid OptimizerNames.*'pion'"):
        arguments(optim="pin")


def test_other_optimizers_see_no_difference(arguments):
    lookup = Trainer.get_optimizer_cls_and_kwargs
    for args in (
        arguments("adamw_torch"),
        arguments("sgd", optim_args="momentum=0.9"),
        arguments("adamw_torch", optim_args="fused=False"),
        arguments("rmsprop", optim_args="alpha=0.9"),
    ):
        assert lookup(args) == lookup.__wrapped__(args)
    # What transformers refuses stays refused: it would otherwise be ignored.
    for text in ("betas=(0.9,0.95)", "momentum=0.9,"):
        with pytest.raises(ValueError, match="unpack"):
            lookup(arguments("adamw_torch", optim_args=text))


@pytest.mark.parametrize(
    ("options", "environment", "what", "instead"),
    [
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, "FSDP1", "FSDP2"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP1", "FSDP2"),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, {}, "FSDP2", "cpu_offload=false"),
        (
            {},
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "FSDP2",
            "fsdp_offload_params: false",
        ),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed", "DDP"),
    ],
)
def test_wrappers_are_refused_with_the_alternative(options, environment, what, instead, arguments, monkeypatch, model):
    args = arguments(**options)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for refused in (lambda: refuse_wrappers(args), lambda: Trainer.get_optimizer_cls_and_kwargs(args, model)):
        with pytest.raises(ValueError, match=f"under {what}") as raised:
            refused()
        assert instead in str(raised.value)
        assert "adamw_torch" in str(raised.value)


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ({"fsdp": True}, {}),
        ({"fsdp": True, "fsdp_config": {"version": 2, "cpu_offload": False}}, {}),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}),
    ],
)
def test_fsdp2_is_not_refused(options, environment, arguments, monkeypatch):
    args = arguments(**options)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refuse_wrappers(args)


@pytest.mark.parametrize("option", ["fused=True", "optim_bits=8", "is_paged=True"])
def test_options_of_fused_and_8_bit_optimizers_are_refused(option, arguments, model):
    with pytest.raises(ValueError, match=f"optim='pion' has no option '{option.split('=')[0]}': .*leave it out"):
        optimizer_of(arguments(optim_args=option), model)


def test_weights_in_8_bits_are_refused():
    weight = torch.ones(4, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"w has dtype torch\.int8; freeze quantised weights .* train LoRA adapters"):
        Pion([("w", weight)])


def test_a_deepspeed_config_is_refused(arguments):
    args = arguments()
    args.deepspeed = {"zero_optimization": {"stage": 1}}  # TrainingArguments takes it only where deepspeed is installed
    with pytest.raises(ValueError, match="under DeepSpeed: ZeRO keeps flat shards"):
        refuse_wrappers(args)


def test_one_process_is_not_refused(arguments):
    refuse_wrappers(arguments())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "is the published rule since 0.13"),
        ("rms=0.1", "is the published rule since 0.13"),
        ("direction=adam", "The metric of optim='pion' is 'lie' by default since 0.13"),
        ("direction=adam, metric=ambient", ""),
        ("direction=adam, metric=lie", ""),
        ("direction=gradient", ""),
        ("preset=paper", ""),
        ("preset=ambient", ""),
    ],
)
def test_what_an_old_recipe_would_mean_otherwise_is_said(options, said, arguments, model, monkeypatch):
    """Both of its meanings are valid."""
    lines = []
    monkeypatch.setattr("pion_hf.integrations.handler.logger.warning_once", lines.append)
    optimizer_of(arguments(optim_args=options, learning_rate=1e-3), model)
    assert len(lines) == bool(said)
    assert said in "".join(lines)
