"""The command `pion-hf`: training through it, the plan, and every way of getting it wrong."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
import trl.scripts.sft
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import pion_hf
from pion_hf import run
from pion_hf.cli import flags, main
from pion_hf.cli.before_after import ReportMixin
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES, default_of, field_name, options_of
from pion_hf.optim.options import usual_rates
from tests.conftest import chat_rows, toy_llama

COMMAND = [str(Path(sysconfig.get_path("scripts")) / "pion-hf")]
TWO_STEPS = ["--optim", "pion", "--max_steps=2", "--learning_rate=1e-2", "--use_cpu", "--report_to=none"]

# Knows nothing of pion_hf.
PLAIN_SCRIPT = """
from dataclasses import dataclass
import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments

@dataclass
class ScriptArguments:
    model: str

if __name__ == "__main__":
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    rows = [{"input_ids": r, "labels": r} for r in torch.randint(5, 105, (16, 12)).tolist()]
    model = AutoModelForCausalLM.from_pretrained(script.model)
    Trainer(model=model, args=args, train_dataset=rows).train()
    model.save_pretrained(args.output_dir)
"""


def fails(*argv: str) -> str:
    """The one line with which `pion-hf` refuses `argv`."""
    with pytest.raises(SystemExit) as raised:
        main(list(argv))
    assert isinstance(raised.value.code, str), "an exit without a message"
    return raised.value.code


def assert_trained_by_rotations(folder: Path) -> None:
    """The saved toy model differs from the initial one, and its hidden matrices have their singular values."""
    trained = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    for name, before in toy_llama().named_parameters():
        after = trained[name].detach()
        assert not torch.equal(after, before), f"{name} was not trained"
        if before.ndim == 2 and "embed" not in name:
            old, new = torch.linalg.svdvals(before.double()), torch.linalg.svdvals(after.double())
            torch.testing.assert_close(new, old, rtol=0, atol=2e-5 * old[0].item(), msg=f"spectrum of {name}")


def run_process(argv: list[str]) -> subprocess.CompletedProcess:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=400, env=os.environ.copy())
    assert done.returncode == 0, done.stderr[-4000:]
    return done


# -- training ---------------------------------------------------------------------------------------


def test_run_trains_an_unmodified_script(tmp_path, checkpoint):
    script = tmp_path / "train.py"
    script.write_text(PLAIN_SCRIPT, encoding="utf-8")
    out = tmp_path / "out"
    options = ["--model", str(checkpoint), "--output_dir", str(out), "--optim_args", "betas=(0.9, 0.95), rms=0.2,"]
    done = run_process([*COMMAND, "run", str(script), *options, *TWO_STEPS])
    assert "pion: 14 matrices of " in done.stderr  # a line for a pipe; the table is for terminals
    assert (out / "routing.json").is_file()
    assert_trained_by_rotations(out)


def test_module_trains_with_trls_own_script(tmp_path, checkpoint, chat_data, monkeypatch):
    """As `accelerate launch -m pion_hf.run` starts it, in this process."""
    options = ["--model_name_or_path", str(checkpoint), "--dataset_name", str(chat_data), "--output_dir", str(tmp_path)]
    script = trl.scripts.sft.__file__
    monkeypatch.setattr(sys, "argv", ["pion_hf.run", script, *options, *TWO_STEPS, "--bf16", "false"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_module("pion_hf.run", run_name="__main__")
    assert (tmp_path / "routing.json").is_file()
    assert_trained_by_rotations(tmp_path)


def test_sft_trains_and_reports(recipe, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("Sphinx of black quartz, judge my vow. " * 20, encoding="utf-8")
    path = recipe(learning_rate=1e-3, other_text_file=str(other), exact_match_samples=3)  # no step is clipped
    main(["sft", "--config", path, "--max_new_tokens", "4"])
    folder = tmp_path / "run"
    report = json.loads((folder / "eval.json").read_text())
    before, after = report["before"], report["after"]
    for moment in (before, after):
        assert list(moment) == ["task", "other_text"]
        assert list(moment["task"]) == ["loss", "perplexity", "exact_match"]
        assert list(moment["other_text"]) == ["loss", "perplexity"]
        assert all(math.isfinite(value) for values in moment.values() for value in values.values())
        assert moment["other_text"]["perplexity"] == pytest.approx(math.exp(moment["other_text"]["loss"]))
    assert report["learnt"] == before["task"]["loss"] - after["task"]["loss"] > 0
    assert report["forgotten"] == {"other_text": after["other_text"]["loss"] - before["other_text"]["loss"]}
    questions = [row["prompt"][0]["content"] for row in chat_rows(3, first=100)]
    assert [example["question"] for example in report["examples"]] == questions
    assert report["examples"][0]["before"] != report["examples"][0]["reference"]
    assert report["optimizer"]["name"] == "pion"
    assert report["optimizer"]["options"]["direction"] == "gradient"
    assert report["steps"] == 2
    assert report["spectrum_drift"] < 1e-5
    printed = capsys.readouterr().out
    assert "pion, 2 steps" in printed
    assert all(f"task: {measure}" in printed for measure in ("loss", "perplexity", "exact match"))
    assert "other text: loss" in printed
    assert all(question in printed for question in questions)
    rules = {r["name"]: r["rule"] for r in json.loads((folder / "routing.json").read_text())["parameters"]}
    assert rules["model.layers.0.mlp.down_proj.weight"] == "pion"
    assert rules["model.embed_tokens.weight"] == "adamw"
    assert_trained_by_rotations(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2="}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert written.shape[1] == prompt["input_ids"].shape[1] + 5


def test_sft_takes_other_optimizers_and_flags_over_the_recipe(recipe, tmp_path):
    main(["sft", f"--config={recipe()}", "--optim", "adamw_torch", "--max-steps", "1", "--eval_strategy", "no"])
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert report["before"] == report["after"] == {}
    assert "spectrum_drift" not in report
    assert not (tmp_path / "run" / "routing.json").exists()
    assert trl.SFTTrainer.__module__ == "trl.trainer.sft_trainer", "TRL's trainer was not put back"


# -- plan -------------------------------------------------------------------------------------------


def test_what_the_optimizer_refuses_is_known_before_anything_is_measured(recipe, monkeypatch):
    monkeypatch.setattr(ReportMixin, "measure", lambda self: pytest.fail("measured"))
    said = fails("sft", "--config", recipe(optim="teon", optim_stack=7))
    assert "stack" in said
    assert "set use_peft too" in fails("sft", "--config", recipe(optim="pion_lora"))


def test_errors_of_the_users_own_code_keep_their_traceback(monkeypatch):
    def train(argv):
        float("seven")  # as a reward function might, in a file of the user's

    monkeypatch.setattr("pion_hf.cli.sft.main", train)
    with pytest.raises(ValueError, match="could not convert string to float: 'seven'"):
        main(["sft"])


def planned_bytes(printed: str) -> dict[str, int]:
    """Bytes of state by optimizer, from their table."""
    table = printed.split("Optimizer state")[1].split("The first update")[0]
    cells = [[c.strip() for c in line.split("│")] for line in table.splitlines()]
    return {row[1]: int(row[2].replace(",", "")) for row in cells if len(row) > 3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optim_args", ["direction=natural", "preset=paper", "preset=ambient", "exclude=q_proj"])
def test_plan_states_the_bytes_a_stepped_optimizer_holds(dtype, optim_args, checkpoint, tmp_path, capsys):
    options = ["--model_name_or_path", str(checkpoint), "--dtype", dtype, "--optim_args", optim_args]
    main(["plan", *options])
    planned = planned_bytes(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    held = {}
    for optim, text in (("pion", optim_args), ("adamw_torch", None)):
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", optim=optim, optim_args=text)
        optimizer = Trainer(model=model, args=args).create_optimizer()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        # Step counters, four bytes a tensor, are left out of the plan.
        entries = [
            (k, v) for state in optimizer.state.values() for k, v in state.items() if isinstance(v, torch.Tensor)
        ]
        held[optim] = sum(v.numel() * v.element_size() for k, v in entries if k != "step")
    assert planned == held


def test_plan_follows_the_recipe_without_training(recipe, tmp_path, capsys):
    # A recipe for a GPU: there need be none to plan with it, nor any data.
    path = recipe(bf16=True, use_cpu=None, dataset_name=None, optim_target_modules="mlp")
    main(["plan", "--config", path, "--routing_file", str(tmp_path / "plan.json")])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "plan.json").read_text())
    by_rule: dict[str, int] = {}
    for row in record["summary"]:
        by_rule[row["rule"]] = by_rule.get(row["rule"], 0) + row["parameters"]
        assert f"{row['parameters']:,}" in printed
        assert row["lr"] == {"pion": 1e-2, "adamw": 1e-3}[row["rule"]]
    sizes = {n: p.numel() for n, p in toy_llama().named_parameters()}
    assert by_rule["pion"] == sum(size for n, size in sizes.items() if "mlp" in n)
    assert by_rule["adamw"] == sum(size for n, size in sizes.items() if "mlp" not in n)
    rows = [[c.strip() for c in line.split("│")] for line in printed.split("The first update")[1].splitlines()]
    updates = {row[1]: row[2:4] for row in rows if len(row) > 3}
    assert updates == {"pion": ["0.01", "RMS 2.0e-03"], "adamw": ["0.001", "RMS 1.0e-03"]}
    assert not (tmp_path / "run").exists()


def test_plan_takes_the_dtype_of_the_checkpoint(tmp_path, capsys):
    toy_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    adamw = {}
    for dtype in ("auto", "bfloat16", "float32"):
        main(["plan", "--model_name_or_path", str(tmp_path), "--dtype", dtype])
        adamw[dtype] = planned_bytes(capsys.readouterr().out)["adamw_torch"]
    assert adamw["auto"] == adamw["bfloat16"] == adamw["float32"] / 2


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sft", "cpt", "plan"])
@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"learning_rat": 1e-3}, [], "'learning_rat' is not a known key. Did you mean 'learning_rate'"),
        ({"optim_rsm": 0.1}, [], "Did you mean 'optim_rms'"),
        ({"optim": "pin"}, [], "'pin' is not a known optimizer. Did you mean 'pion'"),
        ({"optim_metric": "ambiant"}, [], "'ambiant' is not a known value of optim_metric. Did you mean 'ambient'"),
        ({"optim_momentum_frame": "lye"}, [], "'lye' is not a known value of optim_momentum_frame. Did you mean 'lie'"),
        ({"learning_rate": "fast"}, [], "--learning_rate/--learning-rate: invalid float value: 'fast'"),
        ({"optim_rms": [0.1]}, [], "rms must be of type float, got [0.1]"),
        ({"max_steps": 2.5}, [], "max_steps must be a whole number, got 2.5"),
        ({"learning_rate": [0.001]}, [], "learning_rate must be a number, got [0.001]"),
        ({"max_steps": float("inf")}, [], "max_steps must be a whole number, got inf"),
        ({"max_steps": True}, [], "max_steps must be a whole number, got True"),
        ({"optim_args": "beta=(0.9,0.95)"}, [], "Did you mean 'betas'"),
        ({}, ["--optim_rsm", "0.1"], "'optim_rsm' is not a known flag. Did you mean 'optim_rms'"),
        ({}, ["--learning-rate=1e-3x"], "invalid float value: '1e-3x'"),
        ({}, ["--optim_side", "inn"], "'inn' is not a known value. Did you mean 'in'"),
        ({}, ["--optim_polar_steps", "2.5"], "invalid int value: '2.5'"),
        ({}, ["--optim_args", "rms=big"], "rms must be of type float, got 'big'"),
        ({}, ["--optim_sid", "in"], "'optim_sid' is not a known flag. Did you mean 'optim_side'"),
        ({}, ["recipe.yaml"], "'recipe.yaml' belongs to no flag; a recipe is named by --config FILE"),
        ({"model_name_or_path": None}, [], "name the model"),
    ],
)
def test_bad_input_is_one_line_that_names_the_right_one(command, changes, flags, message, recipe):
    said = fails(command, "--config", recipe(**changes), *flags)
    assert said.startswith(f"pion-hf {command}: ")
    assert message in said
    assert "\nusage" not in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exact_match_samples": 3, "eval_strategy": "no"}, "exact_match_samples needs evaluation data"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"output_dir": ""}, "output_dir is empty: name a folder"),
        ({"exact_match_samples": -1}, "exact_match_samples must be at least 0, got -1"),
        ({"other_text_file": "nowhere.txt"}, "other_text_file: there is no file 'nowhere.txt'"),
        ({"lm_eval_limit": 5}, "lm_eval_limit does nothing without lm_eval_tasks: set that too, or leave"),
    ],
)
def test_reports_that_cannot_be_made(changes, message, recipe):
    assert message in fails("sft", "--config", recipe(**changes))


def test_columns_that_cannot_be_read_are_named(recipe, tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text('{"foo": "a", "bar": "b"}\n' * 4)
    said = fails("sft", "--config", recipe(dataset_name=str(tmp_path / "data"), dataset_test_split="test"))
    assert "has the columns foo, bar: sft needs messages (chats), prompt and completion, or text in 'text'" in said


@pytest.mark.parametrize("command", ["sft", "cpt"])
@pytest.mark.parametrize("ids", [[1.5, 2.0], ["a"], "1 2", 3])
def test_tokens_are_whole_numbers(command, ids, recipe, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"input_ids": ids}) + "\n")
    said = fails(command, "--config", recipe(dataset_name=str(tmp_path), eval_strategy="no"))
    assert "input_ids" in said


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([None, None], "train.jsonl' is null, which is no row"),
        ([{"messages": MESSAGES}, None], "1 rows hold nothing in the column 'messages', which is read"),
        ([{"messages": MESSAGES}, {"text": "x"}], "1 rows hold nothing in the column 'messages', which is read"),
        ([{"text": "x"}, {"text": None}], "1 rows hold nothing in the column 'text', which is read"),
        ([{"messages": [{**m, "role": None} for m in MESSAGES]}], "in row 1 of 'messages' a message has no role"),
        ([{"messages": MESSAGES}, {"messages": [{"role": "user"}]}], "in row 2 of 'messages' a message has no content"),
        ([{"messages": [*MESSAGES, {"content": "x"}]}], "in row 1 of 'messages' a message has no role"),
        ([{"input_ids": [1, 99999]}], "input_ids holds 99,999, which is none of the model's "),
        ([{"input_ids": [1, 2]}, {"input_ids": [1, -5]}], "input_ids holds -5, which is none of the model's "),
    ],
)
def test_rows_that_are_none_are_refused(rows, message, recipe, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = fails("sft", "--config", recipe(dataset_name=str(tmp_path), eval_strategy="no"))
    assert message in said


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_messages_without_content_are_refused(column, recipe, tmp_path):
    row = {column: [{"role": "user", "name": "x"}], "completion": [{"role": "assistant", "content": "x"}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    said = fails("sft", "--config", recipe(dataset_name=str(tmp_path), eval_strategy="no"))
    assert f"in row 1 of {column!r} a message has no content" in said


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json' is damaged: Expecting property name"),
        ("config.json", "null", "config.json' is damaged: it holds no keys and values"),
        ("config.json", '{"model_type": "lama"}', "cannot load the model ("),
        ("tokenizer.json", "", "tokenizer.json' is damaged: Expecting value"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json' is damaged: it holds no keys and values"),
        ("model.safetensors", "It was a dark night.", "model.safetensors' is damaged: "),
        ("chat_template.jinja", "{{ raise_exception('not these') }}", "fails on the data ("),
        ("chat_template.jinja", "{{ messages + 1 }}", "fails on the data ("),
    ],
)
def test_files_of_a_model_that_are_damaged_are_named(file, content, message, recipe, checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "damaged")
    (model / file).write_text(content)
    said = fails("sft", "--config", recipe(model_name_or_path=str(model), eval_strategy="no"))
    assert message in said
    assert str(model) in said
    assert "Error: " not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("null\n", "is null, which is no row"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", "is nested too deeply"),
        ("x", "JSON parse error"),
        ('{"messages": [{"content": "a"}]}', "in row 1 of 'messages' a message has no role"),
        ('{"messages": ["a"]}', "in row 1 of 'messages' there is 'a' instead of a message"),
        (json.dumps({"messages": MESSAGES, "tools": 3}), "in row 1 of 'tools' there is 3, which is no list of tools"),
    ],
)
def test_damaged_data_of_another_domain_is_named(content, message, recipe, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test.jsonl").write_text(content)
    said = fails("sft", "--config", recipe(other_dataset=str(tmp_path / "other")))
    assert said.startswith("pion-hf sft: other_dataset")
    assert message in said


@pytest.mark.parametrize("settings", ["configs: [", "configs: 3", "dataset_info:\n  features: 3"])
def test_settings_of_data_that_are_none_are_refused(settings, recipe, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    (tmp_path / "README.md").write_text(f"---\n{settings}\n---\n")
    said = fails("sft", "--config", recipe(dataset_name=str(tmp_path), eval_strategy="no"))
    assert said.startswith(f"pion-hf sft: cannot read the data ({tmp_path}): ")
    assert "\n" not in said.strip()


def test_a_version_is_printed(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"pion-hf {pion_hf.__version__}\n"


def test_a_missing_package_is_one_line(recipe, monkeypatch):
    """In a library; what a user's own code imports in vain keeps its traceback."""
    found = {}
    library = compile(
        "def train(*_): raise ImportError('bits is not installed: pip install bits')", trl.__file__, "exec"
    )
    exec(library, found)
    monkeypatch.setattr("pion_hf.cli.sft.train", found["train"])
    assert fails("sft", "--config", recipe()).strip() == "pion-hf sft: bits is not installed: pip install bits"


