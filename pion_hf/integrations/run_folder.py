"""Writes the folder that `pion_hf.runs` reads, as training goes."""

from __future__ import annotations

import dataclasses
import enum
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.data_loader import IterableDatasetShard
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers.utils import logging

from pion_hf._version import __version__
from pion_hf.files import new_file, read_bytes
from pion_hf.redaction import is_secret, without_secrets
from pion_hf.runs import (
    BEFORE,
    EVALUATION,
    FORMAT,
    LOG,
    MATRICES,
    RECORD,
    RUNNING,
    SPECTRA,
    append_line,
    keep_until,
    read_run,
    write_json,
)
from pion_hf.structure import parameter_count

logger = logging.get_logger(__name__)


def _warns(method: Callable) -> Callable:
    """A folder that cannot be written to costs the record, not the training."""

    @wraps(method)
    def guarded(self: RunFolder, *args: Any) -> Any:
        if not self.open:
            return None
        try:
            return method(self, *args)
        except OSError as error:
            self.open = False
            logger.warning(f"{str(self.path)!r} cannot be written to ({error}): this run is recorded no further.")
            return None

    return guarded


class RunFolder:
    """A run's files. `record` is what `run.json` holds; what is changed in it is written by `write_record`."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.record: dict[str, Any] = {}
        self.open = True

    @_warns
    def begin(self, record: dict[str, Any], step: int) -> None:
        """Start anew, or with `step` above 0 go on where a checkpoint of that step was saved."""
        self.record = {"format": FORMAT, "status": RUNNING, "started": datetime.now(UTC).isoformat("T", "seconds")}
        earlier = self._earlier(record) if step else None
        if earlier:
            self.record["started"] = earlier.get("started", self.record["started"])
            keep_until(self.path, step)
        else:
            for name in (LOG, MATRICES, SPECTRA, BEFORE, EVALUATION):
                (self.path / name).unlink(missing_ok=True)
        self.record |= record | {"steps": step}
        write_json(self.path / RECORD, self.record)

    def _earlier(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """The record of the run that goes on, if it is of the same matrices."""
        try:
            earlier = read_run(self.path).record
        except (OSError, ValueError):
            return None
        same = [m["name"] for m in earlier.get("matrices", [])] == [m["name"] for m in record["matrices"]]
        return earlier if same else None

    @_warns
    def write_record(self) -> None:
        write_json(self.path / RECORD, self.record)

    @_warns
    def log(self, entry: dict[str, Any]) -> None:
        append_line(self.path / LOG, {key: _json_value(value) for key, value in entry.items()})

    @_warns
    def snapshot(self, step: int, values: dict[str, list[float | None]]) -> None:
        append_line(self.path / MATRICES, {"step": step, "values": values})

    def has_snapshots(self) -> bool:
        return (self.path / MATRICES).is_file() and (self.path / MATRICES).stat().st_size > 0

    def spectra_before(self) -> dict[str, Tensor]:
        """Those of a run that goes on."""
        if not (self.path / SPECTRA).is_file():
            return {}
        found = load(read_bytes(self.path / SPECTRA))
        return {key.removeprefix("before/"): value for key, value in found.items() if key.startswith("before/")}

    @_warns
    def write_spectra(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        named = {f"{when}/{name}": v for when, of in (("before", before), ("after", after)) for name, v in of.items()}
        with new_file(self.path / SPECTRA) as file:
            file.write(save({name: v.float().contiguous() for name, v in named.items()}))


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
