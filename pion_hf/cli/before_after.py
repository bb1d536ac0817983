"""What training did to the model, measured before it and after it: `eval.json`, a table, the model card."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import transformers
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor
from transformers import TrainerCallback

from pion_hf.cli.benchmarks import Benchmarks, check_benchmarks
from pion_hf.cli.faults import in_words
from pion_hf.cli.flags import ReportArguments
from pion_hf.cli.rows import check_chats
from pion_hf.errors import unknown
from pion_hf.integrations.blend import Blend
from pion_hf.integrations.evaluation import (
    Measures,
    answer_tokens,
    exact_match,
    generate_answers,
    perplexity,
    progress,
    prompts_and_answers,
    text_stretches,
    token_loss,
)
from pion_hf.integrations.model_card import table_rows
from pion_hf.integrations.run_writer import recording
from pion_hf.runs.files import fault_of_place
from pion_hf.runs.folder import BEFORE, EVALUATION, read_json, write_json

OTHER_ROWS = 128  # rows of `other_dataset` whose loss is measured
SHOWN = 3  # questions that are printed with the answers before and after


class ReportMixin:
    """Measures before and after training what `ReportArguments` asks for.

    `class MyTrainer(ReportMixin, PionTrainerMixin, SomeTrainer): ...`. How well the model does its task is for
    `measure_task` to say: here by evaluation loss, perplexity and exact match. When `train` returns, `eval.json` is
    written, and a model card made from then on tells of it; `finish` prints the table.
    """

    def __init__(self, *args: Any, report: ReportArguments, **kwargs: Any) -> None:
        self.report_arguments = report
        self.measured: dict[str, Measures] = {}
        self.blends: dict[float, Measures] = {}  # by the share of what training changed
        # Answers to the first questions, by the share of what training changed (0: before it).
        self.shown: dict[float, list[str]] = {}
        self._blended = self._saved = False
        # All that can be wrong with the data is found here, most of it before a model is loaded. The raw rows: TRL's
        # own preparation leaves only tokens.
        self.questions = self.task_questions(kwargs.get("eval_dataset"))
        other_rows = _other_rows(report) if report.other_dataset else []
        self.other_questions = other_rows[: report.exact_match_samples]
        text = _other_text(report) if report.other_text_file else None
        self.benchmarks = Benchmarks(report, kwargs["args"].seed) if report.lm_eval_tasks else None
        super().__init__(*args, **kwargs)
        # By domain, the tokens whose loss is measured.
        self.other: dict[str, list[tuple[Tensor, Tensor]]] = {}
        if text is not None:
            self.other["other_text"] = [(ids, ids) for ids in self._other("other_text_file", text_stretches, text)]
        if other_rows:
            self.other["other_dataset"] = self._other("other_dataset", answer_tokens, other_rows)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; before TRL 1.14 its scripts do not say where to resume."""
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def train_from(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        """Train between two measurements; the model is saved before the second one, and then `eval.json` written."""
        self.measured, self.blends, self.shown = {}, {}, {}
        self._blended = self._saved = False
        blend = self._begin_blend()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.add_callback(_MeasuresFirst(self))
        else:
            self.create_optimizer()  # what it refuses is known before anything is measured
            self.measured["before"] = self.measure(0)
        output = super().train_from(checkpoint, *args, **kwargs)
        self.remove_callback(_MeasuresFirst)
        if blend is not None:
            blend.apply(self.report_arguments.blend, self.optimizer)
        self.save_model(_internal_call=True)
        self._saved = True
        if blend is not None:
            self._measure_blends(blend)
        self.measured["after"] = self.measure() if blend is None else self.blends[self.report_arguments.blend]
        if self.is_world_process_zero():
            path, summary = Path(self.args.output_dir) / EVALUATION, self.run_summary()
            with recording(repr(str(path))):
                write_json(path, summary)
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, but TRL's scripts ask for what `train_from` has saved; a push is one of what is there."""
        again = self._saved and output_dir == self.args.output_dir and not self.args.push_to_hub
        if not again:
            super().save_model(output_dir, _internal_call)

    def end(self) -> None:
        """As `Trainer.end`, with nothing left of DDP's wrapper.

        A wrapper that outlives its process group waits for gloo's threads with the interpreter locked, and one of
        them may need it to finish (pytorch#56297): a command that was done would hang.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()
        super().end()

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, of training: what is measured of blends is none of its steps."""
        if not self._blended:
            super().log(logs, *args, **kwargs)

    def _begin_blend(self) -> Blend | None:
        """What remembers the weights that training begins with, before those of a checkpoint are read."""
        if not wants_blend(self.report_arguments):
            return None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("blend and blend_shares need whole parameters: not under FSDP or DeepSpeed, use DDP")
        return Blend(self.model)

    def _measure_blends(self, blend: Blend) -> None:
        """Of the trained model, which is logged as ever, then of all shares asked for; leaves the one that stays."""
        last = self.report_arguments.blend
        for share in sorted({1.0, last, *(self.report_arguments.blend_shares or ())}, reverse=True):
            blend.apply(share, self.optimizer)
            self._blended = share != 1  # what was logged of the trained model is not true of others
            self.blends[share] = self.measure(share)
        self._blended = False
        if share != last:
            blend.apply(last, self.optimizer)

    def measure(self, share: float = 1.0) -> Measures:
        """What the model can do now, with `share` of what training changes."""
        measures = {"task": self.measure_task()}
        if self.questions:
            answers, values = self.answers(self.questions)
            self.shown[share] = answers[:SHOWN]
            measures["task"].update(values)
        for domain, rows in self.other.items():
            with self.accelerator.autocast():  # as the evaluation loss
                loss = token_loss(self.model, rows)
            measures[domain] = {"loss": loss, "perplexity": perplexity(loss)}
        if self.other_questions:
            measures["other_dataset"].update(self.answers(self.other_questions)[1])
        if self.benchmarks is not None:
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            options = {"batch_size": self.args.per_device_eval_batch_size}
            options["precision"] = self.accelerator.mixed_precision
            measures.update(self.benchmarks.measure(self.model, tokenizer, **options))
        return {domain: values for domain, values in measures.items() if values}

    def measure_task(self) -> dict[str, float]:
        """What it can do of its task, by metric; the first one says what was learnt (see `evaluation.PROGRESS`)."""
        values = {}
        if self.eval_dataset is not None:
            loss = self.evaluation()["eval_loss"]
            values = {"loss": loss, "perplexity": perplexity(loss)}
        return values

    def task_questions(self, eval_dataset: Any) -> list[dict]:
        """Rows of the evaluation data to generate answers to, for `measure_task`; before a model is loaded."""
        count = self.report_arguments.exact_match_samples
        rows = list(islice(eval_dataset, count)) if eval_dataset is not None else []
        try:
            prompts_and_answers(rows)
        except ValueError as error:
            raise ValueError(f"exact_match_samples: {error}") from None
        return rows

    def answers(self, rows: list[dict]) -> tuple[list[str], dict[str, float]]:
        """What the model answers to chat rows, and the share of them that it answers as they do."""
        options = {"max_new_tokens": self.report_arguments.max_new_tokens}
        options["template_kwargs"] = getattr(self, "chat_template_kwargs", None)  # GRPO's
        with self.accelerator.autocast():
            answers = generate_answers(self.model, self.processing_class, rows, **options)
        return answers, {"exact_match": exact_match(answers, rows)}

    def examples(self) -> list[dict[str, str]]:
        """The first questions, with their `reference` answers and the model's `before` and `after` training."""
        shown = self.questions[:SHOWN] if self.report_arguments.blend in self.shown else []
        before, after = (self.shown.get(share, [""] * SHOWN) for share in (0, self.report_arguments.blend))
        return [
            {"question": prompt[-1]["content"], "reference": reference, "before": before[i], "after": after[i]}
            for i, (prompt, reference) in enumerate(prompts_and_answers(shown))
        ]

    def run_summary(self) -> dict[str, Any]:
        """What `eval.json` holds; without its measurements while training is not over."""
        summary = super().run_summary()
        if "after" not in self.measured:
            return summary
        if self.blends:
            summary["blend"] = self.report_arguments.blend
            summary["blends"] = [{"share": share, **measures} for share, measures in sorted(self.blends.items())]
        before, after = self.measured["before"], self.measured["after"]
        gained = {domain: progress(before[domain], after[domain]) for domain in before}
        learnt = {"learnt": gained.pop("task")} if "task" in gained else {}
        lost = {domain: -gain for domain, gain in gained.items() if gain is not None}  # of benchmarks there is none
        forgotten = {"forgotten": lost} if lost else {}
        examples = {"examples": self.examples()} if self.questions else {}
        benchmarks = {"lm_eval": self.benchmarks.about} if self.benchmarks else {}
        return {**summary, **self.measured, **learnt, **forgotten, **examples, **benchmarks}

    def finish(self) -> None:
        """Print the table."""
        if self.is_world_process_zero():
            Console().print(self._table())
            if self.questions:
                Console().print(examples_table(self.examples()))
            if self.blends:
                Console().print(blend_table(self.blends))

    def _other(self, name: str, tokens: Callable[..., list], data: Any) -> list:
        """`tokens` of what the field `name` brought."""
        try:
            return tokens(self.processing_class, data)
        except ValueError as error:
            raise ValueError(f"{name}={getattr(self.report_arguments, name)!r}: {error}") from None

    def evaluation(self) -> dict[str, float]:
        """Metrics of the model as it is; the Trainer has often evaluated it at its last step already."""
        last = next((entry for entry in reversed(self.state.log_history) if "eval_loss" in entry), {})
        known = last.get("step") == self.state.global_step and not self.args.load_best_model_at_end
        if known and not self._blended:
            return last
        return self.evaluate()

    def _table(self) -> Table:
        title = f"{self.run_summary()['optimizer']['name']}, {self.state.global_step} steps"
        table = Table("", Column("before", justify="right"), Column("after", justify="right"), title=title)
        for row in table_rows(self.measured["before"], self.measured["after"]):
            table.add_row(escape(f"{row['domain']}: {row['measure']}"), row["before"], row["after"])
        summary = self.run_callback.summary
        if "spectrum_drift" in summary:
            measured, rotated = summary["measured_spectra"], summary["rotated_matrices"]
            of = f"{measured:,} of {rotated:,}" if measured < rotated else f"{rotated:,}"
            table.add_row(
                f"largest relative singular-value drift, {of} rotated matrices", "", f"{summary['spectrum_drift']:.1e}"
            )
        if "optimizer_share" in summary:
            table.add_row("share of the training time in the optimizer", "", f"{summary['optimizer_share']:.0%}")
        table.add_row("checkpoint", "", escape(str(self.args.output_dir)))
        return table


def examples_table(examples: list[dict[str, str]]) -> Table:
    """Questions, and the answers before and after training."""
    columns = (Column(name, overflow="fold") for name in ("question", "reference", "before", "after"))
    table = Table(*columns, title="For example", show_lines=True)
    for example in examples:
        table.add_row(*(Text(str(text).strip()) for text in example.values()))
    return table


def blend_table(blends: dict[float, Measures]) -> Table:
    """What the model can do with a share of what training changed."""
    rows = {share: table_rows({}, measures) for share, measures in sorted(blends.items())}
    names = ["share", *(escape(f"{row['domain']}: {row['measure']}") for row in next(iter(rows.values())))]
    table = Table(*(Column(name, justify="right") for name in names), title="Shares of what training changed")
    for share, measured in rows.items():
        table.add_row(f"{share:g}", *(row["after"] for row in measured))
    return table


class _MeasuresFirst(TrainerCallback):
    """Measures when training begins, where a model can be used only once it is sharded, together with its optimizer.

    A run that goes on has its checkpoint's weights by then: it reads what was measured when it began, if that is there.
    """

    def __init__(self, trainer: ReportMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = Path(args.output_dir, BEFORE)
        self._trainer.measured["before"] = {}
        if state.global_step:
            with recording(f"what was measured before training, {str(path)!r},"):
                self._trainer.measured["before"] = read_json(path) or {}
            return
        self._trainer.measured["before"] = self._trainer.measure(0)
        if state.is_world_process_zero:
            with recording(repr(str(path))):
                write_json(path, self._trainer.measured["before"])


def wants_blend(report: ReportArguments) -> bool:
    """Whether other weights than the trained ones are wanted."""
    return report.blend != 1 or bool(report.blend_shares)


def check_report(args: transformers.TrainingArguments, report: ReportArguments) -> None:
    """Raise ValueError or FileNotFoundError, before anything is loaded, for a report that could not be made."""
    path = report.other_text_file
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"other_text_file: there is no file {path!r}")
    if report.exact_match_samples and args.eval_strategy == "no" and not report.other_dataset:
        raise ValueError("exact_match_samples needs evaluation data: set eval_strategy: epoch, and dataset_test_split")
    for name, shares in (("blend", [report.blend]), ("blend_shares", report.blend_shares or [])):
        for share in shares:
            if not 0 < share <= 1:
                raise ValueError(f"{name} is a share of what training changes, above 0 and up to 1, got {share}")
    check_benchmarks(report)
    if not args.output_dir:
        raise ValueError("output_dir is empty: name a folder")
    if fault := fault_of_place(args.output_dir):
        raise ValueError(f"output_dir={args.output_dir!r}: {fault}; choose another")


def _other_text(report: ReportArguments) -> str:
    try:
        return Path(report.other_text_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"other_text_file: cannot read {report.other_text_file!r} as UTF-8 text: {error}") from None


def _other_rows(report: ReportArguments) -> list[dict]:
    """Chat rows of the other domain, `OTHER_ROWS` or as many as are asked."""
    name, split = report.other_dataset, report.other_dataset_split
    try:
        splits = load_dataset(name)
        rows = list(islice(splits.get(split, ()), max(OTHER_ROWS, report.exact_match_samples)))
    except Exception as error:  # of the many readers behind it
        said = in_words(error.__cause__ or error) if isinstance(error, DatasetGenerationError) else in_words(error)
        raise ValueError(f"other_dataset: cannot load {name!r}: {said}") from None
    if split not in splits:
        raise ValueError(f"other_dataset_split: {unknown(f'split of {name!r}', split, splits)}")
    check_chats(splits[split], f"other_dataset={name!r}")
    try:
        prompts_and_answers(rows)
    except ValueError as error:
        raise ValueError(f"other_dataset={name!r}: {error}") from None
    return rows
