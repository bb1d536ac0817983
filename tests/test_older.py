"""What older releases lack or call otherwise: the same recipes and data mean the same with them."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset

from pion_hf.cli import cpt, grpo, main, older, sft
from pion_hf.cli.older import with_text_column
from pion_hf.cli.training import ReportingSFTTrainer
from tests.conftest import write_jsonl
from tests.test_cli import fails

NAME = "activation_checkpointing"


@pytest.fixture(params=[False, True], ids=["this release", "before transformers 5.23"])
def release(request, monkeypatch):
    """The names of this release, and those of the ones before 5.23."""
    if request.param:
        names = {name: name.replace("activation", "gradient") for name in (NAME, f"{NAME}_kwargs")}
        monkeypatch.setattr(older, "OLD_NAMES", names)


@pytest.mark.usefixtures("release")
@pytest.mark.parametrize("command", [sft, cpt, grpo])
@pytest.mark.parametrize("value", [True, False])
def test_activation_checkpointing_has_its_new_name_in_recipes_and_flags(command, value, recipe):
    options = {"reward_funcs": ["accuracy_reward"], "num_generations": 2} if command is grpo else {}
    options[f"{NAME}_kwargs"] = {"use_reentrant": True}
    for keys, flags in (
        ({NAME: value}, []),
        ({}, [f"--{NAME}", str(value)]),
        ({}, [f"--{NAME.replace('_', '-')}={value}"]),
        ({NAME: not value}, [f"--{NAME}={value}"]),
    ):
        _, args, *_ = command.parser().parse_recipe(["--config", recipe(**options, **keys), *flags])
        assert args.gradient_checkpointing is value
        assert args.gradient_checkpointing_kwargs == {"use_reentrant": True}


@pytest.mark.usefixtures("release")
def test_of_both_names_the_new_one_counts(recipe):
    path = recipe(gradient_checkpointing=True, activation_checkpointing=False)
    _, args, *_ = sft.parser().parse_recipe(["--config", path])
    assert args.gradient_checkpointing is False


@pytest.mark.usefixtures("release")
def test_a_misspelt_key_finds_the_new_name(recipe):
    assert f"Did you mean '{NAME}'" in fails("sft", "--config", recipe(activation_checkpoint=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_text_is_in_the_column_that_trl_ends_with_a_token(streaming):
    rows = Dataset.from_list([{"page": "a", "text": "not this"}, {"page": "b", "text": "nor this"}])
    data = IterableDataset.from_generator(lambda: iter(rows)) if streaming else rows
    assert [row["text"] for row in with_text_column(data, "page")] == ["a", "b"]
    assert [row["text"] for row in with_text_column(data.remove_columns("text"), "page")] == ["a", "b"]
    assert with_text_column(data, "text") is data
    assert with_text_column(data, "absent") is data


def test_text_of_another_column_ends_with_a_token_in_sft_too(recipe, tmp_path, tokenizer, monkeypatch):
    seen, prepare = [], ReportingSFTTrainer.__init__

    def kept(self, *args, **kwargs):
        prepare(self, *args, **kwargs)
        seen.append((self.train_dataset, self.eval_dataset))

    monkeypatch.setattr(ReportingSFTTrainer, "__init__", kept)
    (tmp_path / "pages").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "pages" / f"{split}.jsonl", [{"page": word} for word in ("owl", "cat", "dog", "ant")])
    main(["sft", "--config", recipe(dataset_name=str(tmp_path / "pages"), dataset_text_field="page", max_steps=1)])
    for dataset in seen[0]:
        assert [row["input_ids"][-1] for row in dataset] == [tokenizer.eos_token_id] * 4
