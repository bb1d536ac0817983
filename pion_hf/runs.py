"""A run's folder: what training leaves there beside its checkpoints, and how it is read back.

    run.json             what ran: status, model, data, optimizer, arguments that differ from their defaults, versions
    log.jsonl            every log entry of the Trainer, a line each, with its `step`
    matrices.jsonl       snapshots of every hidden matrix: a line for a step, a list for a quantity
    spectra.safetensors  singular values before and after, under `before/<name>` and `after/<name>`
    routing.json         which rule updates which parameter (this package's optimizers)
    eval.json            what the model could do before and after (the commands of `pion-hf`)

Lines are appended as training goes, so that a run that is still going, or was killed, can be read as far as it came.
JSON has no word for a number that is none: where training diverged a value is null, and reads as NaN.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pion_hf.files import append_text, read_bytes, write_text

RECORD, LOG, MATRICES, SPECTRA = "run.json", "log.jsonl", "matrices.jsonl", "spectra.safetensors"
ROUTING, EVALUATION = "routing.json", "eval.json"
BEFORE = "before.json"  # measured when training began, for a run that goes on
FORMAT = 1  # of run.json
RUNNING, FINISHED, FAILED = "running", "finished", "failed"


@dataclass(frozen=True)
class Snapshot:
    """Every matrix at one step: quantity (`spectral_norm`, `stable_rank`, ...) -> values in the order of the matrices.

    NaN where a quantity does not apply to a matrix, or was not finite.
    """

    step: int
    values: dict[str, list[float]]


@dataclass(frozen=True)
class Run:
    """What a run left in its folder, as far as it came."""

    folder: Path
    record: dict[str, Any]
    logs: list[dict[str, Any]] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    routing: Any = None

    @property
    def status(self) -> str:
        """`running` (or killed), `finished` or `failed`."""
        return self.record.get("status", RUNNING)

    @property
    def matrices(self) -> list[dict[str, Any]]:
        """`name`, `role`, `layer` (None outside of layers), `rule` and `shape` of the matrices of the snapshots."""
        return self.record.get("matrices", [])

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a quantity of the logs."""
        found = [(entry["step"], entry[key]) for entry in self.logs if isinstance(entry.get(key), (int, float))]
        return [step for step, _ in found], [float(value) for _, value in found]

    @cached_property
    def spectra(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Singular values before and after, `(E, k)`, of every matrix whose both are known."""
        try:
            tensors = load(read_bytes(self.folder / SPECTRA))
        except (OSError, SafetensorError):
            return {}
        names = (key.removeprefix("after/") for key in tensors if key.startswith("after/"))
        return {n: (tensors[f"before/{n}"], tensors[f"after/{n}"]) for n in names if f"before/{n}" in tensors}


def read_run(folder: str | os.PathLike) -> Run:
    """Read a run's folder; a last line that was cut off is left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no run's, or a file is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}.")
    if not (folder / RECORD).is_file():
        raise ValueError(
            f"{str(folder)!r} is no run: it holds no {RECORD}, which training with this package's Trainers "
            "and commands, or with pion_hf.watch(trainer), writes when it begins."
        )
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{str(folder / RECORD)!r} is not of format {FORMAT}, which this version reads.")
    return Run(
        folder=folder,
        record=record,
        logs=_read_lines(folder / LOG),
        snapshots=[Snapshot(line["step"], line.get("values", {})) for line in _read_lines(folder / MATRICES)],
        evaluation=read_json(folder / EVALUATION),
        routing=read_json(folder / ROUTING),
    )


def write_json(path: str | os.PathLike, record: Any) -> None:
    """Write JSON, whole or not at all; its folder is made if need be."""
    write_text(path, json.dumps(finite(record), indent=1, allow_nan=False) + "\n")


def append_line(path: str | os.PathLike, entry: dict[str, Any]) -> None:
    """Append an entry to a file of JSON lines."""
    append_text(path, json.dumps(finite(entry), allow_nan=False) + "\n")


def keep_until(folder: str | os.PathLike, step: int, files: Iterable[str] = (LOG, MATRICES)) -> None:
    """Drop lines of later steps than `step`: a run that resumes from a checkpoint takes them again."""
    for path in (Path(folder, name) for name in files):
        if path.is_file():
            lines = [json.dumps(finite(e)) for e in _read_lines(path) if e.get("step", 0) <= step]
            write_text(path, "".join(f"{line}\n" for line in lines))


def finite(value: Any) -> Any:
    """`value` with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nan(value: Any) -> Any:
    """The inverse of `finite`."""
    if isinstance(value, dict):
        return {key: _nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_nan(entry) for entry in value]
    return math.nan if value is None else value


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if there is none.

    Raises:
        ValueError: it is damaged, or cannot be read.
    """
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = read_bytes(path).decode("utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = _nan(json.loads(line))
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise ValueError("it says nothing of a step")
            entries.append(entry)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {str(path)!r} is damaged: {error}") from None
    return entries
