"""Options: the `optim_args` string, the typed fields, and what is said about wrong ones."""

from __future__ import annotations

import inspect
import re
import typing

import pytest
from transformers import HfArgumentParser

from pion_hf import Pion, PionTrainingArguments, param_groups
from pion_hf.integrations.arguments import (
    GROUP_OPTIONS,
    OPTIMIZER_CLASSES,
    OptimizerFields,
    option_types,
    parse_optim_args,
    resolve_options,
)


@pytest.fixture
def arguments(tmp_path):
    """`PionTrainingArguments` with given options, on a CPU."""

    def build(**options) -> PionTrainingArguments:
        return PionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)

    return build


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (None, {}),
        ("", {}),
        (" , ", {}),
        ("rms=0.2", {"rms": 0.2}),
        ("rms = 0.2 , side = both ,", {"rms": 0.2, "side": "both"}),
        ("betas=(0.9,0.95)", {"betas": [0.9, 0.95]}),
        ("betas=[0.9, 0.95],eps=0.0", {"betas": [0.9, 0.95], "eps": 0.0}),
        ("second_moment=true,preset=none", {"second_moment": True, "preset": None}),
        ("polar_steps=3,eps=1e-6", {"polar_steps": 3, "eps": 1e-6}),
        ("targets=[q_proj, k_proj]", {"targets": ["q_proj", "k_proj"]}),
        ("exclude=(q|k)_proj", {"exclude": "(q|k)_proj"}),
        (r"exclude='layers\.(0|1)\.,x'", {"exclude": r"layers\.(0|1)\.,x"}),
        ("exclude=['a,b', \"c\"]", {"exclude": ["a,b", "c"]}),
    ],
)
def test_optim_args_are_read(text, options):
    assert parse_optim_args(text) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rms", "'rms' is not of the form key=value"),
        ("rms=", "'rms=' is not of the form key=value"),
        ("=0.2", "'=0.2' is not of the form key=value"),
        ("rms=0.2,rms=0.3", "'rms' is given twice"),
        ("betas=(0.9,0.95", "unbalanced brackets"),
        ("betas=0.9)", "unbalanced brackets"),
        ("side='in", "unbalanced brackets or quotes"),
    ],
)
def test_malformed_optim_args(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_optim_args(text)


@pytest.mark.parametrize(
    ("text", "constructor", "groups"),
    [
        ("betas=(0.9,0.95)", {"betas": (0.9, 0.95)}, {}),
        ("adamw_betas=[0.9,0.99],adamw_lr=1", {}, {"adamw_betas": (0.9, 0.99), "adamw_lr": 1.0}),
        ("exclude=q_proj", {}, {"exclude": ["q_proj"]}),
        ("polar_steps=4,rms=1", {"polar_steps": 4, "rms": 1.0}, {}),
        ("scale=none", {"scale": "none"}, {}),
        ("preset=none", {"preset": None}, {}),
    ],
)
def test_options_get_the_types_of_the_signature(text, constructor, groups):
    resolved = resolve_options("pion", parse_optim_args(text))
    assert resolved == (constructor, groups)
    for got, wanted in zip(resolved, (constructor, groups), strict=True):
        assert {k: type(v) for k, v in got.items()} == {k: type(v) for k, v in wanted.items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta=(0.9,0.95)", "'beta' is not a known option of optim='pion'. Did you mean 'betas'"),
        ("polar_step=3", "Did you mean 'polar_steps'"),
        ("side=inn", "'inn' is not a known value of side. Did you mean 'in'"),
        ("retraction=tailor", "Did you mean 'taylor'"),
        ("rms=big", "rms must be of type float, got 'big'"),
        ("rms=true", "rms must be of type float, got True"),
        ("polar_steps=2.5", "polar_steps must be of type int, got 2.5"),
        ("polar_steps=1e999", "polar_steps must be of type int, got inf"),
        ("second_moment=1", "second_moment must be of type bool, got 1"),
        ("betas=0.9", "betas must be 2 numbers"),
        ("betas=(a,b)", "betas must be of type float, got 'a'"),
        ("lr=1e-3", "'lr' is set by --learning_rate"),
        ("weight_decay=0.1", "'weight_decay' is set by --weight_decay"),
    ],
)
def test_wrong_options_name_the_right_one(text, message, arguments):
    for build in (lambda: resolve_options("pion", parse_optim_args(text)), lambda: arguments(optim_args=text)):
        with pytest.raises(ValueError, match=re.escape(message)):
            build()


def test_a_mapping_of_options_is_taken_as_it_is(arguments):
    assert parse_optim_args({"side": "in"}) == {"side": "in"}
    with pytest.raises(ValueError, match="Did you mean 'in'"):
        arguments(optim_args={"side": "inn"})