def test_a_wrong_checkpoint_is_found_before_anything_is_measured(recipe, monkeypatch):
    monkeypatch.setattr("pion_hf.cli.before_after.ReportMixin.measure", lambda self: pytest.fail("measured"))
    said = fails("sft", "--config", recipe(), "--resume_from_checkpoint", "nowhere")
    assert "resume_from_checkpoint: there is no folder 'nowhere'" in said


@pytest.mark.parametrize("key", ["dataset_train_split", "dataset_test_split"])
def test_splits_that_the_data_lacks(key, recipe):
    assert f"the dataset has no split 'tset': set {key}" in fails("sft", "--config", recipe(**{key: "tset"}))


def test_files_of_different_columns(tmp_path, recipe):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for name, line in (("train", row), ("test", {**row, "id": 3})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    said = fails("sft", "--config", recipe(dataset_name=str(tmp_path)))
    assert said.startswith(f"pion-hf sft: cannot read the data ({tmp_path}): ")
    assert said.endswith("column names don't match. All its files need the same columns.")


@pytest.mark.parametrize(("key", "what"), [("dataset_name", "data"), ("model_name_or_path", "model")])
def test_data_and_models_that_are_not_there(key, what, recipe):
    said = fails("sft", "--config", recipe(**{key: "no/such-name"}))
    assert said.startswith(f"pion-hf sft: cannot load the {what} (no/such-name)")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a list\n", "must hold keys and values (a YAML mapping)"),
        ("", "must hold keys and values (a YAML mapping)"),
        ("key: [unclosed\n", "is not YAML"),
    ],
)
def test_recipes_that_are_none(content, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    assert message in fails("sft", "--config", str(path))


def test_missing_recipe(tmp_path):
    assert f"there is no recipe '{tmp_path}/none.yaml'" in fails("sft", "--config", f"{tmp_path}/none.yaml")
    assert "--config needs the path of a recipe" in fails("plan", "--config")
    assert "--config names one recipe, and is given twice" in fails("sft", "--config", "a.yaml", "--config=b.yaml")


def test_plan_of_what_is_not_there(recipe, tmp_path):
    for name in (f"{tmp_path}/none", "no/such-model"):
        assert f"no model config at '{name}'" in fails("plan", "--model_name_or_path", name)
    assert "plan shows this package's optimizers (pion, " in fails("plan", "--config", recipe(), "--optim", "sgd")


def test_sharding_is_refused_before_anything_is_loaded(recipe):
    flat = {"fsdp": True, "fsdp_config": {"version": 1}}
    said = fails("sft", "--config", recipe(model_name_or_path="no/such-model", **flat))
    assert "does not run under FSDP1" in said


# -- the command itself -----------------------------------------------------------------------------


def test_unknown_command():
    assert "'plam' is not a known command. Did you mean 'plan'" in fails("plam")


def test_help_names_every_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pion-hf", "--help"])
    runpy.run_module("pion_hf.cli", run_name="__main__")
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in ("sft", "cpt", "run", "plan", "answers", "report", "compare"))


