"""TRL's trainers, ours and its own with `optim="pion"`: what moves, what stays, and what is logged."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import datasets
import peft
import pytest
import torch
import trl
from transformers import Trainer

import pion_hf.integrations.trl as ours
from pion_hf import Pion, PionLora
from pion_hf.integrations.arguments import OptimizerFields, default_rate
from tests.conftest import CHAT_TEMPLATE, chat_rows, toy_llama
from tests.test_trainer import QUIET, inner

ADAPTER = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
TRAINING_TEMPLATE = CHAT_TEMPLATE.replace(
    "<{{ message['role'] }}>{{ message['content'] }}<end>",
    "<{{ message['role'] }}>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<end>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<end>{% endif %}",
)


def messages(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def preferences() -> list[dict]:
    return [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": messages("assistant", "?")}
        for r in chat_rows(16)
    ]


def judged() -> list[dict]:
    rows = chat_rows(16)
    for i, row in enumerate(rows):
        row["label"] = i % 3 != 0
    return rows


def digits(completions: list, **columns: Any) -> list[float]:
    """A reward that differs between samples of an untrained model: the share of digits."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in texts]


class Method(NamedTuple):
    """A trainer of TRL's: its data, and a metric that it logs."""

    rows: list[dict]
    logged: str


METHODS = {
    "SFT": Method(chat_rows(16), "mean_token_accuracy"),
    "DPO": Method(preferences(), "rewards/margins"),
    "KTO": Method(judged(), "rewards/chosen"),
    "Reward": Method(preferences(), "accuracy"),
    "GRPO": Method(chat_rows(16), "reward"),
}
OPTIONS = {"GRPO": {"num_generations": 4, "max_completion_length": 12}}
ARGUMENTS = {"GRPO": {"reward_funcs": digits}}
CONSTRUCTOR = ("processing_class", "peft_config", "reward_funcs")  # no fields of a config
WITH_REFERENCE = {"DPO": {}, "KTO": {}, "GRPO": {"beta": 0.1}}


@pytest.fixture
def make(tmp_path, tokenizer):
    """Makes the trainer of a method, of three steps on a CPU, by classes of `package`."""

    def make(name: str, model: Any, *, package: Any = ours, rows: list | None = None, **options) -> Trainer:
        common = {"output_dir": str(tmp_path), "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, **QUIET}
        options = {"per_device_train_batch_size": 8, "bf16": False, **OPTIONS.get(name, {}), **options}
        arguments = {"processing_class": tokenizer, **ARGUMENTS.get(name, {})}
        arguments.update({key: options.pop(key) for key in CONSTRUCTOR if key in options})
        if package is trl:
            options["optim"] = "pion"
        prefix = "Pion" if package is ours else ""
        return getattr(package, f"{prefix}{name}Trainer")(
            model=model,
            args=getattr(package, f"{prefix}{name}Config")(**common, **options),
            train_dataset=datasets.Dataset.from_list(rows or METHODS[name].rows),
            **arguments,
        )

    return make


def copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_rotated(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], kept: set[str]) -> None:
    """Everything of `before` moved; the matrices named in `kept` have the singular values that they had."""
    assert kept
    for name, old in before.items():
        new = after[name].detach()
        assert (new - old).norm() > 1e-4 * old.norm(), f"{name} did not move"
        if name in kept:
            values = torch.linalg.svdvals(old.double())
            drift = (torch.linalg.svdvals(new.double()) - values).abs().max() / values[0]
            assert drift < 2e-5, f"{name}: {drift:.1e}"  # two steps, clipped at this rate, of up to 5e-6 a factor


def hidden(model: torch.nn.Module) -> set[str]:
    """Names of the matrices of a toy Llama's layers."""
    return {name for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name}


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# -- kept directions ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_checkpointing_sees_the_same_inputs(name, make, checkpoint):
    """Layers that run twice, once for the backward pass, and those of a reference model count their inputs once."""
    found = []
    for checkpointing in (False, True):
        trainer = make(name, str(checkpoint), optim_keep=2, gradient_checkpointing=checkpointing)
        trainer.train()
        found.append(copies(trainer.model))
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


# -- every method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [ours, trl], ids=["pion_hf", "trl"])
@pytest.mark.parametrize("name", METHODS)
def test_full_training(name, package, make, checkpoint):
    trainer = make(name, str(checkpoint), package=package)
    model = trainer.model
    before = copies(model)
    metrics = trainer.train().metrics
    assert type(inner(trainer)) is Pion
    assert_rotated(before, copies(model), hidden(model))
    assert len(logged(trainer, "loss")) == len(logged(trainer, METHODS[name].logged)) == 3
    assert ("spectrum_drift" in metrics) == (package is ours)
    if package is ours:
        assert metrics["spectrum_drift"] < 1e-5
        assert metrics["rotated_matrices"] == len(hidden(model))
        assert len(logged(trainer, "learning_rate/adamw")) == 3


