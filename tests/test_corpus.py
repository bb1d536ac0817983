"""The text of `pion-hf cpt`: every source, streams, held-out documents, budgets, resuming, and what is refused."""

from __future__ import annotations

import gzip
import inspect
import itertools
import json
import logging
import random
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from safetensors.torch import load_file

from pion_hf.cli import corpus, cpt, main
from pion_hf.cli.corpus import check_corpus, is_held_out, load_corpus, set_budget
from pion_hf.cli.training import ReportingSFTTrainer
from tests.conftest import write_jsonl
from tests.distributed_worker import forkserver
from tests.test_cli import fails

LENGTH = 32  # of a row
# Before datasets 5.0 a shuffled stream reads one file after the other.
SEVERAL_FILES_AT_ONCE = "max_buffer_input_shards" in inspect.signature(IterableDataset.shuffle).parameters
STREAMS = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


def texts(count: int) -> list[str]:
    """Documents that differ, of 15 to 80 characters: a token each."""
    draw = random.Random(0)
    return [f"{i}: " + " ".join(draw.choices(("cat", "dog", "owl"), k=draw.randint(3, 19))) for i in range(count)]


def write(path: Path, documents: list[str]) -> Path:
    """A file of rows, by its ending; without one a folder of a .txt file per document."""
    rows = [{"text": text, "source": str(i)} for i, text in enumerate(documents)]
    if not path.suffix:
        path.mkdir(parents=True)
        for i, text in enumerate(documents):
            (path / f"{i:03}.txt").write_text(text, encoding="utf-8")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        write_jsonl(path, rows)
    return path


@pytest.fixture
def command(recipe) -> Callable[..., list[str]]:
    """The command line of two steps on a source, a row of 32 tokens each."""

    def argv(source: Path | str | None, **changes: Any) -> list[str]:
        keys = {
            "dataset_name": None if source is None else str(source),
            "max_length": LENGTH,
            "per_device_train_batch_size": 1,
            "eval_strategy": "no",
            "optim": "adamw_torch",
            "optim_adamw_lr": None,
        }
        return ["cpt", "--config", recipe(**{**keys, **changes})]

    return argv


@pytest.fixture
def load(command) -> Callable[..., dict[str, Any]]:
    """The splits that a command would use, without training."""

    def splits(source: Path | str | None, **changes: Any) -> dict[str, Any]:
        script_args, args, _, dataset_args, *_, corpus_args = parse(command(source, **changes))
        check_corpus(script_args, args, dataset_args, corpus_args)
        return load_corpus(script_args, args, dataset_args, corpus_args)

    return splits


@pytest.fixture
def said(monkeypatch, caplog) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger(corpus.__name__), "propagate", True)
    return caplog


def parse(argv: list[str]) -> tuple[Any, ...]:
    return cpt.parser().parse_recipe(argv[1:])


def documents(rows: Iterable[dict]) -> list[str]:
    return [row["text"] for row in rows]


# -- sources ------------------------------------------------------------------------------------------


@STREAMS
@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.parquet", "rows.jsonl.gz", "part [1].jsonl", "folder", "csv/rows.csv", "saved", "dict"]
)
def test_every_source_gives_its_documents_in_order(name, streaming, load, tmp_path):
    source = tmp_path / "data" / name
    if name in ("saved", "dict"):
        saved = Dataset.from_dict({"text": texts(12), "source": ["?"] * 12})
        (saved if name == "saved" else DatasetDict(train=saved)).save_to_disk(source)
    else:
        write(source, texts(12))
    source = source.parent if name.startswith("csv") else source
    dataset = load(source, dataset_streaming=streaming, **({"shuffle_buffer": 0} if streaming else {}))["train"]
    assert isinstance(dataset, IterableDataset) == streaming
    assert list(dataset) == [{"text": text} for text in texts(12)]


