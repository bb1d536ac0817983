"""Recipes of this repository parse, can be planned and say what they cost; mistakes in recipes are named."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import transformers
import trl
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import load_dataset
from trl.data_utils import is_conversational

from pion_hf.cli import cpt, grpo, main, older, sft
from pion_hf.cli.recipe import GONE, LOADER_OPTIONS, RENAMED, read_recipe
from pion_hf.integrations.values import check_ranges
from tests.conftest import write_jsonl
from tests.test_cli import fails

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("recipes/*/*/*.yaml"))
READMES = sorted(ROOT.glob("recipes/*/README.md"))
COMMANDS = {"sft": sft, "cpt": cpt, "grpo": grpo}
STALE = "python examples/benchmarks/recipes.py --write brings it up to date"
# What belongs to a machine, and so into recipes/accelerate.
HARDWARE = re.compile(r"(use_cpu|fsdp|deepspeed|ddp_|tf32|local_rank|torch_compile|dataloader_|device_map|bf16_full)")


def script(name: str):
    """A module of examples/, which is no package."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "examples" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes"))


# -- the recipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_recipes_parse_with_the_installed_trl(path):
    command = COMMANDS[path.parent.name]
    # No GPU is needed to parse bf16.
    _, args, model_args, *_ = command.parser().parse_recipe(["--config", str(path), "--use_cpu", "true"])
    keys = read_recipe(path)
    assert args.output_dir.startswith("runs/")
    assert args.optim.value == keys["optim"]
    assert getattr(args, "packing", False) == (command is cpt)
    assert model_args.use_peft == ("lora" in path.stem)
    assert model_args.load_in_4bit == ("qlora" in path.stem)
    machine = [key for key in keys if HARDWARE.match(key)]
    assert machine == (["use_cpu"] if path.parts[-3] == "smollm2-135m" and "qlora" not in path.stem else [])


def test_every_model_has_full_lora_and_qlora_fine_tuning_and_continued_pretraining():
    folders = [readme.parent for readme in READMES]
    assert sorted({path.parents[1] for path in RECIPES}) == folders
    assert len(folders) == 6
    for folder in folders:
        wanted = ("sft/full", "sft/lora", "sft/qlora", "cpt/pion", "cpt/teon")
        assert all((folder / f"{name}.yaml").is_file() for name in wanted), folder


def test_no_two_recipes_write_into_one_folder():
    outputs = [read_recipe(path)["output_dir"] for path in RECIPES]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("readme", READMES, ids=named)
def test_readmes_name_every_recipe_and_say_what_plan_estimates(readme):
    text = readme.read_text(encoding="utf-8")
    commands = set(re.findall(r"(sft|cpt|grpo) --config (recipes/\S+)", text))
    paths = [path for path in RECIPES if path.is_relative_to(readme.parent)]
    assert commands == {(path.parent.name, str(path.relative_to(ROOT))) for path in paths}
    if older.TILED_LOSS:  # before it there was another loss, which takes other memory
        row = script("benchmarks/recipes.py").row
        for path in paths:
            if "lora" not in path.stem or readme.parent.name == "smollm2-1.7b":  # adapters take seconds each
                assert row(path) in text, STALE


@pytest.mark.slow
@pytest.mark.parametrize("readme", READMES, ids=named)
def test_tables_of_readmes_are_what_plan_estimates(readme):
    table = script("benchmarks/recipes.py").table(readme.parent)
    assert table in readme.read_text(encoding="utf-8") or not older.TILED_LOSS, STALE


