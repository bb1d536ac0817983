"""Checkpoints that a run can be resumed from: which are whole, what a failed save leaves, what loading must keep.

The Trainer writes into a checkpoint's own folder, file by file, `trainer_state.json` at the end. One that was killed
while it saved leaves a folder that transformers takes for the last checkpoint all the same. What was written is
remembered in a manifest (see `manifest`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType
from transformers.utils import logging

from pion_hf.errors import listing
from pion_hf.integrations.manifest import MANIFEST, STATE_NAME, Damaged, fault_of, read_manifest, write_manifest
from pion_hf.integrations.optimizers import unwrap
from pion_hf.integrations.run_writer import correct_routing, recording
from pion_hf.optim.saved import plain_name

# Arguments that make a schedule, besides the length of the training.
SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")

LOCK = "_run.lock"  # never uploaded: transformers leaves out what begins with "_"
PATIENCE = 8  # seconds, for the workers of a run that was killed, which hold its lock until they notice

logger = logging.get_logger(__name__)


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was saved to its end and is still as it was, so far as that can be told."""
    return fault_of(checkpoint) is None


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete `checkpoint-<step>` with the most steps, None if there is none."""
    return next((str(folder) for folder in reversed(_checkpoints(output_dir)) if is_complete(folder)), None)


def resolve_resume(resume: str | bool | None, output_dir: str | os.PathLike) -> str | None:
    """The folder that `resume_from_checkpoint` means: the one it names, or with true the last complete checkpoint.

    Raises:
        ValueError: with true, no complete checkpoint; a folder that is not one.
        FileNotFoundError: there is no such folder.
    """
    if resume in (None, False):
        return None
    if resume is True or str(resume).lower() == "true":  # a word where it comes from a command line
        return _last_of(output_dir)
    if not os.path.isdir(resume):
        raise FileNotFoundError(f"resume_from_checkpoint: there is no folder {str(resume)!r}.")
    if fault := fault_of(resume):
        last = last_complete_checkpoint(output_dir)
        instead = f" The last complete checkpoint of output_dir is {last!r}." if last else ""
        raise ValueError(f"resume_from_checkpoint={str(resume)!r} is no complete checkpoint: it {fault}.{instead}")
    return str(resume)


def _last_of(output_dir: str | os.PathLike) -> str:
    """The last complete checkpoint; a line says which were passed over, and why."""
    passed_over = []
    for folder in reversed(_checkpoints(output_dir)):
        fault = fault_of(folder)
        if fault is None:
            if passed_over:
                logger.warning(
                    f"Resuming from {folder}, and steps after {_step(folder):,} are taken again: "
                    f"{'; '.join(passed_over)}."
                )
            return str(folder)
        passed_over.append(f"{folder.name} {fault}")
    why = f" ({'; '.join(passed_over)})" if passed_over else ""
    raise ValueError(
        f"resume_from_checkpoint=true: there is no complete checkpoint in {str(output_dir)!r}{why}: leave it out, "
        "and training starts from the beginning."
    )


class CheckpointMixin:
    """Mix into any Trainer: it goes on from complete checkpoints only, where they end and as they began, and leaves no
    others when a save fails. An output folder is one run's at a time.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args, **kwargs) -> Any:
        """As `Trainer.train`; `resume_from_checkpoint` as in `resolve_resume`.

        Raises:
            ValueError: another process trains into the same folder.
        """
        folder, given = self._get_output_dir(trial), self.args.resume_from_checkpoint
        lock = FileLock(Path(folder, LOCK))  # ends with the process
        try:
            self._of_first(lambda: _take(lock))
            checkpoint = self._of_first(lambda: resolve_resume(resume_from_checkpoint, folder))
            self.args.resume_from_checkpoint = checkpoint  # by which a resumed run is routed, whoever named it
            return self.train_from(checkpoint, trial, *args, **kwargs)
        finally:
            self.args.resume_from_checkpoint = given
            lock.release()

    def train_from(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        """`train` from the beginning, or from a complete checkpoint: one that has taken all steps is evaluated."""
        self._take_schedule_of(checkpoint)
        taken = None if checkpoint is None else steps_of(checkpoint)  # which may be gone by the end
        output = super().train(checkpoint, *args, **kwargs)
        if self.state.global_step == taken:
            logger.warning(f"{checkpoint} has taken all {self.state.global_step:,} steps: none was left to train.")
            if self.args.eval_strategy != "no":
                output.metrics.update(self.evaluate())
        return output

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """As the Trainer's; none where all steps are taken, of which the Trainer thinks only after one more.

        Before the first step the optimizer hears that processes have equal gradients, as under DDP.
        """
        if ours := unwrap(self.optimizer):
            ours.divides_work = isinstance(self.model_wrapped, DistributedDataParallel)
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _of_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns or raises on the first process, on all of them."""
        said = [None, None]
        if self.args.process_index == 0:
            try:
                said[0] = work()
            except (OSError, ValueError) as error:
                said[1] = error
        broadcast_object_list(said)
        if said[1] is not None:
            raise said[1]
        return said[0]

    # -- saving -----------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, and a manifest. A folder of that step from an earlier run is incomplete from here on.

        Raises:
            OSError: saving failed, with what torch and safetensors hide: where, and how much space was left.
        """
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            if self.args.should_save:
                if self.args.save_only_model:  # nothing else may be left of it
                    shutil.rmtree(folder, ignore_errors=True)
                _remove_pipes(folder)
                for name in (STATE_NAME, MANIFEST):
                    (folder / name).unlink(missing_ok=True)
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not self.args.should_save or is_complete(folder):
                raise
            free = shutil.disk_usage(folder.parent).free
            shutil.rmtree(folder, ignore_errors=True)
            last = last_complete_checkpoint(folder.parent)
            raise OSError(
                f"{folder} could not be saved, with {free / 1e6:,.1f} MB free there ({str(error).splitlines()[0]}). "
                + (f"The run can be resumed from {last}." if last else "There is no earlier checkpoint.")
            ) from error
        self.accelerator.wait_for_everyone()  # each process has saved its own files
        if self.args.should_save:
            with recording(f"{MANIFEST} of {folder.name}"):
                skipped = getattr(unwrap(self.optimizer), "skipped_steps", 0)
                write_manifest(folder, schedule=self._schedule(), skipped_steps=skipped)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the Trainer's, and what each process has of the optimizer's state where they divide the work."""
        if ours := unwrap(self.optimizer):
            ours.consolidate_state_dict(to=None if self.args.save_on_each_node else 0)
        super()._save_optimizer_and_scheduler(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As the Trainer's, under the names that weights have where nothing is compiled."""
        _remove_pipes(Path(output_dir or self.args.output_dir))
        if state_dict is None and any(name != plain_name(f"{name}.") for name, _ in self.model.named_modules()):
            state_dict = {plain_name(name): value for name, value in self.model.state_dict().items()}
        super()._save(output_dir, state_dict=state_dict)

    # -- loading ----------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the Trainer's, but adapters keep their dtype: peft loads half-precision ones as float32.

        Raises:
            ValueError: the weights are of other shapes, or some are missing.
        """
        target = _without_compiler(self.model if model is None else model)
        dtypes = {name: p.dtype for name, p in target.named_parameters()}
        try:
            with _by_plain_names(target, resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, target)
        except RuntimeError as error:
            which = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
            if which is None:
                raise
            raise ValueError(f"{resume_from_checkpoint} holds the weights of another model: {which}") from error
        for name, p in target.named_parameters():
            if p.dtype != dtypes.get(name, p.dtype):
                p.data = p.data.to(dtypes[name])

    def _load_best_model(self) -> None:
        """As the Trainer's, into a compiled model too."""
        compiled, self.model = self.model, _without_compiler(self.model)
        try:
            with _by_plain_names(self.model, self.state.best_model_checkpoint):
                super()._load_best_model()
        finally:
            self.model = compiled

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As the Trainer's, but not of tied weights, which are saved under one of their names.

        Raises:
            Damaged: weights that are trained are missing: what is in the model would go on as if it were theirs.
        """
        params = dict(_without_compiler(self.model).named_parameters(remove_duplicate=False))
        missing, found = set(load_result.missing_keys), {plain_name(name) for name in load_result.unexpected_keys}
        loaded = {id(p) for name, p in params.items() if name not in missing or plain_name(name) in found}
        alone = [name for name in load_result.missing_keys if name not in params or id(params[name]) not in loaded]
        if trained := [name for name in alone if name in params and params[name].requires_grad]:
            raise Damaged(f"is damaged (it holds no {listing(trained)})")
        if alone or load_result.unexpected_keys:
            super()._issue_warnings_after_load(load_result)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's; says which learning rates those of the checkpoint have taken the place of."""
        given = _rates(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        used = _rates(self.optimizer)
        differing = {name: (rate, given[name]) for name, rate in used.items() if rate != given.get(name, rate)}
        if differing:
            self._say_rates(differing, used)
        manifest, ours = read_manifest(checkpoint), unwrap(self.optimizer)
        if manifest is None:
            _warn_of_another_schedule(self.lr_scheduler)
        elif ours is not None:  # which torch.distributed.checkpoint leaves out
            ours.skipped_steps = manifest.get("skipped_steps", ours.skipped_steps)

    def _say_rates(self, differing: dict[str, tuple[float, float]], used: dict[str, float]) -> None:
        """In a line, in the arguments and in `routing.json`. differing: those that are used, and those given."""
        said = ", ".join(f"{name} {rate:g}, not {other:g}" for name, (rate, other) in differing.items())
        logger.warning(f"The checkpoint's learning rates go on, and not those given: {said}.")
        for field in ("learning_rate", "optim_adamw_lr"):
            now = [rate for rate, other in differing.values() if other == getattr(self.args, field, None)]
            if now:
                setattr(self.args, field, now[0])
        if self.args.should_save:
            correct_routing(self.args.output_dir, used)

    def _schedule(self) -> dict[str, Any]:
        """What the arguments say of the schedule, as JSON."""
        said = {name: getattr(self.args, name) for name in SCHEDULE if hasattr(self.args, name)}
        return json.loads(json.dumps(said, default=str))

    def _take_schedule_of(self, checkpoint: str | None) -> None:
        """A checkpoint's schedule goes on, as its learning rates do."""
        if checkpoint is None or not (self.lr_scheduler is None or self._created_lr_scheduler):
            return
        manifest = self._of_first(lambda: read_manifest(checkpoint)) or {}
        given, saved = self._schedule(), manifest.get("schedule", {})
        differing = [name for name in given if saved.get(name, given[name]) != given[name]]
        if differing:
            said = ", ".join(f"{name} {saved[name]!r}, not {given[name]!r}" for name in differing)
            logger.warning(f"The checkpoint's schedule goes on, and not the one given: {said}.")
            for name in differing:
                setattr(self.args, name, SchedulerType(saved[name]) if name == "lr_scheduler_type" else saved[name])


def _take(lock: FileLock) -> None:
    folder = Path(lock.lock_file).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise ValueError(
            f"another run trains into {str(folder)!r}: let it end, or end it, or choose another output_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning(f"{str(folder)!r} cannot be locked ({error}): see that no other run trains into it.")


def steps_of(checkpoint: str | os.PathLike) -> int:
    """The steps taken before a complete checkpoint."""
    return TrainerState.load_from_json(os.path.join(checkpoint, STATE_NAME)).global_step


def _rates(optimizer: Any) -> dict[str, float]:
    """What the schedule of every kind of group starts from: of this package's rules, or by the group's index."""
    groups = enumerate(getattr(optimizer, "param_groups", ()))
    return {str(group.get("rule", f"group {i}")): float(group.get("initial_lr", group["lr"])) for i, group in groups}


def _warn_of_another_schedule(scheduler: Any) -> None:
    """A checkpoint without a manifest does not say which schedule it had, but what the last one came to."""
    if not isinstance(scheduler, LambdaLR):
        return
    step, multipliers = scheduler.last_epoch, scheduler.lr_lambdas
    now = [base * multiplier(step) for base, multiplier in zip(scheduler.base_lrs, multipliers, strict=True)]
    for rate, saved in zip(now, scheduler.get_last_lr(), strict=True):
        if not math.isclose(rate, saved, rel_tol=1e-6):
            logger.warning(
                f"Another schedule, or length of training, than the checkpoint's: after {step:,} steps the learning "
                f"rate is {rate:g} and was {saved:g}."
            )
            return


def _without_compiler(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` was given."""
    return getattr(model, "_orig_mod", model)


@contextlib.contextmanager
def _by_plain_names(model: nn.Module, checkpoint: str) -> Iterator[None]:
    """While weights are loaded: names that torch.compile has changed, here or in a file, find each other.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    own = {plain_name(name): name for name, _ in tensors}

    def rename(module: nn.Module, state_dict: dict[str, Any], *args: Any) -> None:
        for name in [name for name in state_dict if own.get(plain_name(name), name) != name]:
            state_dict[own[plain_name(name)]] = state_dict.pop(name)

    handle = model.register_load_state_dict_pre_hook(rename)
    try:
        yield
    except Damaged as damaged:
        raise ValueError(f"{checkpoint} {damaged}") from None
    finally:
        handle.remove()


def _remove_pipes(folder: Path) -> None:
    """Whoever writes to one waits for a reader, for ever."""
    for path in folder.glob("*"):
        if path.is_fifo():
            path.unlink()


def _checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Checkpoint folders by step."""
    found = (p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.is_dir() and _step(p) >= 0)
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    """The step in a checkpoint's name, -1 if it is none."""
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else -1