def described(section: str) -> dict[str, str]:
    """Every flag of a section of `--help` and what is said of it, in one line."""
    parts = (re.match(r"--(\w+)(.*)", part, re.DOTALL) for part in re.split(r"^  (?=-)", section, flags=re.MULTILINE))
    return {part[1]: " ".join(part[2].split()) for part in parts if part}


@pytest.mark.parametrize("command", ["sft", "cpt", "grpo", "plan"])
def test_help_begins_with_our_flags_and_their_defaults(command, capsys):
    with pytest.raises(SystemExit) as raised:
        main([command, "--help"])
    assert raised.value.code == 0
    printed = capsys.readouterr().out
    assert not re.findall(r"^  (?:-.+)?--\w+-\w.*", printed, re.MULTILINE)  # one spelling of a flag is enough
    printed = re.split(r"^flags of .+:$", printed, flags=re.MULTILINE)
    start, ours, theirs = map(described, printed)
    assert next(iter(start)) == "config"
    assert "recipe" in start["config"]
    assert {"exact_match_samples", "max_skipped_steps", "optim"} <= ours.keys()
    assert {"dataset_name", "output_dir", "weight_decay"} <= theirs.keys()
    assert not [flag for flag in theirs if flag.startswith("optim")]
    assert "default: None" not in " ".join(ours.values())
    assert "GaLore" not in " ".join(ours.values())
    assert "transformers" in ours["optim"]
    assert "for AdamW (" not in ours["learning_rate"]
    for optim in OPTIMIZER_CLASSES:
        assert re.search(rf"\b{optim}\b", ours["optim"])
        assert re.search(rf"{usual_rates(optim)} of [\w, ]*\b{optim}\b", ours["learning_rate"])
        for option in options_of(optim):
            default = default_of(optim, option)
            said = re.search(r"\(default: (.+)\)$", ours[field_name(option)])[1].split("; ")
            its = [part.partition(" of ")[0] for part in said if len(said) == 1 or re.search(rf"\b{optim}\b", part)]
            assert default is None or its == [str(default)], (option, said)


