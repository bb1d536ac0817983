"""`pion-hf grpo`: rewards, training through the command, and every way of getting it wrong."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
import reasoning_gym
import trl
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from pion_hf.cli import main
from pion_hf.cli.grpo import check_columns, check_reward, import_rewards, parser
from pion_hf.cli.rewards import answer_similarity_reward, reasoning_gym_reward
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES
from tests.conftest import write_jsonl
from tests.test_cli import assert_trained_by_rotations, fails

ROOT = Path(__file__).parents[1]
REWARDS = ["reasoning_gym_reward", "tests.test_trl.digits"]


def load_example(name: str):
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reasoning_data(tmp_path_factory) -> Path:
    """What examples/prepare_reasoning.py writes, little of it."""
    folder = tmp_path_factory.mktemp("reasoning")
    module = load_example("prepare_reasoning")
    write_jsonl(folder / "train.jsonl", module.examples(16, seed=1))
    write_jsonl(folder / "test.jsonl", module.examples(4, seed=1 + module.SEED_DISTANCE))
    return folder


@pytest.fixture
def grpo_recipe(recipe, reasoning_data):
    """Writes a recipe of two steps for the toy model, with changes."""

    def write(**changes) -> str:
        keys = {
            "dataset_name": str(reasoning_data),
            "reward_funcs": REWARDS,
            "num_generations": 4,
            "max_completion_length": 8,
            "per_device_eval_batch_size": 8,
            "logging_steps": 1,
        }
        return recipe(**{**keys, **changes})

    return write


# -- rewards ---------------------------------------------------------------------------------------


def entries(task: str, count: int = 20) -> list[dict]:
    return list(reasoning_gym.create_dataset(task, size=count, seed=5))


@pytest.mark.parametrize(
    "task", ["chain_sum", "basic_arithmetic", "spell_backward", "sentence_reordering", "countdown"]
)
def test_reward_is_reasoning_gyms_own_score(task):
    dataset = reasoning_gym.create_dataset(task, size=20, seed=5)
    items = list(dataset)
    texts = [json.dumps(item) for item in items]
    for answer in (
        lambda item: item["answer"],
        lambda item: item["answer"] + "0",
        lambda item: item["answer"].upper(),
        lambda item: "no idea at all",
        lambda item: "",
    ):
        answers = [answer(item) for item in items]
        expected = [dataset.score_answer(a, item) for a, item in zip(answers, items, strict=True)]
        assert reasoning_gym_reward(completions=answers, entry=texts) == expected
        chats = [[{"role": "tool", "content": "7"}, {"role": "assistant", "content": f" {a}\n"}] for a in answers]
        assert reasoning_gym_reward(completions=chats, prompts=answers, entry=texts) == expected


def test_answers_may_stand_in_tags():
    (item,) = entries("chain_sum", 1)
    right, text = item["answer"], [json.dumps(item)]
    assert reasoning_gym_reward([f"<answer>1</answer> No: <answer> {right} </answer>."], text) == [1.0]
    assert reasoning_gym_reward([f"{right} <answer>none</answer>"], text) == [0.0]


def test_similarity_tells_wrong_answers_apart():
    text = json.dumps({"answer": "12345", "metadata": {"source_dataset": "chain_sum"}})
    answers = ["12345", "<answer> 12345 </answer>", "12354", "It is 12345.", "98", ""]
    scores = answer_similarity_reward(completions=answers, entry=[text] * len(answers))
    assert scores[:2] == [1.0, 1.0]
    assert scores == sorted(scores, reverse=True)
    assert scores[2:4] == [2 * 4 / 10, 2 * 5 / 17]  # 123 and one of 4 and 5 in common; all of five
    assert scores[4:] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "the column 'entry' must hold JSON with 'answer' and 'metadata'"),
        ("4", "as examples/prepare_reasoning.py writes it, got '4'"),
        ("{", "got '{'"),
        (json.dumps({"answer": "1"}), "the column 'entry' must hold JSON"),
        (json.dumps({"answer": "1", "metadata": {}}), "the column 'entry' must hold JSON"),
        (json.dumps({"metadata": {"source_dataset": "chain_sum"}}), "the column 'entry' must hold JSON"),
        (
            json.dumps({"answer": "1", "metadata": {"source_dataset": "chain_sums"}}),
            "'chain_sums' is not a known dataset of reasoning-gym. Did you mean 'chain_sum'",
        ),
    ],
)
def test_entries_that_are_none(entry, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        reasoning_gym_reward(completions=["1"], entry=[entry])


def test_prepared_rows_score_their_own_answers(reasoning_data):
    rows = [json.loads(line) for line in (reasoning_data / "train.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == {json.loads(row["entry"])["metadata"]["source_dataset"] for row in rows}
    answers = [row["completion"] for row in rows]
    assert reasoning_gym_reward(completions=answers, entry=[row["entry"] for row in rows]) == [1.0] * len(rows)
    assert all(json.loads(row["entry"])["question"] == row["prompt"][0]["content"] for row in rows)


# -- training --------------------------------------------------------------------------------------


def test_one_reward_needs_no_list(grpo_recipe):
    script_args, *_ = parser().parse_recipe(["--config", grpo_recipe(reward_funcs="think_format_reward")])
    assert script_args.reward_funcs == ["think_format_reward"]


def test_grpo_trains_and_reports(grpo_recipe, tmp_path, capsys, monkeypatch):
    evaluated, evaluate = [], trl.GRPOTrainer.evaluate

    def counted(self, *args, **kwargs):
        evaluated.append(self.state.global_step)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(trl.GRPOTrainer, "evaluate", counted)
    other = tmp_path / "other.txt"
    other.write_text("Sphinx of black quartz, judge my vow. " * 20, encoding="utf-8")
    main(["grpo", "--config", grpo_recipe(other_text_file=str(other), exact_match_samples=2, max_new_tokens=4)])
    folder = tmp_path / "run"
    record = json.loads((folder / "eval.json").read_text())
    for moment in ("before", "after"):
        task = record[moment]["task"]
        assert set(task) == {"reward", "reasoning_gym_reward", "digits", "exact_match"}
        assert task["reward"] == pytest.approx(task["reasoning_gym_reward"] + task["digits"])
        assert set(record[moment]["other_text"]) == {"loss", "perplexity"}
        assert all(math.isfinite(value) for values in record[moment].values() for value in values.values())
    assert record["learnt"] == record["after"]["task"]["reward"] - record["before"]["task"]["reward"]
    assert 0 < record["before"]["task"]["reward"] < 2
    assert record["spectrum_drift"] < 2e-5  # two steps, clipped at this rate, of up to 5e-6 a factor
    assert_trained_by_rotations(folder)
    printed = capsys.readouterr().out
    assert "task: reward" in printed
    assert evaluated == [0, 2], "not evaluated once before and once after"
    assert "'rewards/reasoning_gym_reward/mean'" in printed
    assert "'rewards/digits/mean'" in printed
    assert trl.GRPOTrainer.__module__ == "trl.trainer.grpo_trainer", "TRL's trainer was not put back"


def test_grpo_takes_reward_models_and_adapters(grpo_recipe, tmp_path, checkpoint, tokenizer):
    folder = tmp_path / "reward"
    AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = ["--use_peft", "--lora_target_modules", "all-linear", "--init_lora_weights", "gaussian"]
    keys = {"reward_funcs": None, "reward_model_name_or_path": str(folder), "eval_strategy": "no"}
    main(["grpo", "--config", grpo_recipe(**keys), *flags])
    routing = json.loads((tmp_path / "run" / "routing.json").read_text())
    assert {row["rule"] for row in routing["parameters"]} == {"pion_lora"}
    assert "task" not in json.loads((tmp_path / "run" / "eval.json").read_text())["before"]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_recipes_parse_and_name_known_rewards():
    for path in (ROOT / "recipes").glob("*/grpo/*.yaml"):
        script_args, args, *_ = parser().parse_recipe(["--config", str(path)])
        assert args.optim.value in OPTIMIZER_CLASSES
        for name in script_args.reward_funcs:
            check_reward(name)
        import_rewards(script_args.reward_funcs)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_funcs": None}, "name a reward: reward_funcs: [reasoning_gym_reward], or reward_model_name_or_path"),
        ({"reward_funcs": ["reasoning_reward"]}, "Did you mean 'reasoning_gym_reward'?"),
        ({"reward_funcs": ["zzz"]}, "Or give an import path: package.function."),
        ({"reward_funcs": ["no_such.reward"]}, "reward_funcs: cannot import 'no_such' of 'no_such.reward'"),
        ({"reward_funcs": ["tests.test_trl.digit"]}, "Did you mean 'digits'?"),
        ({"reward_funcs": ["tests.test_trl.GENERATION"]}, "'GENERATION' is not a known function of tests.test_trl"),
        ({"reward_weights": [1.0]}, "reward_weights: 1 weights for 2 rewards"),
        ({"sync_ref_model": True}, "sync_ref_model has nothing to update: beta=0 keeps no reference model"),
        ({"sync_ref_model": True, "beta": 0.1, "use_peft": True}, "the reference of an adapter is the bare model"),
        ({"num_generations": 8}, "generation_batch_size (4) must be divisible by num_generations (8)"),
        ({"per_device_eval_batch_size": 6}, "must be divisible by the number of generations"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is for sft and cpt alone"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva' is for sft and cpt alone"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights is for LoRA adapters: set use_peft too"),
        ({"other_text_file": "nowhere.txt"}, "other_text_file: there is no file 'nowhere.txt'"),
        ({"max_length": 3}, "'max_length' is not a known key"),
        ({"model_name_or_path": "no/such-model"}, "cannot load the model (no/such-model)"),
        ({"dataset_train_split": "tset"}, "the dataset has no split 'tset': set dataset_train_split"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(changes, message, grpo_recipe, tmp_path):
    said = fails("grpo", "--config", grpo_recipe(**changes))
    assert said.startswith("pion-hf grpo: ")
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("reward", "column", "hint"),
    [
        ("reasoning_gym_reward", "prompt", "a text or messages to be answered"),
        ("reasoning_gym_reward", "entry", "which reasoning_gym_reward needs; examples/prepare_reasoning.py writes it"),
        ("tests.test_grpo.judge", "task", "which judge needs"),
    ],
)
def test_columns_that_the_data_lacks(reward, column, hint, grpo_recipe, reasoning_data, tmp_path):
    for file in reasoning_data.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        write_jsonl(tmp_path / file.name, [{key: row[key] for key in row if key != column} for row in rows])
    # No model either: the data come first.
    keys = {"reward_funcs": [reward], "model_name_or_path": "no/such-model", "dataset_name": str(tmp_path)}
    said = fails("grpo", "--config", grpo_recipe(**keys))
    assert f"the dataset has no column {column!r} (it has " in said
    assert hint in said
    assert "\n" not in said


def judge(prompts, completions, task, *, trainer_state, strict=False, **columns) -> list[float]:
    """A reward that takes a column, something of the trainer's, and an option with a default."""
    return [float(len(name)) for name in task]


