"""Values as YAML and people write them: converted by the field's type, and refused out of its range."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import pytest
import yaml
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from pion_hf import PionTrainer, PionTrainingArguments
from pion_hf.cli import cpt, grpo, sft
from pion_hf.integrations.arguments import resolve_options
from pion_hf.integrations.values import RANGES, check_ranges, fit, fit_fields, numbers_in
from tests.conftest import toy_llama
from tests.test_cli import fails

BASE = {"output_dir": "x", "use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.mark.parametrize(
    ("value", "wanted", "fitting"),
    [
        ("1e-3", float, 1e-3),
        ("1e-3", float | None, 1e-3),
        (" 3 ", int, 3),
        (4.0, int, 4),
        ("4.0", int | None, 4),
        (4, float, 4),
        (None, int | None, None),
        ("1e-4", str | None, "1e-4"),
        (7, str | None, "7"),
        ("no", bool, False),
        (1, bool | None, True),
        (False, IntervalStrategy | str, "no"),
        (False, Literal["off", "auto"], "off"),
        (True, Literal["yes", "no"] | None, "yes"),
        ("steps", IntervalStrategy | str, "steps"),
        (True, str | bool, True),
        (True, str | None, True),  # resume_from_checkpoint
        (["1e-1", 2], list[float] | None, [0.1, 2]),
        (0.5, list[float] | None, [0.5]),
        (["a", "1e-1"], list[str], ["a", "1e-1"]),
        ({"min_lr": "1e-4", "a": {"b": ["2E+3", ".5e1"]}}, dict | str | None, {"min_lr": 1e-4, "a": {"b": [2e3, 5.0]}}),
        ({"revision": "12e4567", "name": "1e-4x", "n": "7"}, dict[str, Any] | str | None, ...),
        ("{", dict | str | None, "{"),
        (object, type, object),
    ],
)
def test_values_fit_their_fields(value, wanted, fitting):
    fitting = value if fitting is ... else fitting
    found = fit("key", value, wanted)
    assert found == fitting
    assert type(found) is type(fitting)
    assert fit("key", found, wanted) == found


@pytest.mark.parametrize(
    ("value", "wanted", "said"),
    [
        (4.5, int, "key must be a whole number, got 4.5"),
        ("4.5", int, "key must be of type int, got '4.5'"),
        (math.inf, int, "key must be a whole number, got inf"),
        (True, int, "key must be a whole number, got True"),
        ("much", float, "key must be of type float, got 'much'"),
        ([1], float, "key must be a number, got [1]"),
        ("maybe", bool, "key must be true or false, got 'maybe'"),
        (True, IntervalStrategy | str, "True is not a known value of key"),
        (["x"], list[float], "key must be of type float, got 'x'"),
    ],
)
def test_what_fits_no_field_is_named(value, wanted, said):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        fit("key", value, wanted)
    assert str(raised.value).startswith(said)


# What a recipe says, and what training gets.
WRITTEN = """
learning_rate: 1e-3
adam_epsilon: 1e-8
max_steps: 4.0
seed: 7.0
warmup_steps: "2"
eval_strategy: no
save_strategy: off
logging_strategy: no
packing: "false"
use_cpu: yes
run_name: 7
max_grad_norm: 1
num_train_epochs: "1e0"
optim_adamw_betas: [9e-1, "0.95"]
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1e-4}
model_init_kwargs: {rope_theta: 1e6, revision: main}
bf16: false
"""
MEANT = {
    **{"learning_rate": 1e-3, "adam_epsilon": 1e-8, "max_steps": 4, "seed": 7, "warmup_steps": 2.0, "use_cpu": True},
    **{"packing": False, "run_name": "7", "max_grad_norm": 1, "num_train_epochs": 1.0, "bf16": False},
    **{"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no"},
    **{"lr_scheduler_kwargs": {"min_lr": 1e-4}},
}


@pytest.mark.parametrize("command", [sft, cpt, grpo])
def test_a_recipe_means_what_it_says(command, tmp_path):
    recipe = {key: value for key, value in yaml.safe_load(WRITTEN).items() if command is not grpo or key != "packing"}
    recipe |= {"lora_r": 8.0, "lora_dropout": "5e-2", "exact_match_samples": 3.0, "output_dir": str(tmp_path)}
    recipe |= {"model_name_or_path": 123, "report_to": "none"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    _, args, model_args, _, report_args, *_ = command.parser().parse_recipe(["--config", str(path)])
    for key, value in MEANT.items():
        if key in recipe:
            assert getattr(args, key) == value, key
            assert isinstance(getattr(args, key), type(value)), key
    assert args.model_init_kwargs["rope_theta"] == 1e6
    assert (model_args.lora_r, model_args.lora_dropout, model_args.model_name_or_path) == (8, 0.05, "123")
    assert type(model_args.lora_r) is type(report_args.exact_match_samples) is int


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: {a: b}", "learning_rate must be a number, got {'a': 'b'}"),
        ("learning_rate: 2026-01-01", "learning_rate must be a number, got datetime.date(2026, 1, 1)"),
        ("learning_rate: .nan", "learning_rate must be at least 0, got nan"),
        ("max_steps: null", "max_steps has no value: leave it out for the default, -1"),
        ("eval_strategy: yes", "True is not a known value of eval_strategy. Known: no, steps, epoch."),
        ("dataset_name: [a]", "dataset_name must be text (in quotes), got ['a']"),
        ("output_dir: no", "output_dir must be text (in quotes), got False"),
        ("other_text_file: no", "other_text_file must be text (in quotes), got False"),
        ("model_init_kwargs: no", "model_init_kwargs must hold keys and values, got False"),
        ("lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs must hold keys and values, got [1]"),
        ("lora_target_modules: no", "lora_target_modules must be a list, got False"),
        ("datasets: no", "datasets must be a list of mappings, each with a path, got False"),
        ("env: no", "env must hold variables and their values, got False"),
        ("env: {SECRET: [hunter2]}", "env: the variable SECRET must have a text or a number"),
    ],
)
def test_values_of_another_form_are_named(text, said, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model_name_or_path: m\nbf16: false\n{text}\n")
    line = fails("sft", "--config", str(path), "--use_cpu")
    assert f"recipe.yaml: {said}" in line
    assert "hunter2" not in line


def test_null_is_a_value_where_the_field_has_it(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("max_length: null\ndata_seed: ~\nresume_from_checkpoint: true\nbf16: null\nreport_to: none\n")
    _, args, *_ = sft.parser().parse_recipe(["--config", str(path), "--use_cpu", "--output_dir", str(tmp_path)])
    assert (args.max_length, args.data_seed, args.resume_from_checkpoint) == (None, None, True)


def test_arguments_in_python_mean_what_they_say():
    given = {k: v for k, v in yaml.safe_load(WRITTEN).items() if k not in ("packing", "model_init_kwargs")}
    args = PionTrainingArguments(**{**BASE, **given, "remove_unused_columns": "no"})
    for key, value in MEANT.items():
        if key in given:
            assert getattr(args, key) == value, key
    assert args.remove_unused_columns is False
    text = '{"min_lr": "1e-4"}'
    args = PionTrainingArguments(**BASE, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=text)
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-4}


def test_plain_arguments_with_text_for_numbers(tmp_path, token_rows):
    """As `yaml.safe_load` gives them to transformers' own class, which does not look at them."""
    given = {
        **BASE,
        "output_dir": str(tmp_path),
        "learning_rate": "1e-3",
        "weight_decay": "0e0",
        "adam_epsilon": "1e-8",
    }
    for trainer_class, optim in ((Trainer, "pion"), (PionTrainer, "adamw_torch")):
        args = TrainingArguments(**given, optim=optim, max_steps=1)
        trainer = trainer_class(toy_llama(), args, train_dataset=token_rows)
        trainer.train()
        assert args.learning_rate == 1e-3
    assert trainer.run_summary()["optimizer"]["learning_rate"] == 1e-3


