"""What a run says of itself: spectrum drift, skipped steps, the optimizer's share of the time, all learning rates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from pion_hf.linalg.spectrum import numerical_zero, singular_values, spectral_drift
from pion_hf.optim import MatrixOptimizer, blocks

logger = logging.get_logger(__name__)


class SpectrumCallback(TrainerCallback):
    """Measures singular values when training begins and ends, and times the optimizer's steps.

    At the end it adds to the logs `spectrum_drift` (the largest change of a singular value relative to its
    matrix's spectral norm), `optimizer_share` (of the time between the first step and the last) and, if there
    were any, `skipped_steps`. A callback cannot log where the loop does not, so the values also stay in `summary`.

    Beside transformers' `learning_rate`, which is the first group's, it logs those of all groups (`learning_rates`).
    In a Trainer without `PionTrainerMixin` the trackers of `report_to` do not see them: they come first.
    """

    def __init__(self) -> None:
        self.summary: dict[str, float] = {}
        self.before: dict[str, Tensor] = {}
        self.rates: dict[str, float] = {}
        self._optimizer_seconds = 0.0
        self._started = self._entered = 0.0

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        self._optimizer_seconds = 0.0
        inner = unwrap(optimizer)
        if inner is None or not state.is_world_process_zero:
            return
        self.before = spectra(inner)
        deficient = [name for name, values in self.before.items() if _rank_deficient(values)]
        if deficient:
            logger.warning(
                f"{len(deficient)} rotated matrices are rank-deficient and stay so under rotations "
                f"(a zero singular value never grows): {', '.join(deficient[:5])}{' ...' if len(deficient) > 5 else ''}"
            )

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._started = self._started or time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._entered = time.perf_counter()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._optimizer_seconds += time.perf_counter() - self._entered
        # The step just taken: by the time of logging the scheduler has set the next one's.
        self.rates = learning_rates(optimizer)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry and "learning_rate" in entry:
                entry.update(self.rates)

    def on_train_end(self, args, state, control, optimizer=None, **kwargs) -> None:
        inner = unwrap(optimizer)
        elapsed = time.perf_counter() - self._started if self._started else 0.0
        if elapsed:
            self.summary["optimizer_share"] = self._optimizer_seconds / elapsed
            self.summary["optimizer_seconds"] = self._optimizer_seconds
        if inner is None:
            return
        if inner.skipped_steps:
            self.summary["skipped_steps"] = inner.skipped_steps
        if not self.before:
            return
        drifts = {
            name: spectral_drift(self.before[name], values).max().item() for name, values in spectra(inner).items()
        }
        self.summary["spectrum_drift"] = max(drifts.values())
        self.summary["rotated_matrices"] = sum(values[..., 0].numel() for values in self.before.values())


def unwrap(optimizer: Any) -> MatrixOptimizer | None:
    """This package's optimizer inside accelerate's wrapper, or None."""
    while optimizer is not None and not isinstance(optimizer, MatrixOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def learning_rates(optimizer: Any) -> dict[str, float]:
    """The learning rate of every kind of group, as log entries.

    For this package's optimizers `learning_rate/<rule>`; where the groups of a rule differ, one entry for each with
    its index: `learning_rate/<rule>/<index>`. For others `learning_rate/<index>`, and none if all groups agree.
    """
    inner = unwrap(optimizer)
    kinds: dict[str, dict[int, dict]] = {}
    for index, group in enumerate(getattr(inner or optimizer, "param_groups", [])):
        kinds.setdefault(f"/{group['rule']}" if inner else "", {})[index] = group
    found = {}
    for kind, groups in kinds.items():
        # With the rate a schedule starts from: groups that differ keep their names where both are at 0.
        rates = {i: (float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for i, group in groups.items()}
        distinct = set(rates.values())
        if len(distinct) > 1:
            found.update({f"learning_rate{kind}/{i}": rate for i, (rate, _) in rates.items()})
        elif inner:
            found[f"learning_rate{kind}"] = distinct.pop()[0]
    return found


def spectra(optimizer: MatrixOptimizer) -> dict[str, Tensor]:
    """Singular values of every matrix that keeps them, `(E, k)` by parameter name (and index, if it holds several)."""
    found = {}
    for name, index, matrix in rotated_matrices(optimizer):
        found[name if index is None else f"{name}[{index}]"] = singular_values(matrix).cpu()
    return found


def rotated_matrices(optimizer: MatrixOptimizer) -> Iterator[tuple[str, int | None, Tensor]]:
    """`(name, index, (E, m, n))` of every matrix under a rule that keeps its spectrum."""
    for group in optimizer.param_groups:
        if not optimizer.keeps_spectrum(group):
            continue
        layout = blocks.Layout.parse(group["layout"])
        names = group.get("param_names") or [str(i) for i in range(len(group["params"]))]
        for name, p in zip(names, group["params"], strict=True):
            views = blocks.split(p.detach(), layout)
            for index, view in enumerate(views):
                yield name, index if len(views) > 1 else None, blocks.merge_rows(view)


def _rank_deficient(values: Tensor) -> bool:
    return bool(numerical_zero(values.float()).any())
