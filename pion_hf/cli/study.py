"""Running the trials of a comparison: an Optuna study, which any number of processes on one file system work through.

It lies in a journal in the comparison's folder, or in a database, and has a trial for every run of the grid. A run is
a process with a folder of its own, which is its `output_dir`; it is over when its `eval.json` is there, and is then not
repeated, whatever a study says. Who runs a trial holds a lock in its folder, which the system frees with the process:
then another goes on with the trial. (Optuna's heartbeats are for databases alone, and take minutes.)
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pion_hf.cli.grid import Trial, write_recipe
from pion_hf.cli.standings import OUTPUT, RECIPE, is_finished
from pion_hf.errors import first_line
from pion_hf.integrations.checkpoints import last_complete_checkpoint
from pion_hf.needs import needed
from pion_hf.runs.files import is_part
from pion_hf.runs.folder import SPECTRA, read_evaluation
from pion_hf.runs.redaction import without_secrets

with needed("optuna"):
    import optuna
    from optuna.distributions import CategoricalDistribution
    from optuna.storages import JournalStorage, RetryHeartbeatStaleTrialCallback
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState, create_trial
    from sqlalchemy.exc import SQLAlchemyError

WAITING, RUNNING, FAIL = TrialState.WAITING, TrialState.RUNNING, TrialState.FAIL
JOURNAL, LOCK = "study.journal", ".lock"
AXES = ("contender", "learning_rate", "seed")  # of the grid: what a trial's parameters are
PATIENCE = 60  # seconds, for a lock that is held for moments
POLL = 0.5  # seconds
# What Optuna raises for a journal that is damaged, or a database that cannot be used.
UNUSABLE = (ImportError, SQLAlchemyError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
# The process of a run. Its stdin is a pipe that only the process which started it holds open: when that is gone, by
# SIGKILL too, this one and all it started end at once. It watches before its imports, which take seconds.
CHILD = f"""
import os, sys, threading
end = lambda: (os.read(0, 1), os.killpg(0, 9) if hasattr(os, "killpg") else os._exit(1))
threading.Thread(target=end, daemon=True).start()
sys.path.append({str(Path(__file__).parents[2])!r})
from pion_hf.cli import main
main()
"""


@dataclass
class Job:
    """A trial that is this process's to run; died: whether another one began it."""

    number: int
    trial: Trial
    folder: Path
    lock: FileLock
    died: bool
    process: subprocess.Popen | None = None


def run_all(
    grid: list[Trial], output_dir: Path, storage: str | None, *, slots: int, keep_models: bool
) -> Iterator[tuple[list[Trial], Trial | None]]:
    """Run every trial that is not finished, `slots` at once, until none is left, nor with another process.

    Yields what runs, and what ended, whenever that changes. Runs that fail do not stop the others. Whatever ends this,
    an interrupt too, ends the processes.
    """
    study = open_study(grid, output_dir, storage)
    trials = {trial.folder: trial for trial in grid}
    running: dict[int, Job] = {}
    try:
        while study.get_trials(deepcopy=False, states=(WAITING, RUNNING)):
            for slot in set(range(slots)) - running.keys():
                while (job := _take(study, trials, output_dir)) and is_finished(job.folder):
                    # By the process that died, or by another comparison, whose weights are not ours to drop.
                    settle(study, job, keep_models=keep_models or not job.died)
                if job:
                    running[slot] = job
                    start(job, slot, slots)
                    yield [job.trial for job in running.values()], None
            time.sleep(POLL)
            for slot, job in list(running.items()):
                if job.process.poll() is not None:
                    settle(study, running.pop(slot), keep_models=keep_models)
                    yield [job.trial for job in running.values()], job.trial
    finally:
        for job in running.values():
            stop(job)


def open_study(grid: list[Trial], output_dir: Path, storage: str | None) -> optuna.Study:
    """The study of these runs, with a trial for each, and again one for what failed or was removed since."""
    axes = {axis: CategoricalDistribution(sorted({getattr(trial, axis) for trial in grid})) for axis in AXES}
    with _locked(output_dir), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        retry = RetryHeartbeatStaleTrialCallback()
        study = _study(grid, output_dir, storage)
        last = {found.user_attrs["folder"]: found for found in study.get_trials()}
        for trial in grid:
            found = last.get(trial.folder)
            if found is None:
                params, attrs = {axis: getattr(trial, axis) for axis in AXES}, {"folder": trial.folder}
                study.add_trial(create_trial(state=WAITING, params=params, distributions=axes, user_attrs=attrs))
            elif found.state.is_finished() and not is_finished(output_dir / trial.folder):
                retry(study, found)
    return study


def states(grid: list[Trial], output_dir: Path, storage: str | None) -> dict[str, str]:
    """How far the runs of a study came, by their folders and in Optuna's words; of no study, nothing."""
    if storage is None and not os.path.lexists(output_dir / JOURNAL):
        return {}
    return {found.user_attrs["folder"]: found.state.name for found in _study(grid, output_dir, storage).get_trials()}


