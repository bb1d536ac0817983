"""Pictures of the hidden matrices of runs, by role and layer: norms over time, spectra, rotation angles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pion_hf.report.figures import Picture
from pion_hf.report.style import (
    COLOURS,
    SEQUENTIAL,
    add_legend,
    columns_for,
    line_styles,
    log_scale,
    new_figure,
    numbered,
    panels,
    plain,
    run_handles,
    styled,
)
from pion_hf.runs.folder import Run

MOST_ROLES = 18  # panels of a picture
MOST_MAPS = 8  # of it that have an axis of roles under each
POINTS = np.linspace(0, 1, 120)  # of a spectrum's curve: 0 is the largest singular value, 1 the smallest
BAND = (0.1, 0.9)  # quantiles over the matrices of a role
LEAST_CHANGE = 1e-10  # of a singular value that is shown: well below float32's rounding
LEAST_CHANGE_SHOWN = 0.1  # per cent: rounding is not to look like a change

Curves = tuple[np.ndarray, np.ndarray]  # before and after, see `_spectrum_curves`


@styled
def spectral_norms(runs: Sequence[Run]) -> Picture | None:
    """The spectral norm of every matrix against steps."""
    return _over_time(runs, "spectral_norm", "spectral norm")


@styled
def spectral_norm_changes(runs: Sequence[Run]) -> Picture | None:
    """The change of every spectral norm since the first snapshot, in per cent."""
    return _over_time(runs, "spectral_norm", "change, %", relative=True)


@styled
def stable_ranks(runs: Sequence[Run]) -> Picture | None:
    """The stable rank of every matrix against steps."""
    return _over_time(runs, "stable_rank", "stable rank")


@styled
def spectra(runs: Sequence[Run]) -> Picture | None:
    """Singular values before and after, by role: median over the matrices, of one run with a band."""
    made = _panels_of_spectra(runs, "singular value")
    if made is None:
        return None
    figure, by_role, notes = made
    found, alone, known = line_styles(runs), len(runs) == 1, [i for i, run in enumerate(runs) if run.spectra]
    of_one_model = len({str((runs[i].record.get("model") or {}).get("name")) for i in known}) == 1
    for axes, curves in by_role.values():
        for nth, (i, (before, after)) in enumerate(curves.items()):
            colour, style = (COLOURS[1], "--") if alone else (found[i].colour, found[i].style)
            if nth == 0 or not of_one_model:
                _median(axes, before, "#555555" if of_one_model else colour, "-", band=alone, linewidth=2.5, alpha=0.6)
            _median(axes, after, colour, style, band=alone)
        log_scale(axes)
    before_handle = Line2D([], [], color="#555555", linewidth=2.5, alpha=0.6, label="before")
    after = (
        [Line2D([], [], color=COLOURS[1], linestyle="--", label="after")]
        if alone
        else run_handles([found[i] for i in known])
    )
    add_legend(figure, [before_handle, *after] if of_one_model else after)
    return Picture(figure, _alt("Singular values before and after training", by_role, runs), notes)


@styled
def spectrum_changes(runs: Sequence[Run]) -> Picture | None:
    """How far every singular value moved, relative to its matrix's largest: median by role, of one run with a band."""
    made = _panels_of_spectra(runs, "change, relative to the largest singular value", sharey=True)
    if made is None:
        return None
    figure, by_role, notes = made
    found, names, alone, largest = line_styles(runs), numbered(runs), len(runs) == 1, {}
    for axes, curves in by_role.values():
        for i, (before, after) in curves.items():
            scale = np.where(before > 0, before, after)[:, :1]  # an adapter's B begins with zeros
            change = np.abs(after - before) / np.maximum(scale, np.finfo(float).tiny)
            largest[i] = max(largest.get(i, 0.0), float(np.nanmax(change, initial=0.0)))
            colour, style = (COLOURS[0], "-") if alone else (found[i].colour, found[i].style)
            _median(axes, np.maximum(change, LEAST_CHANGE), colour, style, band=alone)
    log_scale(axes)
    add_legend(figure, [] if alone else run_handles([found[i] for i in sorted(largest)]))
    said = "; ".join(f"{names[i]}: at most {value:.1e}" for i, value in largest.items())
    return Picture(figure, f"{_alt('Change of the singular values', by_role, runs)} {said}.", notes)


