"""What a comparison found: figures of all runs from their folders, the best of every contender, and the table.

All of it is plain data (`compare.json`), so that a table can be made again from a record without its runs.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from pion_hf.cli.grid import Trial
from pion_hf.integrations.evaluation import PROGRESS
from pion_hf.integrations.model_card import in_words, number_format
from pion_hf.runs.folder import EVALUATION, FAILED, FINISHED, RECORD, read_evaluation, read_run
from pion_hf.runs.redaction import without_secrets

RECIPE, OUTPUT = "recipe.yaml", "train.log"  # of a run's folder, the first file and the last one
PLAIN_WIDTH = 240  # of tables where no terminal gives one
TAIL = 16384  # bytes of the latter, among which its last line is
DIVERGED, MISSING = "diverged", "not run"  # beside FINISHED and FAILED
TASK = "task"
MEASURED = ("spectrum_drift", "optimizer_share")  # of eval.json
DIVERGING = ("loss", "eval_loss", "grad_norm")  # of log.jsonl: not finite where a run was lost before it ended
RECORDED = ("seconds", "peak_memory_bytes")  # of run.json

Figures = dict[str, dict[str, float | None]]  # name -> mean and spread


def is_finished(folder: Path) -> bool:
    """Whether a run has been measured; nothing that follows changes what was found."""
    return (folder / EVALUATION).is_file()


def read_result(trial: Trial, folder: Path, state: str | None = None) -> dict[str, Any]:
    """What is known of a run: `status`, and if it is over the figures of its eval.json and run.json.

    state: Optuna's word for how its last attempt ended.
    """
    told = {"contender": trial.contender, "learning_rate": trial.learning_rate, "seed": trial.seed}
    if not is_finished(folder) and state not in ("COMPLETE", "FAIL"):
        return {**told, "status": MISSING}
    run = read_run(folder) if os.path.lexists(folder / RECORD) else None
    told |= {"folder": folder.name, "process_seconds": seconds(folder)}
    if run is not None:
        told |= {key: run.record[key] for key in RECORDED if key in run.record}
    if not is_finished(folder):
        lost = run is not None and not all(math.isfinite(v) for key in DIVERGING for v in run.series(key)[1])
        error = (state == "FAIL" and _last_line(folder / OUTPUT)) or f"no {EVALUATION}"
        return {**told, "status": DIVERGED if lost else FAILED, "error": without_secrets(error)}
    measured = read_evaluation(folder) or {}
    if not measured.get("before") or TASK not in (measured.get("after") or {}):
        raise ValueError(f"{str(folder)!r} is damaged: {EVALUATION} says nothing of before and after training")
    after = measured["after"]
    lost = any(value is None for values in after.values() for value in values.values())  # not finite
    told |= {"status": DIVERGED if lost else FINISHED, "before": measured["before"], "after": after}
    return told | {key: measured[key] for key in ("learnt", "forgotten", *MEASURED) if key in measured}


def seconds(folder: Path) -> float:
    """How long a run took with all that it loaded and measured, by its files."""
    written = [os.path.getmtime(folder / name) for name in (RECIPE, EVALUATION, OUTPUT) if (folder / name).exists()]
    return max(written, default=0.0) - min(written, default=0.0)


def standings(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every contender at its best learning rate: the one whose runs are best at the task in the mean over seeds.

    A rate counts if none of its runs diverged or failed. `interior` says whether worse ones were tried on both sides
    of it; `figures` are means and spreads, half the range, over `seeds` runs (see `comparable`); none without a rate
    that counts.
    """
    found = []
    for contender, group in _grouped(comparable(runs), "contender").items():
        points = rate_points(group)
        best = max(points, key=lambda point: point["score"], default=None)
        tried = [run["learning_rate"] for run in group if run["status"] in (FINISHED, DIVERGED)]
        place = {"contender": contender, "learning_rate": None, "interior": None, "seeds": 0, "figures": {}}
        if best is not None:
            rate = best["learning_rate"]
            place |= {key: best[key] for key in ("learning_rate", "seeds", "figures")}
            place["interior"] = min(tried) < rate < max(tried)
        found.append(place)
    return found


