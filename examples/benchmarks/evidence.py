"""What is kept at the same exact match: every contender of evidence.yaml on tasks that are answered.

SmolLM2-135M-Instruct learns a task of reasoning-gym; a trial is a task, a contender, a rate, a seed and a length. It
measures the exact match of greedy answers to held-out questions and what is left of the base model: the loss on
unrelated text, loss and KL on the base model's own answers to general instructions, and the capitals of 104 countries;
and all that again for blends with the base model (evidence_trial.py). The protocol is docs/evidence.md.

Trials run in the order of evidence.yaml's stages. After a stage's own rates every sweep of one seed goes on by factors
of two until the lowest rate that answers as well as any (within 3 points) has a worse neighbour below, and the best one
a neighbour above. Finished trials are kept in results/evidence.json and not repeated, so that a run that was killed
goes on by the same command. `--show` prints the tables, `--picture` draws results/evidence.png; neither runs anything.

Shown is for every contender what is kept at the best exact match of AdamW (of a stage's `reference`, if it names one),
less the standard error of a difference of two: of its points that answer as well, and of the lines from one rate or
blend to the next where they cross that exact match, the one with the least KL.

Needs examples/prepare_smollm2.py and data/python_docs.txt (examples/prepare_reasoning.py).
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from pion_hf._version import __version__
from pion_hf.cli.frontier import RING
from pion_hf.report.style import add_legend, new_figure, styled, styles_of
from pion_hf.runs.folder import read_json, write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "evidence.json"
REFERENCE = "AdamW"  # whose best exact match is the one to match, where a stage names no other
KEPT = {  # losses and KL in nats per token
    "own_kl": "KL on own answers",
    "own_loss": "change of their loss",
    "other_text": "of other text's",
    "capitals": "of capitals known",
}
AS_WELL = 0.03  # of exact match
FURTHEST = 3  # rates that a sweep may add on either side

Place = tuple[float, str]  # a rate, and a share of the way
Measures = dict[str, float]


class Point(NamedTuple):
    """On the line from one place to another, `part` of the way along it."""

    start: Place
    end: Place
    part: float

    def measures(self, known: dict[Place, Measures]) -> Measures:
        start, end = known[self.start], known[self.end]
        return {key: (1 - self.part) * start[key] + self.part * end[key] for key in start}

    def __str__(self) -> str:
        return " to ".join(dict.fromkeys(f"{lr:g}" if share == "1" else f"{lr:g} x {share}" for lr, share in self[:2]))


class Ledger:
    """Finished trials, and the base model's measures by task."""

    def __init__(self) -> None:
        plan = yaml.safe_load((HERE / "evidence.yaml").read_text(encoding="utf-8"))
        self.contenders, self.stages = plan["contenders"], plan["stages"]
        self.record = read_json(RESULTS) or {"version": __version__, "base": {}, "trials": []}
        self.bench: Any = None

    def of(self, stage: dict, contender: str, seed: int) -> dict[Place, Measures]:
        """What was measured, rates and shares ascending."""
        wanted = {key: stage[key] for key in ("task", "steps", "questions")} | {"contender": contender, "seed": seed}
        trials = sorted((t for t in self.record["trials"] if wanted.items() <= t.items()), key=lambda t: t["lr"])
        return {(trial["lr"], share): measures for trial in trials for share, measures in trial["shares"].items()}

    def pooled(self, stage: dict, contender: str) -> dict[Place, Measures]:
        """Means over seeds, of places that all seeds have."""
        first, *others = (self.of(stage, contender, seed) for seed in stage["seeds"])
        return {
            place: {key: statistics.fmean(of[place][key] for of in (first, *others)) for key in measures}
            for place, measures in first.items()
            if all(place in of for of in others)
        }

    def wanted(self, stage: dict) -> float:
        """The reference's best exact match, less the standard error of a difference."""
        best = max(of_trained(self.pooled(stage, reference(stage))).values(), default=math.nan)
        return best - math.sqrt(2 * best * (1 - best) / stage["questions"] / len(stage["seeds"]))

    def todo(self, stage: dict) -> Iterator[tuple[str, float, int]]:
        """Trials that have not been run: the stage's own, then what the sweeps still want."""
        turns = itertools.zip_longest(*([(name, lr) for lr in rates] for name, rates in stage["rates"].items()))
        own = [trial for turn in turns for trial in turn if trial]  # everybody's first rate first
        for (name, lr), seed in itertools.product(own, stage["seeds"]):
            if (lr, "1") not in self.of(stage, name, seed):
                yield name, lr, seed
        for name, seed in itertools.product(stage["rates"], stage["seeds"] if len(stage["seeds"]) == 1 else ()):
            while (lr := next_rate(self.of(stage, name, seed), stage["rates"][name])) is not None:
                yield name, lr, seed

    def run(self, stage: dict) -> None:
        task, steps, questions = stage["task"], stage["steps"], stage["questions"]
        for name, lr, seed in self.todo(stage):
            if self.bench is None:
                from evidence_trial import Bench

                self.bench = Bench()
            key = {"task": task, "contender": name, "lr": lr, "seed": seed, "steps": steps, "questions": questions}
            if task not in self.record["base"]:
                self.record["base"][task] = self.bench.before(task)
            measured = self.bench.run(self.contenders[name], task, lr, seed, steps, questions)
            self.record["trials"].append({**key, **measured})
            write_json(RESULTS, self.record)
            tqdm.write(f"{key}: {measured['shares']['1']}, {measured['seconds']:.0f} s")


