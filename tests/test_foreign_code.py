"""Python of others: a model's own and reward modules run when, and only when, somebody has said that they may."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pion_hf.cli import main, recipe, sft
from tests.test_cli import fails

# A model folder's own code, which leaves a trace when it runs.
CODE = """
import pathlib
pathlib.Path({trace!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}


@pytest.fixture
def trace(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "trace"


@pytest.fixture
def written(tmp_path, trace) -> Path:
    """A recipe that trusts its model."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "own.py").write_text(CODE.format(trace=str(trace)))
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (model / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code, **SIZES}))
    keys = {"model_name_or_path": str(model), "trust_remote_code": True, "dataset_name": "d", "eval_strategy": "epoch"}
    keys |= {"bf16": False, "report_to": "none", "output_dir": str(tmp_path / "out"), "learning_rate": 1e-3}
    keys |= {"model_init_kwargs": {"attention_dropout": 0.0}}  # the check of which looks at the model's config
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "sft" / "recipe.yaml"


def test_plan_asks_on_the_command_line(written, trace, capsys):
    said = fails("plan", "--config", str(written))
    assert "the recipe says trust_remote_code: true" in said
    assert "add --trust_remote_code to the command" in said
    assert not trace.exists()
    main(["plan", "--config", str(written), "--trust_remote_code"])
    assert trace.exists()
    assert "Which rule updates what" in capsys.readouterr().out


def test_the_check_of_a_comparison_asks_on_the_command_line(written, trace, monkeypatch):
    command = ["compare", str(written), "--output_dir", str(trace.parent / "runs")]
    assert "add --trust_remote_code to the command" in fails(*command)
    assert not trace.exists()

    def checked(*args):
        raise SystemExit("checked")

    monkeypatch.setattr("pion_hf.cli.comparison.check_folder", checked)
    assert fails(*command, "--trust_remote_code") == "checked"
    assert trace.exists()


def test_training_goes_by_the_recipe_and_says_so(written, trace, monkeypatch):
    said = []
    monkeypatch.setattr(recipe.logger, "warning", said.append)
    sft.parser().parse_recipe(["--config", str(written), "--use_cpu"])
    assert said == [f"trust_remote_code: Python that comes with {written.parents[1] / 'model'} is run."]
    assert trace.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights: 2 weights for 1 rewards"),
        ({"sync_ref_model": True}, "sync_ref_model has nothing to update"),
        ({"other_dataset": "./none"}, "other_dataset: there is no file or folder"),
        ({"exact_match_samples": -1}, "exact_match_samples must be at least 0"),
        ({"eval_strategy": "no"}, "without evaluation there is nothing to compare"),
    ],
)
def test_rewards_are_imported_when_all_else_is_accepted(tmp_path, trace, changes, said):
    (tmp_path / "traced_reward.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).write_text('ran')\n")
    keys = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["traced_reward.none"], "bf16": False}
    keys |= {"eval_strategy": "epoch", "report_to": "none", "learning_rate": 1e-3, **changes}
    (tmp_path / "grpo").mkdir()
    path = tmp_path / "grpo" / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    if "eval_strategy" not in changes:
        assert said in fails("grpo", "--config", str(path), "--output_dir", str(tmp_path / "out"), "--use_cpu")
    assert said in fails("compare", str(path), "--output_dir", str(tmp_path / "runs"))
    assert not trace.exists()


def test_rewards_of_an_accepted_recipe_are_imported(tmp_path, trace):
    (tmp_path / "second_reward.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).write_text('ran')\n")
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    said = fails("grpo", *flags, "--bf16", "false", "--reward_funcs", "second_reward.none")
    assert "'none' is not a known function of second_reward" in said
    assert trace.exists()
