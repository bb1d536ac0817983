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

import itertools
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pion_hf.runs.files import append_text, read_bytes, write_text

RECORD, LOG, MATRICES, SPECTRA = "run.json", "log.jsonl", "matrices.jsonl", "spectra.safetensors"
ROUTING, EVALUATION = "routing.json", "eval.json"
BEFORE = "before.json"  # measured when training began, for a run that goes on
FORMAT = 1  # of run.json
MOST_DIGITS = 18  # of a whole number; with more it is read as one that need not be whole
LONGEST_SHOWN = 40  # of what is wrong, in an error
RUNNING, FINISHED, FAILED = "running", "finished", "failed"


class Kind(NamedTuple):
    """What a field holds: in words, and whether a value is that."""

    words: str
    holds: Callable[[Any], bool]


TEXT = Kind("text", lambda v: isinstance(v, str))
FIELDS = Kind("fields", lambda v: isinstance(v, dict))
LIST = Kind("a list", lambda v: isinstance(v, list))
NUMBER = Kind("a number", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool))
AMOUNT = Kind("a number of at least 0", lambda v: NUMBER.holds(v) and not v < 0)
COUNT = Kind("a whole number of at least 0", lambda v: type(v) is int and v >= 0)
SHAPE = Kind("a shape", lambda v: isinstance(v, list) and v != [] and all(map(COUNT.holds, v)))
STATUS = Kind("text that says running, finished or failed", lambda v: v in (RUNNING, FINISHED, FAILED))
# What fields hold, where they are there (`check_fields`): a kind, fields of their own, or a list of what follows. Those
# that are not named hold what `...` says, if that is there.
RECORD_FIELDS = {
    "status": STATUS,
    **dict.fromkeys(("started", "device", "error"), TEXT),
    **dict.fromkeys(("seconds", "peak_memory_bytes", "spectrum_drift", "optimizer_share"), AMOUNT),
    **dict.fromkeys(("steps", "skipped_steps", "clipped_steps"), COUNT),
    "model": {"name": TEXT, "class": TEXT, "parameters": COUNT, "trainable": COUNT},
    "data": {...: TEXT},
    "optimizer": {
        **{"name": TEXT, "learning_rate": NUMBER, "schedule": TEXT, "options": {}},
        "rules": [
            {
                **{"rule": TEXT, "method": TEXT, "learning_rate": NUMBER, "weight_decay": NUMBER},
                **dict.fromkeys(("tensors", "matrices", "stacks", "parameters"), COUNT),
            }
        ],
    },
    "arguments": {},
    "times": {...: AMOUNT},
    "versions": {},
    "matrices": [{"name": TEXT, "role": TEXT, "layer": COUNT, "rule": TEXT, "shape": SHAPE}],
}
MEASURES = {...: {...: NUMBER}}  # by domain and metric
EVALUATION_FIELDS = {
    **{"before": MEASURES, "after": MEASURES, "learnt": NUMBER, "forgotten": {...: NUMBER}},
    **{"blend": NUMBER, "blends": [{"share": NUMBER, **MEASURES}]},
    **dict.fromkeys(("spectrum_drift", "optimizer_share"), AMOUNT),
}
LINE_FIELDS = {"step": COUNT}
SNAPSHOT_FIELDS = {**LINE_FIELDS, "values": {...: [NUMBER]}}

logger = logging.getLogger(__name__)


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

    @property
    def learnt(self) -> float | None:
        """How far the loss of the task fell, or its reward rose; None if that is not known, or not finite."""
        return finite((self.evaluation or {}).get("learnt"))

    @property
    def forgotten(self) -> dict[str, float | None]:
        """How far the loss of other domains rose; None where it is not finite."""
        return finite((self.evaluation or {}).get("forgotten") or {})

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a quantity of the logs."""
        found = [(entry["step"], entry[key]) for entry in self.logs if key in entry]
        for step, value in found:
            check_fields(f"{str(self.folder / LOG)!r} is damaged: step {step}: {key}", value, NUMBER)
        return [step for step, _ in found], [float(value) for _, value in found]

    def history(self, quantity: str) -> tuple[list[int], list[list[float]]]:
        """Steps of the snapshots that have a quantity, and its values in the order of the matrices."""
        found = [(taken.step, taken.values[quantity]) for taken in self.snapshots if quantity in taken.values]
        for step, values in found:
            if len(values) != len(self.matrices):
                raise ValueError(
                    f"{str(self.folder / MATRICES)!r} is damaged: step {step}: {quantity} holds {len(values)} values, "
                    f"{RECORD} {len(self.matrices)} matrices."
                )
        return [step for step, _ in found], [values for _, values in found]

    @cached_property
    def spectra(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Singular values before and after, `(E, k)`, of every matrix whose both are known; none if unreadable."""
        try:
            return read_spectra(self.folder)
        except (OSError, ValueError):
            return {}


