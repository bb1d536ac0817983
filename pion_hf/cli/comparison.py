"""What `pion-hf compare` does: runs all that is not finished, and shows what was found."""

from __future__ import annotations

import argparse
import contextlib
import html
import signal
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pion_hf.cli import INTERRUPTED, standings
from pion_hf.cli.grid import (
    Trial,
    check_grid,
    command_of,
    contenders_from_flags,
    make_grid,
    parse_axes,
    read_contenders,
)
from pion_hf.cli.recipe import read_recipe
from pion_hf.cli.study import check_folder, run_all, states
from pion_hf.integrations.evaluation import PROGRESS
from pion_hf.integrations.run_writer import versions
from pion_hf.runs.files import fault_of_place, new_file
from pion_hf.runs.folder import RECORD, write_json
from pion_hf.runs.redaction import without_secrets

RESULTS, FRONTIER, PAGE = "compare.json", "frontier.png", "report.html"
FORMAT = 1  # of it
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
            check_folder(output_dir / trial.folder)
        try:
            _run(grid, output_dir, args, console)
        except KeyboardInterrupt:
            interrupted = True
    record = make_record(args.recipe, recipe, grid, output_dir, states(grid, output_dir, args.storage))
    if interrupted:
        console.out("Interrupted: the same command goes on.", highlight=False)
    if not interrupted or any(run["status"] != standings.MISSING for run in record["runs"]):
        show(record, output_dir, console)
    if interrupted:
        raise SystemExit(INTERRUPTED)


def make_record(path: Path, recipe: dict, grid: list[Trial], output_dir: Path, states: dict) -> dict[str, Any]:
    """All that is known of a comparison, as `compare.json` keeps it; `states` as in `read_result`, by folder."""
    runs = [standings.read_result(trial, output_dir / trial.folder, states.get(trial.folder)) for trial in grid]
    return {
        "format": FORMAT,
        "recipe": {"path": str(path), "command": grid[0].command, "keys": without_secrets(recipe)},
        "seeds": len({trial.seed for trial in grid}),
        "versions": versions(),
        "standings": standings.standings(runs),
        "runs": runs,
    }


def show(record: dict[str, Any], output_dir: Path, console: Console) -> None:
    """Write `compare.json`, the picture and the page; print the table, and where they are."""
    if all(run["status"] == standings.MISSING for run in record["runs"]):
        raise ValueError(f"no run in {str(output_dir)!r} is over yet: there is nothing to show")
    if fault := fault_of_place(output_dir):
        raise ValueError(f"{fault}, where table, picture and page would go")
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
    (Console(width=standings.PLAIN_WIDTH) if plain else console).print(standings.table(record, plain=plain))
    for line in (*standings.remarks(record), f"Written: {', '.join(map(str, written))}"):
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
    paragraphs = "".join(f"<p>{html.escape(line)}</p>" for line in standings.remarks(record))
    extra = [("The best of every contender", str(report.table(*standings.rows(record))) + paragraphs)]
    if picture is not None:
        extra.append(("Learning and forgetting", picture))
    return [report.write_report(shown.values(), output_dir / PAGE, standings.title(record), extra=extra)]


def _run(grid: list[Trial], output_dir: Path, args: argparse.Namespace, console: Console) -> None:
    """Run the grid with one progress display over all runs; a line for each where there is no terminal."""

    def terminated(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminated)
    what, left = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[left]}")
    columns = (what, BarColumn(), MofNCompleteColumn(), left)
    try:
        changes = run_all(grid, output_dir, args.storage, slots=args.jobs, keep_models=args.keep_models)
        shown = Progress(*columns, console=console, disable=not console.is_terminal)
        with contextlib.closing(changes), shown as progress:
            bar = progress.add_task("", total=len(grid), left="")
            for running, ended in changes:
                if ended is not None:
                    result = standings.read_result(ended, output_dir / ended.folder, "FAIL")
                    console.out(f"{ended}: {_told(result)}", highlight=False)
                finished = filter(standings.is_finished, (output_dir / trial.folder for trial in grid))
                took = list(map(standings.seconds, finished))
                minutes = sum(took) / max(len(took), 1) * (len(grid) - len(took)) / args.jobs / 60
                left = f"about {minutes:.0f} min left" if took else ""
                progress.update(bar, completed=len(took), description=" | ".join(map(str, running)), left=left)
    finally:
        signal.signal(signal.SIGTERM, before)


def _told(result: dict[str, Any]) -> str:
    """How a run ended, in a line."""
    after = result.get("after", {}).get("task", {})
    found = ", ".join(f"task {metric} {after[metric]:.4f}" for metric in PROGRESS if after.get(metric) is not None)
    return ", ".join(filter(None, [result["status"], found, result.get("error"), f"{result['process_seconds']:.0f} s"]))


def _name(recipe: Path) -> str:
    """Model, task and variant of a recipe in its place; else the file's name."""
    parts = recipe.with_suffix("").parts
    return "-".join(parts[-3:] if "recipes" in parts[:-3] else parts[-1:])