def reference(stage: dict) -> str:
    return stage.get("reference", REFERENCE)


def of_trained(known: dict[Place, Measures]) -> dict[float, float]:
    """Exact match by rate, without blends."""
    return {lr: measures["exact_match"] for (lr, share), measures in known.items() if share == "1"}


def next_rate(known: dict[Place, Measures], own: list[float]) -> float | None:
    """The rate that a sweep still needs; None where its best is interior, or it has gone far enough."""
    right = of_trained(known)
    best, lowest, highest = max(right.values()), min(right), max(right)
    if right[lowest] > best - AS_WELL and lowest > min(own) / 2**FURTHEST:
        return float(f"{lowest / 2:.6g}")
    if right[highest] == best and best < 1 - AS_WELL and highest < max(own) * 2**FURTHEST:
        return float(f"{highest * 2:.6g}")
    return None


# -- what is kept at the same exact match -----------------------------------------------------------------------------


def neighbours(known: dict[Place, Measures]) -> Iterator[tuple[Place, Place]]:
    """Places that follow each other along the shares of a rate, or along the rates at a share."""
    for which in (0, 1):
        for value in dict.fromkeys(place[which] for place in known):
            yield from itertools.pairwise(place for place in known if place[which] == value)


def at(known: dict[Place, Measures], wanted: float) -> Point | None:
    """Where a contender keeps most at the exact match `wanted`; None if it never answers so well."""
    found = [Point(place, place, 0.0) for place, measures in known.items() if measures["exact_match"] >= wanted]
    for start, end in neighbours(known):
        low, high = (known[place]["exact_match"] for place in (start, end))
        if min(low, high) < wanted < max(low, high):
            found.append(Point(start, end, (wanted - low) / (high - low)))
    return min(found, key=lambda point: point.measures(known)["own_kl"], default=None)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def at_seeds(ledger: Ledger, stage: dict, name: str, point: Point) -> list[Measures]:
    return [point.measures(ledger.of(stage, name, seed)) for seed in stage["seeds"]]


