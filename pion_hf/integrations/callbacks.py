"""What a run says of itself: in the logs, and in the files of its folder (see `pion_hf.runs.folder`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from pion_hf.errors import listing
from pion_hf.integrations import run_writer
from pion_hf.integrations.hidden_matrices import (
    COLD_STEPS,
    WARM_STEPS,
    HiddenMatrix,
    Norms,
    Spectra,
    hidden_matrices,
    orthogonality_error,
)
from pion_hf.integrations.model_card import describe
from pion_hf.integrations.optimizers import learning_rates, unwrap
from pion_hf.integrations.run_writer import RunFolder, recording
from pion_hf.integrations.updates import Meter, Stopwatch
from pion_hf.integrations.values import fit_fields
from pion_hf.linalg.spectrum import numerical_zero
from pion_hf.runs.folder import FAILED, FINISHED
from pion_hf.runs.redaction import without_secrets

logger = logging.get_logger(__name__)

SNAPSHOTS = 10  # between the first and the last
# Shares of the training time that measuring may take: single steps, spectra, snapshots between the first and the last.
STEPS_SHARE, SPECTRA_SHARE, SNAPSHOTS_SHARE = 0.003, 0.003, 0.004
# Seconds that each of them may take in any case: in a run of a few steps nothing is left out.
FREE_SECONDS = 0.4
# A drift above this is not rounding of float32 (1e-8 a step at most), nor that of bfloat16 weights (1e-3).
MOST_DRIFT = 1e-2
SUMMARY = (
    *("optimizer_share", "optimizer_seconds", "logging_share", "skipped_steps", "clipped_steps"),
    *("spectrum_drift", "rotated_matrices", "measured_spectra"),
)


class RunCallback(TrainerCallback):
    """Measures what training does, adds it to the logs and keeps it in the run's folder. One line: `watch(trainer)`.

    At logging steps the logs also hold every group's learning rate, the root mean square of the updates by rule,
    rotation angles, skipped steps, how many steps of rotated matrices were clipped since the last entry (`clipped`),
    and the optimizer's share of the time. Snapshots of every hidden matrix (spectral norm, stable rank) are taken at
    the start, at the end and at ten points between, whatever the optimizer; the change of the singular values of as
    many as time allows joins them. Measuring takes a hundredth of the training time: where it would take more, fewer
    steps and spectra are measured, and `run.json` says how many.

    `summary` holds what is known at the end: `optimizer_share`, `optimizer_seconds`, `logging_share`, `skipped_steps`
    and `clipped_steps` if there were any; of rotated matrices `spectrum_drift` (the largest change of a singular value
    relative to its matrix's spectral norm), their number, and of how many the spectrum was measured. It joins the last
    log entry.

    Only the first process measures and writes.
    """

    def __init__(self) -> None:
        self.summary: dict[str, float] = {}
        self.folder: str | None = None  # if not `output_dir`: of one trial of a search
        self.waits = False  # for `finished`: when training ends, weights are still to be saved
        self._run: _Run | None = None
        self._early: list[dict[str, Any]] = []  # logged before training began

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self.forget()
        early, self._early = self._early, []
        if state.is_world_process_zero:
            with recording("the record of this run"):
                folder = self.folder or args.output_dir
                self._run = _Run(folder, args, state, model, optimizer, kwargs, [] if state.global_step else early)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._tell(lambda run: run.step_begins())

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._tell(lambda run: run.before_update(state))

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._tell(lambda run: run.after_update())

    def on_step_end(self, args, state, control, optimizer=None, **kwargs) -> None:
        self._tell(lambda run: run.step_ends(state))
        ours, most = unwrap(optimizer), getattr(args, "max_skipped_steps", 0)
        if ours is not None and 0 < most <= ours.skipped_in_a_row:
            raise RuntimeError(
                f"{most} steps in a row were skipped (max_skipped_steps), the last of them step {state.global_step}: "
                "their gradients were not finite, and none of them has trained anything. Lower the learning rate, or "
                "look at the data and at the precision of the model; a checkpoint from before goes on."
            )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        if self._run is None:
            self._early.append({**logs, "step": state.global_step})
        self._tell(lambda run: self._log(run, state, logs))

    def _log(self, run: _Run, state: Any, logs: dict[str, Any]) -> None:
        added = run.additions(logs)
        if "train_loss" in logs and run.was_over():  # all is known, and no loss is new
            self.summary = {key: run.folder.earlier[key] for key in SUMMARY if key in run.folder.earlier}
            return
        if "train_loss" in logs and not run.measured:  # the last entry, and no other
            added, self.summary = run.end(state)
            added |= self.summary
        for loss in {"loss", "train_loss"} & logs.keys():
            if run.all_skipped(state.global_step, loss) and not logs[loss]:
                added[loss] = math.nan  # which transformers counts as 0
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)
        run.folder.log({**logs, "step": state.global_step})

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._tell(lambda run: run.close(self.summary))
        if not self.waits:
            self.finished()

    def finished(self) -> None:
        """All that the run is for has been saved."""
        self._tell(lambda run: run.says(FINISHED))

    def failed(self, error: BaseException) -> None:
        """Training, or saving what it has trained, has raised `error`."""
        said = str(error).splitlines() or [""]
        self._tell(lambda run: run.says(FAILED, error=without_secrets(f"{type(error).__name__}: {said[0]}")))

    def forget(self) -> None:
        """Another run begins, or an attempt at one."""
        self.summary = {}
        if self._run:
            self._run.stop_measuring()
        self._run = None

    def _tell(self, what: Callable[[_Run], None]) -> None:
        """Let the run measure and record; where it cannot, it measures no more, and training goes on."""
        if self._run is None:
            return
        told = False
        with recording("the record of this run", "nothing more is measured"):
            what(self._run)
            told = True
        if not told:
            self._run.stop_measuring()


def watch(trainer: Trainer) -> RunCallback:
    """Log and record what `trainer` does (`RunCallback`); before other callbacks, so that trackers see it too."""
    fit_fields(trainer.args)
    callbacks = trainer.callback_handler.callbacks
    callback = next((known for known in callbacks if isinstance(known, RunCallback)), None) or RunCallback()
    callbacks[:] = [callback, *(other for other in callbacks if other is not callback)]
    return callback


class _Run:
    """One call of `Trainer.train`, on the first process."""

    def __init__(
        self, folder: str, args: Any, state: Any, model: Any, optimizer: Any, loaders: dict, early: list[dict]
    ) -> None:
        self.began = time.perf_counter()
        self.args, self.optimizer, self.ours = args, optimizer, unwrap(optimizer)
        self.matrices = hidden_matrices(model, optimizer, self.ours)
        self.norms, self.spectra = Norms(self.matrices), Spectra(self.matrices)
        self.meter = Meter(model, optimizer, self.ours)
        self.stopwatch = Stopwatch(args.device)
        self.seconds = dict.fromkeys(("logging", "snapshots", "evaluation"), 0.0)
        self._last = time.perf_counter()  # when something was logged, or a step ended
        self.rates: dict[str, float] = {}
        self.pending: dict[str, float] = {}  # of the last snapshot, for the next log entry
        self.drift: float | None = None
        self.measured = False  # whether the end has been
        known = state.global_step, 0 if self.ours is None else self.ours.skipped_steps
        self.counted = {"loss": known, "train_loss": known}  # step, and steps skipped until then
        self.rotates = self.ours is not None and any(map(self.ours.keeps_spectrum, self.ours.param_groups))
        self._clipped = self.ours.clipped_steps if self.rotates else 0  # until the last entry
        self.first_step = 0.0
        self._started = False
        self._planned: set[int] = set()
        self._step_cost = self._drift_seconds = 0.0
        self.folder = RunFolder(folder)
        record = {
            "model": run_writer.describe_model(model),
            "data": {
                "train": run_writer.describe_data(loaders.get("train_dataloader")),
                "evaluation": run_writer.describe_data(loaders.get("eval_dataloader")),
            },
            "optimizer": describe(args, optimizer, model),
            "arguments": run_writer.describe_arguments(args),
            "versions": run_writer.versions(),
            "device": run_writer.describe_device(args.device),
            "matrices": [matrix.describe() for matrix in self.matrices],
        }
        self.folder.begin(record, state.global_step)
        for entry in early:
            self.folder.log(entry)
        if self.ours is not None:
            self.ours.observers.append(self.meter)
        self.seconds["logging"] += time.perf_counter() - self.began

    # -- in the loop ------------------------------------------------------------------------------

    def step_begins(self) -> None:
        self.first_step = self.first_step or time.perf_counter()

    def before_update(self, state: Any) -> None:
        if not self._started:
            self._started = True
            self._measure_start(state)
        spent = self.meter.seconds
        moves = any(group["lr"] > 0 for group in self.optimizer.param_groups)  # in a warmup's first step nothing does
        wanted = moves and self._wants(state.global_step + 1, state)
        if wanted and self._allows(STEPS_SHARE, spent + self._step_cost):
            self.meter.begin()
        self.stopwatch.start()

    def after_update(self) -> None:
        self.stopwatch.stop()
        began = time.perf_counter()
        # Of the step just taken: by the time of logging the scheduler has set the next one's.
        self.rates = learning_rates(self.optimizer)
        self.seconds["logging"] += time.perf_counter() - began
        if self.meter.on:
            self.meter.end()
            self._step_cost = self.meter.last_seconds

    def step_ends(self, state: Any) -> None:
        self._last = time.perf_counter()
        self.folder.record["steps"] = state.global_step
        if state.global_step in self._planned:
            self._snapshot(state.global_step, self.spectra.affordable(self._drift_seconds))
            self.folder.record["times"] = self.times()
            self.folder.write_record()

    def additions(self, logs: dict[str, Any]) -> dict[str, float]:
        """What an entry of the training loop gets."""
        told = sum(value for key, value in logs.items() if key.endswith("_runtime") and key != "train_runtime")
        now = time.perf_counter()
        self.seconds["evaluation"] += min(max(told, 0.0), now - self._last)  # told by a clock that may be set anew
        self._last = now
        if "learning_rate" not in logs or self.measured:
            return {}
        news = self.meter.news()  # keeps its own time
        began = time.perf_counter()
        added = {**self.rates, **news, **self._shares(), **self._newly_clipped(), **self.pending}
        self.pending = {}
        self.seconds["logging"] += time.perf_counter() - began
        return added

    def _wants(self, step: int, state: Any) -> bool:
        """Whether what `step` does will be told: of rules that take turns, so that both sides are, of two steps."""
        return any(
            s in self._planned or s == state.max_steps or _is_logged(s, self.args, state) for s in (step, step + 1)
        )

    def _allows(self, share: float, seconds: float) -> bool:
        return seconds <= max(FREE_SECONDS, share * (time.perf_counter() - self.began))

    def all_skipped(self, step: int, loss: str) -> bool:
        """Whether all steps up to `step` were that count in `loss`: since its last entry, or since training began."""
        skipped = self.ours.skipped_steps if self.ours is not None else 0
        first, before = self.counted[loss]
        self.counted[loss] = step, skipped
        every = first < step <= first + skipped - before
        if every and loss == "train_loss":
            logger.warning(f"All {step - first} steps were skipped: no gradient was finite, and nothing was trained.")
        return every

    # -- measurements -----------------------------------------------------------------------------

    def _measure_start(self, state: Any) -> None:
        """Snapshot, spectra, and the plan of the rest: the first gradient is there, and tells how long that takes."""
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)
        began = time.perf_counter()
        steps = state.max_steps - state.global_step
        expected = (began - self.first_step) * steps
        if not self.matrices:
            return
        resumed = state.global_step > 0
        values = self.norms.measure()
        cost = (time.perf_counter() - began) * WARM_STEPS / COLD_STEPS
        if not (resumed and self.folder.has_snapshots()):
            self._store(state.global_step, values, [])
        allowed = max(FREE_SECONDS, SPECTRA_SHARE / 3 * expected)
        names = {matrix.name for matrix in self.matrices}
        self.spectra.before = {n: v for n, v in self.folder.spectra_before().items() if resumed and n in names}
        if not self.spectra.before:
            self.spectra.measure_before(allowed)
            self.folder.write_spectra(self.spectra.before, {})
        self._warn_of_rank()
        count = min(SNAPSHOTS, int(max(FREE_SECONDS, SNAPSHOTS_SHARE * expected) / max(cost, 1e-9)))
        places = (round(k * state.max_steps / (count + 1)) for k in range(1, count + 1))
        self._planned = {step for step in places if state.global_step < step < state.max_steps}
        self._drift_seconds = allowed / max(1, len(self._planned))
        self.seconds["snapshots"] += time.perf_counter() - began

    def _snapshot(self, step: int, again: list[HiddenMatrix], *, last: bool = False) -> None:
        """Norms of all matrices, and the drift of the spectra of those that are measured `again`."""
        began = time.perf_counter()
        self.meter.read()
        self._store(step, self.norms.measure(), again, last=last)
        self.seconds["snapshots"] += time.perf_counter() - began

    def _store(
        self, step: int, values: dict[str, list[float]], again: list[HiddenMatrix], *, last: bool = False
    ) -> None:
        names = [matrix.name for matrix in self.matrices]
        self.folder.snapshot(step, values | self.meter.columns(names))
        ranks = [rank for rank in values["stable_rank"] if math.isfinite(rank)]
        found = {
            "spectral_norm/max": torch.tensor(values["spectral_norm"]).max().item(),
            "stable_rank/mean": sum(ranks) / len(ranks) if ranks else None,
            "spectrum_drift": self.spectra.drift(again, keep=last),
            "orthogonality_error": orthogonality_error(self.ours, again) if self.ours is not None else None,
        }
        self.drift = found["spectrum_drift"]
        self.pending = {key: value for key, value in found.items() if value is not None}

    def _warn_of_rank(self) -> None:
        rotated = [matrix.name for matrix in self.spectra.known if matrix.keeps_spectrum]
        deficient = [name for name in rotated if bool(numerical_zero(self.spectra.before[name].float()).any())]
        if deficient:
            logger.warning(
                f"{len(deficient)} of the {len(rotated)} rotated matrices whose spectrum was measured are "
                "rank-deficient and stay so under rotations (a zero singular value never grows): "
                f"{listing(deficient)}"
            )

    # -- the end ----------------------------------------------------------------------------------

    def end(self, state: Any) -> tuple[dict[str, float], dict[str, float]]:
        """Measure a last time; what joins the last entry of the logs, and the summary."""
        if not self._started:
            self._started = True
            self._measure_start(state)
        if self.matrices:
            self._snapshot(state.global_step, self.spectra.known, last=True)
            self.folder.write_spectra(self.spectra.before, self.spectra.after)
        self.measured = True
        summary = self._shares()
        summary["clipped_steps"] = self.ours.clipped_steps if self.rotates else 0
        for count in ("skipped_steps", "clipped_steps"):
            if not summary.get(count):
                summary.pop(count, None)
        times = self.times()
        if self.first_step:
            summary["optimizer_seconds"] = times["optimizer"]
            summary["logging_share"] = (times["logging"] + times["snapshots"]) / times["total"]
        rotated = [matrix for matrix in self.matrices if matrix.keeps_spectrum]
        if rotated and self.drift is not None:
            summary["spectrum_drift"] = self.drift
            if self.drift > MOST_DRIFT:
                logger.warning(
                    f"the singular values of rotated matrices moved by {self.drift:.1e} of the largest, which rounding "
                    f"does only at absurd angles: is the learning rate ({self.args.learning_rate:g}) right?"
                )
            summary["rotated_matrices"] = sum(len(matrix.weights()) for matrix in rotated)
            summary["measured_spectra"] = sum(len(m.weights()) for m in self.spectra.known if m.keeps_spectrum)
        return {key: value for key, value in self.pending.items() if key != "spectrum_drift"}, summary

    def was_over(self) -> bool:
        """Whether a run was resumed that had come to its end."""
        return not self._started and "optimizer_seconds" in self.folder.earlier

    def close(self, summary: dict[str, float]) -> None:
        """Write down what is known when training ends."""
        if self.was_over():
            self.folder.record = self.folder.earlier | self.folder.record
            self.stop_measuring()
            return
        drift = {} if self.drift is None else {"spectrum_drift": self.drift}
        self.folder.record |= {**drift, **summary}
        self._take_times()
        self.folder.write_record()

    def says(self, status: str, **more: Any) -> None:
        """How the run ended."""
        if "seconds" not in self.folder.record:
            self._take_times()
        self.folder.record |= {"status": status, **more}
        self.folder.open = True  # a disk that was full may not be so any more
        self.folder.write_record()

    def _take_times(self) -> None:
        self.stop_measuring()
        times, memory = self.times(), run_writer.peak_memory(self.args.device)
        self.folder.record |= {"seconds": times["total"], "times": times, "peak_memory_bytes": memory}

    def stop_measuring(self) -> None:
        self.matrices, self._planned, self.measured, self.meter.on = [], set(), True, False
        if self.ours is not None:
            self.ours.observers = [observer for observer in self.ours.observers if observer is not self.meter]

    def times(self) -> dict[str, float]:
        """Seconds since training began, and what they went to."""
        measuring = self.meter.seconds_in_steps if self.args.device.type != "cuda" else 0.0  # there they overlap
        return {
            "optimizer": max(0.0, self.stopwatch.seconds() - measuring),
            **self.seconds,
            "logging": self.seconds["logging"] + self.meter.seconds,
            "total": time.perf_counter() - self.began,
        }

    def _shares(self) -> dict[str, float]:
        """`skipped_steps` of this package's optimizers, and the optimizer's share of the time since the first step."""
        found = {} if self.ours is None else {"skipped_steps": self.ours.skipped_steps}
        if self.first_step:
            found["optimizer_share"] = self.times()["optimizer"] / (time.perf_counter() - self.first_step)
        return found

    def _newly_clipped(self) -> dict[str, int]:
        """How many steps of rotated matrices were clipped since the last entry; it waits for the device."""
        if not self.rotates:
            return {}
        before, self._clipped = self._clipped, self.ours.clipped_steps
        return {"clipped": self._clipped - before}


def _is_logged(step: int, args: Any, state: Any) -> bool:
    """Whether the Trainer will write a log entry after `step`; where it does so by epochs, any may be the last."""
    strategy = args.logging_strategy
    if strategy == IntervalStrategy.EPOCH:
        return True
    every = strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0
    return every or (step == 1 and args.logging_first_step)