def read_run(folder: str | os.PathLike) -> Run:
    """Read a run's folder; a last line that was cut off is left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no run's, or a file is damaged or cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}.")
    record = read_json(folder / RECORD)
    if record is None:
        raise ValueError(
            f"{str(folder)!r} is no run: it holds no {RECORD}, which training with this package's Trainers "
            "and commands, or with pion_hf.watch(trainer), writes when it begins."
        )
    if not isinstance(record, dict) or type(record.get("format")) is not int or record["format"] != FORMAT:
        raise ValueError(f"{str(folder / RECORD)!r} is not of format {FORMAT}, which this version reads.")
    check_fields(f"{str(folder / RECORD)!r} is damaged: ", record, RECORD_FIELDS)
    snapshots = _read_lines(folder / MATRICES, SNAPSHOT_FIELDS)
    return Run(
        folder=folder,
        record=record,
        logs=_read_lines(folder / LOG),
        snapshots=[Snapshot(line["step"], line.get("values") or {}) for line in snapshots],
        evaluation=read_evaluation(folder),
        routing=read_json(folder / ROUTING),
    )


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """What `eval.json` of a run's folder says; None if there is none.

    Raises:
        ValueError: it is damaged, or cannot be read.
    """
    evaluation = read_json(folder / EVALUATION)
    if evaluation is not None:
        check_fields(f"{str(folder)!r} is damaged: {EVALUATION}", evaluation, EVALUATION_FIELDS)
        if evaluation.keys().isdisjoint(EVALUATION_FIELDS):
            raise ValueError(f"{str(folder)!r} is damaged: {EVALUATION} says nothing of before and after training")
    return evaluation


def read_spectra(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Singular values before and after, `(E, k)`, of every matrix whose both are known.

    Raises:
        OSError: there are none, or they cannot be read. ValueError: they are damaged.
    """
    try:
        tensors = load(read_bytes(folder / SPECTRA))
    except SafetensorError as error:
        raise ValueError(f"{SPECTRA} is damaged: {error}") from None
    names = [key.removeprefix("after/") for key in tensors if key.startswith("after/")]
    pairs = {n: (tensors[f"before/{n}"], tensors[f"after/{n}"]) for n in names if f"before/{n}" in tensors}
    for name, (before, after) in pairs.items():
        if before.shape != after.shape or before.ndim not in (1, 2) or not before.numel() or before.is_complex():
            raise ValueError(f"{SPECTRA} is damaged: {name} is {[*before.shape]} before, {[*after.shape]} after")
    return {name: (before.double(), after.double()) for name, (before, after) in pairs.items()}


def check_fields(where: str, value: Any, wanted: Any) -> None:
    """Raise ValueError, which begins with `where`, for what is not of the kinds `wanted` (see `RECORD_FIELDS`)."""
    kind = {dict: FIELDS, list: LIST}.get(type(wanted), wanted)
    if not kind.holds(value):
        raise ValueError(f"{where} holds {str(value)[:LONGEST_SHOWN]!r}, which is not {kind.words}.")
    if kind is FIELDS:
        for key, entry in value.items():
            inner = wanted.get(key, wanted.get(...))
            left_out = entry is None and (key in wanted or not isinstance(inner, (dict, list)))
            if inner is not None and not left_out:
                between = ": " if where and not where.endswith(" ") else ""
                check_fields(f"{where}{between}{key}", entry, inner)
    elif kind is LIST:
        for entry in value:
            if entry is not None or wanted[0] is not NUMBER:
                check_fields(where, entry, wanted[0])


def write_json(path: str | os.PathLike, record: Any) -> None:
    """Write JSON, whole or not at all; its folder is made if need be."""
    write_text(path, json.dumps(finite(record), indent=1, allow_nan=False) + "\n")


def append_line(path: str | os.PathLike, entry: dict[str, Any]) -> None:
    """Append an entry to a file of JSON lines."""
    append_text(path, json.dumps(finite(entry), allow_nan=False) + "\n")


def keep_until(folder: str | os.PathLike, step: int) -> None:
    """Drop lines of later steps than `step`: a run that resumes from a checkpoint takes them again.

    A damaged file is set aside, and what can be read of it goes on.
    """
    for name, fields in {LOG: LINE_FIELDS, MATRICES: SNAPSHOT_FIELDS}.items():
        path = Path(folder, name)
        if path.is_file():
            try:
                entries = _read_lines(path, fields)
            except ValueError as error:
                entries = _read_lines(set_aside(path, error), fields, skip=True)
            lines = [json.dumps(finite(e)) for e in entries if e["step"] <= step]
            write_text(path, "".join(f"{line}\n" for line in lines))


def set_aside(path: Path, why: object) -> Path:
    """Give a damaged file of a run another name, under which it stays; one line says so."""
    names = (path.with_name(f"_damaged-{i}-{path.name}") for i in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    os.rename(path, aside)
    logger.warning("%s is damaged and kept as %s: %s", path, aside.name, why)
    return aside


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
    """What a JSON file holds; None if there is none, ValueError if it cannot be read."""
    text = _read(path)
    try:
        found = None if text is None else _parse(text)
    except ValueError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from None
    if text is not None and found is None:
        raise ValueError(f"cannot read {str(path)!r}: it holds null")
    return found


def _read(path: Path, errors: str = "strict") -> str | None:
    """The text of a file; None if there is none, ValueError if it cannot be read."""
    try:
        return read_bytes(path).decode("utf-8", errors)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', error)}") from None


def _parse(text: str) -> Any:
    """JSON of which no number is too large to reckon with."""
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < MOST_DIGITS else float(digits))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _read_lines(path: Path, fields: dict[str, Any] = LINE_FIELDS, *, skip: bool = False) -> list[dict[str, Any]]:
    """Entries of JSON lines, the last of which may have been cut off. skip: those that cannot be read, too."""
    *lines, last = (_read(path, "replace" if skip else "strict") or "").split("\n")
    if last:
        try:
            _parse(last)
            lines.append(last)
        except ValueError:
            logger.warning("the last line of %s was cut off, and is left out", path)
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = _nan(_parse(line))
            if not isinstance(entry, dict) or type(entry.get("step")) is not int:
                raise ValueError("it says nothing of a step")
            check_fields("", entry, fields)
            entries.append(entry)
        except ValueError as error:
            if not skip:
                raise ValueError(f"line {number} of {str(path)!r} is damaged: {error}") from None
    return entries