@styled
def angle_map(runs: Sequence[Run]) -> Picture | None:
    """Heat map of rotation angles, layer x role: the mean over the snapshots, of one run for either side."""
    names = numbered(runs)
    maps = {}
    for name, run in zip(names, runs, strict=True):
        sides = {side: _mean_of_snapshots(run, f"angle_{side}") for side in ("in", "out")}
        sides = {side: values for side, values in sides.items() if np.isfinite(values).any()}
        if sides and len(runs) == 1:
            maps = {f"angle {side}": (run, values) for side, values in sides.items()}
        elif sides:
            maps[name] = (run, _mean(np.array(list(sides.values()))))
    maps = {title: grid for title, (run, values) in maps.items() if (grid := _layer_by_role(run, values))}
    if not maps:
        return None
    shown, notes = _shown(maps, MOST_MAPS)
    maps = {title: maps[title] for title in shown}
    tallest = max(len(layers) for layers, _, _ in maps.values())
    rows = -(-len(maps) // columns_for(len(maps)))
    figure = new_figure(1.0 + rows * (1.1 + min(3.2 if len(runs) == 1 else 1.8, max(0.6, 0.13 * tallest))))
    grid = panels(figure, list(maps))
    highest = max(float(np.nanmax(values)) for *_, values in maps.values())
    colours = Normalize(0.0, highest or 1.0)
    cmap = matplotlib.colormaps[SEQUENTIAL].with_extremes(bad="#dddddd")
    for axes, (layers, roles, values) in zip(grid, maps.values(), strict=True):
        axes.imshow(values, norm=colours, cmap=cmap, aspect="auto", interpolation="none", origin="lower")
        axes.set_xticks(range(len(roles)), map(plain, roles), rotation=90)
        ticks = range(0, len(layers), -(-len(layers) // 6))
        axes.set_yticks(ticks, [str(layers[i]) for i in ticks])
        axes.grid(visible=False)
    figure.supylabel("layer")
    figure.colorbar(
        ScalarMappable(colours, cmap), ax=grid, location="bottom", shrink=0.8, aspect=30, label="mean angle, radians"
    )
    at = []
    for title, (layers, roles, values) in maps.items():
        row, column = np.unravel_index(int(np.nanargmax(values)), values.shape)
        at.append(f"{title}: largest {values[row, column]:.1e} at layer {layers[row]}, {roles[column]}")
    return Picture(figure, f"Heat map of the mean rotation angle by layer and role. {'; '.join(at)}.", notes)


def _over_time(runs: Sequence[Run], quantity: str, label: str, *, relative: bool = False) -> Picture | None:
    """A panel for every role: of one run a line for each layer, of several the median over the layers."""
    known = [(i, run, *_history(run, quantity)) for i, run in enumerate(runs)]
    known = [(i, run, steps, values) for i, run, steps, values in known if np.isfinite(values).any()]
    if relative:  # since the first snapshot: it takes two
        known = [(i, run, s, 100 * (v / np.where(v[0] > 0, v[0], np.nan) - 1)) for i, run, s, v in known if len(s) > 1]
    roles, notes = _shown(
        {_role(m): None for _, run, _, v in known for k, m in enumerate(run.matrices) if np.isfinite(v[:, k]).any()}
    )
    if not roles:
        return None
    alone, found = len(runs) == 1, line_styles(runs)
    layers = [m.get("layer") for _, run, *_ in known for m in run.matrices if m.get("layer") is not None]
    colours = ScalarMappable(Normalize(0, max(layers, default=0) or 1), matplotlib.colormaps[SEQUENTIAL])
    figure, grid = _role_figure(roles, sharex=True, sharey=relative)
    for axes, role in zip(grid, roles, strict=True):
        for i, run, steps, values in known:
            of_role = [k for k, m in enumerate(run.matrices) if _role(m) == role]
            marker = found[i].marker if len(steps) == 1 else None
            if alone:
                for k in of_role:
                    colour = colours.to_rgba(run.matrices[k].get("layer") or 0)
                    axes.plot(steps, values[:, k], color=colour, linewidth=0.9, marker=marker)
            elif of_role:
                _median(axes, values[:, of_role].T, found[i].colour, found[i].style, x=steps, marker=marker)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        if not relative:
            middle = float(np.mean(axes.get_ylim()))
            _at_least(axes, LEAST_CHANGE_SHOWN / 100 * abs(middle), around=middle)
    if relative:
        _at_least(grid[0], LEAST_CHANGE_SHOWN, around=0.0)
    figure.supxlabel("optimizer step")
    figure.supylabel(label)
    if alone:
        ticks = MaxNLocator(integer=True)
        figure.colorbar(colours, ax=grid, location="top", shrink=0.8, aspect=30, label="layer", ticks=ticks)
    else:
        add_legend(figure, run_handles([found[i] for i, *_ in known]))
    what = f"{quantity.replace('_', ' ').capitalize()}{', change since the start in per cent' if relative else ''}"
    said = [f"{numbered(runs)[i]}: {np.nanmin(v):.3g} to {np.nanmax(v):.3g}" for i, _, _, v in known]
    return Picture(figure, f"{_alt(what, roles, runs)} {'; '.join(said)}.", notes)


def _role(matrix: dict) -> str:
    return str(matrix.get("role", "matrix"))


def _shown(panels: Iterable[str], most: int = MOST_ROLES) -> tuple[list[str], tuple[str, ...]]:
    """What has a panel, and a note of what has none."""
    panels = list(panels)
    left_out = panels[most:]
    return panels[:most], (f"Left out for want of room: {', '.join(left_out)}.",) if left_out else ()


def _panels_of_spectra(
    runs: Sequence[Run], label: str, **options: object
) -> tuple[Figure, dict[str, tuple[Axes, dict[int, Curves]]], tuple[str, ...]] | None:
    """By role its panel and the curves of the runs that have some there, before anything is drawn; and notes."""
    roles, notes = _shown({_role(m): None for run in runs for m in run.matrices if m.get("name") in run.spectra})
    if not roles:
        return None
    figure, grid = _role_figure(roles, sharex=True, **options)
    grid[0].set_xlim(0, 1)
    figure.supxlabel("place in the spectrum: 0 largest, 1 smallest")
    figure.supylabel(label)
    curves = [{i: of for i, run in enumerate(runs) if (of := _spectrum_curves(run, role))} for role in roles]
    return figure, dict(zip(roles, zip(grid, curves, strict=True), strict=True)), notes


def _role_figure(roles: list[str], **options: object) -> tuple:
    figure = new_figure(1.0 + 1.35 * -(-len(roles) // columns_for(len(roles))))
    return figure, panels(figure, roles, **options)


def _history(run: Run, quantity: str) -> tuple[list[int], np.ndarray]:
    """Steps of the snapshots that have the quantity, and its values `(snapshots, matrices)`."""
    steps, values = run.history(quantity)
    return steps, np.array(values, dtype=float).reshape(len(steps), len(run.matrices))


def _mean_of_snapshots(run: Run, quantity: str) -> np.ndarray:
    """`(matrices,)`, NaN where there is none."""
    _, values = _history(run, quantity)
    return _mean(values) if len(values) else np.full(len(run.matrices), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis, of what is finite; NaN, without a warning, where nothing is."""
    return np.ma.masked_invalid(values).mean(0).filled(np.nan)


def _layer_by_role(run: Run, values: np.ndarray) -> tuple[list[int], list[str], np.ndarray] | None:
    """Layers, roles, and the means of the matrices there `(layers, roles)`; None if no layer has a value."""
    places = [(m.get("layer"), _role(m), v) for m, v in zip(run.matrices, values, strict=True) if math.isfinite(v)]
    places = [place for place in places if place[0] is not None]
    if not places:
        return None
    present = {role for _, role, _ in places}
    roles = [role for role in dict.fromkeys(map(_role, run.matrices)) if role in present]
    layers = sorted({layer for layer, _, _ in places})
    total, count = np.zeros((2, len(layers), len(roles)))
    for layer, role, value in places:
        at = layers.index(layer), roles.index(role)
        total[at] += value
        count[at] += 1
    return layers, roles, np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _spectrum_curves(run: Run, role: str) -> Curves | None:
    """Singular values before and after of the matrices of a role at `POINTS`, `(matrices, points)`."""
    pairs = [run.spectra[m["name"]] for m in run.matrices if _role(m) == role and m.get("name") in run.spectra]
    if not pairs:
        return None
    return tuple(
        np.array([_at_points(values) for pair in pairs for values in np.atleast_2d(pair[side].double().numpy())])
        for side in (0, 1)
    )


def _at_points(values: np.ndarray) -> np.ndarray:
    return np.interp(POINTS, np.linspace(0, 1, len(values)), values)


def _median(
    axes: Axes,
    values: np.ndarray,
    colour: str,
    style: str,
    *,
    x: Sequence[float] = POINTS,
    band: bool = False,
    **options: object,
) -> None:
    """The median of curves `(curves, points)`, and the band that holds most of them."""
    values = np.where(np.isfinite(values), values, np.nan)
    values = values[np.isfinite(values).any(axis=1)]
    whole = np.isfinite(values).any(axis=0)  # points at which there is any
    if not whole.any():
        return
    x, values = np.asarray(x)[whole], values[:, whole]
    quantile = np.quantile if np.isfinite(values).all() else np.nanquantile  # ten times slower
    low, middle, high = quantile(values, (BAND[0], 0.5, BAND[1]), axis=0)
    axes.plot(x, middle, style, color=colour, **options)
    if band:
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _at_least(axes: Axes, distance: float, *, around: float) -> None:
    """Let the y axis reach as far as `distance` from `around`."""
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, around - distance), max(high, around + distance))


def _alt(what: str, roles: Iterable[str], runs: Sequence[Run]) -> str:
    return f"{what}, for {', '.join(roles)}, of {', '.join(numbered(runs))}."
