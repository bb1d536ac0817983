"""Pictures of the logs of runs and of what came of them: each takes a list of runs, and is None without data for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pion_hf.integrations.evaluation import progress
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


@styled
def angles(runs: Sequence[Run]) -> Picture | None:
    """Mean and largest rotation angle of the matrices, on the side of the inputs and of the outputs, against steps."""
    sides = {
        f"angle {side}, radians": {f"angle_{side}/mean": "mean", f"angle_{side}/max": "largest"}
        for side in ("in", "out")
    }
    picture = _against_steps(runs, {side: _lines(runs, keys) for side, keys in sides.items()})
    return picture and picture._replace(alt=_alt("the mean and the largest rotation angle of a step", runs))


@styled
def drift(runs: Sequence[Run]) -> Picture | None:
    """The largest change of a singular value, and the error of the rotations, against steps."""
    kinds = {
        "spectrum drift": {"spectrum_drift": "drift"},
        "orthogonality error": {"orthogonality_error": "error"},
    }
    picture = _against_steps(runs, {kind: _lines(runs, keys) for kind, keys in kinds.items()})
    if picture is None:
        return None
    last = [(name, run.series("spectrum_drift")[1]) for name, run in zip(numbered(runs), runs, strict=True)]
    said = "; ".join(f"{name}: {values[-1]:.1e}" for name, values in last if values)
    return picture._replace(alt=_alt("the drift of the spectrum", runs) + (f" At the end: {said}." if said else ""))


@styled
def learnt_and_forgotten(runs: Sequence[Run]) -> Picture | None:
    """What was learnt beside what was forgotten: bars for a run, points for several."""
    known = [(i, run.evaluation) for i, run in enumerate(runs) if _number(run.evaluation, "learnt") is not None]
    if not known:
        return None
    return _bars_of_one(known[0][1]) if len(runs) == 1 else _points_of_several(runs, known)


@styled
def blends(runs: Sequence[Run]) -> Picture | None:
    """What is learnt and what is forgotten with a share of what training changed, a line for a run."""
    known = {i: _shares(run.evaluation) for i, run in enumerate(runs)}
    known = {i: points for i, points in known.items() if points}
    if not known:
        return None
    found, domains = line_styles(runs), list(dict.fromkeys(d for points in known.values() for _, _, d, _ in points))
    figure = new_figure(0.7 + 2.6 * len(domains))
    grid = figure.subplots(len(domains), sharex=True, squeeze=False)[:, 0]
    for axes, domain in zip(grid, domains, strict=True):
        for i, points in known.items():
            of = [(share, learnt, forgotten) for share, learnt, d, forgotten in points if d == domain]
            drawn = found[i]
            axes.plot(
                [p[1] for p in of],
                [p[2] for p in of],
                drawn.style,
                marker=drawn.marker,
                color=drawn.colour,
            )
            for share, x, y in of:
                axes.annotate(f"{share:g}", (x, y), (5, -9), textcoords="offset points", fontsize=8.5)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.margins(0.12)
        axes.set_ylabel(f"forgotten: {plain(domain.replace('_', ' '))}\n(loss, nats)")
        axes.set_title("better: to the right and down", loc="right", fontsize=8.5, color="#555555")
    grid[-1].set_xlabel(f"learnt: task ({_unit(runs[next(iter(known))].evaluation)})")
    if len(runs) > 1:
        add_legend(figure, run_handles([found[i] for i in known], styles=False))
    said = "; ".join(
        f"{'' if len(runs) == 1 else f'{i + 1}: '}{share:g} learns {learnt:.3f} and forgets {forgotten:.3f}"
        for i, points in known.items()
        for share, learnt, _, forgotten in points
    )
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


def _against_steps(runs: Sequence[Run], series: Mapping[str, list[Line]]) -> Picture | None:
    """A panel, its scale logarithmic, for every y label that has lines. Of one run the quantities have colours; of
    several the runs have.

    Then the quantities of a panel, if there are several, have line styles.
    """
    series = {kind: lines for kind, lines in series.items() if lines}
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
    return Picture(figure, "", tuple(dict.fromkeys(notes)))


def _draw(axes: Axes, drawn: LineStyle, line: Line) -> bool:
    """Draw a line, and a cross where it ends because what follows is NaN; whether it does."""
    marker = {"marker": drawn.marker} if len(line.steps) <= FEW else {}
    axes.plot(line.steps, line.values, drawn.style, color=drawn.colour, **marker)
    lost = next((i for i, value in enumerate(line.values) if not math.isfinite(value)), None)
    if lost:
        end = line.steps[lost - 1], line.values[lost - 1]
        axes.plot(*end, "x", color=drawn.colour, markersize=9, markeredgewidth=2)
    return lost is not None


def _alt(what: str, runs: Sequence[Run]) -> str:
    return f"Lines of {what} against the step, for {', '.join(numbered(runs))}."


def _number(evaluation: dict | None, key: str) -> float | None:
    """A finite number of `eval.json`, or None."""
    value = (evaluation or {}).get(key)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _unit(evaluation: dict) -> str:
    return "reward" if "reward" in (evaluation.get("after") or {}).get("task", {}) else "loss, nats"


def _shares(evaluation: dict | None) -> list[tuple[float, float, str, float]]:
    """`(share, learnt, domain, forgotten)` of every share and domain that were measured, finite ones."""
    found = []
    for blend in (evaluation or {}).get("blends") or []:
        moments = [{d: m for d, m in part.items() if d != "share"} for part in (evaluation.get("before") or {}, blend)]
        gains = {d: progress(moments[0].get(d, {}), m) for d, m in moments[1].items() if None not in m.values()}
        learnt = gains.pop("task", None)
        if learnt is not None:
            found += [(blend.get("share") or 0.0, learnt, d, -gain) for d, gain in gains.items() if gain is not None]
    return found


def _bars_of_one(evaluation: dict) -> Picture:
    learnt, forgotten = evaluation["learnt"], evaluation.get("forgotten") or {}
    rows = {f"learnt: task ({_unit(evaluation)}) {learnt:+.4f}": (learnt, COLOURS[0])}
    for domain in forgotten:
        value = _number(forgotten, domain)
        said = "NaN" if value is None else f"{value:+.4f}"
        rows[f"forgotten: {domain.replace('_', ' ')} (loss, nats) {said}"] = (value or 0.0, COLOURS[1])
    figure = new_figure(0.7 + 0.5 * len(rows))
    axes = figure.add_subplot()
    _bars(axes, rows)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change by training")
    return Picture(figure, f"Bars: {'; '.join(rows)}.")


def _points_of_several(runs: Sequence[Run], known: list[tuple[int, dict]]) -> Picture | None:
    found = line_styles(runs)
    domains = list(dict.fromkeys(d for _, e in known for d in e.get("forgotten") or {}))
    if not domains:  # nothing but the task was measured: a bar for each
        figure = new_figure(0.9 + 0.4 * len(known))
        axes = figure.add_subplot()
        names = numbered(runs)
        _bars(axes, {f"{names[i]}: {e['learnt']:+.4f}": (e["learnt"], found[i].colour) for i, e in known})
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(f"learnt: task ({_unit(known[0][1])})")
        return Picture(figure, "Bars of what was learnt of the task.")
    figure = new_figure(0.7 + 2.3 * len(domains))
    grid = figure.subplots(len(domains), sharex=True, squeeze=False)[:, 0]
    said = []
    for axes, domain in zip(grid, domains, strict=True):
        for i, evaluation in known:
            y = _number(evaluation.get("forgotten"), domain)
            if y is None:
                continue
            drawn, x = found[i], evaluation["learnt"]
            axes.plot(x, y, drawn.marker, color=drawn.colour, markersize=7, linestyle="none")
            axes.annotate(str(i + 1), (x, y), (5, 4), textcoords="offset points", fontsize=8.5)
            said.append(f"{i + 1}: learnt {x:.3f}, forgotten {y:.3f} ({domain.replace('_', ' ')})")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.margins(0.15)
        axes.set_ylabel(f"forgotten: {plain(domain.replace('_', ' '))}\n(loss, nats)")
        axes.set_title("better: to the right and down", loc="right", fontsize=8.5, color="#555555")
    grid[-1].set_xlabel(f"learnt: task ({_unit(known[0][1])})")
    shown = [found[i] for i, _ in known]
    add_legend(
        figure, [Line2D([], [], color=k.colour, marker=k.marker, linestyle="none", label=k.label) for k in shown]
    )
    return Picture(figure, f"Points of what was learnt and what was forgotten. {'; '.join(said)}.")


def _bars(axes: Axes, rows: Mapping[str, tuple[float, str]]) -> None:
    """A bar for every row, its label above it: beside it there is no room on a phone."""
    for row, (value, colour) in enumerate(rows.values()):
        axes.barh(row, value, 0.45, color=colour)
    _row_labels(axes, list(rows))


def _row_labels(axes: Axes, labels: list[str]) -> None:
    axes.set_ylim(len(labels) - 0.6, -0.8)  # the first on top
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    for row, label in enumerate(labels):  # at the left edge, whatever the sign of the bar
        axes.text(0.01, row - 0.28, plain(label), transform=axes.get_yaxis_transform(), fontsize=8.5, va="bottom")