@pytest.mark.parametrize("command", ["sft", "cpt", "grpo", "plan"])
@pytest.mark.parametrize("given", [[], ["--gradient_checkpointing", "false"], ["--activation_checkpointing", "false"]])
def test_checkpointing_is_trls_by_the_name_that_transformers_wants(command, given, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        _, args, *_ = flags.parser(command).parse_recipe(["--output_dir", str(tmp_path), "--use_cpu", "true", *given])
    assert args.gradient_checkpointing is not bool(given)


@pytest.fixture
def untouched_interpreter(monkeypatch):
    """`run` is made to replace the arguments and extend the path of its process: put them back."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("untouched_interpreter")
def test_run_gives_a_script_its_arguments_and_neighbours(tmp_path, capsys):
    (tmp_path / "neighbour_of_script.py").write_text("NAME = 'neighbour'\n")
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom neighbour_of_script import NAME\nprint(__name__, NAME, sys.argv)\n")
    main(["run", str(script), "--optim", "pion"])
    assert capsys.readouterr().out == f"__main__ neighbour {[str(script), '--optim', 'pion']}\n"


@pytest.mark.usefixtures("untouched_interpreter")
def test_run_takes_a_module_of_the_current_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "module_to_run.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    run.main(["-m", "module_to_run", "--flag"])
    assert capsys.readouterr().out == "__main__ ['--flag']\n"


@pytest.mark.usefixtures("untouched_interpreter")
def test_errors_of_a_script_are_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise ValueError('mine')\n")
    with pytest.raises(ValueError, match="mine"):
        main(["run", str(script)])


def test_run_without_a_script(capsys):
    assert "there is no script 'nowhere.py'" in fails("run", "nowhere.py")
    assert "for our own commands: python -m pion_hf.cli sft" in fails("run", "sft")
    assert "usage: pion-hf run SCRIPT" in fails("run", "-m")
    main(["run"])
    assert "usage: pion-hf run SCRIPT" in capsys.readouterr().out
