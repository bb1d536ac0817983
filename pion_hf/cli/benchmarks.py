"""What lm-evaluation-harness measures of a model in memory: the tasks of `lm_eval_tasks`."""

from __future__ import annotations

import copy
import fnmatch
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pion_hf.cli.faults import in_words, is_of_user
from pion_hf.cli.flags import ReportArguments
from pion_hf.errors import unknown
from pion_hf.integrations.evaluation import Measures, evaluating, keeping_random_numbers
from pion_hf.needs import require

BOOTSTRAP = 1_000  # resamplings for the standard errors that no formula gives: lm_eval's 100,000 can take minutes
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # accelerate's words


class Benchmarks:
    """The tasks of `lm_eval_tasks` with their data, read once: what is missing is missed before training.

    Every process measures all of them, as it measures what else the report asks for.
    """

    def __init__(self, report: ReportArguments, seed: int) -> None:
        (self._manager, self._tasks), self._seed = _load(report), seed
        self._options = {
            "limit": report.lm_eval_limit,
            "num_fewshot": report.lm_eval_num_fewshot,
            "apply_chat_template": report.lm_eval_apply_chat_template,
        }
        self.about: dict[str, Any] = {}  # of the last measurement: lm_eval's version, options, what was asked

    def measure(self, model: nn.Module, tokenizer: Any, *, batch_size: int, precision: str) -> Measures:
        """What `model` can do: a domain for every task; where a group adds its tasks up, one for the group.

        precision: that of the evaluation, in accelerate's words.
        """
        import lm_eval

        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        options = {"batch_size": batch_size, "mixed_precision_dtype": PRECISIONS.get(precision)}
        with evaluating(model), keeping_random_numbers():
            found = lm_eval.simple_evaluate(
                _wrapped(model, copy.deepcopy(tokenizer), **options),  # which may get another padding
                tasks=self._tasks,
                task_manager=self._manager,  # or it would make one that lists all its tasks
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
                **self._options,
                **dict.fromkeys(seeds, self._seed),
            )
        if found is None:  # not the process that reports
            return {}
        self.about = {"version": lm_eval.__version__, **self._options, "tasks": _about(found)}
        summed = {task for group in found.get("groups", ()) for task in found["group_subtasks"][group]}
        values = {name: _values(of) for name, of in found["results"].items() if name not in summed}
        return {f"lm_eval/{name}": of for name, of in values.items() if of}


def check_benchmarks(report: ReportArguments) -> None:
    """Raise ValueError, FileNotFoundError or ImportError for what can be told before anything is loaded."""
    if report.lm_eval_tasks:
        require("lm_eval")
        path = report.lm_eval_include_path
        if path is not None and not Path(path).is_dir():
            raise FileNotFoundError(f"lm_eval_include_path: there is no folder {path!r}")
        return
    for name, value in vars(report).items():
        if name.startswith("lm_eval_") and value not in (None, False):
            raise ValueError(f"{name} does nothing without lm_eval_tasks: set that too, or leave {name} out")


def _load(report: ReportArguments) -> tuple[Any, list[Any]]:
    """lm_eval's manager of tasks; tasks and groups, with their data."""
    from lm_eval.tasks import TaskManager

    names = [name.strip() for words in report.lm_eval_tasks for name in words.split(",") if name.strip()]
    # lm_eval reads thousands of task files to know their names: not where the folder has all that is asked for.
    manager = TaskManager(include_path=report.lm_eval_include_path, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=report.lm_eval_include_path)
    tasks = []
    for name in names:
        matching = fnmatch.filter(manager.all_tasks, name)
        if not matching:
            raise ValueError(f"lm_eval_tasks: {unknown('task of lm_eval', name, manager.all_tasks)}")
        for match in matching:
            try:
                found = manager.load(match)
            except Exception as error:
                if is_of_user(error):  # a function that a task file of theirs names
                    raise
                raise ValueError(f"lm_eval_tasks: cannot load {match!r}: {in_words(error)}") from error
            unsafe = next((task for task, of in found["tasks"].items() if getattr(of, "UNSAFE_CODE", False)), None)
            if unsafe:
                raise ValueError(f"lm_eval_tasks: {unsafe!r} runs what the model writes: leave it out")
            tasks += [found["groups"][match]] if match in found["groups"] else found["tasks"].values()
    return manager, tasks


def _wrapped(model: nn.Module, tokenizer: Any, **options: Any) -> Any:
    """`model` as lm_eval takes it, which would tie weights that adapters have untied, and warn that it is in memory."""
    from lm_eval.models.huggingface import HFLM

    logger = logging.getLogger(HFLM.__module__)
    model.tie_weights, logger.disabled = lambda: None, True
    try:
        return HFLM(pretrained=model, tokenizer=tokenizer, **options)
    finally:
        logger.disabled = False
        del model.tie_weights


def _about(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of every task its version, the worked examples before a question, and how many questions were asked."""
    asked = {name: count["effective"] for name, count in found["n-samples"].items()}
    return {
        name: {"version": found["versions"][name], "num_fewshot": found["n-shot"][name], "questions": count}
        for name, count in asked.items()
    }


def _values(results: dict[str, Any]) -> dict[str, float]:
    """Figures under lm_eval's own names, `metric,filter`, without the filter that does nothing."""
    figures = {key: value for key, value in results.items() if "," in key and isinstance(value, (int, float))}
    return {key.removesuffix(",none"): float(value) for key, value in figures.items()}
