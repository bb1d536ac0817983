"""The demo's path on the real model, clipped. Needs the registry that pip is set up for; minutes on two cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_recipe_learns_keeps_the_spectrum_and_saves_a_usable_checkpoint(tmp_path):
    output = tmp_path / "run"
    recipe = ["--config", "recipes/smollm2-135m/sft/full.yaml", "--max_steps", "6", "--output_dir", str(output)]
    for command in (
        ["examples/prepare_smollm2.py"],
        ["examples/prepare_reasoning.py"],
        ["-m", "pion_hf.cli", "sft", *recipe, "--exact_match_samples", "0"],
        ["-m", "pion_hf.cli", "report", str(output)],
    ):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    report = json.loads((output / "eval.json").read_text())
    assert report["learnt"] > 0.5
    assert report["forgotten"]["other_text"] < 0.5 * report["learnt"]
    assert "arXiv 2605.12492" in (output / "README.md").read_text()
    assert report["spectrum_drift"] < 1e-5
    assert report["rotated_matrices"] == 210
    assert "<img" in (output / "report.html").read_text()
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 3?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    produced = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert produced.shape[1] > prompt["input_ids"].shape[1]