@pytest.mark.parametrize("given", [{"metric": "ambient"}, {"side": "in"}])
def test_a_preset_beside_an_option_that_it_sets(given):
    """The value may be the option's default: it was given all the same."""
    with pytest.raises(ValueError, match=rf"preset='paper' sets {next(iter(given))}=.*leave out one of the two"):
        resolve_options("pion", {"preset": "paper", **given})
    assert resolve_options("pion", {"preset": "paper", "metric": "lie"})


def test_a_list_in_one_word_is_a_list(arguments):
    for text in ("['q_proj','v_proj']", "[q_proj, v_proj]"):
        assert arguments(optim_target_modules=text).optim_target_modules == ["q_proj", "v_proj"]
    assert arguments(optim_target_modules="[qv]_proj").optim_target_modules == "[qv]_proj"


def test_numbers_that_yaml_reads_as_text(arguments):
    assert arguments(learning_rate="1e-3").learning_rate == 1e-3
    with pytest.raises(ValueError, match="learning_rate must be of type float, got 'fast'"):
        arguments(learning_rate="fast")


def test_later_sources_win():
    assert resolve_options("pion", {"rms": 0.1, "eps": 0.1}, {"rms": 0.2}) == ({"rms": 0.2, "eps": 0.1}, {})


@pytest.mark.parametrize("optim", OPTIMIZER_CLASSES)
def test_every_option_has_a_typed_field_of_its_type(optim):
    types, hints = option_types(optim), typing.get_type_hints(OptimizerFields)
    options = {"exclude" if f == "optim_exclude_modules" else f.removeprefix("optim_"): f for f in hints}
    # The field of `targets` is TrainingArguments' own optim_target_modules.
    assert set(types) - {"targets"} <= set(options)
    for option in set(types) - {"targets"}:
        wanted = _without_none(types[option])
        given = _without_none(hints[options[option]])
        if typing.get_origin(wanted) is tuple:
            wanted = list[typing.get_args(wanted)[0]]  # argparse reads several values as a list
        # What the optimizers understand differently is a string, or has the words of all of them, and is checked
        # against the constructor.
        words = [set(typing.get_args(t)) if typing.get_origin(t) is typing.Literal else {t} for t in (wanted, given)]
        assert words[0] <= words[1] or given is str, f"{options[option]}: {given}, the constructor has {wanted}"


def test_every_typed_field_is_an_option_of_some_optimizer():
    known = set().union(*map(option_types, OPTIMIZER_CLASSES))
    fields = typing.get_type_hints(OptimizerFields)
    assert {"exclude" if f == "optim_exclude_modules" else f.removeprefix("optim_") for f in fields} <= known


def test_fields_that_differ_between_optimizers_reach_each_in_its_own_words(arguments):
    for optim, given in (("pion", "spectral"), ("pion_ambient", "rms"), ("teon", "paper"), ("muon", "original")):
        resolved, _ = resolve_options(optim, arguments(optim="adamw_torch", optim_scale=given).given_options())
        assert resolved["scale"] == given
    with pytest.raises(ValueError, match="'spectral' is not a known value of scale"):
        resolve_options("teon", arguments(optim="adamw_torch", optim_scale="spectral").given_options())


def test_momenta_are_numbers_of_teon_and_muon_and_frames_of_pion(arguments):
    for optim in ("teon", "muon", "teon_lora"):
        resolved, _ = resolve_options(optim, arguments(optim="adamw_torch", optim_momentum="0.9").given_options())
        assert resolved == {"momentum": 0.9}
    for optim in ("pion", "pion_ambient", "pion_lora"):
        given = arguments(optim="adamw_torch", optim_momentum_frame="transported").given_options()
        assert resolve_options(optim, given)[0]["momentum_frame"] == "transported"
        with pytest.raises(ValueError, match=rf"not of optim='{optim}'\. It is momentum_frame since 0\.13\.$"):
            resolve_options(optim, {"momentum": "lie"})


def test_a_stack_is_teons():
    assert resolve_options("muon", {"rms": 0.1}) == ({"rms": 0.1}, {})
    assert resolve_options("teon", {"stack": 3, "stack_targets": "q"}) == ({}, {"stack": 3, "stack_targets": ["q"]})


def test_pion_ambient_is_a_preset_of_pion():
    assert OPTIMIZER_CLASSES["pion_ambient"] is OPTIMIZER_CLASSES["pion"] is Pion
    assert resolve_options("pion_ambient", {"side": "in"}) == ({"preset": "ambient", "side": "in"}, {})
    assert resolve_options("pion_ambient", {"rms": 2.0}) == ({"preset": "ambient", "rms": 2.0}, {})
    for clash in ({"rms": 0.2}, {"metric": "lie"}, {"direction": "adam"}, {"scale": "none"}):
        with pytest.raises(ValueError, match=rf"pion_ambient' means {next(iter(clash))}=.*use optim='pion'"):
            resolve_options("pion_ambient", clash)
    for preset in ("ambient", "paper"):
        with pytest.raises(ValueError, match="'preset' is an option of optim='pion', not of optim='pion_ambient'"):
            resolve_options("pion_ambient", {"preset": preset})