def test_fields_of_a_class_whose_names_are_gone_stay():
    @dataclasses.dataclass
    class Arguments:
        learning_rate: NoSuchType = "1e-3"  # noqa: F821

    args = Arguments()
    fit_fields(args)
    assert args.learning_rate == "1e-3"
    assert numbers_in({"a": "1e-3", "code_revision": "1e3"}) == {"a": 1e-3, "code_revision": "1e3"}


OUT_OF_RANGE = [
    ("gradient_accumulation_steps", -1, "at least 1, got -1"),
    ("gradient_accumulation_steps", 0, "at least 1"),
    ("max_steps", 0, "at least 1, or -1 to train for num_train_epochs, got 0"),
    ("max_steps", -2, "at least 1, or -1"),
    ("max_length", -1, "at least 1: leave it out for no limit, got -1"),
    ("max_length", 0, "at least 1"),
    ("learning_rate", math.nan, "at least 0, got nan"),
    ("learning_rate", -1e-3, "at least 0"),
    ("learning_rate", math.inf, "at least 0"),
    ("per_device_train_batch_size", 0, "at least 1"),
    ("per_device_eval_batch_size", -4, "at least 1"),
    ("num_train_epochs", 0, "above 0"),
    ("num_train_epochs", math.nan, "above 0"),
    ("warmup_steps", -0.1, "a number of steps"),
    ("logging_steps", -5, "a number of steps"),
    ("save_steps", math.nan, "a number of steps"),
    ("eval_steps", -1, "a number of steps"),
    ("save_total_limit", 0, "at least 1: leave it out"),
    ("adam_beta1", 1.0, "at least 0 and below 1"),
    ("adam_beta2", -0.1, "at least 0 and below 1"),
    ("adam_epsilon", -1e-8, "at least 0"),
    ("weight_decay", math.nan, "at least 0"),
    ("max_grad_norm", -1.0, "at least 0"),
    ("label_smoothing_factor", 1.5, "between 0 and 1"),
    ("seed", -1, "between 0 and 2^32 - 1"),
    ("dataloader_num_workers", -1, "at least 0"),
    ("optim_adamw_lr", math.nan, "at least 0"),
    ("optim_adamw_betas", [0.9, 1.5], "two numbers in [0, 1), got [0.9, 1.5]"),
    ("optim_rms", 0.0, "above 0"),
    ("optim_eps", math.inf, "at least 0, got inf"),
    ("optim_degree", 0, "in 1..20, got 0"),
    ("lora_r", 0, "at least 1"),
    ("lora_alpha", -8, "at least 1"),
    ("lora_dropout", 1.0, "at least 0 and below 1"),
]


