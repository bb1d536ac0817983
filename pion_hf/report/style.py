"""How the pictures look: colours, line styles and sizes, and which run has which."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from pion_hf.runs.folder import Run

# Told apart by the colour-blind: Okabe and Ito, "Color Universal Design" (2008), less the yellow, which is faint on
# white. With a style for each, curves that coincide for a while stay visible, and a print without colours readable.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SEQUENTIAL = "viridis"  # for what has an order; as readable without colours

WIDTH = 4.2  # inches. On a phone's 360 px an inch is 86 px, and 8.5 points are 10 px
LEGEND_LETTERS = 52  # that fit on a line of a legend
TITLE_LETTERS = 42  # and in the titles of panels beside each other
LEGEND_LINE = 0.18  # inches
LONGEST_LABEL = 44

# Small enough for a phone, and with the least ink.
SETTINGS = {
    "font.size": 9.5,
    "figure.labelsize": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.useoffset": False,
    "image.cmap": SEQUENTIAL,
}
# Decorates a function that draws, which leaves matplotlib's own settings as they were.
styled = matplotlib.rc_context(SETTINGS)


class LineStyle(NamedTuple):
    """How the curves of a run or a contender are drawn."""

    label: str
    colour: str
    style: str
    marker: str


def new_figure(height: float) -> Figure:
    """A figure of `WIDTH` x `height` inches, without a display and without touching pyplot's own state."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with as much of the path before them as it takes to tell them apart."""
    paths = [run.folder.resolve().parts for run in runs]

    def depth(path: tuple[str, ...]) -> int:
        depths = range(1, len(path))
        return next((d for d in depths if sum(other[-d:] == path[-d:] for other in paths) == 1), len(path))

    return ["/".join(path[-depth(path) :]) for path in paths]


def numbered(runs: Sequence[Run]) -> list[str]:
    """`names`, after their number if there are several: how pictures and tables refer to a run."""
    return names(runs) if len(runs) == 1 else [f"{i} {name}" for i, name in enumerate(names(runs), start=1)]


def line_styles(runs: Sequence[Run]) -> list[LineStyle]:
    """Of every run, by its number and name."""
    return styles_of(numbered(runs))


def styles_of(labels: Sequence[str]) -> list[LineStyle]:
    """A colour each; of more labels than colours one comes again, in another style and with another marker."""
    turns = [divmod(i, len(COLOURS)) for i in range(len(labels))]
    return [
        LineStyle(plain(label), COLOURS[nth], STYLES[(nth + turn) % len(STYLES)], MARKERS[(nth + turn) % len(MARKERS)])
        for label, (turn, nth) in zip(labels, turns, strict=True)
    ]


def plain(label: str) -> str:
    """Text as it is, not as mathematics, and not too long for a phone."""
    return escaped(_short(label))


def escaped(label: str) -> str:
    """Text as it is, not as mathematics."""
    return label.replace("$", r"\$")


def _short(label: str) -> str:
    half = LONGEST_LABEL // 2
    return label if len(label) <= LONGEST_LABEL else f"{label[:half]}…{label[-half + 1 :]}"


def add_legend(figure: Figure, handles: Iterable[Line2D]) -> None:
    """A legend above all axes, for which the figure grows: each label once, in as many columns as there is room for."""
    unique = {handle.get_label(): handle for handle in handles}
    if unique:
        columns = max(1, LEGEND_LETTERS // (max(map(len, unique)) + 7))
        figure.set_figheight(figure.get_figheight() + LEGEND_LINE * -(-len(unique) // columns))
        figure.legend(list(unique.values()), list(unique), loc="outside upper left", ncols=columns)


def run_handles(shown: Sequence[LineStyle], *, styles: bool = True) -> list[Line2D]:
    """Legend entries of several runs; solid where the style says something else."""
    return [Line2D([], [], color=k.colour, linestyle=k.style if styles else "-", label=k.label) for k in shown]


def columns_for(count: int) -> int:
    """How many of so many panels are beside each other."""
    return 1 if count == 1 else 2 if count <= 8 else 3


def panels(figure: Figure, titles: Sequence[str], **options: Any) -> list[Axes]:
    """Axes with these titles, two or three beside each other, as many as there are titles."""
    columns = columns_for(len(titles))
    rows = -(-len(titles) // columns)
    grid = figure.subplots(rows, columns, squeeze=False, **options).flatten()
    for axes in grid[len(titles) :]:
        axes.remove()
    for i, title in enumerate(titles):
        grid[i].set_title(escaped(textwrap.fill(_short(title), TITLE_LETTERS // columns)))
        if i + columns >= len(titles):  # nothing below it has them
            grid[i].tick_params(labelbottom=True)
    return list(grid[: len(titles)])


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis for what is drawn, if any of it is positive; its labels leave room for each other."""
    if not any((np.asarray(line.get_ydata()) > 0).any() for line in axes.get_lines()):
        return
    axes.set_yscale("log", nonpositive="mask")
    low, high = axes.get_ylim()
    if high < 10 * low:  # a power of ten may not be among them
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_minor_formatter(NullFormatter())
