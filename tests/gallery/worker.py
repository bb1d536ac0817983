"""What runs a script in a process of its own: what the hub would have given stands in, and every parameter is watched.

Imported by a fork server once, since a start with transformers and TRL costs seconds; a script then runs in a fork.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from tests.gallery.operators import MISSING  # isort: skip  (before transformers)

import datasets
import evaluate
import huggingface_hub
import torch
import transformers
import trl  # noqa: F401
from PIL import Image
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from pion_hf import run

RECORD, OUTPUT = "record.json", "output.txt"


class Watch(TrainerCallback):
    """Writes down what training did to every parameter."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.rules = {id(p): group.get("rule", "adamw") for group in optimizer.param_groups for p in group["params"]}

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        ends = {id(p) for get in ("get_input_embeddings", "get_output_embeddings") for p in weights(inner, get)}
        modules = dict(model.named_modules())
        found = {}
        for name, p in model.named_parameters():
            module = modules[name.rpartition(".")[0]]
            found[name] = {
                "shape": list(p.shape),
                "kind": kind_of(module),
                "trained": p.requires_grad,
                "moved": not torch.equal(p, self.before[name]),
                "rule": self.rules.get(id(p)),
                "end": id(p) in ends,
            }
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        record = {"parameters": found, "losses": losses, "steps": state.global_step, "model": type(inner).__name__}
        self.path.write_text(json.dumps(record), encoding="utf-8")


def weights(model: nn.Module, get: str) -> list[nn.Parameter]:
    """Those of a model's input or output embeddings, if it knows them."""
    try:
        return list(getattr(model, get)().parameters(recurse=False))
    except (AttributeError, NotImplementedError):
        return []


def kind_of(module: nn.Module) -> str:
    for kind in (nn.Linear, nn.Embedding, Conv1D, nn.modules.conv._ConvNd):
        if isinstance(module, kind):
            return kind.__name__.lstrip("_")
    return type(module).__name__


class Metric:
    """In the place of every metric, which `evaluate` would load from the hub."""

    def compute(self, **kwargs: Any) -> dict[str, Any]:
        return {"score": 0.0, "accuracy": 0.0}


def stand_in_for_the_hub() -> None:
    """Metrics are constants; files of a dataset that is a folder are in it; nltk's sentences end at full stops."""
    evaluate.load = lambda *args, **kwargs: Metric()
    download = huggingface_hub.hf_hub_download

    def local_first(repo_id: str, filename: str, **kwargs: Any) -> str:
        path = os.path.join(repo_id, filename)
        return path if os.path.isfile(path) else download(repo_id, filename, **kwargs)

    huggingface_hub.hf_hub_download = local_first
    with contextlib.suppress(ImportError):
        import nltk

        nltk.data.find = lambda *args, **kwargs: None
        nltk.sent_tokenize = lambda text: text.split(". ")
    if MISSING:
        importlib.import_module("torchvision.io").read_image = read_image


def read_image(path: str, mode: Any = None) -> torch.Tensor:
    """As torchvision's, of which a build without operators has none."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def work(script: str, argv: list[str], folder: str, home: str) -> None:
    """Run a script with these arguments in `home`; what is known of it lies in `folder` afterwards."""
    descriptor = os.open(Path(folder, OUTPUT), os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = sys.stderr = output = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")
    os.chdir(home)
    tempfile.tempdir = folder
    datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
    stand_in_for_the_hub()
    transformers.trainer.DEFAULT_CALLBACKS.append(Watch(Path(folder, RECORD)))
    logging.set_verbosity_warning()
    try:
        run.main([script, *argv])
    except BaseException:
        traceback.print_exc()
        output.flush()
        os._exit(1)
    output.flush()
    os._exit(0)
