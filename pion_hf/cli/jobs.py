"""Running the trials of a comparison as processes: once each, several at a time, and none left behind.

Every run has its folder, which is its `output_dir`: beside what training leaves there (see `pion_hf.runs`) it holds the
run's own `recipe.yaml`, its output in `train.log`, and `trial.json`, which says with which arguments it runs or ran and
how that ended. A run is over when `trial.json` says finished; anything else there is cleared away and begun again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock, Timeout
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pion_hf.cli import child
from pion_hf.cli.grid import Trial, write_recipe
from pion_hf.files import is_part
from pion_hf.redaction import without_secrets
from pion_hf.runs import (
    AMOUNT,
    EVALUATION,
    FAILED,
    FINISHED,
    RUNNING,
    SPECTRA,
    STATUS,
    TEXT,
    check_fields,
    read_json,
    write_json,
)

TRIAL, RECIPE, OUTPUT, LOCK = "trial.json", "recipe.yaml", "train.log", ".lock"
FORMAT = 1  # of trial.json
TRIAL_FIELDS = {"status": STATUS, "seconds": AMOUNT, "error": TEXT, "arguments": {}}  # see `check_fields`
POLL = 0.2  # seconds
TAIL = 16384  # bytes of a log, among which its last line is


@dataclass
class Job:
    """A process and what it is for. started: of `time.perf_counter`."""

    trial: Trial
    folder: Path
    process: subprocess.Popen
    log: IO[bytes]
    started: float


def read_trial(folder: Path) -> dict[str, Any] | None:
    """What `trial.json` of a run's folder says; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    said = read_json(folder / TRIAL)
    if said is not None:
        check_fields(f"{str(folder)!r} is damaged: {TRIAL}", said, TRIAL_FIELDS)
        if said.get("status") is None:
            raise ValueError(f"{str(folder)!r} is damaged: {TRIAL} holds no status")
    return said


def is_finished(folder: Path) -> bool:
    """Whether a run is over and has been measured."""
    said = read_trial(folder)
    return said is not None and said.get("status") == FINISHED and (folder / EVALUATION).is_file()


def check_folder(trial: Trial, folder: Path) -> None:
    """Raise ValueError for a folder that holds something else than this run."""
    said = read_trial(folder) if folder.is_dir() else None
    if said is not None:
        known, wanted = without_secrets(said.get("arguments") or {}), without_secrets(trial.arguments)
        differing = [key for key in {**known, **wanted} if known.get(key) != wanted.get(key)]
        if differing:
            raise ValueError(
                f"{str(folder)!r} holds a run with another {', '.join(sorted(differing))}: remove it, or choose "
                "another --output_dir"
            )
    elif folder.exists() and (not folder.is_dir() or not all(is_part(p) for p in folder.iterdir())):
        raise ValueError(f"{str(folder)!r} is in the way and no run of a comparison: choose another --output_dir")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder for the runs of one comparison; the lock ends with the process.

    Raises:
        ValueError: another comparison is at work there, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / LOCK).is_symlink():
            (folder / LOCK).unlink()
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another comparison is at work in {str(folder)!r}: let it end, or end it") from None
    except OSError as error:
        raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another --output_dir") from None
    try:
        yield
    finally:
        lock.release()


def run_all(
    trials: list[Trial],
    output_dir: Path,
    *,
    slots: int,
    keep_models: bool,
    started: Callable[[Trial], None],
    ended: Callable[[Trial], None],
) -> None:
    """Run every trial that is not finished, `slots` at once; those that fail do not stop the others.

    Whatever ends this, an interrupt too, ends the processes.
    """
    waiting = deque(t for t in trials if not is_finished(output_dir / t.folder))
    running: dict[int, Job] = {}
    try:
        while waiting or running:
            for slot in set(range(slots)) - running.keys():
                if waiting:
                    trial = waiting.popleft()
                    running[slot] = start(trial, output_dir / trial.folder, slot, slots)
                    started(trial)
            time.sleep(POLL)
            for slot, job in list(running.items()):
                if job.process.poll() is not None:
                    settle(running.pop(slot), keep_models=keep_models)
                    ended(job.trial)
    finally:
        for job in running.values():
            stop(job)


def start(trial: Trial, folder: Path, slot: int, slots: int) -> Job:
    """Begin a run in its folder, which is cleared of what an earlier attempt left."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / TRIAL, _said(trial, RUNNING))
    for left in folder.iterdir():
        if left.name != TRIAL:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    secrets = write_recipe(folder / RECIPE, trial, folder)
    log = (folder / OUTPUT).open("xb")
    process = subprocess.Popen(
        [sys.executable, child.__file__, trial.command, "--config", str(folder / RECIPE)],
        stdin=subprocess.PIPE,  # its end tells the child that this process is gone
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **_share_of_machine(slot, slots), **secrets},
        start_new_session=True,  # a group of its own, to be ended as one
    )
    return Job(trial, folder, process, log, time.perf_counter())


def settle(job: Job, *, keep_models: bool) -> None:
    """Write down how a run ended, and drop the weights it saved, which nothing needs any more."""
    stop(job)  # what it may have left running
    code = job.process.returncode
    seconds = time.perf_counter() - job.started
    if code == 0 and (job.folder / EVALUATION).is_file():
        if not keep_models:
            for path in job.folder.glob("*.safetensors"):
                if path.name != SPECTRA:
                    path.unlink()
            for checkpoint in job.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                shutil.rmtree(checkpoint)
        write_json(job.folder / TRIAL, _said(job.trial, FINISHED, seconds=seconds))
    else:
        error = _last_line(job.folder / OUTPUT) or f"ended with code {code}"
        write_json(job.folder / TRIAL, _said(job.trial, FAILED, seconds=seconds, code=code, error=error))


def stop(job: Job) -> None:
    """End a run's processes, if any are left."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(job.process.pid, signal.SIGKILL)
    else:
        job.process.kill()
    job.process.wait()
    job.process.stdin.close()
    job.log.close()


def _said(trial: Trial, status: str, **more: Any) -> dict[str, Any]:
    said = {"format": FORMAT, "status": status, "contender": trial.contender, **more, "arguments": trial.arguments}
    return without_secrets(said)


def _share_of_machine(slot: int, slots: int) -> dict[str, str]:
    """A GPU of its own, or its part of the cores."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = [gpu for gpu in gpus if gpu] or [str(i) for i in range(torch.cuda.device_count())]
    if torch.cuda.is_available() and gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    if slots == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // slots))}


def _last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