def test_what_a_reward_needs_no_column_for():
    rows = Dataset.from_dict({"prompt": ["1+1="], "task": ["chain_sum"]})
    check_columns(rows, [judge, trl.rewards.get_soft_overlong_punishment(8, 2)])
    check_columns(rows.to_iterable_dataset(), [judge])


def test_missing_packages(grpo_recipe, monkeypatch):
    for package, reward in (("reasoning-gym", "reasoning_gym_reward"), ("math-verify", "accuracy_reward")):
        monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
        said = fails("grpo", "--config", grpo_recipe(reward_funcs=[reward]))
        assert said == f"pion-hf grpo: reward_funcs: {reward} needs the package {package}: pip install {package}"
    monkeypatch.setattr("pion_hf.cli.grpo.is_vllm_available", lambda: False)
    said = fails("grpo", "--config", grpo_recipe(reward_funcs=["think_format_reward"], use_vllm=True))
    assert said == "pion-hf grpo: use_vllm needs the package vllm: install it, or leave use_vllm out"
    monkeypatch.setitem(sys.modules, "reasoning_gym.utils", None)
    with pytest.raises(ModuleNotFoundError, match="need the package reasoning-gym"):
        reasoning_gym_reward(completions=["1"], entry=["{}"])


@pytest.mark.parametrize("keys", [{"blend": 0.8}, {"blend_shares": [0.5]}])
def test_vllm_would_answer_with_other_weights_than_blends(keys, grpo_recipe):
    said = fails("grpo", "--config", grpo_recipe(reward_funcs=["think_format_reward"], use_vllm=True, **keys))
    assert "do not go with use_vllm" in said


def test_a_bad_entry_is_one_line(grpo_recipe, tmp_path):
    for name in ("train", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "1+1=", "entry": "2"}] * 8)
    said = fails("grpo", "--config", grpo_recipe(dataset_name=str(tmp_path)))
    assert "the column 'entry' must hold JSON" in said


def test_help_names_rewards_and_flags(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["grpo", "--help"])
    assert raised.value.code == 0
    printed = capsys.readouterr().out
    flags = ("--reward_funcs", "reasoning_gym_reward", "--num_generations", "--optim_rms", "--other_text_file")
    assert all(flag in printed for flag in flags)
