"""What `pion-hf compare` does: runs all that is not finished, and shows what was found."""

from __future__ import annotations

import argparse
import html
import os
import signal
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pion_hf.cli import INTERRUPTED
from pion_hf.cli.contest import MISSING, read_result, remarks, rows, standings, table, title
from pion_hf.cli.grid import (
    Trial,
    check_grid,
    command_of,
    contenders_from_flags,
    make_grid,
    parse_axes,
    read_contenders,
)
from pion_hf.cli.jobs import alone_in, check_folder, is_finished, read_trial, run_all
from pion_hf.cli.recipe import read_recipe
from pion_hf.evaluation import PROGRESS
from pion_hf.files import new_file
from pion_hf.integrations.run_folder import versions
from pion_hf.redaction import without_secrets
from pion_hf.runs import RECORD, write_json

RESULTS, FRONTIER, PAGE = "compare.json", "frontier.png", "report.html"
FORMAT = 1  # of it
PLAIN_WIDTH = 240  # of tables where no terminal gives one
DPI = 200


def compare(args: argparse.Namespace) -> None:
    """Run what is not finished yet, then show everything; `args` are the flags of `pion-hf compare`."""
    recipe = read_recipe(args.recipe)
    command = command_of(args.recipe, args.command)
    output_dir = args.output_dir or Path("runs", f"compare-{_name(args.recipe)}")
    if args.contenders:
        contenders = read_contenders(args.contenders, recipe)
    else:
        contenders = contenders_from_flags(recipe, args.optim, args.learning_rate)
    grid, said = make_grid(recipe, command, contenders, parse_axes(args.set), args.seeds)
    console = Console()
    for line in said:
        console.out(line, highlight=False)
    interrupted = False
    if not args.report_only:
        check_grid(grid, args.recipe, output_dir, trusted=args.trust_remote_code)
        for trial in grid:
            check_folder(trial, output_dir / trial.folder)
        with alone_in(output_dir):
            try:
                _run(grid, output_dir, args, console)
            except KeyboardInterrupt:
                interrupted = True
    record = make_record(args.recipe, recipe, grid, output_dir)
    if interrupted:
        console.out("Interrupted: the same command goes on.", highlight=False)
    if not interrupted or any(run["status"] != MISSING for run in record["runs"]):
        show(record, output_dir, console)
    if interrupted:
        raise SystemExit(INTERRUPTED)


def make_record(path: Path, recipe: dict[str, Any], grid: list[Trial], output_dir: Path) -> dict[str, Any]:
    """All that is known of a comparison, as `compare.json` keeps it."""
    runs = [read_result(trial, output_dir / trial.folder) for trial in grid]
    return {
        "format": FORMAT,
        "recipe": {"path": str(path), "command": grid[0].command, "keys": without_secrets(recipe)},
        "seeds": len({trial.seed for trial in grid}),
        "versions": versions(),
        "standings": standings(runs),
        "runs": runs,
    }


def show(record: dict[str, Any], output_dir: Path, console: Console) -> None:
    """Write `compare.json`, the picture and the page; print the table, and where they are.

    Raises:
        ValueError: no run is over, or the folder cannot be written to.
    """
    if all(run["status"] == MISSING for run in record["runs"]):
        raise ValueError(f"no run in {str(output_dir)!r} is over yet: there is nothing to show")
    if not os.access(output_dir, os.W_OK | os.X_OK):
        raise ValueError(f"{str(output_dir)!r} cannot be written to, where table, picture and page would go")
    from pion_hf.cli.frontier import frontier  # matplotlib, not before it is needed

    written = [output_dir / RESULTS]
    write_json(written[0], record)
    picture = frontier(record)
    if picture is not None:
        written.append(output_dir / FRONTIER)
        with new_file(written[-1]) as file:
            picture.figure.savefig(file, format="png", dpi=DPI)
    written += _write_page(record, output_dir, picture)
    plain = not console.is_terminal
    (Console(width=PLAIN_WIDTH) if plain else console).print(table(record, plain=plain))
    for line in (*remarks(record), f"Written: {', '.join(map(str, written))}"):
        console.out(line, highlight=False)


def _write_page(record: dict[str, Any], output_dir: Path, picture: Any) -> list[Path]:
    """The report of the best run of every contender, side by side; its path, and none where no run left a record."""
    from pion_hf import report

    best = {(place["contender"], place["learning_rate"]) for place in record["standings"]}
    shown: dict[str, Path] = {}
    for run in record["runs"]:
        folder = output_dir / run.get("folder", "")
        if (run["contender"], run["learning_rate"]) in best and (folder / RECORD).is_file():
            shown.setdefault(run["contender"], folder)
    if not shown:
        return []
    paragraphs = "".join(f"<p>{html.escape(line)}</p>" for line in remarks(record))
    extra = [("The best of every contender", str(report.table(*rows(record))) + paragraphs)]
    if picture is not None:
        extra.append(("Learning and forgetting", picture))
    return [report.write_report(shown.values(), output_dir / PAGE, title(record), extra=extra)]


def _run(grid: list[Trial], output_dir: Path, args: argparse.Namespace, console: Console) -> None:
    """Run the grid with one progress display over all runs; a line for each where there is no terminal."""

    def terminated(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminated)
    done = sum(is_finished(output_dir / trial.folder) for trial in grid)
    what, left = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[left]}")
    columns = (what, BarColumn(), MofNCompleteColumn(), left)
    running: list[Trial] = []
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=len(grid), completed=done, left="")

            def update() -> None:
                progress.update(bar, description=" | ".join(map(str, running)), left=_left(grid, output_dir, args.jobs))

            def started(trial: Trial) -> None:
                running.append(trial)
                update()

            def ended(trial: Trial) -> None:
                running.remove(trial)
                progress.advance(bar)
                result = read_result(trial, output_dir / trial.folder)
                console.out(f"{trial}: {_told(result)}", highlight=False)
                update()

            run_all(grid, output_dir, slots=args.jobs, keep_models=args.keep_models, started=started, ended=ended)
    finally:
        signal.signal(signal.SIGTERM, before)


def _told(result: dict[str, Any]) -> str:
    """How a run ended, in a line."""
    after = result.get("after", {}).get("task", {})
    found = ", ".join(f"task {metric} {after[metric]:.4f}" for metric in PROGRESS if after.get(metric) is not None)
    return ", ".join(filter(None, [result["status"], found, result.get("error"), f"{result['process_seconds']:.0f} s"]))


def _left(grid: list[Trial], output_dir: Path, jobs: int) -> str:
    """How long the rest will take, by the mean of what is finished."""
    over = [
        read_trial(output_dir / trial.folder).get("seconds") or 0.0
        for trial in grid
        if is_finished(output_dir / trial.folder)
    ]
    if not over:
        return ""
    minutes = sum(over) / len(over) * (len(grid) - len(over)) / jobs / 60
    return f"about {minutes:.0f} min left"


def _name(recipe: Path) -> str:
    """Model, task and variant of a recipe in its place; else the file's name."""
    parts = recipe.with_suffix("").parts
    return "-".join(parts[-3:] if "recipes" in parts[:-3] else parts[-1:])
