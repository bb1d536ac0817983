"""The learning rates of a run before it runs: as numbers, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments, get_scheduler

from pion_hf.errors import unknown
from pion_hf.routing.routes import Routing
from pion_hf.runs.files import new_file

# Their rates answer to the evaluation loss.
UNFORESEEABLE = ("reduce_lr_on_plateau", "greedy")


class Curve(NamedTuple):
    """The learning rate at every optimizer step, and the rules and roles of the groups that have it."""

    label: str
    rates: tuple[float, ...]


def check_plot(args: TrainingArguments, path: str) -> None:
    """Raise ValueError, before anything is loaded, for a picture that could not be drawn or written."""
    if args.max_steps <= 0:
        raise ValueError("--plot: the length of the run is unknown without the data: add --max_steps N")
    if args.lr_scheduler_type.value in UNFORESEEABLE:
        raise ValueError(
            f"--plot: lr_scheduler_type={args.lr_scheduler_type.value!r} follows the evaluation loss, which is unknown "
            "before training"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix.lower().lstrip(".") not in known:
        raise unknown(f"kind of picture (--plot {path})", Path(path).suffix, [f".{name}" for name in known])


def learning_rate_curves(args: TrainingArguments, optimizer: torch.optim.Optimizer, routing: Routing) -> list[Curve]:
    """The distinct learning rates of the groups over `args.max_steps` steps, by transformers' own scheduler."""
    groups = optimizer.param_groups
    # An optimizer without weights, whose groups a scheduler sees as it would the real one's.
    stand_in = torch.optim.SGD([{"params": [torch.zeros(())], "rule": g["rule"], "lr": g["lr"]} for g in groups])
    try:
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=stand_in,
            num_warmup_steps=args.get_warmup_steps(args.max_steps),
            num_training_steps=args.max_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except TypeError as error:
        raise ValueError(f"lr_scheduler_kwargs={args.lr_scheduler_kwargs!r}: {error}") from error
    stand_in.step()  # torch warns of a scheduler that steps before its optimizer
    steps = []
    for _ in range(args.max_steps):
        steps.append([float(group["lr"]) for group in stand_in.param_groups])
        scheduler.step()
    roles = {route.name: route.role for route in routing}
    members: dict[tuple[float, ...], dict[str, dict[str, None]]] = {}  # rates -> rule -> roles, in the groups' order
    for group, rates in zip(groups, zip(*steps, strict=True), strict=True):
        of_rule = members.setdefault(rates, {}).setdefault(group["rule"], {})
        of_rule.update(dict.fromkeys(roles[name] for name in group["param_names"]))
    return [
        Curve("; ".join(f"{r}: {', '.join(of)}" for r, of in rules.items()), rates) for rates, rules in members.items()
    ]


def picture(args: TrainingArguments, curves: list[Curve]) -> Any:
    """Learning rate against optimizer step (the first is 1, as in the logs), as a `matplotlib.figure.Figure`."""
    from pion_hf.report.style import COLOURS, STYLES, escaped, new_figure

    figure = new_figure(4)
    figure.set_figwidth(7)
    axes = figure.add_subplot()
    for i, curve in enumerate(curves):
        look = {"linestyle": STYLES[i % len(STYLES)], "color": COLOURS[i % len(COLOURS)]}
        axes.plot(range(1, len(curve.rates) + 1), curve.rates, label=escaped(curve.label), **look)
    axes.set_title(f"{args.optim.value}, {args.lr_scheduler_type.value}, {args.max_steps} steps")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def save_plot(args: TrainingArguments, curves: list[Curve], path: str) -> None:
    """Write the picture of the curves to `path`, whose folder is made if need be."""
    try:
        with new_file(path) as file:
            picture(args, curves).savefig(file, format=Path(path).suffix.removeprefix("."), dpi=150)
    except OSError as error:
        raise ValueError(f"--plot: cannot write {path!r}: {error.strerror or error}") from error
