"""Model folders that training begins with: damaged files, and files that say something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.field.checkpoints import DAMAGES, fewer_tensors, narrower, not_numbers, renamed
from tests.field.recipes import same, sft
from tests.field.trial import Input
from tests.field.world import World

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

EDITS: dict[str, dict[str, Callable[[dict], Any]]] = {
    "config.json": {
        "a list": lambda content: [content],
        "nothing": lambda content: {},
        "null": lambda content: None,
        "another kind of model": lambda content: {**content, "model_type": "gpt2"},
        "a kind that is none": lambda content: {**content, "model_type": "lama"},
        "a width that is text": lambda content: {**content, "hidden_size": "wide"},
        "a width that is negative": lambda content: {**content, "hidden_size": -32},
        "a width that heads do not divide": lambda content: {**content, "hidden_size": 33},
        "another width": lambda content: {**content, "hidden_size": 64},
        "no layers": lambda content: {**content, "num_hidden_layers": 0},
        "more layers": lambda content: {**content, "num_hidden_layers": 9},
        "fewer layers": lambda content: {**content, "num_hidden_layers": 1},
        "fewer tokens": lambda content: {**content, "vocab_size": 10},
        "an activation that is none": lambda content: {**content, "hidden_act": "sillu"},
        "a dtype that is none": lambda content: {**content, "dtype": "float99"},
        "code of its own": lambda content: {**content, "auto_map": {"AutoModelForCausalLM": "planted.Model"}},
    },
    "model.safetensors": {
        "fewer tensors": fewer_tensors,
        "half of every tensor": narrower,
        "other names": renamed,
        "NaN": not_numbers,
    },
    "tokenizer_config.json": {
        "a list": lambda content: [content],
        "nothing": lambda content: {},
        "a class that is none": lambda content: {**content, "tokenizer_class": "NoTokenizer"},
        "a template that is none": lambda content: {**content, "chat_template": "{% for %}"},
        "a template that raises": lambda content: {**content, "chat_template": "{{ raise_exception('not these') }}"},
        "a template that is a number": lambda content: {**content, "chat_template": 3},
    },
}


def damaged(file: str, damage: Callable[[Path], None], world: World, folder: Path) -> Any:
    model = world.copy(world.model, folder / "model")
    damage(model / file)
    return sft(world, world.recipe(folder, model_name_or_path=str(model)))


def edited(file: str, edit: Callable[[Any], Any], world: World, folder: Path) -> Any:
    model = world.copy(world.model, folder / "model")
    if file == "tokenizer_config.json":
        (model / "chat_template.jinja").unlink(missing_ok=True)
    path = model / file
    if file.endswith(".json"):
        path.write_text(json.dumps(edit(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    else:
        save_file(edit(load_file(path)), path, {"format": "pt"})
    return sft(world, world.recipe(folder, model_name_or_path=str(model)))


KIND = "models"
# transformers says in a table which weights were missing or left over.
NAMES = ("/model'", "/model)", "MISSING", "UNEXPECTED", "template", "hidden layer", "model.layers.0.self_attn.q_proj")
INPUTS = [
    *(
        Input(KIND, f"{file}: {words}", partial(damaged, file, damage), (file, *NAMES), same)
        for file in FILES
        for words, damage in DAMAGES.items()
        if not words.startswith("a bit") or file != "model.safetensors"
    ),
    *(
        Input(KIND, f"{file}: {words}", partial(edited, file, edit), (file, *NAMES), same)
        for file, edits in EDITS.items()
        for words, edit in edits.items()
    ),
]
