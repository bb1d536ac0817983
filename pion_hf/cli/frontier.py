"""The learning-forgetting frontier: what every contender learnt, against what it forgot meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pion_hf.cli.standings import comparable, other_domains, rate_points, task_metric
from pion_hf.integrations.evaluation import PROGRESS
from pion_hf.integrations.model_card import in_words
from pion_hf.report.figures import Picture
from pion_hf.report.style import add_legend, new_figure, styled, styles_of
from pion_hf.runs.folder import FINISHED

HEIGHT = 3.6  # inches, of a domain
LEGEND_LINE = 0.2
FAR = 5  # times as far above the lowest loss as the middle one, or as this: out of sight
NEAR = 0.02
RING = {"markersize": 10, "markerfacecolor": "none", "color": "black"}


@styled
def frontier(record: dict[str, Any]) -> Picture | None:
    """Progress at the task against the loss of every other domain, a line per contender by rising learning rate.

    Ringed is what nothing beats: no other mean over seeds learnt as much and kept as much. None without finished runs,
    or where nothing but the task was measured.
    """
    over = [run for run in record["runs"] if run["status"] == FINISHED]
    domains = other_domains(record)
    contenders = list(dict.fromkeys(run["contender"] for run in record["runs"]))
    runs = comparable(record["runs"])
    points = {name: rate_points(run for run in runs if run["contender"] == name) for name in contenders}
    if not domains or not any(points.values()):
        return None
    figure = new_figure(HEIGHT * len(domains) + LEGEND_LINE * len(contenders))
    metric = task_metric(over[0])
    gain = "rise" if PROGRESS[metric] > 0 else "fall"
    notes = []
    for axes, domain in zip(figure.subplots(len(domains), squeeze=False).flatten(), domains, strict=True):
        words = in_words(domain)
        places = _draw(axes, points, f"{domain} loss")
        best = [name for name, is_best in zip(places, unbeaten(list(places.values())), strict=True) if is_best]
        axes.plot(*zip(*(places[name] for name in best), strict=True), "o", **RING)
        axes.axhline(over[0]["before"][domain]["loss"], color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel(f"{gain} of the task's {metric}: what was learnt")
        axes.set_ylabel(f"{words} loss: what was forgotten")
        notes.append(f"Unbeaten in {words}: {'; '.join(best)}.")
        far = _focus(axes, places, best)
        if far:
            told = [f"{name} ({gain} {places[name][0]:.4f}, loss {places[name][1]:.4f})" for name in far]
            notes.append(f"Out of sight in {words}: {'; '.join(told)}.")
    ring = Line2D([], [], linestyle="", marker="o", **RING, label="unbeaten: none learnt more and forgot less")
    before = Line2D([], [], color="black", linewidth=0.8, linestyle=":", label="before training")
    add_legend(figure, [*axes.get_legend_handles_labels()[0], ring, before])
    return Picture(figure, f"Task progress against the loss of other text. {' '.join(notes)}", tuple(notes))


def unbeaten(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of `(gain, loss)` no other betters in one while matching it in the other."""
    return [not any(g >= gain and c <= loss and (g, c) != (gain, loss) for g, c in points) for gain, loss in points]


def _draw(axes: Axes, points: dict[str, list[dict[str, Any]]], key: str) -> dict[str, tuple[float, float]]:
    """Draw all contenders; the places of their points, by contender and rate."""
    places = {}
    for look, (name, of) in zip(styles_of(list(points)), points.items(), strict=True):
        found = [(point["figures"]["learnt"]["mean"], point["figures"][key]["mean"]) for point in of]
        xs, ys = zip(*found, strict=True) if found else ((), ())
        axes.plot(xs, ys, look.style, marker=look.marker, color=look.colour, label=look.label)
        places |= {f"{name} {point['learning_rate']:g}": place for point, place in zip(of, found, strict=True)}
    return places


def _focus(axes: Axes, places: dict[str, tuple[float, float]], best: list[str]) -> list[str]:
    """Keep points that are far worse from flattening the picture of the others; their names."""
    losses = sorted(loss for _, loss in places.values())
    low, middle = losses[0], losses[len(losses) // 2]
    ceiling = max(low + FAR * max(middle - low, NEAR), *(places[name][1] for name in best))
    far = [name for name, (_, loss) in places.items() if loss > ceiling]
    if far:
        shown = [gain for name, (gain, _) in places.items() if name not in far]
        margin = 0.08 * (max(shown) - min(shown))
        axes.set_xlim(min(shown) - margin, max(shown) + margin)
        axes.set_ylim(low - 0.08 * (ceiling - low), ceiling + 0.08 * (ceiling - low))
    return far