def comparable(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without finished runs of seeds that not every rate of every contender has: one seed is harder than another.

    While there is no seed that all have, all runs.
    """
    runs = list(runs)
    seeds: dict[tuple, set[int]] = {}
    for run in runs:
        if run["status"] == FINISHED:
            seeds.setdefault((run["contender"], run["learning_rate"]), set()).add(run["seed"])
    shared = set.intersection(*seeds.values()) if seeds else set()
    return [run for run in runs if not shared or run["status"] != FINISHED or run["seed"] in shared]


def rate_points(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of one contender, by rising learning rate: `learning_rate`, `seeds`, `figures` and `score`, higher is better.

    Rates at which a run diverged or failed, and those with no finished run, are left out.
    """
    points = []
    for rate, group in sorted(_grouped(runs, "learning_rate").items()):
        over = [run for run in group if run["status"] == FINISHED]
        if not over or any(run["status"] in (DIVERGED, FAILED) for run in group):
            continue
        metric = task_metric(over[0])
        figures = _figures(over)
        score = PROGRESS[metric] * figures[f"{TASK} {metric}"]["mean"]
        points.append({"learning_rate": rate, "seeds": len(over), "figures": figures, "score": score})
    return points


def task_metric(run: dict[str, Any]) -> str:
    """What says how good a finished run is at its task."""
    return next(metric for metric in PROGRESS if metric in run["after"][TASK])


def other_domains(record: dict[str, Any]) -> list[str]:
    """Domains whose loss was measured beside the task's."""
    after = next((run["after"] for run in record["runs"] if "after" in run), {})
    return [domain for domain in after if domain != TASK and "loss" in after[domain]]


def rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table of standings."""
    columns = _columns(record)
    cells = []
    for place in record["standings"]:
        rate, few = place["learning_rate"], 0 < place["seeds"] < record["seeds"]
        cells.append(
            [
                place["contender"] + (f" ({place['seeds']} of {record['seeds']} seeds)" if few else ""),
                "none finished" if rate is None else f"{rate:g}",
                {True: "yes", False: "no", None: ""}[place["interior"]],
                *(_shown(key, place["figures"].get(key)) for key in columns),
            ]
        )
    return ["contender", "learning rate", "interior", *columns.values()], cells


def table(record: dict[str, Any], *, plain: bool = False) -> Table:
    """The standings of a record. plain: Markdown, for what is no terminal."""
    headings, cells = rows(record)
    made = Table(title=None if plain else escape(title(record)), box=box.MARKDOWN if plain else box.ROUNDED)
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="right" if i else "left", no_wrap=plain)
    for row in cells:
        made.add_row(*map(escape, row))
    return made


def title(record: dict[str, Any]) -> str:
    """The recipe, and how often everything ran."""
    return f"{record['recipe']['path']}, {record['seeds']} seed{'s' if record['seeds'] > 1 else ''}"


def remarks(record: dict[str, Any]) -> list[str]:
    """What must be said beside the table: how figures were made, and which runs are missing from it."""
    runs = record["runs"]
    over = [run for run in runs if run["status"] == FINISHED]
    said = [f"{len(over)} of {len(runs)} runs finished."]
    if over:
        metric = task_metric(over[0])
        before = ", ".join(f"{heading} {_number(key, value)}" for key, heading, value in _before(record, over[0]))
        said[0] += (
            f" Each contender at the learning rate with the {'highest' if PROGRESS[metric] > 0 else 'lowest'} mean "
            f"{TASK} {metric}; interior: worse rates were tried on both sides of it."
        )
        said.append(f"Before training: {before}.")
        if any(place["seeds"] > 1 for place in record["standings"]):
            said.append("± is half the range over seeds.")
    for run in runs:
        if run["status"] in (DIVERGED, FAILED):
            why = f": {run['error']}" if "error" in run else ""
            where = f"{run['contender']}, learning rate {run['learning_rate']:g}, seed {run['seed']}"
            said.append(f"{run['status'].capitalize()}: {where}{why}")
    return said


def _grouped(runs: Iterable[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run[key], []).append(run)
    return groups


def _figures(runs: list[dict[str, Any]]) -> Figures:
    """Mean and spread over runs of everything measured after training, as `<domain> <metric>`, and of the rest."""
    values: dict[str, list[float]] = {}
    for run in runs:
        measured = {f"{domain} {metric}": v for domain, of in run["after"].items() for metric, v in of.items()}
        gains = {"learnt": run.get("learnt"), **{f"{d} forgotten": v for d, v in run.get("forgotten", {}).items()}}
        for key, value in {**measured, **gains, **{key: run.get(key) for key in (*MEASURED, *RECORDED)}}.items():
            if value is not None:
                values.setdefault(key, []).append(value)
    return {key: {"mean": statistics.fmean(of), "spread": (max(of) - min(of)) / 2} for key, of in values.items()}


def _columns(record: dict[str, Any]) -> dict[str, str]:
    """Figure -> heading, of those that some contender has."""
    there = set(itertools.chain.from_iterable(place["figures"] for place in record["standings"]))
    losses = {f"{domain} loss": f"{in_words(domain)} loss" for domain in other_domains(record)}
    headings = {
        f"{TASK} reward": "task reward",
        f"{TASK} loss": "task loss",
        f"{TASK} exact_match": "exact match",
        **losses,
        "spectrum_drift": "drift",
        "seconds": "seconds",
        "peak_memory_bytes": "peak memory",
    }
    return {key: heading for key, heading in headings.items() if key in there}


def _shown(key: str, figure: dict[str, float] | None) -> str:
    if figure is None:
        return ""
    shown = _number(key, figure["mean"])
    spread = figure["spread"] if key not in (*MEASURED, *RECORDED) else 0.0
    return f"{shown} ± {_number(key, spread)}" if spread else shown


def _number(key: str, value: float) -> str:
    if key == "peak_memory_bytes":
        return f"{value / 2**30:.2f} GiB"
    forms = {"spectrum_drift": "{:.0e}", "seconds": "{:.0f}"}
    return forms.get(key, number_format(key.rpartition(" ")[2])).format(value)


def _before(record: dict[str, Any], run: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Key, heading and value of the table's figures before training, by a run; seeds do not change them."""
    for key, heading in _columns(record).items():
        domain, _, metric = key.rpartition(" ")
        if run["before"].get(domain, {}).get(metric) is not None:
            yield key, heading, run["before"][domain][metric]


def _last_line(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