@pytest.mark.parametrize(("sample_by", "count"), [("document", 2), ("paragraph", 3), ("line", 6)])
def test_a_txt_file_is_a_document_or_its_paragraphs_or_lines_are(sample_by, count, load, tmp_path):
    for name, text in (("a.txt", "one\ntwo\n\nthree"), ("sub/b.txt", "four\nfive")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = documents(load(tmp_path, sample_by=sample_by)["train"])
    assert len(found) == count
    assert "".join(found).replace("\n", "") == "onetwothreefourfive"
    assert found[0] == {"document": "one\ntwo\n\nthree", "paragraph": "one\ntwo", "line": "one"}[sample_by]


def test_names_of_files_are_splits_only_if_all_of_them_are(load, tmp_path, said):
    for name in ("train", "validation"):
        write(tmp_path / f"{name}.jsonl", [f"of {name}"])
    splits = load(tmp_path, dataset_test_split="validation", eval_strategy="epoch")
    assert {name: documents(rows) for name, rows in splits.items()} == {
        "train": ["of train"],
        "validation": ["of validation"],
    }
    assert not said.text
    write(tmp_path / "books.jsonl", ["of books"])
    assert sorted(documents(load(tmp_path)["train"])) == ["of books", "of train", "of validation"]
    assert "2 of 3 files are called as those of a split ('train', 'validation')" in said.text


def test_a_card_says_what_the_splits_are(load, tmp_path):
    for name in ("wiki", "held"):
        write(tmp_path / f"{name}.jsonl", [f"of {name}"])
    write(tmp_path / "notes.parquet", ["no part of the data"])
    files = "\n".join(
        f"  - split: {split}\n    path: {file}.jsonl" for split, file in (("train", "wiki"), ("test", "held"))
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n---\n")
    splits = load(tmp_path, eval_strategy="epoch")
    assert {name: documents(rows) for name, rows in splits.items()} == {"train": ["of wiki"], "test": ["of held"]}


@STREAMS
def test_a_mixture_of_sources(streaming, load, tmp_path):
    sources = [
        {"path": "json", "data_files": str(write(tmp_path / f"{n}.jsonl", [n] * 3)), "split": "train"} for n in "ab"
    ]
    options = {"streaming": True, "shuffle_buffer": 0} if streaming else {}
    assert documents(load(None, datasets=sources, **options)["train"]) == ["a"] * 3 + ["b"] * 3
    splits = load(None, datasets=sources, **options, validation_fraction=0.5, eval_strategy="steps")
    assert sorted(documents(splits["train"]) + documents(splits["test"])) == ["a"] * 3 + ["b"] * 3


# -- streams ------------------------------------------------------------------------------------------


def test_a_stream_begins_again_and_is_packed_across_documents(command, tmp_path, tokenizer, monkeypatch):
    trainers, train = [], ReportingSFTTrainer.train
    monkeypatch.setattr(
        ReportingSFTTrainer, "train", lambda *args, **kw: (trainers.append(args[0]), train(*args, **kw))[1]
    )
    source = write(tmp_path / "rows.jsonl", texts(7))
    main(command(source, dataset_streaming=True, shuffle_buffer=0))
    rows = [row["input_ids"] for row in itertools.islice(trainers[0].train_dataset, 40)]
    assert {len(row) for row in rows} == {LENGTH}
    read = tokenizer.decode(list(itertools.chain.from_iterable(rows)))
    assert ("<end>".join(texts(7)) + "<end>") * 8 > read > ""
    assert (("<end>".join(texts(7)) + "<end>") * 8).startswith(read)
    assert trainers[0].state.global_step == 2


def test_the_buffer_shuffles_files_and_documents_by_the_seed(load, tmp_path):
    for part in range(3):
        write(tmp_path / f"{part}.jsonl", texts(30)[part * 10 : part * 10 + 10])
    orders = [
        documents(load(tmp_path, dataset_streaming=True, shuffle_buffer=buffer, **seeds)["train"])
        for buffer, seeds in (
            (0, {}),
            (4, {}),
            (4, {}),
            (4, {"seed": 7}),
            (4, {"data_seed": 42, "seed": 7}),
            (None, {}),
        )
    ]
    in_order, shuffled, again, other, data_seed, default = orders
    assert in_order == texts(30)
    assert all(sorted(order) == sorted(texts(30)) for order in orders)
    assert shuffled == again == data_seed
    assert len({tuple(order) for order in (in_order, shuffled, other, default)}) == 4
    if SEVERAL_FILES_AT_ONCE:
        assert len({int(text.split(":")[0]) // 10 for text in shuffled[:6]}) > 1, "one file after the other"


# -- held out -----------------------------------------------------------------------------------------


def test_a_hash_holds_out_about_the_fraction_and_more_of_the_same_for_a_larger_one():
    many = [f"Text {i}." for i in range(4000)]
    small, large = ({text for text in many if is_held_out(text, fraction)} for fraction in (0.05, 0.2))
    assert len(small) == pytest.approx(200, abs=50)
    assert len(large) == pytest.approx(800, abs=100)
    assert small < large
    assert not any(is_held_out(text, 0.0) for text in many)


def test_held_out_documents_are_the_same_for_every_seed_and_way_of_reading(load, tmp_path):
    source = write(tmp_path / "rows.jsonl", texts(60) + texts(60)[::-1])
    found = []
    for options in ({}, {"seed": 5}, {"dataset_streaming": True}, {"dataset_streaming": True, "seed": 5}):
        splits = load(source, validation_fraction=0.2, eval_strategy="epoch", **options)
        assert isinstance(splits["test"], Dataset), "an evaluation would read the whole stream"
        train, test = (sorted(documents(splits[name])) for name in ("train", "test"))
        assert sorted(train + test) == sorted(texts(60) * 2)
        assert not set(train) & set(test), "a copy of a document is on the other side"
        found.append(test)
    assert found[0] == found[1] == found[2] == found[3]
    assert 4 <= len(found[0]) <= 40


def test_of_a_stream_only_so_many_documents_are_evaluated(load, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "STREAM_HELD_OUT", 6)
    for part in range(3):
        write(tmp_path / f"{part}.jsonl", texts(90)[part * 30 : part * 30 + 30])
    options = {"dataset_streaming": True, "validation_fraction": 0.4, "eval_strategy": "steps"}
    splits = load(tmp_path, **options)
    held_out = documents(splits["test"])
    assert len(held_out) == 6
    if SEVERAL_FILES_AT_ONCE:
        assert {int(text.split(":")[0]) // 30 for text in held_out} == {0, 1, 2}, "of one file alone"
    assert documents(load(tmp_path, seed=9, **options)["test"]) == held_out
    assert set(documents(splits["train"])) == {text for text in texts(90) if not is_held_out(text, 0.4)}


@STREAMS
def test_a_test_split_is_used_as_it_is(streaming, load, tmp_path, said):
    write(tmp_path / "train.jsonl", texts(20))
    write(tmp_path / "test.jsonl", ["of test"])
    options = {"shuffle_buffer": 0} if streaming else {}
    splits = load(tmp_path, validation_fraction=0.5, eval_strategy="steps", dataset_streaming=streaming, **options)
    assert documents(splits["train"]) == texts(20)
    assert documents(splits["test"]) == ["of test"]
    assert "The data have a split 'test' to evaluate on: validation_fraction is not used." in said.text


# -- how long -----------------------------------------------------------------------------------------


def test_a_budget_of_tokens_is_rounded_down_to_steps(command, said):
    options = {"max_steps": None, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    step = 2 * 3 * LENGTH
    for tokens, steps in ((step, 1), (5 * step - 1, 4), (5 * step, 5)):
        _, args, *_, corpus_args = parse(command("x", **options, max_tokens=tokens))
        set_budget(args, corpus_args)
        assert args.max_steps == steps
    assert f"max_tokens={5 * step}: 5 steps of {step} tokens, 6 rows each" in said.text
    _, args, *_, corpus_args = parse(command("x", **options))
    set_budget(args, corpus_args)
    assert args.max_steps == -1
    args.max_length, corpus_args.max_tokens = None, 1000
    with pytest.raises(ValueError, match="max_tokens counts rows of max_length tokens: set max_length"):
        set_budget(args, corpus_args)


def test_plan_knows_budgets(checkpoint, tmp_path, said):
    options = ["--model_name_or_path", str(checkpoint), "--max_length", "32", "--per_device_train_batch_size", "1"]
    main(["plan", *options, "--max_tokens", "330", "--plot", str(tmp_path / "rates.png")])
    assert "max_tokens=330: 10 steps of 32 tokens" in said.text
    assert (tmp_path / "rates.png").stat().st_size


# -- resuming -----------------------------------------------------------------------------------------

STEPS, INTERRUPTED = 10, 5
CASES = {  # each is in its second pass over the data when it is interrupted
    "map": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "stream": {"gradient_accumulation_steps": 3, "dataset_streaming": True, "shuffle_buffer": 4},
}


def train(argv: list[str]) -> dict[str, Any]:
    """The batches of a run, in order, and its weights at the end."""
    batches, step = [], ReportingSFTTrainer.training_step

    def watched(trainer: ReportingSFTTrainer, model: Any, inputs: dict, *args: Any) -> Any:
        batches.append(inputs["input_ids"].clone())
        return step(trainer, model, inputs, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReportingSFTTrainer, "training_step", watched)
        main(argv)
    return {"batches": batches, "weights": load_file(Path(parse(argv)[1].output_dir) / "model.safetensors")}


def resume_all(commands: dict[str, list[str]], folder: Path) -> None:
    """In another process, which does not tidy up."""
    tempfile.tempdir = str(folder)
    for case, argv in commands.items():
        torch.save(train(argv), folder / f"{case}.pt")


def test_a_new_process_goes_on_at_the_same_row(command, tmp_path, subtests):
    source, straight, commands = write(tmp_path / "rows.jsonl", texts(10)), {}, {}
    options = {
        "optim": "teon",
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": INTERRUPTED,
        "validation_fraction": 0.2,
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
    for case, changes in CASES.items():
        path = Path(command(source, **options, **changes)[-1]).rename(tmp_path / f"{case}.yaml")
        argv, folder = ["cpt", "--config", str(path), "--output_dir"], tmp_path / case
        straight[case] = train([*argv, str(folder)])
        checkpoint = str(folder / f"checkpoint-{INTERRUPTED}")
        commands[case] = [*argv, str(tmp_path / f"{case}-resumed"), "--resume_from_checkpoint", checkpoint]
    other = forkserver().Process(target=resume_all, args=(commands, tmp_path))
    other.start()
    other.join()
    assert other.exitcode == 0
    for case, expected in straight.items():
        with subtests.test(case):
            resumed = torch.load(tmp_path / f"{case}.pt")
            count = len(expected["batches"]) - len(resumed["batches"])
            first, second = expected["batches"][:count], expected["batches"][count:]
            assert sum(batch.numel() for batch in first) > sum(len(text) + 1 for text in texts(10))
            assert all(torch.equal(*pair) for pair in zip(resumed["batches"], second, strict=True))
            assert all(torch.equal(w, expected["weights"][name]) for name, w in resumed["weights"].items())
            half = load_file(tmp_path / case / f"checkpoint-{INTERRUPTED}" / "model.safetensors")
            assert not all(torch.equal(w, expected["weights"][name]) for name, w in half.items())


# -- what is refused ----------------------------------------------------------------------------------

LONG = {"text": "some words " * 20}
BAD_FILES = {
    "empty folder": ({}, "'{}' is a folder without data files (.txt, .jsonl, .parquet)"),
    "other files": ({"a.xyz": "x"}, "'{}' is a folder without data files (.txt, .jsonl, .parquet)"),
    "two formats": (
        {"a.txt": "x", "b/c.jsonl": [LONG]},
        "the folder '{}' holds files of several formats (a.txt, b/c.jsonl): keep those of one",
    ),
    "empty file": ({"train.jsonl": [], "test.jsonl": [LONG]}, "'{}/train.jsonl' is empty: add rows, or remove it"),
    "no train split": ({"valid.jsonl": [LONG]}, "no split 'train' (it has 'validation'): set dataset_train_split"),
    "no text": ({"a.txt": "", "b.txt": "few"}, "have 5 tokens, fewer than one row of max_length=32: lower it, or add"),
    "no column": ({"a.jsonl": [{"page": "x"}]}, "no column 'text' (it has 'page'): set dataset_text_field to its text"),
    "a row without text": (
        {"a.jsonl": [LONG], "b.jsonl": [LONG, {"page": "x"}]},
        "{}/b.jsonl, line 2 has no text in 'text': set dataset_text_field, or mend the line",
    ),
    "null for text": ({"a.jsonl": [LONG, {"text": None}]}, "{}/a.jsonl, line 2 has no text in 'text': set"),
    "broken JSON": (
        {"a.jsonl": [LONG], "b.jsonl": [LONG, LONG, '{"text": "oops', LONG]},
        "{}/b.jsonl, line 3 is not JSON: Invalid control character",
    ),
    "Latin 1": ({"a.txt": "words " * 9, "b.txt": b"caf\xe9"}, "{}/b.txt, line 1 is not UTF-8: 'utf-8' codec can't"),
    "Parquet without the column": (
        {"a.parquet": [LONG], "b.parquet": [{"page": "x"}]},
        "{}/b.parquet has no column 'text' (it has 'page'): set dataset_text_field to its text",
    ),
    "no Parquet": ({"a.parquet": "words"}, "{}/a.parquet is no Parquet file: "),
    "Parquet without rows": ({"a.parquet": [LONG], "b.parquet": []}, "{}/b.parquet has no rows: remove it"),
    "columns that differ": (
        {"a.jsonl": [{**LONG, "n": 1}], "b.jsonl": [{**LONG, "n": {"m": 1}}]},
        "cannot read '{}': Couldn't cast array of type struct",
    ),
}


@STREAMS
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named_in_one_line_and_nothing_is_written(case, streaming, command, tmp_path):
    files, message = BAD_FILES[case]
    source = tmp_path / "data"
    source.mkdir()
    for name, content in files.items():
        path = source / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content)
        elif path.suffix == ".parquet":
            Dataset.from_dict({key: [row[key] for row in content] for key in (content or [LONG])[0]}).to_parquet(path)
        else:
            path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content))
    refused = fails(*command(source, dataset_streaming=streaming))
    assert refused.startswith("pion-hf cpt: ")
    assert message.format(source) in refused
    assert "\n" not in refused
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_read_later_in_a_stream_is_named(command, tmp_path):
    write(tmp_path / "data" / "a.jsonl", texts(6))
    (tmp_path / "data" / "b.jsonl").write_text('{"text": "fine"}\n{"text": \n', encoding="utf-8")
    refused = fails(*command(tmp_path / "data", dataset_streaming=True, shuffle_buffer=0, max_steps=30))
    assert f"dataset_name: {tmp_path}/data/b.jsonl, line 2 is not JSON" in refused
    assert (tmp_path / "run").exists(), "the stream was read ahead"


STREAM = {"dataset_streaming": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": "/no/where"}, "dataset_name: there is no file or folder '/no/where'"),
        ({"dataset_name": "gone.parquet"}, "dataset_name: there is no file or folder 'gone.parquet'"),
        ({"dataset_name": __file__}, "test_corpus.py' is of no known format (.txt, .jsonl, .parquet, or a folder of"),
        ({"max_length": 10_000}, "fewer than one row of max_length=10000: lower it, or add text"),
        ({"max_tokens": 100, "max_steps": None, "per_device_train_batch_size": 4}, "max_tokens=100 is less than one"),
        ({"max_tokens": 100}, "max_tokens=100 and max_steps=2 both set the length: leave one out (max_steps=-1)"),
        ({"max_tokens": 100, "max_steps": None, "packing": False}, "max_tokens counts full rows: leave packing on"),
        ({**STREAM, "max_steps": None}, "a stream has no length to count epochs of: set max_steps or max_tokens"),
        ({**STREAM, "shuffle_dataset": True}, "shuffle_dataset is for data that are no stream: set shuffle_buffer"),
        ({**STREAM, "shuffle_buffer": -1}, "shuffle_buffer must be at least 0, got -1"),
        ({"shuffle_buffer": 10}, "shuffle_buffer is for streams, other data are shuffled whole: set dataset_streaming"),
        (
            {"validation_fraction": 1.0, "eval_strategy": "epoch"},
            "validation_fraction must be between 0 and 1, got 1.0",
        ),
        ({"validation_fraction": 0.1}, "validation_fraction holds out documents for evaluation: set eval_strategy"),
        (
            {"validation_fraction": 1e-9, "eval_strategy": "epoch"},
            "validation_fraction=1e-09 leaves no document to eval",
        ),
        (
            {"eval_strategy": "epoch"},
            "no split 'test' (it has 'train'): set dataset_test_split, or validation_fraction",
        ),
        ({"sample_by": "lines"}, "'lines' is not a known value of sample_by. Did you mean 'line'?"),
        ({"output_dir": __file__ + "/run"}, "test_corpus.py' is no folder; choose another"),
    ],
)
def test_bad_options_are_named_in_one_line_and_nothing_is_written(changes, message, command, tmp_path):
    source = write(tmp_path / "rows.jsonl", texts(12))
    refused = fails(*command(source, **changes))
    assert refused.startswith("pion-hf cpt: ")
    assert message in refused
    assert "\n" not in refused
    assert not (tmp_path / "run").exists()


def test_rows_of_tokens_are_no_documents_to_hold_out(command, load, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": [7, 8, 9]} for _ in range(20)])
    options = {"validation_fraction": 0.5, "eval_strategy": "epoch"}
    with pytest.raises(ValueError, match="rows of tokens may be parts of documents; give a dataset_test_split"):
        load(tmp_path / "rows.jsonl", **options)
    assert load(tmp_path / "rows.jsonl")["train"]["input_ids"][0] == [7, 8, 9]
