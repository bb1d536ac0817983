"""`pion-hf cpt`: continued pretraining on packed plain text, from scratch too, and the text that its recipe uses."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from pion_hf.cli import cpt, main
from pion_hf.cli.training import ReportingSFTTrainer
from tests.conftest import toy_llama, write_jsonl
from tests.test_cli import fails

ROOT = Path(__file__).parents[1]


def documents(count: int, first: int = 0) -> list[dict]:
    """Documents of 20 to 110 characters: a phrase, over and over."""
    return [
        {"text": f"{i % 7} cats and {i % 5} dogs. " * (1 + i % 5), "source": f"{i}"}
        for i in range(first, first + count)
    ]


@pytest.fixture(scope="session")
def text_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_jsonl(folder / "train.jsonl", documents(40))
    write_jsonl(folder / "test.jsonl", documents(9, first=100))
    return folder


@pytest.fixture
def text_recipe(recipe, text_data):
    """As `recipe`, with text data, rows of 32 tokens and a few steps that learn."""

    def write(**changes) -> str:
        keys = {"dataset_name": str(text_data), "max_length": 32, "max_steps": 8, "learning_rate": 3e-2}
        return recipe(**{**keys, "optim_adamw_lr": 1e-2, **changes})

    return write


@pytest.fixture
def trainers(monkeypatch) -> list[ReportingSFTTrainer]:
    """The trainers that the command makes, as they are when they are done."""
    made, finish = [], ReportingSFTTrainer.finish
    monkeypatch.setattr(ReportingSFTTrainer, "finish", lambda trainer: (made.append(trainer), finish(trainer)))
    return made


def report(folder: Path) -> dict:
    return json.loads((folder / "run" / "eval.json").read_text())


# -- training ---------------------------------------------------------------------------------------


def test_cpt_trains_and_reports(text_recipe, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("Sphinx of black quartz, judge my vow. " * 20, encoding="utf-8")
    main(["cpt", "--config", text_recipe(other_text_file=str(other))])
    said, printed = report(tmp_path), capsys.readouterr().out
    for moment in ("before", "after"):
        assert list(said[moment]) == ["task", "other_text"]
        for measures in said[moment].values():
            assert measures == {"loss": measures["loss"], "perplexity": pytest.approx(math.exp(measures["loss"]))}
    assert said["learnt"] > 0.5
    assert said["spectrum_drift"] < 1e-5
    assert 0 < said["optimizer_share"] < 1
    assert all(words in printed for words in ("task: perplexity", "other text: loss", "pion, 8 steps", "rotated"))
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_evaluation_runs_once_before_and_once_after(text_recipe, tmp_path, monkeypatch, trainers):
    losses, evaluate = [], ReportingSFTTrainer.evaluate

    def counted(trainer: ReportingSFTTrainer, *args, **kwargs) -> dict:
        metrics = evaluate(trainer, *args, **kwargs)
        losses.append(metrics["eval_loss"])
        return metrics

    monkeypatch.setattr(ReportingSFTTrainer, "evaluate", counted)
    main(["cpt", "--config", text_recipe(max_steps=2)])
    assert [report(tmp_path)[moment]["task"]["loss"] for moment in ("before", "after")] == losses
    assert evaluate(trainers[0])["eval_loss"] == losses[1] < losses[0]


def test_every_token_is_in_one_row_and_all_rows_but_the_last_are_full(text_recipe, trainers, tokenizer):
    main(["cpt", "--config", text_recipe(max_steps=1)])
    for dataset, rows in ((trainers[0].train_dataset, documents(40)), (trainers[0].eval_dataset, documents(9, 100))):
        texts = [tokenizer(row["text"] + tokenizer.eos_token)["input_ids"] for row in rows]
        assert list(itertools.chain.from_iterable(dataset["input_ids"])) == list(itertools.chain.from_iterable(texts))
        lengths = [len(ids) for ids in dataset["input_ids"]]
        assert set(lengths[:-1]) == {32}
        assert lengths[-1] <= 32
        assert dataset["labels"][:] == dataset["input_ids"][:]
    assert not trainers[0].padding_free  # rows stay rows: no mask over the whole batch


def test_other_columns_do_not_turn_text_into_chats(text_recipe, tmp_path, trainers):
    rows = [{**row, "prompt": "Say it.", "completion": "No.", "page": row["text"]} for row in documents(8)]
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    main(["cpt", "--config", text_recipe(dataset_name=str(tmp_path), dataset_text_field="page", max_steps=1)])
    assert sum(map(len, trainers[0].train_dataset["input_ids"])) == sum(len(row["page"]) + 1 for row in rows)


def test_rows_that_are_tokens_already_are_taken_as_they_are(text_recipe, tmp_path, trainers):
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"input_ids": [7, 8, 9] * 5} for _ in range(10)])
    main(["cpt", "--config", text_recipe(dataset_name=str(tmp_path), max_steps=1)])
    assert [len(ids) for ids in trainers[0].train_dataset["input_ids"]] == [32, 32, 32, 32, 22]


@pytest.mark.parametrize(("optim", "learning_rate"), [("teon", 3e-2), ("muon", 3e-2), ("adamw_torch", 1e-2)])
def test_cpt_with_other_optimizers_and_a_stream_of_text(optim, learning_rate, text_recipe, tmp_path):
    options = {"lr_scheduler_type": "teon_wsd", "lr_scheduler_kwargs": {"decay_fraction": 0.5}, "warmup_steps": 1}
    options = options if optim != "adamw_torch" else {"optim_adamw_lr": None}
    path = text_recipe(optim=optim, learning_rate=learning_rate, dataset_streaming=True, **options)
    main(["cpt", "--config", path, "--eval_strategy", "steps", "--eval_steps", "100"])
    said = report(tmp_path)
    assert said["after"]["task"]["perplexity"] < 0.7 * said["before"]["task"]["perplexity"]
    assert "spectrum_drift" not in said


# -- options ----------------------------------------------------------------------------------------


def test_packing_is_on_unless_recipe_or_flag_says_otherwise(text_recipe):
    def packing(argv: list[str]) -> tuple[bool, str]:
        args = cpt.parser().parse_recipe(["--use_cpu", *argv])[1]
        return args.packing, args.packing_strategy

    assert packing([]) == packing(["--config", text_recipe()]) == (True, "wrapped")
    path = text_recipe(packing_strategy="bfd_split")
    assert packing(["--config", path]) == (True, "bfd_split")
    assert packing(["--config", path, "--packing_strategy", "wrapped", "--packing", "false"]) == (False, "wrapped")


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ([], False),
        (["--packing_strategy", "bfd_split"], False),
        (["--packing_strategy", "bfd"], True),
        (["--packing", "false"], True),
        (["--eval_packing", "false"], True),
    ],
)
def test_text_that_would_be_cut_off_is_warned_of(flags, warned, text_recipe, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pion_hf.cli.cpt"), "propagate", True)
    monkeypatch.setattr("pion_hf.cli.cpt.train", lambda *args, **kwargs: None)
    main(["cpt", "--config", text_recipe(), *flags])
    assert ("beyond max_length=32 tokens is left out" in caplog.text) == warned


# -- from scratch -----------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder / "run")
    return {n: p.detach().clone() for n, p in model.named_parameters()}  # no view of a file that the next run writes


def test_from_config_starts_from_fresh_weights_that_the_seed_decides(text_recipe, tmp_path):
    runs = []
    for seed in (0, 0, 1):
        options = {"from_config": True, "spectral_init": 1.5, "seed": seed, "data_seed": 0, "max_steps": 2}
        main(["cpt", "--config", text_recipe(**options)])
        runs.append((report(tmp_path), weights(tmp_path)))
    (first, once), (second, again), (third, other) = runs
    assert (first["before"], first["after"]) == (second["before"], second["after"])
    assert all(torch.equal(p, again[n]) for n, p in once.items())
    assert first["before"] != third["before"]
    assert not torch.equal(once["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    # Rotations keep the norms that training began with.
    for name, p in once.items():
        if name.endswith("_proj.weight"):
            wanted = 1.5 * math.sqrt(p.shape[0] / p.shape[1])
            assert torch.linalg.matrix_norm(p, ord=2).item() == pytest.approx(wanted, rel=1e-4), name


def test_from_config_alone_draws_weights_as_the_model_class_does(text_recipe, tmp_path):
    main(["cpt", "--config", text_recipe(max_steps=1), "--from_config", "true", "--dtype", "bfloat16"])
    trained = weights(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert trained[name].std().item() == pytest.approx(0.02, rel=0.1)  # initializer_range
    assert not torch.allclose(trained[name].float(), toy_llama().get_parameter(name), atol=1e-2)
    assert trained[name].dtype == torch.bfloat16


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exact_match_samples": 3}, "exact_match_samples does not apply to plain text"),
        ({"spectral_init": 1.0}, "spectral_init is for fresh weights, pretrained ones have their size"),
        ({"spectral_init": -1.0, "from_config": True}, "spectral_init must be above 0, got -1.0"),
        ({"spectral_init": "big", "from_config": True}, "invalid float value: 'big'"),
        ({"from_config": True, "load_in_4bit": True}, "there are none to quantize: leave out load_in_8bit/4bit"),
        ({"from_config": True, "model_name_or_path": "no/such-model"}, "no tokenizer at 'no/such-model'"),
        (
            {"dataset_text_field": "txt"},
            "no column 'txt' (it has 'text', 'source'): set dataset_text_field to its text",
        ),
        (
            {"dataset_test_split": "tset"},
            "the dataset has no split 'tset' (it has 'train', 'test'): set dataset_test_split, or validation_fraction",
        ),
        ({"dataset_name": "nowhere"}, "'nowhere' is no file or folder here and not at the hub: Couldn't reach"),
        ({"model_name_or_path": "/no/where"}, "there is no file or folder '/no/where'"),
        ({"packing_strategy": "wraped"}, "'wraped' is not a known value of packing_strategy. Did you mean 'wrapped'"),
        ({"other_text_file": "nowhere.txt"}, "other_text_file: there is no file 'nowhere.txt'"),
        ({"from_confg": True}, "'from_confg' is not a known key. Did you mean 'from_config'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(changes, message, text_recipe, tmp_path):
    said = fails("cpt", "--config", text_recipe(**changes))
    assert said.startswith("pion-hf cpt: ")
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": 3}], "the column 'text' holds Value('int64'), not text"),
        ([{"text": ["a", "b"]}], "the column 'text' holds List(Value('string')), not text"),
        ([{"text": "a"}, {"text": None}], "test.jsonl, line 2 has no text in 'text': set dataset_text_field, or mend"),
    ],
)
def test_columns_that_hold_no_text(rows, message, text_recipe, tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    assert message in fails("cpt", "--config", text_recipe(dataset_name=str(tmp_path)))


def test_a_tokenizer_that_cannot_part_documents(text_recipe, tmp_path, tokenizer):
    folder = tmp_path / "model"
    toy_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token": None}))
    said = fails("cpt", "--config", text_recipe(model_name_or_path=str(folder)))
    assert "has no end-of-text token to part documents by: set eos_token" in said
    main(["cpt", "--config", text_recipe(model_name_or_path=str(folder), eos_token="<end>", max_steps=1)])


def test_help_explains_the_packing(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["cpt", "--help"])
    assert raised.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("wrapped", "--from_config", "--spectral_init", "--optim_rms"))


# -- the recipe's text ------------------------------------------------------------------------------


SHARED = "A paragraph that two modules share, word for word, and long enough to be told from a mere phrase."


@pytest.fixture
def prepare_text(monkeypatch):
    """examples/prepare_text.py with small topics."""
    spec = importlib.util.spec_from_file_location("prepare_text", ROOT / "examples" / "prepare_text.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "topics", {f"t{i}": f"Topic {i} says {i}. " * 40 for i in range(30)})
    return module


@pytest.fixture
def stdlib(tmp_path) -> Path:
    """A small standard library, with files that are no part of the documents."""
    folder = tmp_path / "stdlib"
    source = '''"""Module {0} on {0}."""
# A comment.
import os
X = "{0}"
def f():
    """{1}

    {2}
    """
class C:
    """Class of {0}."""
    def _hidden(self):
        """Secret of {0}."""
'''
    for name in ("a", "b", "c.__init__", "c.d", "_private", "c._e", "test.a", "site-packages.p", "idlelib.x"):
        path = folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.format(name, SHARED, f"What only {name} has to say. " * 30), encoding="utf-8")
    (folder / "short.py").write_text('"""Too short."""\n', encoding="utf-8")
    return folder


def test_documents_are_topics_and_docstrings_of_public_modules(prepare_text, stdlib):
    rows = prepare_text.documents(stdlib)
    texts = {row["source"]: row["text"] for row in rows}
    assert [s for s in texts if s.startswith("module")] == ["module a", "module b", "module c", "module c.d"]
    assert sum(s.startswith("topic") for s in texts) == 30
    assert texts["module a"].startswith(f"a\n\nModule a on a.\n\na.f\n\n{SHARED}\n\nWhat only a has to say.")
    assert texts["module a"].endswith("a.C\n\nClass of a.")
    assert not any(word in text for text in texts.values() for word in ("Secret", "import os", "A comment"))
    assert sum(SHARED in text for text in texts.values()) == 1


def test_documents_are_split_whole_and_the_seed_decides(prepare_text, stdlib):
    rows = prepare_text.documents(stdlib)
    train, validation = prepare_text.split(rows, 0.2, seed=1)
    sources = [row["source"] for row in (*train, *validation)]
    assert sorted(sources) == sorted(row["source"] for row in rows)
    characters = [sum(len(row["text"]) for row in part) for part in (validation, rows)]
    assert characters[0] == pytest.approx(0.2 * characters[1], rel=0.2)
    assert prepare_text.split(rows, 0.2, seed=1) == (train, validation)
    assert prepare_text.split(rows, 0.2, seed=2) != (train, validation)


def test_code_has_no_docstrings_and_no_comments(prepare_text, stdlib):
    code = prepare_text.code(("a", "b"), stdlib)
    assert code.count("import os") == code.count("class C") == 2
    assert not any(word in code for word in ("Module", "Class of", "Secret", SHARED, "A comment", '"""'))
    compile(code, "code", "exec")


def test_the_same_seed_writes_the_same_bytes(prepare_text, stdlib, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_text, "STDLIB", stdlib)
    monkeypatch.setattr(prepare_text, "CODE", ("a", "b"))
    written = []
    for name, seed in (("one", "1"), ("two", "1"), ("three", "2")):
        folder = tmp_path / name
        prepare_text.main(["--output", str(folder), "--other", str(folder / "code.txt"), "--seed", seed])
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert written[0] == written[1] != written[2]
    assert set(written[0]) == {"train.jsonl", "validation.jsonl", "code.txt"}
    train, validation = (Dataset.from_json(str(tmp_path / "one" / f"{n}.jsonl")) for n in ("train", "validation"))
    assert set(train.column_names) == {"text", "source"}
    assert not set(train["source"]) & set(validation["source"])
    assert f"{len(train)} documents, {sum(map(len, train['text'])):,} characters" in capsys.readouterr().out
