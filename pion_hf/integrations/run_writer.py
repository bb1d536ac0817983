"""Writes the folder that `pion_hf.runs.folder` reads, as training goes."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import platform
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.data_loader import IterableDatasetShard
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers.utils import logging

from pion_hf._version import __version__
from pion_hf.routing.structure import parameter_count
from pion_hf.runs.files import new_file, read_bytes
from pion_hf.runs.folder import (
    BEFORE,
    EVALUATION,
    FORMAT,
    LOG,
    MATRICES,
    RECORD,
    RECORD_FIELDS,
    ROUTING,
    RUNNING,
    SPECTRA,
    append_line,
    check_fields,
    keep_until,
    read_json,
    set_aside,
    write_json,
)
from pion_hf.runs.redaction import is_secret, without_secrets

logger = logging.get_logger(__name__)


@contextlib.contextmanager
def recording(what: str, then: str = "training goes on without it") -> Iterator[None]:
    """Around everything that only tells of a run: what fails there costs the record that part, and nothing else."""
    try:
        yield
    except Exception as error:
        said = str(error) if isinstance(error, OSError) else repr(error)
        logger.warning(f"{what} cannot be written to ({said}): {then}.")


def _guarded(method: Callable) -> Callable:
    """A folder that cannot be written to is left alone from then on."""

    @wraps(method)
    def guarded(self: RunFolder, *args: Any) -> None:
        if self.open:
            self.open = False
            with recording(repr(str(self.path)), "this run is recorded no further"):
                method(self, *args)
                self.open = True

    return guarded


class RunFolder:
    """A run's files. `record` is what `run.json` holds; what is changed in it is written by `write_record`."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.record: dict[str, Any] = {}
        self.earlier: dict[str, Any] = {}  # of the run that goes on
        self.open = True

    @_guarded
    def begin(self, record: dict[str, Any], step: int) -> None:
        """Start anew, or with `step` above 0 go on where a checkpoint of that step was saved."""
        fresh = {"format": FORMAT, "status": RUNNING, "started": datetime.now(UTC).isoformat("T", "seconds")}
        earlier = self._earlier(record) if step else None
        if earlier is None:
            for name in (LOG, MATRICES, SPECTRA, BEFORE, EVALUATION):
                with recording(repr(str(self.path / name))):
                    (self.path / name).unlink(missing_ok=True)
        else:
            fresh["started"] = earlier.get("started", fresh["started"])
            keep_until(self.path, step)
        self.earlier = {key: value for key, value in (earlier or {}).items() if key not in ("status", "error")}
        self.record = fresh | record | {"steps": step}
        write_json(self.path / RECORD, self.record)

    def _earlier(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """The record of the run that goes on, as far as it can be read; None if it is of other matrices."""
        try:
            earlier = read_json(self.path / RECORD)
            earlier = {} if earlier is None else earlier
            check_fields(f"{RECORD} ", earlier, RECORD_FIELDS)
        except ValueError as error:
            set_aside(self.path / RECORD, error)
            return {}
        names = [matrix["name"] for matrix in record["matrices"]]
        return earlier if names == [m.get("name") for m in earlier.get("matrices") or record["matrices"]] else None

    @_guarded
    def write_record(self) -> None:
        write_json(self.path / RECORD, self.record)

    @_guarded
    def log(self, entry: dict[str, Any]) -> None:
        append_line(self.path / LOG, {key: _json_value(value) for key, value in entry.items()})

    @_guarded
    def snapshot(self, step: int, values: dict[str, list[float | None]]) -> None:
        append_line(self.path / MATRICES, {"step": step, "values": values})

    def has_snapshots(self) -> bool:
        return (self.path / MATRICES).is_file() and (self.path / MATRICES).stat().st_size > 0

    def spectra_before(self) -> dict[str, Tensor]:
        """Those of a run that goes on."""
        path = self.path / SPECTRA
        try:
            found = load(read_bytes(path)) if path.is_file() else {}
        except (OSError, SafetensorError) as error:
            set_aside(path, f"{error}; drift counts from here")
            return {}
        return {key.removeprefix("before/"): value for key, value in found.items() if key.startswith("before/")}

    @_guarded
    def write_spectra(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        named = {f"{when}/{name}": v for when, of in (("before", before), ("after", after)) for name, v in of.items()}
        with new_file(self.path / SPECTRA) as file:
            file.write(save({name: v.float().contiguous() for name, v in named.items()}))


def correct_routing(folder: str | os.PathLike, learning_rates: dict[str, float]) -> None:
    """Write into `routing.json` which learning rates are used, by rule."""
    path = Path(folder, ROUTING)
    with recording(str(path)):
        if routing := read_json(path):
            for row in routing["summary"]:
                row["lr"] = learning_rates.get(row["rule"], row["lr"])
            write_json(path, routing)


def describe_model(model: nn.Module) -> dict[str, Any]:
    counts = [(parameter_count(p), p.requires_grad) for p in model.parameters()]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "name": getattr(getattr(inner, "config", None), "_name_or_path", "") or type(inner).__name__,
        "class": type(inner).__name__,
        "parameters": sum(n for n, _ in counts),
        "trainable": sum(n for n, trained in counts if trained),
    }


def describe_data(loader: Any) -> str | None:
    """A data set's own name, if it has one, and its number of rows."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return None
    if isinstance(dataset, IterableDatasetShard):
        dataset = dataset.dataset
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None) or type(dataset).__name__
    try:
        return f"{name}, {len(dataset):,} rows"
    except TypeError:  # of a stream, whose wrappers may have a length that fails
        return str(name)


def describe_arguments(args: transformers.TrainingArguments) -> dict[str, Any]:
    """The arguments that differ from their class's defaults, as JSON; without tokens, which are secrets."""
    found = {}
    for field in dataclasses.fields(args):
        value, default = getattr(args, field.name), field.default
        if is_secret(field.name) or dataclasses.is_dataclass(value):  # the latter are made of other fields
            continue
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value, default = _json_value(without_secrets(value)), _json_value(default)
        if value != default and not (_is_unset(value) and _is_unset(default)):
            found[field.name] = value
    return found


def _is_unset(value: Any) -> bool:
    """TrainingArguments put one of these for another."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def versions() -> dict[str, str]:
    """Of this package, Python and the libraries in use."""
    used = (name for name in ("torch", "transformers", "accelerate", "trl", "peft", "datasets") if name in sys.modules)
    return {"pion_hf": __version__, "python": platform.python_version()} | {
        name: str(getattr(sys.modules[name], "__version__", "")) for name in used
    }


def describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: allocated on a GPU, else the process's largest resident set; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _json_value(value: Any) -> Any:
    """`value` as JSON knows it: numbers of other libraries as numbers, what it has no form for as text."""
    if isinstance(value, enum.Enum):
        return _json_value(value.value)
    if isinstance(value, dict):
        return {str(key): _json_value(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_json_value(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    return str(value)
