"""Command lines of every command, and what `plan` and `compare` are given."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pion_hf.cli import main
from pion_hf.cli.study import JOURNAL
from tests.field.checkpoints import a_folder, a_pipe, cut_in_half, emptied, missing, noise
from tests.field.pages import Figure, sketch
from tests.field.trial import Input
from tests.field.world import World

# -- command lines ----------------------------------------------------------------------------------------------------

# Words -> what a refusal names. `{recipe}`, `{run}` and `{model}` are undamaged ones.
LINES: dict[str, tuple[str, ...]] = {
    "sfx": ("sfx",),
    "SFT": ("SFT",),
    "--sft": ("--sft",),
    "-x": ("-x",),
    "sft sft": ("sft",),
    "sft": ("model", "dataset"),
    "sft --config": ("--config",),
    "sft --config nowhere.yaml": ("nowhere.yaml",),
    "sft --config {recipe} --config {recipe}": ("--config", "recipe"),
    "sft --config {recipe} nowhere": ("nowhere",),
    "sft {recipe}": ("recipe",),
    "sft --config {recipe} --learning_rate": ("learning_rate",),
    "sft --config {recipe} --learning_rate x": ("learning_rate",),
    "sft --config {recipe} --learning_rate=": ("learning_rate",),
    "sft --config {recipe} --lerning_rate 1": ("lerning_rate",),
    "sft --config {recipe} --learning 1": ("learning",),
    "sft --config {recipe} -learning_rate 1": ("learning_rate",),
    "sft --config {recipe} --max_steps 2.5": ("max_steps",),
    "sft --config {recipe} --max_steps -3": ("max_steps",),
    "sft --config {recipe} --max_steps 0": ("max_steps",),
    "sft --config {recipe} --optim poin": ("poin",),
    "sft --config {recipe} --optim": ("optim",),
    "sft --config {recipe} --optim_side left": ("optim_side", "side"),
    "sft --config {recipe} --optim_args rms": ("optim_args",),
    "sft --config {recipe} --optim_args rms=x": ("rms",),
    "sft --config {recipe} --bf16 perhaps": ("bf16",),
    "sft --config {recipe} --max_seq_length 64": ("max_seq_length",),
    "sft --config {recipe} --lr_scheduler_type cosinus": ("cosinus",),
    "sft --config {recipe} --lr_scheduler_kwargs x": ("x", "lr_scheduler_kwargs"),
    "sft --config {recipe} --report_to nobody": ("nobody", "report_to"),
    "sft --config {recipe} --dataset_name nowhere": ("nowhere",),
    "sft --config {recipe} --dataset_name x.jsonl": ("x.jsonl",),
    "sft --config {recipe} --model_name_or_path nowhere": ("nowhere",),
    "sft --config {recipe} --dtype float99": ("float99", "dtype"),
    "sft --config {recipe} --attn_implementation nothing": ("nothing", "attn_implementation"),
    "sft --config {recipe} --lora_r 0 --use_peft": ("lora_r",),
    "sft --config {recipe} --use_peft --lora_target_modules nothing": ("nothing", "lora_target_modules"),
    "sft --config {recipe} --use_peft --init_lora_weights nothing": ("nothing", "init_lora_weights"),
    "sft --config {recipe} --load_in_4bit": ("bitsandbytes", "load_in_4bit"),
    "sft --config {recipe} --optim pion_lora": ("pion_lora",),
    "sft --config {recipe} --gradient_accumulation_steps 0": ("gradient_accumulation_steps",),
    "cpt": ("model", "dataset"),
    "cpt --config nowhere.yaml": ("nowhere.yaml",),
    "cpt --config {recipe} --max_tokens x": ("max_tokens",),
    "cpt --config {recipe} --max_tokens 0 --max_steps -1": ("max_tokens",),
    "cpt --config {recipe} --validation_fraction 2": ("validation_fraction",),
    "cpt --config {recipe} --sample_by page": ("sample_by",),
    "grpo": ("model", "dataset"),
    "grpo --config {recipe} --reward_funcs nowhere.reward": ("nowhere",),
    "grpo --config {recipe} --reward_funcs nothing": ("nothing",),
    "grpo --config {recipe} --num_generations 0": ("num_generations",),
    "report": ("RUN", "runs"),
    "report nowhere": ("nowhere",),
    "report {run} nowhere": ("nowhere",),
    "report {run} --output": ("--output",),
    "report {run} --output /dev/null/page.html": ("/dev/null",),
    "report {run} --output .": ("'.'", "folder"),
    "report {run} --pictures {recipe}": ("recipe.yaml",),
    "report {run} --nothing": ("--nothing",),
    "report {model}": ("model",),
    "plan": ("model",),
    "plan --config nowhere.yaml": ("nowhere.yaml",),
    "plan --config {recipe} --model_name_or_path nowhere": ("nowhere",),
    "plan --config {recipe} --optim adamw_torch": ("adamw_torch",),
    "plan --config {recipe} --optim poin": ("poin",),
    "plan --config {recipe} --routing_file /dev/null/x.json": ("/dev/null",),
    "plan --config {recipe} --routing_file .": ("'.'", "routing_file"),
    "plan --config {recipe} --plot /dev/null/x.png": ("/dev/null", "plot"),
    "plan --config {recipe} --plot x.nothing": ("nothing",),
    "plan --config {recipe} --max_length -1": ("max_length",),
    "plan --config {recipe} --per_device_train_batch_size 0": ("per_device_train_batch_size",),
    "plan --config {recipe} --optim_exclude_modules [": ("exclude",),
    "plan --config {recipe} --optim_target_modules nothing": ("nothing",),
    "plan --config {recipe} --nothing": ("nothing",),
    "compare": ("RECIPE", "recipe"),
    "compare nowhere.yaml --command sft": ("nowhere.yaml",),
    "compare {recipe} --command sfx": ("sfx",),
    "run": ("usage", "SCRIPT"),
    "run nowhere.py": ("nowhere.py",),
}


def line(words: str, world: World, folder: Path) -> None:
    of_grpo = {"max_length": ..., "num_generations": 2} if words.startswith("grpo") else {}
    recipe = world.recipe(folder, **of_grpo)
    main(words.format(recipe=recipe, run=world.run, model=world.model).split())


# -- compare ----------------------------------------------------------------------------------------------------------

GRIDS: dict[str, tuple[str, ...]] = {
    "--optim poin": ("poin",),
    "--optim ,": ("--optim",),
    "--optim pion,pion": ("pion",),
    "--optim [": ("--optim",),
    "--learning_rate x": ("x", "learning_rate"),
    "--learning_rate -1": ("learning_rate",),
    "--learning_rate nan": ("learning_rate",),
    "--learning_rate inf": ("learning_rate",),
    "--learning_rate 1e-3,1e-3": ("learning_rate", "1e-3"),
    "--learning_rate 1e-3,,2e-3": ("learning_rate",),
    "--seeds 0": ("seeds",),
    "--seeds -1": ("seeds",),
    "--seeds x": ("seeds",),
    "--seeds 1.5": ("seeds",),
    "--jobs 0": ("jobs",),
    "--jobs x": ("jobs",),
    "--set x": ("--set",),
    "--set =3": ("--set",),
    "--set lerning_rate=3": ("lerning_rate",),
    "--set seed=3": ("seed",),
    "--set optim=pion": ("optim",),
    "--set output_dir=x": ("output_dir",),
    "--set weight_decay=": ("weight_decay",),
    "--set weight_decay=0,0": ("weight_decay",),
    "--set weight_decay=much": ("weight_decay",),
    "--set weight_decay=0 weight_decay=1": ("weight_decay",),
    "--set max_steps=2,3": ("max_steps",),
    "--set optim_side=left": ("side",),
    "--set optim_nothing=1": ("optim_nothing",),
    "--set optim_stack=2": ("stack",),
    "--set max_steps=0": ("max_steps",),
    "--set eval_strategy=no": ("eval",),
    "--output_dir /dev/null/x": ("/dev/null",),
    "--contenders nowhere.yaml": ("nowhere.yaml",),
    "--contenders . ": ("'.'",),
    "--contenders empty.yaml": ("empty.yaml",),
    "--contenders list.yaml": ("list.yaml",),
    "--contenders scalar.yaml": ("scalar.yaml",),
    "--contenders norate.yaml": ("norate.yaml", "learning_rate"),
    "--contenders seed.yaml": ("seed.yaml", "seed"),
    "--contenders unknown.yaml": ("unknown.yaml", "poin"),
    "--contenders key.yaml": ("key.yaml", "optim_nothing"),
    "--contenders list.yaml --optim pion": ("--contenders",),
    "--nothing": ("--nothing",),
}
CONTENDERS = {
    "empty": "",
    "list": "- optim: pion\n",
    "scalar": "A: 3\n",
    "norate": "A: {optim: pion}\n",
    "seed": "A: {optim: pion, seed: 3, learning_rate: 1e-3}\n",
    "unknown": "A: {optim: poin, learning_rate: 1e-3}\n",
    "key": "A: {optim: pion, optim_nothing: 1, learning_rate: 1e-3}\n",
}


def grid(flags: str, world: World, folder: Path) -> None:
    for name, content in CONTENDERS.items():
        Path(f"{name}.yaml").write_text(content, encoding="utf-8")
    rates = [] if "learning_rate" in flags or "norate" in flags or "contenders" in flags else ["--learning_rate=1e-3"]
    output = [] if "--output_dir" in flags else ["--output_dir", "runs"]
    recipe = world.comparison / "sft" / "toy.yaml"
    main(["compare", str(recipe), *rates, *output, *flags.split()])


def comparison(file: str, damage: Callable[[Path], None], world: World, folder: Path) -> str:
    """The table of a comparison one of whose runs is damaged."""
    runs = world.copy(world.comparison / "runs", folder / "runs")
    folder = runs if file == JOURNAL else sorted(path for path in runs.iterdir() if path.is_dir())[0]
    damage(folder / file)
    return table(world, runs)


def table(world: World, runs: Path) -> str:
    Figure.savefig = sketch
    recipe = str(world.comparison / "sft" / "toy.yaml")
    rates = "--learning_rate=0.001,0.002"
    main(["compare", recipe, "--optim=pion", rates, "--output_dir", str(runs), "--report_only"])
    record = json.loads((runs / "compare.json").read_text(encoding="utf-8"))
    return json.dumps([record["runs"], record["standings"]], sort_keys=True)


def as_undamaged(world: World, found: str) -> bool:
    return found == (world.folder / "table.json").read_text(encoding="utf-8")


def field_of(file: str, key: str, value: Any, path: Path) -> None:
    content = json.loads((path.parent / file).read_text(encoding="utf-8"))
    content[key] = value
    (path.parent / file).write_text(json.dumps(content), encoding="utf-8")


DAMAGES = {f.__name__.replace("_", " "): f for f in (emptied, cut_in_half, noise, a_folder, a_pipe)}
FIELDS: dict[str, dict[str, list[Any]]] = {
    "eval.json": {"after": ["x", [1], {"task": 3}, None], "before": ["x", {"task": {"loss": "x"}}], "learnt": ["x"]},
    "run.json": {"seconds": ["x"], "peak_memory_bytes": ["x", [1]], "format": [2]},
}

INPUTS = [
    *(Input("command lines", f"pion-hf {words}", partial(line, words), names) for words, names in LINES.items()),
    *(Input("compare: grids", f"compare {flags}", partial(grid, flags), names) for flags, names in GRIDS.items()),
    *(
        Input("compare: folders", f"{file}: {words}", partial(comparison, file, damage), (file,), as_undamaged)
        for file in (JOURNAL, "eval.json", "run.json")
        for words, damage in {**DAMAGES, **({"missing": missing} if file == "eval.json" else {})}.items()
    ),
    *(
        Input(
            "compare: folders",
            f"{file}: {key}: {value}",
            partial(comparison, file, partial(field_of, file, key, value)),
            (file, key),
            as_undamaged,
        )
        for file, keys in FIELDS.items()
        for key, values in keys.items()
        for value in values
    ),
]
