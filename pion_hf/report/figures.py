"""Pictures of the logs of runs and of what came of them: each takes a list of runs, and is None without data for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pion_hf.integrations.evaluation import progress
from pion_hf.integrations.model_card import in_words
from pion_hf.report.style import (
    COLOURS,
    STYLES,
    LineStyle,
    add_legend,
    line_styles,
    log_scale,
    new_figure,
    numbered,
    plain,
    run_handles,
    styled,
)
from pion_hf.runs.folder import Run

FEW = 15  # points or fewer are marked


class Picture(NamedTuple):
    """A figure, what it shows for those who cannot see it, and what must be said beside it."""

    figure: Figure
    alt: str
    notes: tuple[str, ...] = ()


class Line(NamedTuple):
    """A quantity that a run logged."""

    run: int
    name: str
    steps: list[int]
    values: list[float]


class Point(NamedTuple):
    """What a run, or a share of what it changed, learnt of the task and forgot of a domain; both are finite."""

    run: int
    label: str
    learnt: float
    domain: str
    forgotten: float


@styled
def angles(runs: Sequence[Run]) -> Picture | None:
    """Mean and largest rotation angle of the matrices, on the side of the inputs and of the outputs, against steps."""
    sides = {
        f"angle {side}, radians": {f"angle_{side}/mean": "mean", f"angle_{side}/max": "largest"}
        for side in ("in", "out")
    }
    return _against_steps(runs, sides, "the mean and the largest rotation angle of a step")


@styled
def drift(runs: Sequence[Run]) -> Picture | None:
    """The largest change of a singular value, and the error of the rotations, against steps."""
    kinds = {
        "spectrum drift": {"spectrum_drift": "drift"},
        "orthogonality error": {"orthogonality_error": "error"},
    }
    picture = _against_steps(runs, kinds, "the drift of the spectrum")
    last = [(name, run.series("spectrum_drift")[1]) for name, run in zip(numbered(runs), runs, strict=True)]
    said = "; ".join(f"{name}: {values[-1]:.1e}" for name, values in last if values)
    return picture._replace(alt=f"{picture.alt} At the end: {said}.") if said else picture


@styled
def learnt_and_forgotten(runs: Sequence[Run]) -> Picture | None:
    """What was learnt beside what was forgotten: bars for a run, points for several."""
    known = {i: run for i, run in enumerate(runs) if run.learnt is not None}
    if not known:
        return None
    task = f"learnt: task ({_unit(next(iter(known.values())))})"
    if len(runs) == 1:
        rows = {f"{task} {runs[0].learnt:+.4f}": (runs[0].learnt, COLOURS[0])}
        for domain, value in runs[0].forgotten.items():
            said = "NaN" if value is None else f"{value:+.4f}"
            rows[f"forgotten: {in_words(domain)} (loss, nats) {said}"] = (value or 0.0, COLOURS[1])
        return Picture(_bars(rows, "change by training"), f"Bars: {'; '.join(rows)}.")
    points = [
        Point(i, str(i + 1), run.learnt, domain, value)
        for i, run in known.items()
        for domain, value in run.forgotten.items()
        if value is not None
    ]
    if not points:  # nothing but the task was measured: a bar for each
        names, styles = numbered(runs), line_styles(runs)
        bars = {f"{names[i]}: {run.learnt:+.4f}": (run.learnt, styles[i].colour) for i, run in known.items()}
        return Picture(_bars(bars, task), "Bars of what was learnt of the task.")
    said = [f"{p.label}: learnt {p.learnt:.3f}, forgotten {p.forgotten:.3f} ({in_words(p.domain)})" for p in points]
    return Picture(_plane(runs, points, task), f"Points of what was learnt and forgotten. {'; '.join(said)}.")


@styled
def blends(runs: Sequence[Run]) -> Picture | None:
    """What is learnt and what is forgotten with a share of what training changed, a line for a run."""
    points = [point for i, run in enumerate(runs) for point in _shares(i, run.evaluation or {})]
    if not points:
        return None
    said = "; ".join(
        f"{'' if len(runs) == 1 else f'{p.run + 1}: '}{p.label} learns {p.learnt:.3f} and forgets {p.forgotten:.3f}"
        for p in points
    )
    figure = _plane(runs, points, f"learnt: task ({_unit(runs[points[0].run])})")
    return Picture(figure, f"Lines of what is learnt and forgotten by the share of the change: {said}.")


def diverged(run: Run) -> int | None:
    """The first step whose training or evaluation loss is NaN."""
    steps = [
        step
        for key in ("loss", "eval_loss")
        for step, value in zip(*run.series(key), strict=True)
        if not math.isfinite(value)
    ]
    return min(steps, default=None)


def _lines(runs: Sequence[Run], keys: Mapping[str, str]) -> list[Line]:
    """What the runs logged under these keys, which have these names."""
    found = (Line(i, name, *run.series(key)) for key, name in keys.items() for i, run in enumerate(runs))
    return [line for line in found if line.steps]


def _against_steps(runs: Sequence[Run], panels: Mapping[str, Mapping[str, str]], what: str) -> Picture | None:
    """A panel, its scale logarithmic, for every y label whose quantities (key, name) were logged. Of one run the
    quantities have colours; of several the runs have.

    Then the quantities of a panel, if there are several, have line styles.
    """
    series = {kind: lines for kind, keys in panels.items() if (lines := _lines(runs, keys))}
    if not series:
        return None
    alone, found, notes = len(runs) == 1, line_styles(runs), []
    figure = new_figure(2.5 if len(series) == 1 else 0.6 + 1.8 * len(series))
    grid = figure.subplots(len(series), sharex=True, squeeze=False)[:, 0]
    name_handles: dict[str, Line2D] = {}
    by_name = any(len({line.name for line in lines}) > 1 for lines in series.values())
    for axes, (kind, lines) in zip(grid, series.items(), strict=True):
        quantities = list(dict.fromkeys(line.name for line in lines))
        for line in lines:
            k = quantities.index(line.name)
            drawn = LineStyle(line.name, COLOURS[k % len(COLOURS)], "-", "o") if alone else found[line.run]
            if by_name:
                drawn = drawn._replace(style=STYLES[k % len(STYLES)])
                colour = drawn.colour if alone else "#666666"
                name_handles[line.name] = Line2D([], [], color=colour, linestyle=drawn.style, label=plain(line.name))
            if _draw(axes, drawn, line):
                notes.append("A cross is the last number before NaN.")
        axes.set_ylabel(plain(kind))
        log_scale(axes)
    last = max((entry["step"] for run in runs for entry in run.logs), default=0)
    grid[-1].set_xlim(-0.02 * last, max(1.02 * last, 1))  # the same for all that was logged, if at a few steps only
    grid[-1].set_xlabel("optimizer step")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    shown = sorted({line.run for lines in series.values() for line in lines})
    handles = [] if alone else run_handles([found[i] for i in shown], styles=not by_name)
    if by_name:
        handles += name_handles.values()
    add_legend(figure, handles)
    alt = f"Lines of {what} against the step, for {', '.join(numbered(runs))}."
    return Picture(figure, alt, tuple(dict.fromkeys(notes)))


def _draw(axes: Axes, drawn: LineStyle, line: Line) -> bool:
    """Draw a line, and a cross where it ends because what follows is NaN; whether it does."""
    marker = {"marker": drawn.marker} if len(line.steps) <= FEW else {}
    axes.plot(line.steps, line.values, drawn.style, color=drawn.colour, **marker)
    lost = next((i for i, value in enumerate(line.values) if not math.isfinite(value)), None)
    if lost:
        end = line.steps[lost - 1], line.values[lost - 1]
        axes.plot(*end, "x", color=drawn.colour, markersize=9, markeredgewidth=2)
    return lost is not None


def _unit(run: Run) -> str:
    return "reward" if "reward" in (run.evaluation.get("after") or {}).get("task", {}) else "loss, nats"


def _shares(run: int, evaluation: dict) -> Iterator[Point]:
    """Of every share and domain that were measured."""
    before = evaluation.get("before") or {}
    for blend in evaluation.get("blends") or []:
        measured = {domain: values for domain, values in blend.items() if domain != "share"}
        gains = {d: progress(before.get(d, {}), of) for d, of in measured.items() if None not in of.values()}
        learnt = gains.pop("task", None)
        for domain, gain in gains.items():
            if learnt is not None and gain is not None:
                yield Point(run, f"{blend.get('share') or 0.0:g}", learnt, domain, -gain)


def _plane(runs: Sequence[Run], points: Sequence[Point], task: str) -> Figure:
    """A panel for every domain, what was learnt to the right, what was forgotten above; a line joins a run's points."""
    found, domains = line_styles(runs), list(dict.fromkeys(point.domain for point in points))
    figure = new_figure(0.7 + 2.5 * len(domains))
    grid = figure.subplots(len(domains), sharex=True, squeeze=False)[:, 0]
    for axes, domain in zip(grid, domains, strict=True):
        for i, look in enumerate(found):
            of_run = [point for point in points if (point.run, point.domain) == (i, domain)]
            if not of_run:
                continue
            xs, ys = [point.learnt for point in of_run], [point.forgotten for point in of_run]
            style = look.style if len(of_run) > 1 else "none"
            marked = {"marker": look.marker, "markersize": 6}
            axes.plot(xs, ys, linestyle=style, color=look.colour, label=look.label, **marked)
            for point in of_run:
                place = point.learnt, point.forgotten
                axes.annotate(point.label, place, (5, -9), textcoords="offset points", fontsize=8.5)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.margins(0.15)
        axes.set_ylabel(f"forgotten: {plain(in_words(domain))}\n(loss, nats)")
        axes.set_title("better: to the right and down", loc="right", fontsize=8.5, color="#555555")
    grid[-1].set_xlabel(task)
    if len(runs) > 1:
        add_legend(figure, [handle for axes in grid for handle in axes.get_legend_handles_labels()[0]])
    return figure


def _bars(rows: Mapping[str, tuple[float, str]], label: str) -> Figure:
    """A bar for every row, the first on top, its own label above it: beside it there is no room on a phone."""
    figure = new_figure(0.7 + 0.5 * len(rows))
    axes = figure.add_subplot()
    for row, (said, (value, colour)) in enumerate(rows.items()):
        axes.barh(row, value, 0.45, color=colour)
        at = axes.get_yaxis_transform()  # from the left edge, whatever the sign of the bar
        axes.text(0.01, row - 0.28, plain(said), transform=at, fontsize=8.5, va="bottom")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_ylim(len(rows) - 0.6, -0.8)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label)
    return figure
