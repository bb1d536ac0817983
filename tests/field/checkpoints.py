"""Checkpoints that a run is resumed from: damaged files, states of something else, and pickles that run code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pion_hf.cli import main
from tests.field.trial import Input
from tests.field.world import LAST, STEPS, World
from tests.test_faults import everything, same_bits, trainer_of

FILES = (
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
)


# -- damaged files ----------------------------------------------------------------------------------------------------


def missing(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_by_a_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flipped(path: Path, place: float) -> None:
    """A bit, at this share of the file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def text(path: Path) -> None:
    path.write_text("It was a dark and stormy night.\n", encoding="utf-8")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(100))


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f.__name__.replace("_", " "): f for f in (missing, emptied, cut_in_half, cut_by_a_byte, zeros, noise, text)},
    **{f.__name__.replace("_", " "): f for f in (a_folder, a_pipe, a_link_to_nowhere, longer)},
    **{f"a bit flipped at {place:.0%}": partial(flipped, place=place) for place in (0.02, 0.4, 0.7, 0.97)},
}
# What training goes on from: all damages are done to these.
STATE = FILES[1:6]
ALL_WAYS = ("missing", "emptied", "cut in half", "a bit flipped at 40%", "a pipe")


def resume(run: Path, how: bool | str) -> list[Tensor]:
    trainer = trainer_of(run, steps=STEPS)
    trainer.train(resume_from_checkpoint=how)
    return everything(trainer)


def damaged(file: str, damage: Callable[[Path], None], by_name: bool, world: World, folder: Path) -> list[Tensor]:
    run = world.copy(world.finished, folder / "run")
    damage(run / LAST / file)
    return resume(run, str(run / LAST) if by_name else True)


def as_uninterrupted(world: World, result: list[Tensor]) -> bool:
    return same_bits(result, world.end)


# -- whole files that say something else ------------------------------------------------------------------------------


