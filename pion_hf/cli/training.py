"""What `pion-hf sft` and `pion-hf cpt` share: TRL's script with this package's trainer, and the report at the end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from rich.console import Console
from rich.table import Table
from trl.scripts import sft as trl_sft

from pion_hf.arguments import OPTIMIZER_CLASSES
from pion_hf.cli.adapters import AdapterSFTTrainer, ModelArguments, check_adapter, set_initialisation
from pion_hf.evaluation import exact_match, text_loss
from pion_hf.integrations.registry import refuse_wrappers
from pion_hf.integrations.trl import PionSFTConfig

NUMBER_FORMATS = {"exact match": "{:.1%}", "perplexity": "{:.2f}"}  # any other: four places


@dataclass
class ReportArguments:
    """What is measured before and after training, besides the evaluation loss."""

    exact_match_samples: int = field(
        default=0, metadata={"help": "Generate answers to this many evaluation examples, before and after (0: none)."}
    )
    max_new_tokens: int = field(default=32, metadata={"help": "Longest generated answer, in tokens."})
    other_text_file: str | None = field(
        default=None,
        metadata={"help": "Text of another domain: its loss before and after shows what was forgotten."},
    )


# The dataclasses of every training command, in the order of `train`'s arguments.
ARGUMENTS = (trl.ScriptArguments, PionSFTConfig, ModelArguments, trl.DatasetMixtureConfig, ReportArguments)


class ReportingSFTTrainer(AdapterSFTTrainer):
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
        self.measured["before"] = self.measure()
        output = super().train(*args, **kwargs)
        self.measured["after"] = self.measure()
        return output

    def measure(self) -> dict[str, float]:
        """What the model can do now, by the names of the report."""
        values = {}
        if self.eval_dataset is not None:
            values["evaluation loss"] = self._evaluation_loss()
        with self.accelerator.autocast():  # as the evaluation loss
            if self.eval_rows and self.report_arguments.exact_match_samples:
                tokens = self.report_arguments.max_new_tokens
                values["exact match"] = exact_match(
                    self.model, self.processing_class, self.eval_rows, max_new_tokens=tokens
                )
            if self.other_text is not None:
                values["loss on other text"] = text_loss(self.model, self.processing_class, self.other_text)
        return values

    def _evaluation_loss(self) -> float:
        """Of the model as it is; the Trainer has often evaluated it at its last step already."""
        last = next((entry for entry in reversed(self.state.log_history) if "eval_loss" in entry), {})
        if last.get("step") == self.state.global_step and not self.args.load_best_model_at_end:
            return last["eval_loss"]
        return self.evaluate()["eval_loss"]

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
            number = NUMBER_FORMATS.get(name, "{:.4f}")
            table.add_row(name, number.format(before), number.format(after[name]))
        summary = self.spectrum.summary
        if "spectrum_drift" in summary:
            matrices = f"{summary['rotated_matrices']:,} rotated matrices"
            table.add_row(f"largest relative singular-value drift, {matrices}", "", f"{summary['spectrum_drift']:.1e}")
        if "optimizer_share" in summary:
            table.add_row("share of the training time in the optimizer", "", f"{summary['optimizer_share']:.0%}")
        table.add_row("checkpoint", "", str(folder))
        return table


def train(
    script_args: trl.ScriptArguments,
    training_args: PionSFTConfig,
    model_args: ModelArguments,
    dataset_args: trl.DatasetMixtureConfig,
    report_args: ReportArguments,
    *,
    make_trainer: Callable[..., ReportingSFTTrainer] = ReportingSFTTrainer,
) -> None:
    """Run TRL's script with the trainer that `make_trainer` makes of the script's arguments, then report.

    Raises:
        ValueError, FileNotFoundError: input that cannot be trained on; where possible before anything is loaded.
    """
    check_model(training_args, model_args)
    _check_report(training_args, report_args)
    trainers: list[ReportingSFTTrainer] = []

    def trainer(**kwargs: Any) -> ReportingSFTTrainer:
        if model_args.init_lora_weights is not None:
            set_initialisation(kwargs["peft_config"], model_args.init_lora_weights)
        trainers.append(make_trainer(report=report_args, **kwargs))
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
    except OSError as error:  # a name that is no folder here is looked for at the hub
        if trainers:
            raise
        names = f"the data ({script_args.dataset_name}) or the model ({model_args.model_name_or_path})"
        raise ValueError(f"cannot load {names}: {str(error).splitlines()[0]}") from error
    trainers[0].finish()


def check_model(training_args: PionSFTConfig, model_args: ModelArguments) -> None:
    """Raise ValueError, before anything is loaded, for what the optimizer could not train."""
    if not model_args.model_name_or_path:
        raise ValueError("name the model: --model_name_or_path FOLDER_OR_ID, or --config RECIPE")
    check_adapter(model_args)
    if training_args.optim.value in OPTIMIZER_CLASSES:
        refuse_wrappers(training_args)


def model_from_config(
    name: str, *, dtype: str | torch.dtype | None = "float32", revision: str | None = None, **options: Any
) -> transformers.PreTrainedModel:
    """A model of the config in a checkpoint folder or hub id, with fresh weights on the current device.

    `dtype` is as in `from_pretrained`: `"auto"` or None is the checkpoint's own. The other options too.

    Raises:
        ValueError: there is no config.
    """
    remote = options.get("trust_remote_code", False)
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=remote)
    except OSError as error:
        raise ValueError(f"no model config at {name!r}: {str(error).splitlines()[0]}") from None
    dtype = config.dtype if dtype in (None, "auto") else dtype
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32, **options)


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