def start(job: Job, slot: int, slots: int) -> None:
    """Begin a run in its folder, which is cleared; of a process that died, go on from its last checkpoint."""
    trial, goes_on = job.trial, job.died and last_complete_checkpoint(job.folder) is not None
    if goes_on:
        trial = replace(trial, recipe={**trial.recipe, "resume_from_checkpoint": True})
    for left in job.folder.iterdir():
        if left.name == OUTPUT or not (goes_on or left.name == LOCK):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    secrets = write_recipe(job.folder / RECIPE, trial, job.folder)
    with (job.folder / OUTPUT).open("xb") as log:
        job.process = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD, trial.command, "--config", str(job.folder / RECIPE)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_share_of_machine(slot, slots), **secrets},
            start_new_session=True,  # a group of its own, to be ended as one
        )


def settle(study: optuna.Study, job: Job, *, keep_models: bool) -> None:
    """Tell the study how a run ended, and drop the weights it saved, which nothing needs any more."""
    stop(job)  # what it may have left running
    value = None
    if is_finished(job.folder):
        for path in () if keep_models else job.folder.glob("*.safetensors"):
            if path.name != SPECTRA:
                path.unlink()
        for checkpoint in () if keep_models else job.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(checkpoint)
        learnt = (read_evaluation(job.folder) or {}).get("learnt")
        value = -math.inf if learnt is None else learnt
    with _locked(job.folder.parent):
        study.tell(job.number, value, state=FAIL if value is None else TrialState.COMPLETE)
        job.lock.release()


def stop(job: Job) -> None:
    """End a run's processes, if any are left."""
    if job.process is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(job.process.pid, signal.SIGKILL) if hasattr(os, "killpg") else job.process.kill()
        job.process.wait()
        job.process.stdin.close()


def check_folder(folder: Path) -> None:
    """Raise ValueError for a folder that holds something else than a run."""
    if not folder.exists() or (folder / RECIPE).is_file():
        return
    if not folder.is_dir() or not all(is_part(path) or path.name == LOCK for path in folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is in the way and no run of a comparison: choose another --output_dir")


def _take(study: optuna.Study, trials: dict[str, Trial], output_dir: Path) -> Job | None:
    """A trial that nobody runs: of a process that died, under its number, or else the first that waits."""
    with _locked(output_dir):
        for state in (RUNNING, WAITING):
            for found in study.get_trials(deepcopy=False, states=(state,)):
                died, folder = state == RUNNING, output_dir / found.user_attrs["folder"]
                lock = _lock(folder / LOCK)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    if died:
                        continue
                    return None  # another comparison runs the same: what waits is asked for in its order
                if not died:
                    study.ask()
                return Job(found.number, trials[folder.name], folder, lock, died)
    return None


def _study(grid: list[Trial], output_dir: Path, storage: str | None) -> optuna.Study:
    """One of its own for other runs, and for another folder where a database holds many; made if need be."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    digest = hashlib.sha256("\n".join(sorted(trial.folder for trial in grid)).encode()).hexdigest()[:8]
    name, path = f"{'compare' if storage is None else output_dir.resolve()} {digest}", output_dir / JOURNAL
    try:
        kept = storage
        if storage is None:
            if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
                raise ValueError("it is no regular file")
            kept = JournalStorage(JournalFileBackend(str(path), _lock(path.with_name(f"{JOURNAL}.lock"))))
        return optuna.create_study(study_name=name, storage=kept, direction="maximize", load_if_exists=True)
    except UNUSABLE as error:
        what, way_out = f"--storage {without_secrets(storage)}", ""
        if storage is None:
            what, way_out = f"{str(path)!r} is damaged", "; remove it: what is finished stays so"
        raise ValueError(f"{what}: {without_secrets(first_line(error))}{way_out}") from None


def _lock(path: Path) -> FileLock:
    """Freed by the system with its process, as Optuna's own are not; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
    return FileLock(path)


def _locked(folder: Path) -> contextlib.AbstractContextManager:
    """Holds a comparison for a moment, in which nobody else makes, takes or ends a trial of it."""
    try:
        return _lock(folder / LOCK).acquire(timeout=PATIENCE)
    except OSError as error:
        why = "another comparison holds it" if isinstance(error, Timeout) else error.strerror
        raise ValueError(f"cannot write to {str(folder)!r}: {why}; choose another --output_dir") from None


def _share_of_machine(slot: int, slots: int) -> dict[str, str]:
    """A GPU of its own, or its part of the cores."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = [gpu for gpu in gpus if gpu] or [str(i) for i in range(torch.cuda.device_count())]
    if torch.cuda.is_available() and gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    if slots == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // slots))}
