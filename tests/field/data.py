"""Datasets of `sft`, texts of `cpt`, and what measures forgetting: damaged, of other shapes, or not there."""

from __future__ import annotations

import importlib
import json
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pion_hf.cli import main
from tests.field.recipes import same, sft
from tests.field.trial import Input
from tests.field.world import World

ROW = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]}
LONG = 3_000_000


def rows(*given: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in given).encode()


def messages(*given: Any) -> bytes:
    return rows(*({"messages": m} for m in given))


# Contents of `train.jsonl` that no model can be trained on.
USELESS: dict[str, bytes] = {
    "nothing": b"",
    "empty lines": b"\n\n\n",
    "a word": b"hello\n",
    "half a row": rows(ROW, ROW)[:-30],
    "a row that is cut off in the middle": rows(ROW)[:40] + b"\n" + rows(ROW),
    "numbers": rows(1, 2, 3),
    "texts": rows("a", "b"),
    "nulls": rows(None, None),
    "lists": rows([1], [2]),
    "empty rows": rows({}, {}),
    "other columns": rows({"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}),
    "mixed columns": rows(ROW, {"text": "x"}),
    "messages that are text": messages("a", "b"),
    "messages that are numbers": messages(1, 2),
    "messages that are null": messages(None, None),
    "messages that are lists of text": messages(["a"], ["b"]),
    "no messages in a chat": messages([], []),
    "no role": messages([{"content": "a"}], [{"content": "b"}]),
    "no content": messages([{"role": "user"}], [{"role": "user"}]),
    "a role that is null": messages([{"role": None, "content": "a"}], [{"role": None, "content": "b"}]),
    "text that is a number": rows({"text": 1}, {"text": 2}),
    "text that is null": rows({"text": None}, {"text": None}),
    "text that is a list": rows({"text": ["a"]}, {"text": ["b"]}),
    "ids that are text": rows({"input_ids": "abc"}, {"input_ids": "def"}),
    "ids that are fractions": rows({"input_ids": [1.5, 2.5]}, {"input_ids": [1.5]}),
    "ids that are no tokens": rows({"input_ids": [1, 99999]}, {"input_ids": [1, -5]}),
    "empty ids": rows({"input_ids": []}, {"input_ids": []}),
    "completions without prompts": rows({"completion": "a"}, {"completion": "b"}),
    "prompts without completions": rows({"prompt": "a"}, {"prompt": "b"}),
    "a completion that is null": rows({"prompt": "a", "completion": None}, {"prompt": "b", "completion": "c"}),
    "completions that are numbers": rows({"prompt": "a", "completion": 1}, {"prompt": "b", "completion": 2}),
    "prompts that are numbers": rows({"prompt": 1, "completion": "a"}, {"prompt": 2, "completion": "b"}),
    "prompts that are chats, completions that are text": rows(
        *({"prompt": ROW["messages"][:1], "completion": "a"},) * 2
    ),
    "prompts that are empty chats": rows(*({"prompt": [], "completion": ROW["messages"][1:]},) * 2),
    "messages that are one message": messages(ROW["messages"][0], ROW["messages"][0]),
    "a message that is null": messages([ROW["messages"][0], None], ROW["messages"]),
    "content that is a number": messages([{"role": "user", "content": 3}], [{"role": "user", "content": 4}]),
    "roles that are numbers": messages([{"role": 1, "content": "a"}], [{"role": 2, "content": "b"}]),
    "conversations that are text": rows({"conversations": "a"}, {"conversations": "b"}),
    "tools that are a number": rows({**ROW, "tools": 3}, {**ROW, "tools": 3}),
    "tools that are text": rows({**ROW, "tools": "x"}, {**ROW, "tools": "x"}),
    "template options that are text": rows({**ROW, "chat_template_kwargs": "x"}, {**ROW, "chat_template_kwargs": "x"}),
    "no text in any row": rows({"text": ""}, {"text": ""}),
    "fewer labels than ids": rows(*({"input_ids": [1, 2, 3], "labels": [1]},) * 2),
    "a shorter mask than ids": rows(*({"input_ids": [1, 2, 3], "completion_mask": [1]},) * 2),
    "bytes": bytes(range(128, 256)) * 4,
    "zeros": bytes(100),
    "UTF-16": json.dumps(ROW).encode("utf-16"),
    "Latin-1": json.dumps({"text": "schön"}, ensure_ascii=False).encode("latin-1") + b"\n",
    "HTML": b"<!DOCTYPE html><html><body>404</body></html>\n",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "null before rows": b"null\n" + rows(ROW, ROW),
    "deep lists": b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
    "one long line of nothing": b"x" * LONG,
}


def undamaged(world: World) -> bytes:
    return (world.chats / "train.jsonl").read_bytes()


# Changes to the file of which the same weights come.
HARMLESS: dict[str, Callable[[bytes], bytes]] = {
    "the same": lambda content: content,
    "no newline at the end": lambda content: content.rstrip(b"\n"),
    "line ends of Windows": lambda content: content.replace(b"\n", b"\r\n"),
    "a mark of byte order": lambda content: b"\xef\xbb\xbf" + content,
}


def with_data(content: bytes, world: World, folder: Path) -> Any:
    data = folder / "chats"
    data.mkdir()
    (data / "train.jsonl").write_bytes(content)
    return sft(world, world.recipe(folder, dataset_name=str(data)))


def as_evaluation(content: bytes, world: World, folder: Path) -> Any:
    data = world.copy(world.chats, folder / "chats")
    (data / "test.jsonl").write_bytes(content)
    options = {"eval_strategy": "epoch", "dataset_test_split": "test", "exact_match_samples": 2, "max_new_tokens": 2}
    return sft(world, world.recipe(folder, dataset_name=str(data), **options))


def as_other(content: bytes, world: World, folder: Path) -> Any:
    (folder / "other").mkdir()
    (folder / "other" / "test.jsonl").write_bytes(content)
    return sft(
        world, world.recipe(folder, other_dataset=str(folder / "other"), exact_match_samples=2, max_new_tokens=2)
    )


def changed(change: Callable[[bytes], bytes], world: World, folder: Path) -> dict[str, torch.Tensor]:
    return with_data(change(undamaged(world)), world, folder)


# -- what the data is named by ----------------------------------------------------------------------------------------


def empty_folder(folder: Path) -> None:
    (folder / "chats").mkdir()


def a_file(folder: Path) -> None:
    (folder / "chats").write_text("x")


def only_test(folder: Path) -> None:
    (folder / "chats").mkdir()
    (folder / "chats" / "test.jsonl").write_bytes(rows(ROW, ROW))


def a_pipe(folder: Path) -> None:
    (folder / "chats").mkdir()
    os.mkfifo(folder / "chats" / "train.jsonl")


def a_link(folder: Path) -> None:
    (folder / "chats").mkdir()
    (folder / "chats" / "train.jsonl").symlink_to("nowhere.jsonl")


def another_kind(folder: Path) -> None:
    (folder / "chats").mkdir()
    (folder / "chats" / "train.parquet").write_bytes(b"PAR1" + bytes(20))


def code(folder: Path) -> None:
    (folder / "chats").mkdir()
    (folder / "chats" / "chats.py").write_text("open('planted', 'w')\n")


def with_settings(settings: str, folder: Path) -> None:
    """In the head of a README.md, where `datasets` looks for them."""
    (folder / "chats").mkdir()
    (folder / "chats" / "README.md").write_text(f"---\n{settings}\n---\n")
    (folder / "chats" / "train.jsonl").write_bytes(rows(ROW, ROW))


SETTINGS = {
    "no YAML": "configs: [",
    "a number": "configs: 3",
    "no files": "configs:\n- config_name: a\n  data_files: nowhere.jsonl",
    "a nameless configuration": "configs:\n- data_files: 3",
    "features that are a number": "dataset_info:\n  features: 3",
    "features of no type": "dataset_info:\n  features:\n  - name: messages\n    dtype: nothing",
    "other features": "dataset_info:\n  features:\n  - name: text\n    dtype: string",
}
PLACES = {
    **{f.__name__.replace("_", " "): f for f in (empty_folder, a_file, only_test, a_pipe, a_link, another_kind, code)},
    **{f"settings: {words}": partial(with_settings, settings) for words, settings in SETTINGS.items()},
}


def placed(make: Callable[[Path], None], world: World, folder: Path) -> Any:
    make(folder)
    return sft(world, world.recipe(folder, dataset_name=str(folder / "chats")))


# -- prompts of rewards -----------------------------------------------------------------------------------------------

PROMPTS: dict[str, bytes] = {
    "nothing": b"",
    "other columns": rows({"question": "a"}, {"question": "b"}),
    "text": rows({"text": "a"}, {"text": "b"}),
    "prompts that are numbers": rows({"prompt": 1}, {"prompt": 2}),
    "prompts that are null": rows({"prompt": None}, {"prompt": "a"}),
    "prompts that are lists of text": rows({"prompt": ["a"]}, {"prompt": ["b"]}),
    "prompts that are empty chats": rows({"prompt": []}, {"prompt": []}),
    "messages without a role": rows({"prompt": [{"content": "a"}]}, {"prompt": [{"content": "b"}]}),
    "messages without content": rows({"prompt": [{"role": "user"}]}, {"prompt": [{"role": "user"}]}),
    "lists": rows([1], [2]),
    "bytes": bytes(range(128, 256)) * 4,
}


def grpo(content: bytes, world: World, folder: Path) -> None:
    data = folder / "chats"
    data.mkdir()
    (data / "train.jsonl").write_bytes(content)
    (folder / "toy_rewards.py").write_text(
        "def letters(completions, **kwargs):\n    return [1.0 for _ in completions]\n"
    )
    importlib.invalidate_caches()
    of_grpo = {"max_length": ..., "num_generations": 2, "max_completion_length": 4}
    recipe = world.recipe(folder, dataset_name=str(data), reward_funcs=["toy_rewards.letters"], **of_grpo)
    main(["grpo", "--config", str(recipe)])


# -- texts ------------------------------------------------------------------------------------------------------------

TEXTS: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \n\t\n ",
    "a word": b"x",
    "bytes": bytes(range(128, 256)) * 20,
    "UTF-16": ("words and words " * 50).encode("utf-16"),
    "Latin-1": ("schöne Worte " * 50).encode("latin-1"),
    "cut inside a character": ("ö" * 501).encode()[:-1],
    "noise": random.Random(0).randbytes(2000),
}


def cpt(content: bytes | None, world: World, folder: Path) -> None:
    texts = folder / "texts"
    if content is not None:
        texts.mkdir()
        (texts / "train.txt").write_bytes(content)
    main(["cpt", "--config", str(world.recipe(folder, dataset_name=str(texts), max_length=16))])


def other_text(content: bytes, world: World, folder: Path) -> None:
    Path("other.txt").write_bytes(content)
    main(["sft", "--config", str(world.recipe(folder, other_text_file="other.txt"))])


def other_place(make: Callable[[Path], None], world: World, folder: Path) -> None:
    make(Path("other.txt"))
    main(["sft", "--config", str(world.recipe(folder, other_text_file="other.txt"))])


NAMES = ("chats", "train.jsonl", "messages", "text", "input_ids", "role", "content", "data")
KIND = "datasets"
INPUTS = [
    *(Input(KIND, f"sft: {words}", partial(with_data, content), NAMES) for words, content in USELESS.items()),
    *(
        Input(KIND, f"evaluation: {words}", partial(as_evaluation, content), NAMES)
        for words, content in USELESS.items()
    ),
    *(
        Input(KIND, f"other_dataset: {words}", partial(as_other, content), ("other_dataset",))
        for words, content in USELESS.items()
    ),
    *(Input(KIND, f"sft: {words}", partial(changed, change), NAMES, same) for words, change in HARMLESS.items()),
    *(Input(KIND, f"sft: {words}", partial(placed, make), ("chats", "split")) for words, make in PLACES.items()),
    *(
        Input(KIND, f"grpo: {words}", partial(grpo, content), ("chats", "train.jsonl", "prompt"))
        for words, content in PROMPTS.items()
    ),
    *(
        Input(KIND, f"cpt: {words}", partial(cpt, content), ("texts", "data", "token"))
        for words, content in TEXTS.items()
    ),
    Input(KIND, "cpt: not there", partial(cpt, None), ("texts",)),
    *(
        Input(KIND, f"other_text_file: {words}", partial(other_text, content), ("other_text_file", "other.txt", "text"))
        for words, content in TEXTS.items()
    ),
    *(
        Input(KIND, f"other_text_file: {words}", partial(other_place, make), ("other_text_file",))
        for words, make in {
            "a folder": Path.mkdir,
            "a pipe": os.mkfifo,
            "not there": lambda path: None,
            "a link to itself": lambda path: path.symlink_to(path.name),
        }.items()
    ),
]