@pytest.mark.parametrize(("key", "value", "said"), OUT_OF_RANGE, ids=lambda value: str(value)[:24])
def test_what_is_out_of_range_is_refused_before_anything_is_loaded(key, value, said, tmp_path):
    keys = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": str(tmp_path), "bf16": False, key: value}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    line = fails("sft", "--config", str(path), "--use_cpu")
    assert f"recipe.yaml: {key} must be {said}" in line
    if key in (field.name for field in dataclasses.fields(PionTrainingArguments)):
        with pytest.raises(ValueError, match=f"{key.removeprefix('optim_')} must be"):
            PionTrainingArguments(**{**BASE, key: value})


def test_ranges_hold_on_the_command_line_and_within_optim_args(tmp_path):
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--use_cpu"]
    assert "lora_r must be at least 1, got 0" in fails("sft", *flags, "--lora_r", "0", "--bf16", "false")
    assert "max_steps must be at least 1" in fails("sft", *flags, "--max_steps", "0", "--bf16", "false")
    with pytest.raises(ValueError, match="adamw_lr must be at least 0, got nan"):
        resolve_options("pion", {"adamw_lr": math.nan})
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
        resolve_options("muon", {"momentum": "1.0"})


def test_defaults_are_within_their_ranges():
    for command in (sft, cpt, grpo):
        parser = command.parser()
        defaults = {key: parser.get_default(key) for key in RANGES}
        check_ranges({key: value for key, value in defaults.items() if value is not None})
        missing = [key for key in RANGES if key not in parser._by_key()]
        assert command is not grpo or {*missing} <= {"warmup_ratio", "max_length", "spectral_init", "dataset_num_proc"}