def edited(file: str, edit: Callable[[Any], Any], world: World, folder: Path) -> list[Tensor]:
    """Resume from a checkpoint one file of which was written by another program: without a manifest of it."""
    run = world.copy(world.finished, folder / "run")
    path = run / LAST / file
    for other in path.parent.iterdir():
        if other.name not in (*FILES, "generation_config.json", "README.md"):
            other.unlink()
    if file.endswith(".json"):
        path.write_text(json.dumps(edit(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    elif file.endswith(".safetensors"):
        save_file(edit(load_file(path)), path, {"format": "pt"})
    else:
        torch.save(edit(torch.load(path, weights_only=file == "optimizer.pt")), path)
    return resume(run, str(run / LAST))


def setting(*keys: Any, value: Any) -> Callable[[Any], Any]:
    """An edit that sets an entry."""

    def edit(content: Any) -> Any:
        at = content
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        return content

    return edit


def removing(*keys: Any) -> Callable[[Any], Any]:
    def edit(content: Any) -> Any:
        at = content
        for key in keys[:-1]:
            at = at[key]
        del at[keys[-1]]
        return content

    return edit


def every_state(change: Callable[[dict], None]) -> Callable[[Any], Any]:
    def edit(content: Any) -> Any:
        for entry in content["state"].values():
            change(entry)
        return content

    return edit


def tensors(change: Callable[[Tensor], Tensor]) -> Callable[[dict], None]:
    def all_of(entry: dict) -> None:
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
                entry[key] = change(value)

    return all_of


def steps(value: Any) -> Callable[[dict], None]:
    def of(entry: dict) -> None:
        entry["step"] = torch.tensor(float(value)) if isinstance(entry.get("step"), Tensor) else value

    return of


def fewer_groups(content: Any) -> Any:
    content["param_groups"] = content["param_groups"][:1]
    return content


def fewer_tensors(content: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(content.items())[2:])


def narrower(content: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w[: max(1, len(w) // 2)].contiguous() for name, w in content.items()}


def renamed(content: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"other.{name}": w for name, w in content.items()}


def not_numbers(content: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w * float("nan") for name, w in content.items()}


EDITS: dict[str, list[tuple[str, Callable[[Any], Any]]]] = {
    "optimizer.pt": [
        ("no state", setting("state", value={})),
        ("state of fewer parameters", removing("state", 0)),
        ("state of one more", setting("state", 999, value={"step": 3})),
        ("state that is a list", setting("state", value=[])),
        ("no state at all", removing("state")),
        ("no groups at all", removing("param_groups")),
        ("fewer groups", fewer_groups),
        ("a list", lambda content: [content]),
        ("None", lambda content: None),
        ("NaN in the state", every_state(tensors(lambda x: x * float("nan")))),
        ("state cut to half its rows", every_state(tensors(lambda x: x[: len(x) // 2].clone()))),
        ("state transposed", every_state(tensors(lambda x: x.transpose(-1, -2).contiguous()))),
        ("empty state of each", every_state(lambda entry: entry.clear())),
        ("steps below 0", every_state(steps(-5))),
        ("steps that are NaN", every_state(steps(float("nan")))),
        ("another rule", setting("param_groups", 0, "rule", value="muon")),
        ("a rule that is none", setting("param_groups", 0, "rule", value="poin")),
        ("params of other numbers", setting("param_groups", 0, "params", value=[0])),
    ],
    "scheduler.pt": [
        ("None", lambda content: None),
        ("a list", lambda content: [content]),
        ("nothing", lambda content: {}),
        ("a step that is text", setting("last_epoch", value="x")),
        ("a step below 0", setting("last_epoch", value=-7)),
        ("a step that is NaN", setting("last_epoch", value=float("nan"))),
        ("rates of fewer groups", setting("base_lrs", value=[1e-2])),
        ("rates that are NaN", lambda content: {**content, "base_lrs": [float("nan")] * len(content["base_lrs"])}),
    ],
    "rng_state.pth": [
        ("None", lambda content: None),
        ("nothing", lambda content: {}),
        ("without that of the CPU", removing("cpu")),
        ("a state that is text", setting("cpu", value="x")),
        ("a state cut short", lambda content: {**content, "cpu": content["cpu"][:100].clone()}),
    ],
    "trainer_state.json": [
        ("a list", lambda content: [content]),
        ("null", lambda content: None),
        ("nothing", lambda content: {}),
        ("a step that is text", setting("global_step", value="two")),
        ("a step below 0", setting("global_step", value=-2)),
        ("another step", setting("global_step", value=3)),
        ("a step that is null", setting("global_step", value=None)),
        ("a log that is text", setting("log_history", value="x")),
        ("a log that is null", setting("log_history", value=None)),
        ("an unknown key", setting("nothing_of_it", value=1)),
        ("an epoch that is text", setting("epoch", value="x")),
    ],
    "model.safetensors": [
        ("fewer tensors", fewer_tensors),
        ("half of every tensor", narrower),
        ("other names", renamed),
        ("NaN", not_numbers),
    ],
    "config.json": [
        ("another width", setting("hidden_size", value=64)),
        ("another kind of model", setting("model_type", value="gpt2")),
        ("a width that is text", setting("hidden_size", value="x")),
    ],
}


# -- folders ----------------------------------------------------------------------------------------------------------


def resumed_by(name: Callable[[Path], Any], world: World, folder: Path) -> list[Tensor]:
    run = world.copy(world.finished, folder / "run")
    return resume(run, name(run))


def without_last(run: Path) -> bool:
    shutil.rmtree(run / LAST)
    return True


def without_any(run: Path) -> bool:
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return True


def of_no_step(run: Path) -> bool:
    (run / "checkpoint-old").mkdir()
    return True


def a_file(run: Path) -> bool:
    (run / "checkpoint-9").touch()
    return True


def an_empty_one(run: Path) -> bool:
    (run / "checkpoint-9").mkdir()
    return True


def a_linked_one(run: Path) -> bool:
    (run / LAST).rename(run / "elsewhere")
    (run / LAST).symlink_to("elsewhere")
    return True


FOLDERS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "the last is gone": (without_last, ()),
    "all are gone": (without_any, ("checkpoint",)),
    "one of no step": (of_no_step, ()),
    "a file of that name": (a_file, ()),
    "an empty one": (an_empty_one, ("checkpoint-9",)),
    "a link to one": (a_linked_one, ()),
    "a name that is none": (lambda run: "nowhere", ("nowhere",)),
    "a file": (lambda run: str(run / "run.json"), ("run.json",)),
    "the run itself": (str, ("checkpoint",)),
    "a number": (lambda run: 3, ("resume_from_checkpoint",)),
    "an empty name": (lambda run: "", ("resume_from_checkpoint", "checkpoint")),
}


# -- pickles ----------------------------------------------------------------------------------------------------------

PLANTED = "planted"


class Planter:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def plant(path: Path, folder: Path, *, as_torch: bool) -> None:
    if path.exists():
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"state": Planter(folder / PLANTED), "param_groups": []}
    if as_torch:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))


def ran_code(do: Callable[[World, Path], None], world: World, folder: Path) -> bool:
    """Whether anything of the pickles was run; what else came of it is not judged here."""
    with contextlib.suppress(BaseException), contextlib.redirect_stderr(io.StringIO()):
        do(world, folder)
    return (folder / PLANTED).exists()


def in_checkpoint(file: str, as_torch: bool, world: World, folder: Path) -> None:
    run = world.copy(world.finished, folder / "run")
    plant(run / LAST / file, folder, as_torch=as_torch)
    if file == "pytorch_model.bin":
        (run / LAST / "model.safetensors").unlink()
    resume(run, str(run / LAST))


def in_record(file: str, as_torch: bool, world: World, folder: Path) -> None:
    run = world.copy(world.run, folder / "run")
    plant(run / file, folder, as_torch=as_torch)
    main(["report", str(run)])


def in_model(file: str, as_torch: bool, world: World, folder: Path) -> None:
    model = world.copy(world.model, folder / "model")
    plant(model / file, folder, as_torch=as_torch)
    (model / "model.safetensors").unlink()
    main(["sft", "--config", str(world.recipe(folder, model_name_or_path=str(model)))])


def in_data(file: str, as_torch: bool, world: World, folder: Path) -> None:
    plant(folder / "data" / file, folder, as_torch=as_torch)
    main(["sft", "--config", str(world.recipe(folder, dataset_name=str(folder / "data")))])


def not_run(world: World, ran: bool) -> bool:
    return ran is False


PICKLES: dict[Callable[..., None], tuple[str, ...]] = {
    in_checkpoint: (*("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"), "pytorch_model.bin"),
    in_record: ("run.json", "spectra.safetensors", "log.jsonl", "eval.json", "routing.json"),
    in_model: ("pytorch_model.bin", "adapter_model.bin", "training_args.bin"),
    in_data: ("train.pkl", "train.pt", "train.pickle"),
}

RESUMED = "checkpoints: damaged files"
INPUTS = [
    *(
        Input(RESUMED, f"{file}: {words}", partial(damaged, file, damage, False), (file, LAST), as_uninterrupted, True)
        for file in FILES
        for words, damage in DAMAGES.items()
        if file in STATE or words in ALL_WAYS
    ),
    *(
        Input(
            RESUMED,
            f"{file}: {words}, of a checkpoint by name",
            partial(damaged, file, DAMAGES[words], True),
            (file, LAST),
            as_uninterrupted,
            True,
        )
        for file in STATE
        for words in ALL_WAYS[:3]
    ),
    *(
        Input(
            "checkpoints: state of something else",
            f"{file}: {words}",
            partial(edited, file, edit),
            (file, "saved optimizer state", LAST),
            as_uninterrupted,
            True,
        )
        for file, edits in EDITS.items()
        for words, edit in edits
    ),
    *(
        Input("checkpoints: folders", words, partial(resumed_by, of), names, as_uninterrupted, True)
        for words, (of, names) in FOLDERS.items()
    ),
    *(
        Input(
            "pickles that run code",
            f"{file} {do.__name__.replace('_', ' ')}, {'a zip of torch' if as_torch else 'plain'}",
            partial(ran_code, partial(do, file, as_torch)),
            (),
            not_run,
            True,
        )
        for do, files in PICKLES.items()
        for file in files
        for as_torch in ((True, False) if do is in_checkpoint else (False,))
    ),
]
