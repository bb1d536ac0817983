"""Recipes: damaged YAML, keys that are none, values of other types or out of range, and values in other words."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pion_hf.cli import main
from pion_hf.cli.recipe import GONE, RENAMED
from tests.field.trial import Input
from tests.field.world import World

# -- what is no recipe ------------------------------------------------------------------------------------------------

DEEP = 20_000
NO_RECIPES: dict[str, bytes] = {
    "empty": b"",
    "white space": b" \n\n",
    "a comment": b"# nothing\n",
    "a word": b"pion\n",
    "a number": b"1e-4\n",
    "a list": b"- optim: pion\n",
    "null": b"null\n",
    "a tab": b"optim:\n\tpion\n",
    "an open bracket": b"report_to: [none\n",
    "an open quote": b'optim: "pion\n',
    "an open mapping": b"model_init_kwargs: {dtype: float32\n",
    "a colon too many": b"optim: pion: adamw\n",
    "not indented": b"model_init_kwargs:\ndtype: float32\n  x: 1\n",
    "a key twice": b"optim: pion\noptim: muon\n",
    "an alias of nothing": b"optim: *pion\n",
    "two documents": b"optim: pion\n---\noptim: muon\n",
    "a tag of Python": b"optim: !!python/object/apply:os.system ['touch planted']\n",
    "a tag of nobody": b"optim: !pion x\n",
    "a number as key": b"1: 2\noptim: pion\n",
    "null as key": b"null: 2\noptim: pion\n",
    "a list as key": b"[a, b]: 2\noptim: pion\n",
    "a mapping as key": b"{a: b}: 2\noptim: pion\n",
    "bytes": bytes(range(128, 256)),
    "zeros": bytes(64),
    "UTF-16": "optim: pion\n".encode("utf-16"),
    "Latin-1": "optim: piön\n".encode("latin-1"),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(32),
    "deep lists": b"report_to: " + b"[" * DEEP + b"]" * DEEP + b"\n",
    "deep mappings": b"report_to: " + b"{a: " * DEEP + b"}" * DEEP + b"\n",
    "a list of itself": b"report_to: &a [*a]\n",
    "a mapping of itself": b"model_init_kwargs: &a {dtype: *a}\n",
    "JSON that is cut off": b'{"optim": "pion", "max_steps": ',
}


def sft(world: World, path: Path | str) -> dict[str, torch.Tensor]:
    """What `pion-hf sft` makes of a recipe: the weights."""
    main(["sft", "--config", str(path)])
    return load_file("out/model.safetensors")


def same(world: World, weights: dict[str, torch.Tensor]) -> bool:
    """Those of the undamaged recipe."""
    return weights.keys() == world.trained.keys() and all(torch.equal(w, world.trained[n]) for n, w in weights.items())


def of_bytes(content: bytes, world: World, folder: Path) -> Any:
    """Some of these may say all that a recipe must: the model and the data come by flags."""
    Path("recipe.yaml").write_bytes(content)
    keys = world.keys(optim=..., model_init_kwargs=..., report_to="none")
    flags = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    main(["sft", "--config", "recipe.yaml", *flags])
    return None


def of_place(make: Callable[[World], str], world: World, folder: Path) -> Any:
    return sft(world, make(world))


def a_pipe(world: World) -> str:
    os.mkfifo("recipe.yaml")
    return "recipe.yaml"


def a_link_to_itself(world: World) -> str:
    os.symlink("recipe.yaml", "recipe.yaml")
    return "recipe.yaml"


def a_folder(world: World) -> str:
    os.mkdir("recipe.yaml")
    return "recipe.yaml"


PLACES: dict[str, Callable[[World], str]] = {
    "not there": lambda world: "recipe.yaml",
    "in a folder that is not there": lambda world: "none/recipe.yaml",
    "below a file": lambda world: str(world.text / "recipe.yaml"),
    "a folder": a_folder,
    "a pipe": a_pipe,
    "a link to itself": a_link_to_itself,
    "a name that is too long": lambda world: "x" * 300 + ".yaml",
    "no name": lambda world: "",
    "a device": lambda world: "/dev/null",
}

# -- keys and values --------------------------------------------------------------------------------------------------

MISSPELT = {
    "learning_rat": 1,
    "lerning_rate": 1,
    "optimizer": "pion",
    "optim_sid": "in",
    "optim_adamw_learning_rate": 1e-3,
    "max_step": 1,
    "batch_size": 1,
    "model": "x",
    "dataset": "x",
    "Optim": "pion",
    "optim ": "pion",
    "max-steps": 1,
    "lora": True,
    "": 1,
    "[bold]": 1,
    "[/b]": 1,
}
WRONG_TYPES: dict[str, list[Any]] = {
    "learning_rate": ["fast", [1e-3], {"a": 1}, True, "1e-2x", float("nan"), float("inf"), -1e-3],
    "max_steps": ["two", 2.5, [2], True, "2.5", {"a": 2}, float("inf"), 0],
    "per_device_train_batch_size": ["2 rows", 0, -1, 1.5, [2]],
    "gradient_accumulation_steps": [0, -1, "no", 1.5],
    "max_length": [-1, 0, "long", 2.5],
    "seed": ["x", 1.5, [1]],
    "num_train_epochs": ["all", [3], float("nan")],
    "warmup_steps": ["few", [1], -3],
    "weight_decay": ["much", [0.1], float("nan")],
    "max_grad_norm": ["1 or 2", [1], float("nan")],
    "logging_steps": ["often", 0, -1],
    "optim": ["poin", 3, [1], "", True],
    "lr_scheduler_type": ["cosinus", 3, ["cosine"]],
    "bf16": ["perhaps", 2, [True]],
    "use_cpu": ["perhaps", [True]],
    "report_to": [{"a": 1}],
    "eval_strategy": ["sometimes", 3],
    "save_strategy": ["sometimes", []],
    "optim_args": [3, ["rms=0.2"], {"rms": 0.2}, "rms", "rms=", "nothing=3", "rms=x"],
    "optim_side": ["left", 3, True, ["in"]],
    "optim_rms": ["x", -1, [0.2], float("nan")],
    "optim_adamw_lr": ["x", -1, [1e-3], float("nan")],
    "optim_betas": [0.9, "x", [0.9], [0.9, 2]],
    "lora_r": ["x", 0, -1, 1.5],
    "lr_scheduler_kwargs": ["x", [1], 3, {"nothing": 1}, {"min_lr_ratio": "x"}],
    "model_init_kwargs": ["x", [1], 3, {"nothing_of_it": 1}],
    "activation_checkpointing_kwargs": ["x", {"nothing": 1}],
    "gradient_checkpointing_kwargs": ["x", {"nothing": 1}],
    "accelerator_config": ["x", {"nothing": 1}],
    "datasets": ["x", 3, {"path": "x"}, [3], [{}], [{"name": "x"}], [{"path": "x", "nothing": 1}]],
    "resume_from_checkpoint": ["nowhere", "true"],
    "output_dir": ["", "/dev/null/out"],
    "model_name_or_path": ["", "nowhere", "/dev/null", 3],
    "dataset_name": ["", "nowhere", "/dev/null", 3],
    "dataset_train_split": ["trian", 3],
    "init_lora_weights": ["orthodox", 3],
    "exact_match_samples": [-1, "x", 1.5],
    "max_new_tokens": [0, "x"],
    "blend": [0, 2, -1, "x", float("nan")],
    "other_text_file": ["nowhere.txt", "/dev/null/x", 3],
    "other_dataset": ["nowhere"],
    "env": ["x", [1], 3],
}
# Beside a key that only counts together with it.
BESIDE: dict[str, dict[str, Any]] = {
    "lora_r": {"use_peft": True},
    "init_lora_weights": {"use_peft": True},
    "exact_match_samples": {"eval_strategy": "epoch"},
    "max_new_tokens": {"eval_strategy": "epoch", "exact_match_samples": 1},
    "activation_checkpointing_kwargs": {"activation_checkpointing": True},
    "gradient_checkpointing_kwargs": {"activation_checkpointing": True},
    "datasets": {"dataset_name": ...},
    "optim_side": {"optim": "pion"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "pion_cosine"},
    "warmup_steps": {"lr_scheduler_type": "linear"},
}
# The recipe in other words, or with more of them that change nothing: the same weights must come of it.
OTHER_WORDS: dict[str, dict[str, Any]] = {
    "learning_rate as text": {"learning_rate": "1e-2"},
    "learning_rate as decimal text": {"learning_rate": "0.01"},
    "max_steps: 2.0": {"max_steps": 2.0},
    "max_steps as text": {"max_steps": "2"},
    "seed: 1.0": {"seed": 1.0},
    "batch size: 2.0": {"per_device_train_batch_size": 2.0},
    "max_length: 64.0": {"max_length": 64.0},
    "logging_steps: 1.0": {"logging_steps": 1.0},
    "bf16: no": {"bf16": "no"},
    "bf16: 'false'": {"bf16": "false"},
    "use_cpu: 'yes'": {"use_cpu": "yes"},
    "eval_strategy: no (a boolean)": {"eval_strategy": False},
    "save_strategy: no (a boolean)": {"save_strategy": False},
    "adam_epsilon as text": {"adam_epsilon": "1e-8"},
    "weight_decay: 0": {"weight_decay": 0},
    "report_to as a list": {"report_to": ["none"]},
    "optim_side as it is": {"optim_side": "alternate"},
    "optim_args as it is": {"optim_args": "rms=0.2, side=alternate"},
    "min_lr as text in lr_scheduler_kwargs": {"lr_scheduler_kwargs": {"min_lr_ratio": "1e-2"}},
    "a null": {"optim_rms": None},
    "accumulation: 1.0": {"gradient_accumulation_steps": 1.0},
    "warmup_steps: 0.0": {"warmup_steps": 0.0},
}
# What the words above stand for where it is not the recipe itself.
SCHEDULED = {"lr_scheduler_type": "pion_cosine"}


def of_keys(changes: dict[str, Any], world: World, folder: Path) -> dict[str, torch.Tensor]:
    return sft(world, world.recipe(Path(), **changes))


def of_word(words: dict[str, Any], world: World, folder: Path) -> bool:
    """Whether a recipe in other words makes the same weights."""
    if "lr_scheduler_kwargs" not in words:
        return same(world, of_keys(words, world, folder))
    plain = of_keys({**SCHEDULED, "lr_scheduler_kwargs": {"min_lr_ratio": 1e-2}}, world, folder)
    return all(torch.equal(w, plain[name]) for name, w in of_keys({**SCHEDULED, **words}, world, folder).items())


def yes(world: World, result: bool) -> bool:
    return result


def names(key: str, value: Any) -> tuple[str, ...]:
    """A key, the option that it is, or the file or folder that it names."""
    named = (value,) if isinstance(value, str) and key.endswith(("name", "path", "file", "dir", "dataset")) else ()
    return tuple(filter(None, (key, key.removeprefix("optim_"), *named)))


def told(value: Any) -> str:
    return repr(value)[:40]


NAMES = ("recipe", "x.yaml", "config", "/dev/null")
INPUTS = [
    *(Input("recipes: damaged YAML", n, partial(of_bytes, c), ("recipe.yaml",)) for n, c in NO_RECIPES.items()),
    *(
        Input("recipes: damaged YAML", n, partial(of_place, p), ("recipe", "x.yaml", "config", "dev"))
        for n, p in PLACES.items()
    ),
    *(Input("recipes: unknown keys", k, partial(of_keys, {k: v}), (k,)) for k, v in MISSPELT.items()),
    *(Input("recipes: unknown keys", key, partial(of_keys, {key: 1}), (key,)) for key in (*RENAMED, *GONE)),
    *(
        Input("recipes: values", f"{k}: {told(v)}", partial(of_keys, {**BESIDE.get(k, {}), k: v}), names(k, v))
        for k, values in WRONG_TYPES.items()
        for v in values
    ),
    *(Input("recipes: values in other words", n, partial(of_word, w), tuple(w), yes) for n, w in OTHER_WORDS.items()),
]