@pytest.mark.parametrize("name", ["sft/full", "sft/lora", "cpt/pion", "cpt/teon"])
def test_recipes_for_large_models_train_a_small_one(name, checkpoint, chat_data, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    write_jsonl(text / "train.jsonl", [{"text": f"{i} and {i + 1} make {2 * i + 1}. " * 9} for i in range(12)])
    write_jsonl(text / "validation.jsonl", [{"text": "7 and 8 make 15. " * 9}])
    (tmp_path / "other.txt").write_text("Sphinx of black quartz, judge my vow. " * 20, encoding="utf-8")
    flags = ["--config", str(ROOT / "recipes" / "smollm2-1.7b" / f"{name}.yaml"), "--use_cpu", "--max_steps", "2"]
    flags += ["--model_name_or_path", str(checkpoint), "--output_dir", str(tmp_path / "run"), "--max_length", "64"]
    flags += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--dtype", "float32"]
    flags += ["--bf16", "false"]  # before TRL 1.13 the loss of an evaluation in it has steps of 1/32 on a CPU
    if name.startswith("sft"):
        flags += ["--dataset_name", str(chat_data), "--dataset_test_split", "test"]
        flags += ["--other_dataset", str(chat_data), "--other_dataset_split", "test"]
    else:
        flags += ["--dataset_name", str(text), "--other_text_file", str(tmp_path / "other.txt")]
    main([name[:3], *flags])
    report = json.loads((tmp_path / "run" / "eval.json").read_text(encoding="utf-8"))
    assert report["steps"] == 2
    assert report["before"]["task"]["loss"] != report["after"]["task"]["loss"]
    assert len(report["forgotten"]) == 1


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/accelerate/*.yaml")), ids=lambda path: path.stem)
def test_configs_for_accelerate_are_read_by_its_own_loader(path):
    config = load_config_from_file(str(path))
    kinds = {"single": ("NO", 1), "ddp": ("MULTI_GPU", 8), "fsdp2": ("FSDP", 8)}
    assert (config.distributed_type.value, config.num_processes) == kinds[path.stem]
    assert config.mixed_precision == "bf16"
    # The loader takes any key of fsdp_config; `launch` passes on those that are its flags.
    flags = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= flags
    assert config.fsdp_config.get("fsdp_version", 2) == 2


# -- data -------------------------------------------------------------------------------------------


@pytest.fixture
def hub_data(tmp_path):
    """`examples/prepare_hub_data.py`, with folders here in the place of the hub's data."""
    module = script("prepare_hub_data.py")
    questions = [
        {"query": f"{q} (wording {i})", "original_question": q, "response": f"The answer is: {i}", "type": "x"}
        for q in map(str, range(12))
        for i in range(5)
    ]
    write = tmp_path / "hub"
    for name, rows in (
        ("metamath", [*questions, {**questions[0], "response": " "}]),
        ("magicoder", [{"instruction": f"Write {i}.", "response": f"print({i})"} for i in range(20)]),
        ("openwebmath", [{"url": f"u{i}", "text": f"x = {i}", "date": "", "metadata": "{}"} for i in range(20)]),
    ):
        (write / name).mkdir(parents=True)
        write_jsonl(write / name / "train.jsonl", rows)
        source = module.SOURCES[name]
        module.SOURCES[name] = module.Source(**{**vars(source), "path": str(write / name)})
    return module


def test_hub_data_is_written_as_trl_reads_it(hub_data, tmp_path, capsys):
    hub_data.main(["metamath", "magicoder", "openwebmath", "--output", str(tmp_path), "--validation", "7"])
    assert f"{tmp_path / 'metamath'}: 1 empty rows left out" in capsys.readouterr().out
    data = {name: load_dataset(str(tmp_path / name)) for name in hub_data.SOURCES}
    assert {name: {split: len(rows) for split, rows in splits.items()} for name, splits in data.items()} == {
        "metamath": {"train": 50, "validation": 10},
        "magicoder": {"train": 13, "validation": 7},
        "openwebmath": {"train": 13, "validation": 7},
    }
    assert data["openwebmath"]["train"].column_names == ["text"]
    for name in ("metamath", "magicoder"):
        assert data[name]["train"].column_names == ["prompt", "completion"]
        assert all(is_conversational(row) for row in data[name]["train"])
    # All wordings of a question are in one split.
    seen = [{row["prompt"][0]["content"].split()[0] for row in data["metamath"][s]} for s in ("train", "validation")]
    assert not seen[0] & seen[1]


def test_hub_data_that_has_changed_is_named(hub_data, tmp_path):
    source = hub_data.Source(hub_data.SOURCES["magicoder"].path, "instruction", prompt="instruction", completion="out")
    hub_data.SOURCES["magicoder"] = source
    with pytest.raises(SystemExit, match=r"has no column 'out' \(it has instruction, response\)"):
        hub_data.main(["magicoder", "--output", str(tmp_path / "data")])
    assert not (tmp_path / "data").exists()
    with pytest.raises(SystemExit, match="nothing is left for train: change --rows or --validation"):
        hub_data.main(["metamath", "--output", str(tmp_path / "data"), "--rows", "5"])


# -- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sft", "plan"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_length": 8}, "'max_seq_length' is outdated: it is now 'max_length'"),
        ({"evaluation_strategy": "no"}, "it is now 'eval_strategy'"),
        ({"tokenizer_name": "x"}, "'tokenizer_name' is outdated: leave it out, the tokenizer is the model's"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_l": 0.1}}, "Did you mean 'min_lr'"),
        ({"lr_scheduler_type": "teon_wsd", "lr_scheduler_kwargs": {"min_lr": 0.1}}, "Did you mean 'min_lr_ratio'"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, "'a' would be ignored"),
        ({"lr_scheduler_kwargs": '{"num_cycles": 2}'}, "lr_scheduler_kwargs: 'num_cycles' would be ignored"),
        ({"lr_scheduler_kwargs": "num_cycles"}, "lr_scheduler_kwargs must hold keys and values, got 'num_cycles'"),
        ({"model_init_kwargs": {"attn_implementatio": "sdpa"}}, "Did you mean 'attn_implementation'"),
        ({"model_init_kwargs": {"attention_dropuot": 0.1}}, "Did you mean 'attention_dropout'"),
        ({"gradient_checkpointing_kwargs": {"use_reentrent": False}}, "Did you mean 'use_reentrant'"),
        ({"activation_checkpointing_kwargs": {"preserve_rng": False}}, "Did you mean 'preserve_rng_state'"),
        ({"accelerator_config": {"split_batchs": True}}, "Did you mean 'split_batches'"),
        *(
            ({key: text}, f"{key} must hold keys and values, got {text!r}")
            for key in ("accelerator_config", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
            for text in ("x", "{x")
        ),
        ({"accelerator_config": '{"split_batchs": true}'}, "Did you mean 'split_batches'"),
        ({"dataset_kwargs": {"skip_prepare": True}}, "Did you mean 'skip_prepare_dataset'"),
        ({"datasets": [{"path": "a", "splt": "train"}]}, "datasets: 'splt' is not a known key of datasets"),
        ({"datasets": [{"split": "train"}]}, "datasets: {'split': 'train'} has no path"),
        ({"datasets": {"path": "a"}}, "datasets must be a list of mappings, each with a path"),
        (
            {"optim": "teon", "optim_side": "in"},
            "optim_side is an option of optim: pion, pion_ambient, not of optim: teon",
        ),
        (
            {"optim": "adamw_torch", "optim_degree": 3, "optim_adamw_lr": None},
            "optim_degree is an option of optim: pion",
        ),
        ({"optim_hold": 0.1}, "'optim_hold' is outdated: leave it out, no benchmark spoke for it"),
        (
            {"optim_share_work": True},
            "'optim_share_work' is outdated: leave it out, under DDP the work is divided where",
        ),
        ({"optim_momentum": 0.9}, "optim_momentum is an option of optim: teon, muon, teon_lora, not of optim: pion"),
        ({"optim": "adamw_torch"}, "optim_adamw_lr is an option of optim: pion, pion_ambient, teon, muon"),
        ({"optim": "teon", "optim_args": "stack=2, degree=3"}, "optim_args: 'degree' is an option of optim='pion'"),
        ({"optim_args": "rms=0.2, rms=0.3"}, "optim_args: 'rms' is given twice"),
        ({"optim_args": {"rms": 0.2}}, "optim_args must be a string"),
    ],
)
def test_mistakes_name_the_recipe_and_the_key(command, changes, message, recipe):
    path = recipe(**changes)
    said = fails(command, "--config", path)
    assert message in said
    # What the schedules of this package check, they check without knowing of the recipe.
    assert said.startswith(f"pion-hf {command}: " + (f"{path}: " if "teon_wsd" not in changes.values() else ""))
    assert "\n" not in said


def test_what_is_right_in_nested_keys_is_taken(recipe):
    path = recipe(
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-5},
        model_init_kwargs={"attn_implementation": "eager", "attention_dropout": 0.1},
        activation_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False},
        accelerator_config={"split_batches": False},
        datasets=[{"path": "a", "columns": ["text"], "fraction": 0.5}],
        optim_args="rms=0.3",
    )
    _, args, _, dataset_args, _ = sft.parser().parse_recipe(["--config", path])
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert args.model_init_kwargs["attention_dropout"] == 0.1
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False, "preserve_rng_state": False}
    assert dataset_args.datasets[0].columns == ["text"]


def test_options_of_a_model_that_only_the_hub_has_are_left_to_it(recipe):
    path = recipe(model_name_or_path="no/such-model", model_init_kwargs={"unknown_until_it_is_there": 1})
    _, args, *_ = sft.parser().parse_recipe(["--config", path])
    assert args.model_init_kwargs == {"unknown_until_it_is_there": 1}


def test_a_recipe_of_another_optimizer_can_be_compared_on_the_command_line(recipe):
    path = recipe(optim="pion", optim_degree=3)
    _, args, *_ = sft.parser().parse_recipe(["--config", path, "--optim", "adamw_torch"])
    assert args.optim.value == "adamw_torch"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: pion\nseed: 1\noptim: teon\n", "recipe.yaml, line 3: the key 'optim' is given twice"),
        ("seed: 1\nlr_scheduler_kwargs:\n  a: 1\n  a: 2\n", "line 4: the key 'a' is given twice"),
        ("lr_scheduler_kwargs: {a: 1, a: 1}\n", "line 1: the key 'a' is given twice"),
        ("datasets:\n  - path: a\n    path: b\n", "line 3: the key 'path' is given twice"),
    ],
)
def test_a_key_given_twice_is_an_error(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    assert message in fails("sft", "--config", str(path))


@pytest.mark.parametrize("text", ["report_to: &a [*a]", "model_init_kwargs: &a {dtype: *a}", "env: &a {b: [{c: *a}]}"])
def test_what_holds_itself_is_an_error(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    assert f"{path} is not YAML: found unconstructable recursive node" in fails("sft", "--config", str(path))


def test_recipes_may_use_anchors_and_equal_keys_in_different_places(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("a: &base {x: 1, y: 2}\nb: {<<: *base, y: 3}\n", encoding="utf-8")
    assert read_recipe(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


def test_outdated_flags_say_what_they_are_called_now():
    assert "'max_seq_length' is outdated: it is now 'max_length'" in fails("sft", "--max-seq-length=8")


@pytest.mark.skipif(bool(older.OLD_NAMES), reason="the table is of the newest releases")
def test_the_table_of_outdated_keys_is_not_outdated_itself():
    known = set(sft.parser()._by_key())
    assert not known & {*RENAMED, *GONE}
    assert not set(RENAMED) & set(GONE)
    assert {new.partition(":")[0] for new in RENAMED.values()} <= known


def test_options_of_the_loader_are_those_that_transformers_takes():
    """Each is taken out of `from_pretrained`'s keyword arguments, by name, somewhere in its source."""
    package = Path(transformers.__file__).parent
    source = "".join((package / name).read_text() for name in ("modeling_utils.py", "models/auto/auto_factory.py"))
    newer = {"allow_all_kernels"} if older.OLD_NAMES else set()
    assert {name for name in LOADER_OPTIONS if f'"{name}"' not in source} <= newer


# -- every flag of trl sft --------------------------------------------------------------------------

TRL = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig))
OURS = sft.parser()
FLAGS = {a.option_strings[0]: a for a in TRL._actions if not isinstance(a, argparse._HelpAction)}
VALUES = ["3", "0.25", "true", "no", "word", "none", '{"use_reentrant": false}', "-1", ""]
# Where others are needed, or TRL takes what would fail later.
OWN_VALUES = {
    "--accelerator_config": ['{"split_batches": true}'],
    "--activation_checkpointing_kwargs": ['{"use_reentrant": false}'],
    "--dataset_kwargs": ['{"skip_prepare_dataset": true}'],
    "--debug": ["underflow_overflow"],
    "--gradient_checkpointing_kwargs": ['{"use_reentrant": false}'],
    "--lr_scheduler_kwargs": ['{"num_cycles": 2}'],
}
# These need a launcher, a file, or a form that a command line does not have.
NOT_TAKEN_HERE = {"--datasets", "--ddp_backend", "--deepspeed", "--parallelism_config"}
if not older.TILED_LOSS:  # TRL before 1.15 reads no JSON there
    NOT_TAKEN_HERE.add("--dataset_kwargs")
TAKEN_HERE_ALONE = [("--learning_rate", ["none"])]  # the optimizer's own


def outcome(parser: trl.TrlParser, argv: list[str], dest: str) -> tuple[bool, object]:
    """Whether `argv` is taken, and then the value of `dest`."""
    try:
        parsed = parser.parse_recipe(argv) if parser is OURS else parser.parse_args_and_config(argv)
    except (Exception, SystemExit):
        return False, None
    return True, next(getattr(of, dest) for of in parsed if hasattr(of, dest))


def in_range(key: str, value: object) -> bool:
    """Whether training would be training: TRL takes a batch of -1 rows."""
    try:
        check_ranges({key: value})
    except ValueError:
        return False
    return True


@pytest.fixture
def environment(monkeypatch):
    """Some flags set variables of the environment: they end with the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("flag", sorted(FLAGS))
def test_flags_of_trl_sft_mean_what_they_mean_to_trl(flag, tmp_path):
    action = FLAGS[flag]
    base = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--optim", "adamw_torch"]
    base += ["--lr_scheduler_type", "cosine_with_restarts"]
    values = [[str(value)] for value in [*(action.choices or ())][:3] or OWN_VALUES.get(flag, VALUES)]
    values += [[]] if action.nargs in ("?", 0) else []
    taken = 0
    for value in values:
        (theirs, wanted), (ours, got) = (outcome(parser, [*base, flag, *value], action.dest) for parser in (TRL, OURS))
        if (flag, value) in TAKEN_HERE_ALONE:
            assert ours
            assert not theirs
            continue
        refused = theirs and not in_range(action.dest, wanted)
        assert (ours, got) == ((False, None) if refused else (theirs, wanted)), value
        taken += theirs
    assert taken or flag in NOT_TAKEN_HERE


def test_every_spelling_of_a_flag_is_one_of_ours():
    ours = {option for action in OURS._actions for option in action.option_strings}
    assert {option for action in TRL._actions for option in action.option_strings} <= ours
