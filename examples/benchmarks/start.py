"""What it takes to start: CPU seconds of imports and of `--help`, in processes of their own, medians of a few.

CPU time (user and system) hardly depends on what else the machine does, unlike what a clock shows; the first run of
each command, which may compile files, is not counted. Beside each command is what it may take, as a multiple of
another's or in seconds. Keeps `results/start.json`; `--show` prints that and runs nothing. With `--package FOLDER`
another version of the package is measured, from its checkout, and shown beside it as `before`.

    git worktree add /tmp/before COMMIT && python examples/benchmarks/start.py --package /tmp/before
    python examples/benchmarks/start.py
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "start.json"
HERE = Path(__file__).parents[2]

PION, TRL = (f"from {module} import main; main()" for module in ("pion_hf.cli", "trl.cli"))
COMMANDS = {
    "import torch": ("import torch",),
    "import pion_hf": ("import pion_hf",),
    "import pion_hf.optim": ("import pion_hf.optim",),
    "from pion_hf.optim import Pion": ("from pion_hf.optim import Pion",),
    "trl sft --help": (TRL, "sft", "--help"),
    **{
        f"pion-hf {' '.join(arguments)}": (PION, *arguments)
        for arguments in (("--help",), ("--version",), ("no-such-command",))
    },
    **{
        f"pion-hf {command} --help": (PION, command, "--help")
        for command in ("run", "report", "compare", "sft", "cpt", "grpo", "plan")
    },
}
# What a command may take: seconds, or so many times another one's.
QUICK = dict.fromkeys((f"pion-hf {c}" for c in ("--help", "--version", "no-such-command")), 0.6)
QUICK |= dict.fromkeys((f"pion-hf {c} --help" for c in ("report", "compare")), 0.6)
TIMES = dict.fromkeys((f"pion-hf {c} --help" for c in ("sft", "cpt", "grpo", "plan")), (1.2, "trl sft --help"))
TIMES |= dict.fromkeys(("import pion_hf.optim", "from pion_hf.optim import Pion"), (1.6, "import torch"))


def cpu_seconds(command: tuple[str, ...], package: Path) -> float:
    """User and system time of one process."""
    before = os.times()
    env = {**os.environ, "PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-P", "-c", *command], env=env, capture_output=True, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure(package: Path, repeats: int) -> dict[str, float]:
    """The medians; the commands take turns, so that what else the machine does falls on all."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repeat in range(repeats + 1):
        for name, command in COMMANDS.items():
            seconds = cpu_seconds(command, package)
            if repeat:
                taken[name].append(seconds)
    return {name: round(statistics.median(seconds), 3) for name, seconds in taken.items()}


def allowed(name: str, now: dict[str, float]) -> tuple[float, str] | None:
    if name in QUICK:
        return QUICK[name], f"{QUICK[name]:g} s"
    if name in TIMES:
        factor, other = TIMES[name]
        return factor * now[other], f"{factor:g} x {other}"
    return None


def table(results: dict[str, dict[str, float]]) -> Table:
    shown = Table(title="CPU seconds to start")
    for column in ("", *results, "at most"):
        shown.add_column(column, justify="right" if column in results else "left")
    now = results.get("now", {})
    for name in COMMANDS:
        limit = allowed(name, now) if now else None
        verdict = "" if limit is None else f"{limit[1]}{'' if now[name] <= limit[0] else ': too much'}"
        shown.add_row(name, *(f"{seconds[name]:.2f}" for seconds in results.values()), verdict)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=HERE, help="a checkout of another version, shown as `before`")
    parser.add_argument("--repeats", type=int, default=3, help="of every command (default: 3)")
    parser.add_argument("--show", action="store_true", help="print the table of what was measured only")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if not arguments.show:
        of = "now" if arguments.package.resolve() == HERE else "before"
        results[of] = measure(arguments.package, arguments.repeats)
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")
    Console(width=120).print(table(results))


if __name__ == "__main__":
    main()
