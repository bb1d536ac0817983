"""Checkpoints that a run can be resumed from: which are complete, what a failed save leaves, what loading must keep.

The Trainer writes into a checkpoint's own folder, file by file, `trainer_state.json` at the end. One that was killed
while it saved leaves a folder that transformers takes for the last checkpoint all the same.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

STATE_NAME = "trainer_state.json"

logger = logging.get_logger(__name__)


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was saved to its end: `trainer_state.json`, its last file, is there and whole."""
    try:
        json.loads(Path(checkpoint, STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete `checkpoint-<step>` with the most steps, None if there is none."""
    complete = [folder for folder in _checkpoints(output_dir) if is_complete(folder)]
    return str(complete[-1]) if complete else None


def resolve_resume(resume: str | bool | None, output_dir: str | os.PathLike) -> str | None:
    """The folder that `resume_from_checkpoint` means: the one it names, or with true the last complete checkpoint.

    Raises:
        ValueError: with true, no complete checkpoint; a folder that is not one.
        FileNotFoundError: there is no such folder.
    """
    if resume in (None, False):
        return None
    last = last_complete_checkpoint(output_dir)
    if resume is True or str(resume).lower() == "true":  # a word where it comes from a command line
        if last is None:
            raise ValueError(
                f"resume_from_checkpoint=true: there is no complete checkpoint in {str(output_dir)!r}: leave it out, "
                "and training starts from the beginning."
            )
        skipped = [folder.name for folder in _checkpoints(output_dir) if _step(folder) > _step(Path(last))]
        if skipped:
            logger.warning(f"Resuming from {last}: {', '.join(skipped)} was not saved to its end.")
        return last
    if not os.path.isdir(resume):
        raise FileNotFoundError(f"resume_from_checkpoint: there is no folder {str(resume)!r}.")
    if not is_complete(resume):
        instead = f" The last complete checkpoint of output_dir is {last!r}." if last else ""
        raise ValueError(
            f"resume_from_checkpoint={str(resume)!r} is no complete checkpoint: {STATE_NAME}, which is written last, "
            f"is missing or cut off.{instead}"
        )
    return str(resume)


class CheckpointMixin:
    """Mix into any Trainer: it resumes from complete checkpoints only, leaves no others when a save fails, and loads
    adapters in the dtype they are trained in.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; `resume_from_checkpoint` as in `resolve_resume`."""
        return super().train(resolve_resume(resume_from_checkpoint, self.args.output_dir), *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's. A folder of that step from an earlier run is incomplete from here on.

        Raises:
            OSError: saving failed, with what torch and safetensors hide: where, and how much space was left.
        """
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            (folder / STATE_NAME).unlink(missing_ok=True)
        try:
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the Trainer's, but adapters keep their dtype: peft loads half-precision ones as float32."""
        target = self.model if model is None else model
        dtypes = {name: p.dtype for name, p in target.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, p in target.named_parameters():
            if p.dtype != dtypes.get(name, p.dtype):
                p.data = p.data.to(dtypes[name])


def _checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Checkpoint folders by step."""
    found = (p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.is_dir() and _step(p) >= 0)
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    """The step in a checkpoint's name, -1 if it is none."""
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else -1