def table(ledger: Ledger, stage: dict) -> Table:
    """A row for every contender: where it answers as wanted at the least KL, and what is kept there."""
    before, wanted = ledger.record["base"][stage["task"]], ledger.wanted(stage)
    where = f"{wanted:.1%} (before: {before['exact_match']:.1%})"
    title = f"{stage['task']}, {stage['steps']} steps, at an exact match of {where}"
    made = Table(title=title, box=box.MARKDOWN)
    for heading in ("contender", "rates tried", "best match", "rate x share", *KEPT.values()):
        made.add_column(heading, justify="left" if heading in ("contender", "rate x share") else "right", no_wrap=True)
    rows = []
    for name in stage["rates"]:
        known = ledger.pooled(stage, name)
        if not known:
            continue
        best = max(measures["exact_match"] for measures in known.values())
        row = [name, " ".join(f"{lr:g}" for lr in of_trained(known)), f"{best:.1%}"]
        point = at(known, wanted)
        if point is None:
            rows.append((math.inf, [*row, "does not reach it"]))
            continue
        measured = at_seeds(ledger, stage, name, point)
        kept = [spread([measures[key] - before[key] for measures in measured]) for key in KEPT]
        rows.append((point.measures(known)["own_kl"], [*row, str(point), *kept]))
    for _, row in sorted(rows, key=lambda row: row[0]):
        made.add_row(*row)
    return made


def alike(stage: dict) -> tuple[int, int, int, str]:
    """Stages of which this is the same can stand side by side."""
    return stage["steps"], stage["questions"], len(stage["seeds"]), reference(stage)


def side_by_side(ledger: Ledger, stages: list[dict]) -> Table:
    """Every contender's KL and change of the loss of other text, at what each stage wants."""
    titles = [f"{stage['task']}, {ledger.wanted(stage):.1%}" for stage in stages]
    steps, questions, seeds, whose = alike(stages[0])
    title = f"{steps} steps, {questions} questions, {seeds} seeds, at the same exact match, that of {whose}"
    made = Table(title=title, box=box.MARKDOWN)
    for heading in ("contender", *(f"{title}: {word}" for title in titles for word in ("KL", "other text"))):
        made.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
    rows = []
    for name in dict.fromkeys(name for stage in stages for name in stage["rates"]):
        cells, kl = [], []
        for stage in stages:
            known, before = ledger.pooled(stage, name), ledger.record["base"][stage["task"]]
            point = at(known, ledger.wanted(stage))
            measured = [] if point is None else at_seeds(ledger, stage, name, point)
            kl.append(statistics.fmean(m["own_kl"] for m in measured) if measured else math.inf)
            found = [spread([m[key] - before[key] for m in measured]) for key in ("own_kl", "other_text") if measured]
            cells += found or (["does not reach it", ""] if known else ["not run", ""])
        if any(map(math.isfinite, kl)):
            rows.append((math.prod(x for x in kl if math.isfinite(x)), [name, *cells]))
    for _, row in sorted(rows, key=lambda row: row[0]):
        made.add_row(*row)
    return made


def every_trial(ledger: Ledger, stage: dict) -> Table:
    made = Table(box=box.MARKDOWN)
    for heading in (
        "contender",
        "rate",
        "seed",
        *(f"match / KL at {share}" for share in ("0.6", "0.8", "1")),
        "minutes",
    ):
        made.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
    for trial in ledger.record["trials"]:
        if all(trial[key] == stage[key] for key in ("task", "steps", "questions")) and trial["seed"] in stage["seeds"]:
            cells = [f"{m['exact_match']:.0%} / {m['own_kl']:.3f}" for m in trial["shares"].values()]
            minutes = f"{trial['seconds'] / 60:.1f}"
            made.add_row(trial["contender"], f"{trial['lr']:g}", str(trial["seed"]), *cells, minutes)
    return made