@pytest.mark.parametrize("name", METHODS)
def test_config_is_trls_with_typed_options(name, tmp_path):
    config = getattr(ours, f"Pion{name}Config")
    theirs = getattr(trl, f"{name}Config")
    assert issubclass(config, (OptimizerFields, theirs))
    assert config(output_dir=str(tmp_path), bf16=False).optim == "pion"
    assert config(output_dir=str(tmp_path), bf16=False, optim_rms=0.1).given_options() == {"rms": 0.1}
    given = config(output_dir=str(tmp_path), bf16=False).learning_rate
    assert given == (default_rate("pion") if name == "SFT" else theirs.learning_rate)
    with pytest.raises(ValueError, match="'ambiant' is not a known value of metric"):
        config(output_dir=str(tmp_path), bf16=False, optim_metric="ambiant")


# -- reference models and adapters --------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_reference_models_stay(name, make, checkpoint):
    trainer = make(name, str(checkpoint), **WITH_REFERENCE[name])
    before, reference = copies(trainer.model), copies(trainer.ref_model)
    trainer.train()
    assert_rotated(before, copies(trainer.model), hidden(trainer.model))
    for key, value in copies(trainer.ref_model).items():
        assert torch.equal(value, reference[key]), key


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_reference_adapters_stay(name, make):
    """Of a model that comes with an adapter TRL keeps a frozen copy named `ref`."""
    model = peft.get_peft_model(toy_llama(), ADAPTER)
    trainer = make(name, model, **WITH_REFERENCE[name])
    before = copies(model)
    assert any(".ref." in key for key in before)
    trainer.train()
    assert type(inner(trainer)) is PionLora
    names = {n for group in inner(trainer).param_groups for n in group["param_names"]}
    trained = {key for key in before if ".default." in key}
    assert names == trained
    after = copies(model)
    rotated = {key for key in trained if "lora_A" in key}
    assert_rotated({key: before[key] for key in rotated}, after, rotated)
    assert all(after[key].any() for key in trained - rotated), "B did not grow"
    for key in before.keys() - trained:
        assert torch.equal(after[key], before[key]), key


def test_grpo_without_a_difference_in_reward_moves_nothing(make):
    """Samples of equal reward have no advantage: the gradient is zero, and so must the step be."""
    model = toy_llama()
    before = copies(model)
    trainer = make("GRPO", model, reward_funcs=lambda completions, **_: [1.0] * len(completions))
    trainer.train()
    assert logged(trainer, "reward") == [1.0] * 3
    for key, value in copies(model).items():
        assert torch.equal(value, before[key]), key


def test_reward_adapters_come_with_a_head_of_adamws(make, checkpoint):
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = make("Reward", str(checkpoint), peft_config=config)
    trainer.train()
    groups = inner(trainer).param_groups
    kinds = {(name.split(".")[-3], group["rule"]) for group in groups for name in group["param_names"]}
    assert kinds == {("lora_A", "pion_lora"), ("lora_B", "pion_lora"), ("modules_to_save", "adamw")}


# -- supervised fine-tuning ------------------------------------------------------------------------


def test_sft_of_a_new_adapter(make):
    trainer = make("SFT", toy_llama(), peft_config=ADAPTER)
    before = copies(trainer.model)
    metrics = trainer.train().metrics
    assert type(inner(trainer)) is PionLora
    after = copies(trainer.model)
    rotated = {key for key in before if "lora_A" in key}
    assert_rotated({key: before[key] for key in rotated}, after, rotated)
    assert all(after[key].any() for key in before if "lora_B" in key)
    assert metrics["rotated_matrices"] == len(rotated)
    assert metrics["spectrum_drift"] < 1e-5


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_sft_with_packing(strategy, make):
    model = toy_llama()
    before = copies(model)
    trainer = make("SFT", model, packing=True, packing_strategy=strategy, max_length=32)
    lengths = {len(row["input_ids"]) for row in trainer.train_dataset}
    assert max(lengths) > max(len(r["prompt"][0]["content"]) + 6 for r in chat_rows(16)), "nothing was packed"
    trainer.train()
    assert type(inner(trainer)) is Pion
    assert_rotated(before, copies(model), hidden(model))
    assert len(logged(trainer, "loss")) == 3


def test_sft_on_answers_alone(make, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TRAINING_TEMPLATE
    rows = [{"messages": row["prompt"] + row["completion"]} for row in chat_rows(16)]
    model = toy_llama()
    before = copies(model)
    trainer = make("SFT", model, rows=rows, processing_class=tokenizer, assistant_only_loss=True)
    batch = next(iter(trainer.get_train_dataloader()))
    learnt = {tokenizer.decode(row[row >= 0]) for row in batch["labels"]}
    assert learnt <= {r["completion"][0]["content"] + "<end>" for r in chat_rows(16)}
    trainer.train()
    assert type(inner(trainer)) is Pion
    assert_rotated(before, copies(model), hidden(model))
    assert len(logged(trainer, "loss")) == 3
