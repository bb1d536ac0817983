"""The model card: what it says of the optimizer and the run, that the hub can read it, and what a push uploads."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers.trainer
import yaml
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from transformers import Phi3Config, Phi3ForCausalLM, Trainer, TrainingArguments

from pion_hf import Pion, PionTrainer, PionTrainerMixin, PionTrainingArguments, Teon, param_groups
from pion_hf.cli import main
from pion_hf.integrations.model_card import METHODS, extend
from pion_hf.integrations.trl import PionSFTConfig, PionSFTTrainer
from tests.conftest import toy_llama

PAPERS = {
    "pion": "arXiv 2605.12492",
    "teon": "arXiv 2601.23261",
    "muon": "Jordan et al., 2024",
    "adamw_routed": "arXiv 1711.05101",
}


def card_in(folder: Path) -> ModelCard:
    """The card, its metadata parsed and written back without loss."""
    card = ModelCard.load(folder / "README.md")
    written = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert card.data.to_dict() == written
    return card


def rows_of(text: str, first: str) -> list[dict[str, str]]:
    """The table whose first column is called `first`, by column."""
    lines = iter(text.splitlines())
    names = next(cells for line in lines if (cells := _cells(line)) and cells[0] == first)
    next(lines)  # the line of dashes
    found = []
    for line in lines:
        if not line.startswith("|"):
            return found
        found.append(dict(zip(names, _cells(line), strict=True)))
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []


@pytest.fixture
def trainer(token_rows, tmp_path):
    """Makes a `PionTrainer` of the toy model (or another) for one step."""

    def make(model=None, *, trainer_class=PionTrainer, **options) -> PionTrainer:
        quiet = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": 1}
        args = PionTrainingArguments(output_dir=str(tmp_path / "run"), learning_rate=1e-2, **quiet, **options)
        return trainer_class(model=model or toy_llama(), args=args, train_dataset=token_rows)

    return make


def adapted():
    return peft.get_peft_model(toy_llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


# -- what it says -----------------------------------------------------------------------------------


def test_sft_writes_a_card_that_agrees_with_the_records(recipe, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Sphinx of black quartz, judge my vow. " * 20, encoding="utf-8")
    changes = {"other_text_file": str(other), "exact_match_samples": 2, "max_new_tokens": 3}
    main(["sft", "--config", recipe(optim_rms=0.1, weight_decay=0.5, **changes)])
    folder = tmp_path / "run"
    card, record = card_in(folder), json.loads((folder / "eval.json").read_text())
    assert {"pion", "pion_hf", "sft", "trl", "generated_from_trainer"} == set(card.data.tags)
    assert "model-index" not in card.data.to_dict(), "results on data of this machine"
    # TRL's own parts are there, once, and ours stand among them.
    headings = re.findall(r"^#+ .*$", card.text, flags=re.MULTILINE)
    assert headings == [
        "# Model Card for run",
        "## Quick start",
        "## Training procedure",
        "### Optimizer",
        "### Before and after training",
        "### Framework versions",
        "## Citations",
    ]
    assert card.text.index("Cite TRL as") < card.text.index("Cite Pion as")
    assert "None" not in card.text
    assert "2 steps of `pion` of pion_hf" in card.text
    assert "at a learning rate of 0.01 (schedule: `linear`)" in card.text
    assert "`direction=gradient`" in card.text
    assert "`rms=0.1`" in card.text
    # Counts are those of the routing.
    summary = json.loads((folder / "routing.json").read_text())["summary"]
    for row in rows_of(card.text, "rule"):
        routed = [r for r in summary if r["rule"] == row["rule"]]
        for count in ("tensors", "matrices", "parameters"):
            assert row[count] == f"{sum(r[count] for r in routed):,}"
        assert float(row["learning rate"]) == {"pion": 1e-2, "adamw": 1e-3}[row["rule"]] == routed[0]["lr"]
        assert float(row["weight decay"]) == {"pion": 0.0, "adamw": 0.5}[row["rule"]]
    # Measurements are those of eval.json.
    assert f"the 14 rotated matrices changed by at most {record['spectrum_drift']:.1e}" in card.text
    measured = {(r["domain"], r["measure"]): (r["before"], r["after"]) for r in rows_of(card.text, "domain")}
    assert list(measured) == [
        ("task", "loss"),
        ("task", "perplexity"),
        ("task", "exact match"),
        ("other text", "loss"),
        ("other text", "perplexity"),
    ]
    moments = [record[moment]["other_text"]["loss"] for moment in ("before", "after")]
    assert measured["other text", "loss"] == tuple(f"{loss:.4f}" for loss in moments)
    assert all((folder / name).is_file() for name in re.findall(r"\]\((\w+\.json)\)", card.text))
    assert {"routing.json", "eval.json"} == set(re.findall(r"\]\((\w+\.json)\)", card.text))


@pytest.mark.parametrize(
    ("optim", "model", "methods"),
    [
        ("pion", toy_llama, ["pion"]),
        ("pion_ambient", toy_llama, ["pion"]),
        ("teon", toy_llama, ["teon", "muon"]),
        ("muon", toy_llama, ["muon"]),
        ("adamw_routed", toy_llama, ["adamw_routed"]),
        ("adamw_torch", toy_llama, []),
        ("pion", adapted, ["pion", "muon"]),
        ("pion_ambient", adapted, ["pion", "muon"]),
        ("pion_lora", adapted, ["pion", "muon"]),
        ("teon_lora", adapted, ["teon"]),
        ("muon", adapted, ["muon"]),
    ],
)
def test_papers_and_tags_are_of_what_was_used(optim, model, methods, trainer, tmp_path):
    made = trainer(model(), optim=optim)
    made.train()
    made.create_model_card()
    card = card_in(tmp_path / "run")
    for name, method in METHODS.items():
        assert (name in card.data.tags) == (name in methods)
        assert (PAPERS[name] in card.text) == (name in methods)
        assert card.text.count(f"```bibtex\n{method['citation']}\n```") == (name in methods)
    assert ("pion_hf" in card.data.tags) == bool(methods)
    assert f"1 steps of `{optim}`" in card.text
    assert card.text.count("## Citations") == bool(methods)
    assert ("stacks" in card.text) == ("teon" in methods)
    assert ("parameters were frozen" in card.text) == (model is adapted and bool(methods))


def fused():
    config = Phi3Config(
        vocab_size=105,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return Phi3ForCausalLM(config)


def test_matrices_are_counted_as_the_routing_counts_them(trainer, tmp_path):
    """Fused projections hold several; stacks are those of three layers."""
    made = trainer(fused(), optim="teon", optim_stack=3)
    made.create_optimizer()
    described = made.run_summary()["optimizer"]
    routed: dict[str, Counter] = defaultdict(Counter)
    for row in json.loads((tmp_path / "run" / "routing.json").read_text())["summary"]:
        routed[row["rule"]].update({key: row[key] for key in ("tensors", "matrices", "stacks", "parameters")})
    assert routed["teon"]["matrices"] > routed["teon"]["tensors"]
    assert {row["rule"]: {key: row[key] for key in routed[row["rule"]]} for row in described["rules"]} == routed
    assert described["options"]["stack"] == 3


def test_factors_of_adapters_have_a_row_each(trainer, tmp_path):
    made = trainer(adapted(), optim="pion")
    made.train()
    made.create_model_card()
    rows = {row["rule"]: row for row in rows_of(card_in(tmp_path / "run").text, "rule")}
    assert set(rows) == {"pion_lora, rotate", "pion_lora, orthogonal"}
    assert {row["matrices"] for row in rows.values()} == {"2"}
    frozen = sum(p.numel() for p in made.model.parameters() if not p.requires_grad)
    assert f"{frozen:,} parameters were frozen." in card_in(tmp_path / "run").text


def test_transformers_own_card_is_kept(trainer, tmp_path):
    made = trainer()
    made.train()
    Trainer.create_model_card(made)
    own = card_in(tmp_path / "run").text
    made.create_model_card()
    text = card_in(tmp_path / "run").text
    beginning, _, end = own.partition("### Framework versions")
    assert "### Training hyperparameters" in beginning
    assert text.startswith(beginning.rstrip() + "\n\n### Optimizer\n")
    assert f"### Framework versions{end.rstrip()}\n\n## Citations\n" in text
    assert "### Before and after" not in text


def test_a_card_before_training_tells_of_no_optimizer_yet(trainer, tmp_path):
    trainer().create_model_card()
    card = card_in(tmp_path / "run")
    assert "0 steps of `pion` at a learning rate of 0.01" in card.text
    assert "Cite" not in card.text


def test_an_optimizer_built_by_hand(token_rows, tmp_path):
    class Mixed(PionTrainerMixin, Trainer):
        pass

    model = toy_llama()
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    optimizer = Pion(param_groups(model, lr=3e-3), direction="polar")
    made = Mixed(model=model, args=args, train_dataset=token_rows, optimizers=(optimizer, None))
    made.train()
    made.create_model_card(tags="mine")
    card = card_in(tmp_path)
    assert {"mine", "pion", "pion_hf"} <= set(card.data.tags)
    assert "1 steps of `pion` of" in card.text
    assert "`direction=polar`" in card.text
    assert {row["learning rate"] for row in rows_of(card.text, "rule")} == {"0.003"}
    assert "routing.json" not in card.text, "nothing wrote one"


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda m: Teon(param_groups(m, "muon", lr=2e-2), stack=1), "muon"),
        (lambda m: Pion(param_groups(m, lr=2e-2)), "pion"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=2e-2), "sgd"),
    ],
)
def test_an_optimizer_built_by_hand_in_our_trainer(build, name, token_rows, tmp_path):
    """Its default `optim` is `pion`, with a learning rate that nothing uses."""
    args = PionTrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    model = toy_llama()
    PionTrainer(model, args, train_dataset=token_rows, optimizers=(build(model), None)).train()
    said = json.loads((tmp_path / "run.json").read_text())["optimizer"]
    assert (said["name"], said["learning_rate"]) == (name, 2e-2)


def test_cards_can_be_made_again(trainer, tmp_path):
    made = trainer()
    made.train()
    made.create_model_card()
    once = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    made.create_model_card()
    assert (tmp_path / "run" / "README.md").read_text(encoding="utf-8") == once


# -- metadata ---------------------------------------------------------------------------------------


def summary(loss: float) -> dict:
    optimizer = {"name": "x", "learning_rate": 1.0, "schedule": "constant"}
    before, after = ({"task": {"loss": value, "perplexity": 3.3}} for value in (2.0, loss))
    return {"optimizer": optimizer, "steps": 3, "before": before, "after": after}


def test_measurements_on_data_of_the_hub_are_in_the_metadata(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\ntags: [a]\n---\n\n# Model\n", encoding="utf-8")
    extend(path, summary(1.25), dataset_name="someone/data")
    card = card_in(tmp_path)
    found = {r.metric_type: (r.metric_value, r.dataset_name, r.dataset_type) for r in card.data.eval_results}
    assert found == {key: (value, *["someone/data"] * 2) for key, value in {"loss": 1.25, "perplexity": 3.3}.items()}
    (index,) = card.data.to_dict()["model-index"]
    assert index["name"] == tmp_path.name
    assert card.text.rstrip().endswith("|")  # no heading to stand before: at the end


def test_no_number_is_no_result(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\ntags: [a]\n---\n\n# Model\n", encoding="utf-8")
    extend(path, summary(float("nan")), dataset_name="someone/data")
    card = card_in(tmp_path)
    assert [r.metric_type for r in card.data.eval_results] == ["perplexity"]
    assert rows_of(card.text, "domain")[0]["after"] == "nan"


@pytest.mark.parametrize("local", [True, False])
def test_folders_are_not_taken_for_names_at_the_hub(local, tokenizer, chat_data, tmp_path):
    data = datasets.load_dataset(str(chat_data))["train"]
    args = PionSFTConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none")
    made = PionSFTTrainer(toy_llama(), args=args, train_dataset=data, processing_class=tokenizer)
    made.create_model_card(dataset_name=str(chat_data) if local else "someone/data")
    card = card_in(tmp_path)
    assert card.data.datasets == (None if local else "someone/data")
    assert (str(chat_data) in card.text) is False
    assert ("huggingface.co/datasets/someone/data" in card.text) is not local


# -- the hub ----------------------------------------------------------------------------------------


@pytest.fixture
def uploads(monkeypatch) -> list[dict[str, bytes]]:
    """What is uploaded: for each call the files, as they are at that moment."""
    calls = []

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/someone/{repo_id.rpartition('/')[2]}")

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns=None, run_as_future=False, **kwargs):
        assert repo_id == "someone/taught"
        there = [p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file()]
        names = filter_repo_objects(there, ignore_patterns=ignore_patterns)
        calls.append({name: Path(folder_path, name).read_bytes() for name in names})
        done = Future()
        done.set_result(None)
        return done if run_as_future else None

    for method in (create_repo, upload_folder):
        monkeypatch.setattr(HfApi, method.__name__, method)
        # Early releases of transformers 5 hold what the hub's library has made of these methods beforehand.
        monkeypatch.setattr(transformers.trainer, method.__name__, partial(method, None), raising=False)
    return calls


@pytest.mark.parametrize("adapter", [False, True])
def test_a_push_uploads_the_final_card_and_all_records(adapter, recipe, tmp_path, uploads):
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"} if adapter else {}
    hub = {"push_to_hub": True, "hub_model_id": "someone/taught", "save_strategy": "steps", "save_steps": 1}
    main(["sft", "--config", recipe(**hub, **lora)])
    assert (tmp_path / "run" / "checkpoint-1" / "optimizer.pt").is_file()
    assert len(uploads) == 4  # two checkpoints, the model when it is saved, and the end
    weights = {"adapter_model.safetensors", "adapter_config.json"} if adapter else {"model.safetensors", "config.json"}
    for pushed in uploads[2:]:
        assert {"README.md", "eval.json", "routing.json", "tokenizer.json", *weights} <= set(pushed)
        assert not [name for name in pushed if "checkpoint-" in name or "optimizer" in name or name.startswith("_")]
        record = json.loads(pushed["eval.json"])
        assert record["learnt"] == record["before"]["task"]["loss"] - record["after"]["task"]["loss"]
        card = ModelCard(pushed["README.md"].decode())
        assert {"pion", "sft", "trl"} <= set(card.data.tags)
        assert rows_of(card.text, "domain")[0]["after"] == f"{record['after']['task']['loss']:.4f}"
        assert 'model="someone/taught"' in card.text
        assert str(tmp_path) not in card.content
    assert pushed["README.md"] == (tmp_path / "run" / "README.md").read_bytes()


def test_a_card_during_training_tells_of_no_earlier_run(recipe, tmp_path, uploads):
    """The folder holds the records of another run when a checkpoint is pushed."""
    main(["sft", "--config", recipe()])
    assert "### Before and after" in card_in(tmp_path / "run").text
    hub = {"push_to_hub": True, "hub_model_id": "someone/taught", "save_strategy": "steps", "save_steps": 1}
    main(["sft", "--config", recipe(**hub)])
    during, *_, after = (upload["README.md"].decode() for upload in uploads)
    assert "### Optimizer" in during
    assert "### Before and after" not in during
    assert "### Before and after" in after


def test_a_card_names_no_path_of_this_machine(tmp_path):
    """As peft's and transformers' name the model that training began with, and TRL's that of the run."""
    model, data, run = tmp_path / "models" / "toy", tmp_path / "rows.jsonl", tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    kept = {"tags": ["lora", "x:y"], "base_model_relation": "adapter", "library_name": "peft"}
    metadata = {**kept, "base_model": str(model), "datasets": [str(data), "org/chats"]}
    metadata["tags"] = [*kept["tags"], f"base_model:adapter:{model}"]
    text = f'Tuned from {model} on {data}, in {run}. pipeline(model="None")\n### Framework versions\n'
    (run / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n{text}", encoding="utf-8")
    optimizer = {"name": "adamw_torch", "learning_rate": 1e-3, "schedule": "linear"}
    extend(run / "README.md", {"optimizer": optimizer, "steps": 3})
    card = card_in(run)
    assert card.data.to_dict() == {**kept, "datasets": ["org/chats"]}
    assert 'Tuned from toy on rows.jsonl, in mine. pipeline(model="mine")' in card.text
    assert str(tmp_path) not in str(card)
