"""`pion-hf compare`: the same recipe under equal budget with every optimizer, learning rate and seed.

Every run is a process of `pion-hf sft`, `cpt` or `grpo` with a folder of its own under `--output_dir`, which holds its
recipe and its log. What is finished is not repeated: after an interrupt or a kill the same command goes on. It ends
with a table, `compare.json`, the learning-forgetting frontier as a picture, and a report page.

    pion-hf compare recipes/smollm2-135m/sft/full.yaml --optim adamw_torch,muon,pion --learning_rate 1e-4,3e-4,1e-3

Optimizers want different learning rates and options: `--contenders FILE.yaml` names them one by one, as a mapping of
names to keys of the recipe, `learning_rate` being a list:

    AdamW: {optim: adamw_torch, learning_rate: [5e-5, 1e-4, 2e-4]}
    Pion, paper: {optim: pion, optim_preset: paper, learning_rate: [1e-4, 3e-4, 1e-3]}
"""

from __future__ import annotations

import argparse
import html
import os
import signal
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pion_hf.cli.contest import MISSING, read_result, remarks, rows, standings, table, title
from pion_hf.cli.grid import (
    COMMANDS,
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
from pion_hf.errors import unknown
from pion_hf.evaluation import PROGRESS
from pion_hf.files import new_file
from pion_hf.integrations.run_folder import versions
from pion_hf.redaction import without_secrets
from pion_hf.runs import RECORD, write_json

RESULTS, FRONTIER, PAGE = "compare.json", "frontier.png", "report.html"
FORMAT = 1  # of it
INTERRUPTED = 130  # the exit status, as shells have it
PLAIN_WIDTH = 240  # of tables where no terminal gives one
DPI = 200


class _Parser(argparse.ArgumentParser):
    """Mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser() -> argparse.ArgumentParser:
    """The flags of `pion-hf compare`."""
    made = _Parser(
        prog="pion-hf compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("recipe", type=Path, metavar="RECIPE", help="what all runs have in common")
    made.add_argument("--optim", metavar="NAME,NAME", help="optimizers (default: the recipe's)")
    made.add_argument("--learning_rate", metavar="LR,LR", help="tried with each of them (default: the recipe's)")
    made.add_argument("--contenders", type=Path, metavar="FILE", help="YAML, instead of these two: see above")
    made.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=V1,V2",
        help="also compare values of a key of the recipe, each with each; one value replaces the recipe's",
    )
    made.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs of each, with seeds 0 to N-1 (default: 1)"
    )
    made.add_argument("--command", choices=COMMANDS, help="what the recipe is for (default: its folder's name)")
    made.add_argument("--output_dir", type=Path, metavar="DIR", help="default: runs/compare-<the recipe's name>")
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once, on GPUs or cores of their own")
    made.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="where the recipe says so too: let the check before the first run execute the model's own Python",
    )
    made.add_argument("--keep_models", action="store_true", help="keep the trained weights of every run")
    made.add_argument("--report_only", action="store_true", help="show what is finished, run nothing")
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags of a comparison.

    Raises:
        ValueError: an unknown flag, with the nearest, or flags that do not go together.
    """
    flags = parser()
    args, rest = flags.parse_known_args(argv)
    if rest:
        if not rest[0].startswith("-"):
            raise ValueError(f"{rest[0]!r} belongs to no flag: one recipe is compared at a time")
        known = [option for action in flags._actions for option in action.option_strings]
        raise unknown("flag", rest[0].split("=")[0], known)
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.contenders and (args.optim or args.learning_rate):
        raise ValueError("--contenders names optimizers and learning rates: leave out --optim and --learning_rate")
    return args


def main(argv: list[str]) -> None:
    """Run what is not finished yet, then show everything."""
    args = parse(argv)
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
    if interrupted:
        console.out("Interrupted: the same command goes on.", highlight=False)
    show(make_record(args.recipe, recipe, grid, output_dir), output_dir, console)
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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
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
        read_trial(output_dir / trial.folder)["seconds"] for trial in grid if is_finished(output_dir / trial.folder)
    ]
    if not over:
        return ""
    minutes = sum(over) / len(over) * (len(grid) - len(over)) / jobs / 60
    return f"about {minutes:.0f} min left"


def _name(recipe: Path) -> str:
    """Model, task and variant of a recipe in its place; else the file's name."""
    parts = recipe.with_suffix("").parts
    return "-".join(parts[-3:] if "recipes" in parts[:-3] else parts[-1:])
