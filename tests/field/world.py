"""What the undamaged inputs are, made once: a model, chats, texts, a finished run, a record of one, a comparison."""

from __future__ import annotations

import os
import random
import shutil
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from pion_hf.cli import main
from pion_hf.runs import LOG, MATRICES, SPECTRA
from tests.field.pages import page_of
from tests.gallery.stand_ins import CHATS, make_model, make_tokenizer, sentence, write_jsonl
from tests.run_folders import write_run
from tests.test_faults import everything, trainer_of

STEPS = 6  # of the run that is resumed, from the last of its checkpoints 2 and 4
LAST = "checkpoint-4"
RATES = (1e-3, 2e-3)  # of the comparison


@dataclass(frozen=True)
class World:
    """Paths below one folder."""

    folder: Path

    def make(self) -> None:
        """Everything, in a process of its own: who forks for every input should not have computed anything."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self._make()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError("the undamaged inputs could not be made")

    def _make(self) -> None:
        self.folder.mkdir()
        os.chdir(self.folder)
        chance = random.Random(0)
        make_model("llama", self.model, make_tokenizer())
        self.chats.mkdir()
        for split, count in (("train", 16), ("test", 4)):
            write_jsonl(self.chats / f"{split}.jsonl", [CHATS["chats"](chance) for _ in range(count)])
        self.text.write_text("".join(sentence(chance, 12) + ".\n" for _ in range(100)), encoding="utf-8")
        write_run(self.run, layers=1, steps=4, snapshots=2)
        shutil.copytree(self.run, self.bare, ignore=shutil.ignore_patterns(LOG, MATRICES, SPECTRA))
        for run in (self.run, self.bare):
            (self.folder / f"{run.name}.html").write_text(page_of(run), encoding="utf-8")
        trainer = trainer_of(self.finished, steps=STEPS)
        trainer.train()
        torch.save(everything(trainer), self.finished / "end.pt")
        shutil.rmtree(self.finished / f"checkpoint-{STEPS}")
        main(["sft", "--config", str(self.recipe(self.folder, output_dir=str(self.folder / "trained")))])
        self._make_comparison()

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def chats(self) -> Path:
        return self.folder / "chats"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def run(self) -> Path:
        """The record of a run, made up."""
        return self.folder / "run"

    @property
    def bare(self) -> Path:
        """The record without logs, snapshots and spectra."""
        return self.folder / "bare"

    @property
    def finished(self) -> Path:
        """A run with its checkpoints."""
        return self.folder / "finished"

    @property
    def comparison(self) -> Path:
        """A folder with `sft/toy.yaml`, and a comparison in `runs`, made up."""
        return self.folder / "comparison"

    def keys(self, **changes: Any) -> dict[str, Any]:
        """Of a recipe that trains two steps."""
        keys = {
            "model_name_or_path": str(self.model),
            "dataset_name": str(self.chats),
            "optim": "pion",
            "learning_rate": 1e-2,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "max_length": 64,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "seed": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "output_dir": "out",
            **changes,
        }
        return {key: value for key, value in keys.items() if value is not ...}

    def recipe(self, folder: Path, **changes: Any) -> Path:
        """A recipe in `folder`; `...` takes a key out."""
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.keys(**changes), allow_unicode=True), encoding="utf-8")
        return path

    @cached_property
    def page(self) -> str:
        """The page of the record."""
        return (self.folder / "run.html").read_text(encoding="utf-8")

    @cached_property
    def bare_page(self) -> str:
        return (self.folder / "bare.html").read_text(encoding="utf-8").replace("<h1>bare</h1>", "<h1>run</h1>")

    @cached_property
    def trained(self) -> dict[str, Tensor]:
        """The weights that the recipe makes."""
        return load_file(self.folder / "trained" / "model.safetensors")

    @cached_property
    def end(self) -> list[Tensor]:
        """Weights and state of the finished run."""
        return torch.load(self.finished / "end.pt", weights_only=True)

    def copy(self, source: Path, target: Path) -> Path:
        return Path(shutil.copytree(source, target, symlinks=True))

    def _make_comparison(self) -> None:
        """Two runs, as `compare` leaves them."""
        from pion_hf.cli.grid import contenders_from_flags, make_grid
        from pion_hf.cli.study import run_all

        (self.comparison / "sft").mkdir(parents=True)
        recipe = self.recipe(self.comparison / "sft", eval_strategy="epoch", output_dir=..., learning_rate=...)
        path = recipe.rename(recipe.with_name("toy.yaml"))
        keys = yaml.safe_load(path.read_text())
        rates = ",".join(f"{rate:g}" for rate in RATES)
        grid, _ = make_grid(keys, "sft", contenders_from_flags(keys, "pion", rates), {}, 1)
        for trial in grid:
            folder = write_run(
                self.comparison / "runs" / trial.folder, learning_rate=trial.learning_rate, layers=1, steps=4
            )
            (folder / "recipe.yaml").write_text("", encoding="utf-8")
        assert not [*run_all(grid, self.comparison / "runs", None, slots=1, keep_models=True)], "all are finished"
        from tests.field.commands import table

        runs = shutil.copytree(self.comparison / "runs", self.folder / "shown")
        (self.folder / "table.json").write_text(table(self, runs), encoding="utf-8")