@styled
def picture(ledger: Ledger, stages: list[dict]) -> None:
    """Exact match against KL, a line for every rate through its shares of the way; means and spread of the seeds.

    Ringed is where each is compared. Of every task the stage with most seeds; a row of panels for every reference.
    """
    ranked = sorted(stages, key=lambda stage: (stage["questions"], len(stage["seeds"]), -stage["steps"]))
    rows: dict[str, dict[str, dict]] = {reference(stage): {} for stage in stages}
    for stage in ranked:
        rows[reference(stage)][stage["task"]] = stage
    shown = [(row, column, of[task]) for row, of in enumerate(rows.values()) for column, task in enumerate(sorted(of))]
    names = [name for name in ledger.contenders if any(ledger.pooled(stage, name) for *_, stage in shown)]
    figure = new_figure(4.2)
    columns = max(map(len, rows.values()))
    figure.set_size_inches(4.8 * columns, 3.6 * len(rows))
    handles = {}
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for axes in panels.flat:  # tasks may be measured for one reference alone
        axes.set_visible(False)
    for row, column, stage in shown:
        axes = panels[row, column]
        axes.set_visible(True)
        for style, name in zip(styles_of(names), names, strict=True):
            known = ledger.pooled(stage, name) if name in stage["rates"] else {}
            drawn = {"color": style.colour, "marker": style.marker, "capsize": 2}
            for rate in dict.fromkeys(rate for rate, _ in known):
                points = [Point(place, place, 0.0) for place in known if place[0] == rate]
                handles[name] = _errorbars(axes, ledger, stage, name, points, "-", **drawn)
                handles[name].set_label(name)
            point = at(known, ledger.wanted(stage))
            if point is not None:
                _errorbars(axes, ledger, stage, name, [point], "o", **RING)
        axes.axvline(ledger.wanted(stage), color="black", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.set_title(f"{stage['task']}, at what {reference(stage)} answers; seeds: {len(stage['seeds'])}")
        axes.set_xlabel("exact match")
    for axes in panels[:, 0]:
        axes.set_ylabel("KL to the base model on its own answers")
    add_legend(figure, list(handles.values()))
    figure.savefig(RESULTS.with_suffix(".png"), dpi=150)


def _errorbars(axes: Any, ledger: Ledger, stage: dict, name: str, points: list[Point], form: str, **drawn: Any) -> Any:
    """Means of the seeds at these points, and their standard deviations."""
    found = [at_seeds(ledger, stage, name, point) for point in points]
    means, spreads = (
        {k: [of([m[k] for m in seeds]) for seeds in found] for k in ("exact_match", "own_kl")}
        for of in (statistics.fmean, lambda values: statistics.stdev(values) if len(values) > 1 else 0.0)
    )
    bars = {"xerr": spreads["exact_match"], "yerr": spreads["own_kl"]}
    line, *_ = axes.errorbar(means["exact_match"], means["own_kl"], fmt=form, **bars, **drawn)
    return line


def together(stages: list[dict]) -> list[dict]:
    """Stages that differ in who is compared are one."""
    found: dict[str, dict] = {}
    for stage in stages:
        key = str({name: value for name, value in stage.items() if name != "rates"})
        found.setdefault(key, {**stage, "rates": {}})["rates"].update(stage["rates"])
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="run nothing, print the tables")
    parser.add_argument("--picture", action="store_true", help="run nothing, draw the picture")
    chosen = parser.parse_args()
    ledger = Ledger()
    if not (chosen.show or chosen.picture):
        for stage in ledger.stages:
            ledger.run(stage)
    measured = [stage for stage in together(ledger.stages) if ledger.pooled(stage, reference(stage))]
    if not measured:
        raise SystemExit("no finished trials of a reference to show")
    if chosen.picture:
        picture(ledger, measured)
    for kind in dict.fromkeys(map(alike, measured)):
        Console(width=200).print(side_by_side(ledger, [stage for stage in measured if alike(stage) == kind]))
    for stage in measured:
        Console(width=200).print(table(ledger, stage))
        Console(width=200).print(every_trial(ledger, stage))
    seconds = [trial["seconds"] for trial in ledger.record["trials"]]
    print(f"{len(seconds)} trials, {sum(seconds) / 3600:.1f} hours")


if __name__ == "__main__":
    main()
