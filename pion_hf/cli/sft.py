"""`pion-hf sft`: TRL's supervised fine-tuning script with this package's optimizer, and a report at the end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trl
from rich.console import Console
from rich.table import Table
from trl.scripts import sft as trl_sft

from pion_hf.arguments import OPTIMIZER_CLASSES
from pion_hf.cli.recipe import RecipeParser
from pion_hf.evaluation import exact_match, text_loss
from pion_hf.integrations.registry import refuse_wrappers
from pion_hf.integrations.trl import PionSFTConfig, PionSFTTrainer


@dataclass
class ReportArguments:
    """What `pion-hf sft` measures before and after training, besides the evaluation loss."""

    exact_match_samples: int = field(
        default=0, metadata={"help": "Generate answers to this many evaluation examples, before and after (0: none)."}
    )
    max_new_tokens: int = field(default=32, metadata={"help": "Longest generated answer, in tokens."})
    other_text_file: str | None = field(
        default=None,
        metadata={"help": "Text of another domain: its loss before and after shows what was forgotten."},
    )


def parser() -> RecipeParser:
    """Every flag of `trl sft`, the optimizer's `--optim_*`, and the report's."""
    return RecipeParser(
        (trl.ScriptArguments, PionSFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig, ReportArguments),
        prog="pion-hf sft",
        description=__doc__,
    )


def main(argv: list[str]) -> None:
    """Fine-tune; ends with a table and `report.json` in the output folder."""
    script_args, training_args, model_args, dataset_args, report_args = parser().parse_recipe(argv)
    check_model(training_args, model_args)
    _check_report(training_args, report_args)
    trainers: list[ReportingSFTTrainer] = []

    def trainer(*args: Any, **kwargs: Any) -> ReportingSFTTrainer:
        trainers.append(ReportingSFTTrainer(*args, report=report_args, **kwargs))
        return trainers[-1]

    splits = {name: getattr(script_args, name) for name in ("dataset_train_split", "dataset_test_split")}
    try:
        with _substituted(trl, "SFTTrainer", trainer):
            trl_sft.main(script_args, training_args, model_args, dataset_args)
    except KeyError as error:  # TRL's script looks a split up without a check
        for name, split in splits.items():
            if error.args == (split,) and not trainers:
                raise ValueError(f"the dataset has no split {split!r}: set {name}") from error
        raise
    trainers[0].finish()


def check_model(training_args: PionSFTConfig, model_args: trl.ModelConfig) -> None:
    """Raise ValueError, before anything is loaded, for what the optimizer could not train."""
    if not model_args.model_name_or_path:
        raise ValueError("name the model: --model_name_or_path FOLDER_OR_ID, or --config RECIPE")
    optim = training_args.optim.value
    if optim in OPTIMIZER_CLASSES:
        refuse_wrappers(training_args)
        if model_args.use_peft:
            raise ValueError(
                f"optim={optim!r} trains whole matrices, not LoRA adapters, in this version: leave out use_peft, or "
                "train the adapter with --optim adamw_torch."
            )


def _check_report(training_args: PionSFTConfig, report_args: ReportArguments) -> None:
    path = report_args.other_text_file
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"other_text_file: there is no file {path!r}")
    if report_args.exact_match_samples < 0:
        raise ValueError(f"exact_match_samples must be at least 0, got {report_args.exact_match_samples}")
    if report_args.exact_match_samples and training_args.eval_strategy == "no":
        raise ValueError("exact_match_samples needs evaluation data: set eval_strategy: epoch, and dataset_test_split")


@contextlib.contextmanager
def _substituted(module: Any, name: str, value: Any) -> Iterator[None]:
    """TRL's script takes its trainer from the package `trl`: put ours there for the length of one run."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


class ReportingSFTTrainer(PionSFTTrainer):
    """Measures before and after training what `ReportArguments` asks for."""

    def __init__(self, *args: Any, report: ReportArguments, **kwargs: Any) -> None:
        eval_dataset = kwargs.get("eval_dataset")
        self.report_arguments = report
        # The raw rows: TRL's own preparation leaves only tokens.
        self.eval_rows = list(eval_dataset.take(report.exact_match_samples)) if eval_dataset is not None else []
        self.other_text = Path(report.other_text_file).read_text(encoding="utf-8") if report.other_text_file else None
        self.measured: dict[str, dict[str, float]] = {}
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.measured["before"] = self._measure()
        output = super().train(*args, **kwargs)
        self.measured["after"] = self._measure()
        return output

    def _measure(self) -> dict[str, float]:
        values = {}
        if self.eval_dataset is not None:
            values["evaluation loss"] = self.evaluate()["eval_loss"]
        if self.eval_rows and self.report_arguments.exact_match_samples:
            values["exact match"] = exact_match(
                self.model, self.processing_class, self.eval_rows, max_new_tokens=self.report_arguments.max_new_tokens
            )
        if self.other_text is not None:
            values["loss on other text"] = text_loss(self.model, self.processing_class, self.other_text)
        return values

    def finish(self) -> None:
        """Write `report.json`; print the table."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        record = {**self.measured, **self.spectrum.summary}
        (folder / "report.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        Console().print(self._table(folder))

    def _table(self, folder: Path) -> Table:
        table = Table(title=f"{self.args.optim.value}, {self.state.global_step} steps")
        table.add_column("")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        after = self.measured["after"]
        for name, before in self.measured["before"].items():
            number = "{:.1%}" if name == "exact match" else "{:.4f}"
            table.add_row(name, number.format(before), number.format(after[name]))
        summary = self.spectrum.summary
        if "spectrum_drift" in summary:
            matrices = f"{summary['rotated_matrices']:,} rotated matrices"
            table.add_row(f"largest relative singular-value drift, {matrices}", "", f"{summary['spectrum_drift']:.1e}")
        if "optimizer_share" in summary:
            table.add_row("share of the training time in the optimizer", "", f"{summary['optimizer_share']:.0%}")
        table.add_row("checkpoint", "", str(folder))
        return table