def test_choices_of_lora_factors_are_the_routings():
    options = {"lora_a": "orthogonal", "lora_b": "adamw", "direction": "natural"}
    assert resolve_options("pion_lora", options) == (
        {"direction": "natural"},
        {"lora_a": "orthogonal", "lora_b": "adamw"},
    )
    assert resolve_options("teon_lora", {"stack": 4}) == ({}, {"stack": 4})


@pytest.mark.parametrize(
    ("optim", "option", "message"),
    [
        ("teon", {"degree": 2}, "'degree' is an option of optim='pion' and 'pion_ambient', not of optim='teon'"),
        ("pion", {"hold": 0.1}, "optim='pion' has no option 'hold': it is gone since 0.13"),
        ("pion", {"rank_tolerance": 0.1}, "optim='pion' has no option 'rank_tolerance': it is gone since 0.13"),
        ("muon", {"share_work": True}, "optim='muon' has no option 'share_work': it is gone since 0.14, as Trainers"),
        ("muon", {"stack": 2}, "'stack' is an option of optim='teon' and 'teon_lora', not of optim='muon'"),
        ("pion", {"nesterov": True}, "'nesterov' is an option of optim='teon' and 'muon' and 'teon_lora', not of"),
        ("pion", {"lora_a": "rotate"}, "'lora_a' is an option of optim='pion_lora', not of optim='pion'"),
        ("pion_lora", {"side": "in"}, "'side' is an option of optim='pion' and 'pion_ambient', not of"),
        ("pion_lora", {"lora_b": "grow"}, "'grow' is not a known value of lora_b"),
        ("pion_lora", {"retraction": "polar"}, "'retraction' is an option of optim='pion' and 'pion_ambient', not of"),
        ("teon_lora", {"scale": "rms"}, "not of optim='teon_lora'"),
        ("teon", {"momentum_frame": "lie"}, "'momentum_frame' is an option of optim='pion' and 'pion_ambient' and"),
        ("teon", {"momentum": "lie"}, "momentum must be of type float, got 'lie'"),
        ("teon", {"stak": 2}, "Did you mean 'stack'"),
    ],
)
def test_options_of_another_optimizer_are_named(optim, option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_options(optim, option)


def _without_none(hint):
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    return arguments[0] if type(None) in typing.get_args(hint) else hint


def test_typed_fields_show_in_help_and_parse(tmp_path):
    parser = HfArgumentParser(PionTrainingArguments)
    text = parser.format_help()
    for name in OptimizerFields.__dataclass_fields__:
        assert f"--{name}" in text
    command = "--use_cpu --optim_betas 0.9 0.99 --optim_rms 0.1 --optim_side in --optim_exclude_modules q_proj k_proj"
    (args,) = parser.parse_args_into_dataclasses([*command.split(), "--output_dir", str(tmp_path)])
    assert args.optim == "pion"
    assert resolve_options("pion", args.given_options()) == (
        {"betas": (0.9, 0.99), "rms": 0.1, "side": "in"},
        {"exclude": ["q_proj", "k_proj"]},
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "pin"}, "'pin' is not a known optimizer. Did you mean 'pion'"),
        ({"optim_momentum_frame": "transport"}, "Did you mean 'transported'"),
        ({"optim_metric": "ambiant"}, "Did you mean 'ambient'"),
        ({"optim_polar_steps": 2.5}, "polar_steps must be of type int"),
        ({"optim_betas": [0.9]}, "betas must be 2 numbers"),
    ],
)
def test_wrong_typed_fields_fail_at_once(options, message, arguments):
    with pytest.raises(ValueError, match=re.escape(message)):
        arguments(**options)


def test_fields_that_the_optimizer_ignores_are_named(arguments, monkeypatch):
    warnings = []
    monkeypatch.setattr("pion_hf.integrations.arguments.logger.warning", warnings.append)
    arguments(optim="adamw_torch", optim_rms=0.1)
    assert len(warnings) == 1
    assert "adamw_torch" in warnings[0]
    assert "rms" in warnings[0]
    arguments(optim="adamw_torch")
    arguments(optim_rms=0.1)
    assert len(warnings) == 1


def test_group_options_are_those_of_param_groups():
    assert {*GROUP_OPTIONS} <= set(inspect.signature(param_groups).parameters)
