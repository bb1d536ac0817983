"""Run folders as training leaves them, with numbers made up by a formula: nothing is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pion_hf.runs.folder import EVALUATION, LOG, MATRICES, RECORD, SPECTRA, append_line, write_json

ROLES = {"q_proj": (64, 64), "k_proj": (16, 64), "down_proj": (64, 96)}


def write_run(
    folder: Path,
    *,
    optim: str = "pion",
    learning_rate: float = 1e-3,
    layers: int = 3,
    steps: int = 20,
    snapshots: int = 4,
    roles: dict[str, tuple[int, int]] | None = None,
    changes: dict[str, Any] | None = None,
) -> Path:
    """A finished run that rotates under `pion`, and changes the spectrum under anything else.

    changes: keys of `run.json` that differ from those of such a run.
    """
    roles = roles or ROLES
    rotates = optim == "pion"
    rule = optim if rotates else "adamw"
    matrices = [
        {"name": f"model.layers.{layer}.{role}.weight", "role": role, "layer": layer, "rule": rule, "shape": shape}
        for layer in range(layers)
        for role, shape in roles.items()
    ]
    record = {
        "format": 1,
        "status": "finished",
        "started": "2025-01-02T03:04:05+00:00",
        "seconds": 100.0,
        "steps": steps,
        "model": {"name": "toy", "class": "LlamaForCausalLM", "parameters": 1000, "trainable": 900},
        "data": {"train": "chat", "evaluation": "chat"},
        "optimizer": {
            "name": optim,
            "learning_rate": learning_rate,
            "schedule": "linear",
            **({"options": {"side": "alternate", "rms": 0.2}, "rules": [_rule(learning_rate)]} if rotates else {}),
        },
        "arguments": {"max_steps": steps, "output_dir": str(folder), "optim": optim, "learning_rate": learning_rate},
        "peak_memory_bytes": 3 * 2**30,
        "versions": {"pion_hf": "0.0.1"},
        "device": "cpu",
        "matrices": matrices,
        "times": {"optimizer": 30.0, "logging": 0.5, "snapshots": 1.5, "evaluation": 8.0, "total": 100.0},
        **({"spectrum_drift": 3e-8} if rotates else {}),
        **(changes or {}),
    }
    write_json(folder / RECORD, record)
    for step in range(1, steps + 1):
        append_line(folder / LOG, _entry(step, steps, learning_rate, rule, rotates))
    for i in range(snapshots):
        append_line(folder / MATRICES, _snapshot(i * steps // max(1, snapshots - 1), matrices, learning_rate, rotates))
    write_json(folder / EVALUATION, evaluation(learnt=1 + 100 * learning_rate, forgotten=50 * learning_rate))
    tensors = {}
    for m in matrices:
        before = 3 * torch.exp(-torch.linspace(0, 4, min(m["shape"]), dtype=torch.float64))[None]
        tensors["before/" + m["name"]] = before
        tensors["after/" + m["name"]] = before * (1 + (1e-8 if rotates else 10 * learning_rate))
    save_file(tensors, folder / SPECTRA)
    return folder


def evaluation(*, learnt: float, forgotten: float) -> dict[str, Any]:
    """`eval.json` of a run whose task loss fell from 4."""
    before = {"task": {"loss": 4.0, "perplexity": math.exp(4.0), "exact_match": 0.0}, "other_text": {"loss": 3.0}}
    after = {
        "task": {"loss": 4 - learnt, "perplexity": math.exp(4 - learnt), "exact_match": 0.25},
        "other_text": {"loss": 3 + forgotten},
    }
    half = {"task": {"loss": 4 - 0.8 * learnt}, "other_text": {"loss": 3 + 0.3 * forgotten}}
    blends = [{"share": 0.5, **half}, {"share": 1.0, **after}]
    gained = {"learnt": learnt, "forgotten": {"other_text": forgotten}}
    return {"before": before, "after": after, **gained, "blend": 1.0, "blends": blends}


def _rule(learning_rate: float) -> dict[str, Any]:
    counts = {"tensors": 9, "matrices": 9, "stacks": 0, "parameters": 900}
    return {"rule": "pion", **counts, "learning_rate": learning_rate, "weight_decay": 0.0}


def _entry(step: int, steps: int, learning_rate: float, rule: str, rotates: bool) -> dict[str, Any]:
    rate = learning_rate * (1 - step / steps)
    entry = {
        "step": step,
        "loss": 2 + 2 * math.exp(-4 * step / steps) + 0.1 * math.sin(step),
        "learning_rate": rate,
        f"learning_rate/{rule}": rate,
        f"update_rms/{rule}": 0.2 * rate,
    }
    if rotates:
        for side in ("in", "out"):
            entry |= {f"angle_{side}/mean": rate, f"angle_{side}/max": 5 * rate}
        entry |= {"spectrum_drift": 1e-9 * step, "orthogonality_error": 3e-7}
    if step % 5 == 0:
        entry["eval_loss"] = 2.1 + 2 * math.exp(-4 * step / steps)
    return entry


def _snapshot(step: int, matrices: list[dict], learning_rate: float, rotates: bool) -> dict[str, Any]:
    grown = 1.0 if rotates else 1 + learning_rate * step
    norms = [(2.0 + m["layer"] + 0.1 * i) * grown for i, m in enumerate(matrices)]
    values = {"spectral_norm": norms, "stable_rank": [20 / n for n in norms], "update_rms": [2e-4] * len(norms)}
    if rotates:
        angles = [learning_rate * (1 + m["layer"]) for m in matrices]
        values |= {"angle_in": angles if step else [None] * len(angles), "angle_out": angles}
    return {"step": step, "values": values}
