"""What a checkpoint consists of: written down when it has been saved, and looked at before a run goes on from it.

`manifest.json` is a checkpoint's last file: sizes and xxh3 digests of all others, and what no other file holds.
Digests are those of bytes just written, at a sixth of a second per GB. A checkpoint without one (of a plain Trainer, or
of a process killed before it came to it) is opened instead: archives by their checksums, numbers by what they may be.
"""

from __future__ import annotations

import json
import math
import os
import random
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor
from transformers.trainer import safe_globals
from transformers.trainer_callback import TrainerState

from pion_hf.runs.files import read_bytes
from pion_hf.runs.folder import write_json

STATE_NAME, MANIFEST = "trainer_state.json", "manifest.json"
FORMAT = 1  # of manifest.json
READERS, CHUNK = 8, 2**20  # bytes

# Files and folders of which one is there in every checkpoint that a run can go on from: of one process, of several, of
# FSDP, of DeepSpeed.
WEIGHTS = (
    "model.safetensors*",
    "pytorch_model.bin*",
    "adapter_model.*",
    "*/adapter_model.*",
    "pytorch_model_fsdp*",
    "global_step*",
)
OPTIMIZER = ("optimizer.pt*", "optimizer.bin", "optimizer_[0-9]*", "rank*-optimizer.pt", "global_step*")
SCHEDULER = ("scheduler.pt", "global_step*")
RANDOM = ("rng_state*.pth",)
PARTS = {"file of weights": WEIGHTS, "optimizer.pt": OPTIMIZER, "scheduler.pt": SCHEDULER, "rng_state.pth": RANDOM}


class Damaged(ValueError):
    """What is wrong with a checkpoint, as the end of a sentence about it."""


def write_manifest(checkpoint: Path, **known: Any) -> None:
    """Write down what a checkpoint consists of, and what is `known` of it."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / MANIFEST)
    files = {
        path.relative_to(checkpoint).as_posix(): {"size": path.stat().st_size, "xxh3": digest}
        for path, digest in zip(paths, _digests(paths), strict=True)
    }
    write_json(checkpoint / MANIFEST, {"format": FORMAT, **known, "files": files})


def read_manifest(checkpoint: str | os.PathLike) -> dict[str, Any] | None:
    """What `write_manifest` wrote, None if it did not.

    Raises:
        Damaged: it cannot be read.
    """
    try:
        manifest = json.loads(read_bytes(Path(checkpoint, MANIFEST)).decode("utf-8"))
        if manifest["format"] == FORMAT:
            files = {name: (entry["size"], entry["xxh3"]) for name, entry in manifest["files"].items()}
            return {**manifest, "files": files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"is damaged ({MANIFEST} cannot be read: {error!r})") from None
    return None  # of another version


def fault_of(checkpoint: str | os.PathLike) -> str | None:
    """Why a run cannot go on from `checkpoint`, as the end of a sentence about it; None if it can."""
    folder = Path(checkpoint)
    try:
        for path in folder.rglob("*"):
            if not (path.is_file() or path.is_dir()):  # a pipe would be waited for
                raise Damaged(f"is damaged ({path.name} is no file)")
        step = _step_of(folder)
        manifest = read_manifest(folder)
        if manifest:
            _compare(folder, manifest["files"])
        _check_parts(folder, step)
        if manifest is None:
            _look_into(folder, step)
    except Damaged as damaged:
        return str(damaged)
    except OSError as error:
        return f"cannot be read ({error})"
    return None


def _step_of(folder: Path) -> int:
    """The steps that were taken before a checkpoint; `trainer_state.json` is the last file but the manifest."""
    path = folder / STATE_NAME
    if not path.is_file():
        raise Damaged(f"was not saved to its end ({STATE_NAME} is missing)")
    try:
        state = TrainerState.load_from_json(path)
        step, known = state.global_step, (state.max_steps, state.train_batch_size or 0)
        _ = float(state.epoch or 0), [entry.items() for entry in state.log_history]
    except Exception:  # its fields are what a JSON file says they are
        raise Damaged(f"was not saved to its end ({STATE_NAME} is cut off or damaged)") from None
    if not all(isinstance(number, int) for number in (step, *known)) or step < 0:
        raise Damaged(f"is damaged ({STATE_NAME} counts {step!r} steps)")
    return step


def _compare(folder: Path, files: dict[str, tuple[int, str]]) -> None:
    for name, (size, _) in files.items():
        if not (folder / name).is_file():
            raise Damaged(f"is damaged ({name} is missing)")
        found = (folder / name).stat().st_size
        if found != size:
            raise Damaged(f"is damaged ({name} has {found:,} bytes of {size:,})")
    for (name, (_, digest)), found in zip(files.items(), _digests(folder / name for name in files), strict=True):
        if found != digest:
            raise Damaged(f"is damaged ({name} is not what was saved; without {MANIFEST} it would be taken as it is)")


def _digests(paths: Iterable[Path]) -> list[str]:
    """Several at a time: reading and hashing leave the interpreter alone."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _check_parts(folder: Path, step: int) -> None:
    missing = [part for part, patterns in PARTS.items() if not any(any(folder.glob(p)) for p in patterns)]
    if missing == list(PARTS)[1:]:
        raise Damaged(
            "holds weights only (save_only_model): transformers would count its "
            f"{step:,} steps as taken and begin with fresh optimizer state and a fresh schedule; to go on from its "
            "weights, train it as a model of its own (model_name_or_path)"
        )
    if missing:
        raise Damaged(f"is damaged (there is no {' and no '.join(missing)})")


# -- without a manifest -----------------------------------------------------------------------------------------------


def _look_into(folder: Path, step: int) -> None:
    """What can be told of files of which nothing is known."""
    for path in (*folder.glob("*.json"), *folder.glob("*/*.json")):
        _json(path)
    for path in _weights(folder):
        for name, value in _tensors(path):
            if value.is_floating_point() and value.itemsize > 1 and value.isnan().any():
                raise Damaged(f"is damaged ({path.name}: {name} holds NaN)")
    named = folder.name.removeprefix("checkpoint-")
    if named.isdecimal() and int(named) != step:
        raise Damaged(f"is damaged ({STATE_NAME} counts {step:,} steps)")
    # Steps that a scaler of half-precision gradients has skipped count neither for the optimizer nor for the schedule.
    least = 0 if (folder / "scaler.pt").exists() else step
    for path in (*folder.glob("optimizer.pt"), *folder.glob("optimizer.bin")):
        _check_optimizer(path.name, _load(path), step, least)
    for path in folder.glob("scheduler.pt"):
        _check_schedule(path.name, _load(path), range(least, step + 1))
    for path in folder.glob("rng_state*.pth"):
        _check_random(path.name, _load(path))
    for path in folder.glob("scaler.pt"):
        _load(path)
    for path in (*folder.glob("pytorch_model_fsdp_*"), *folder.glob("optimizer_[0-9]*")):
        if path.is_dir() and not ((path / ".metadata").is_file() and (path / ".metadata").stat().st_size):
            raise Damaged(f"was not saved to its end ({path.name}/.metadata is missing)")


def _json(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"is damaged ({path.name} cannot be read: {_first_line(error)})") from None


def _weights(folder: Path) -> Iterator[Path]:
    """Files of weights; those that an index names must be there."""
    for index in folder.glob("*.index.json"):
        try:
            names = sorted(set(_json(index)["weight_map"].values()))
        except (LookupError, TypeError, AttributeError):
            raise Damaged(f"is damaged ({index.name} names no weights)") from None
        for name in names:
            if not (folder / name).is_file():
                raise Damaged(f"is damaged ({name} is missing)")
    for pattern in ("*.safetensors", "*/adapter_model.safetensors", "*.bin"):
        yield from (p for p in sorted(folder.glob(pattern)) if p.name not in ("optimizer.bin", "training_args.bin"))


def _tensors(path: Path) -> Iterable[tuple[str, Tensor]]:
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    found = _load(path)
    if not isinstance(found, dict):
        raise Damaged(f"is damaged ({path.name} holds no weights)")
    return [(name, value) for name, value in found.items() if isinstance(value, Tensor)]


def _of_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """One at a time."""
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
    except Exception as error:  # SafetensorError, or torch's of a dtype or a shape that cannot be
        raise Damaged(f"is damaged ({path.name} cannot be read: {_first_line(error)})") from None


def _load(path: Path) -> Any:
    """What `torch.save` wrote, by the checksums of its archive and without running any code of it."""
    try:
        archive = zipfile.is_zipfile(path)
        if archive and torch.serialization.get_crc32_options():
            with zipfile.ZipFile(path) as file:
                if (bad := file.testzip()) is not None:
                    raise ValueError(f"the checksum of {bad} is wrong")
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # of the many kinds that a cut or changed pickle brings
        raise Damaged(f"is damaged ({path.name} cannot be read: {_first_line(error)})") from None


def _check_optimizer(name: str, saved: Any, step: int, least: int) -> None:
    """step: those taken before the checkpoint. least: those that the optimizer knows of."""
    try:
        state, skipped = saved["state"], saved.get("skipped_steps", step)
        ours = any("rule" in group for group in saved["param_groups"])
        entries = [(param, key, value) for param, of in state.items() for key, value in of.items()]
        counts = [(param, float(value)) for param, key, value in entries if key == "step"]
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError):
        raise Damaged(f"is damaged ({name} is no state of an optimizer)") from None
    for param, count in counts:
        if not 0 <= count < float("inf"):
            raise Damaged(f"is damaged ({name}: parameter {param} is at step {count:g})")
    if ours and skipped < step and max((count for _, count in counts), default=0) + skipped < least:
        raise Damaged(f"is damaged ({name} is not of {step:,} steps)")
    for param, key, value in entries:
        whole = not isinstance(value, Tensor) or not value.is_floating_point() or value.itemsize == 1
        if not whole and not value.isfinite().all():
            raise Damaged(f"is damaged ({name}: {key} of parameter {param} is not finite)")


def _check_schedule(name: str, saved: Any, possible: range) -> None:
    count = saved.get("last_epoch") if isinstance(saved, dict) else None
    if not isinstance(count, int) or count < 0:
        raise Damaged(f"is damaged ({name} counts {count!r} steps)")
    if "lr_lambdas" in saved and count not in possible:  # others count evaluations
        raise Damaged(f"is damaged ({name} counts {count:,} steps of {possible[-1]:,})")
    rates = saved.get("base_lrs", ())
    try:
        whole = all(math.isfinite(rate) for rate in rates) and len(rates) == len(saved.get("lr_lambdas", rates))
    except TypeError:
        whole = False
    if not whole:
        raise Damaged(f"is damaged ({name} holds the learning rates {rates!r})")


def _check_random(name: str, saved: Any) -> None:
    try:
        random.Random().setstate(saved["python"])
        np.random.RandomState().set_state(saved["numpy"])
        torch.Generator().set_state(saved["cpu"])
    except Exception as error:  # of three libraries
        raise Damaged(f"is damaged ({name} holds no state of random numbers: {error!r})") from None


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
