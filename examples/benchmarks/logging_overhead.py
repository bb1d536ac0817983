"""What it costs that a run is logged and recorded: shares of the training time, as the run itself measures them.

Every run is recipes/smollm2-135m/sft/full.yaml for a few steps with another optimizer. Its folder says what went to the
optimizer, to logging (learning rates, updates, angles) and to snapshots (norms of all matrices, spectra of some), and
how many of each there were. In so short a run the first and the last snapshot weigh most; they do not grow with its
length, and what is between them may take a hundredth of the time.

Needs examples/prepare_smollm2.py and examples/prepare_reasoning.py. The results are kept in
results/logging_overhead.json; `--show` prints them and runs nothing.
"""

import argparse
import json
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pion_hf.cli import sft
from pion_hf.runs.folder import read_run

RECIPE = "recipes/smollm2-135m/sft/full.yaml"
RESULTS = Path(__file__).parent / "results" / "logging_overhead.json"
# Keys of the recipe: options of one optimizer, and evaluations, which are no part of training.
LEFT_OUT = ("optim_", "eval_", "exact_match", "other_text")
OPTIMIZERS = ("pion_ambient", "muon", "adamw_torch")


def run(optim: str, steps: int) -> dict:
    folder = Path(f"runs/logging/{optim}")
    fixed = ["--logging_steps", "2"]
    adamw = ["--optim_adamw_lr", "3e-5"] if optim != "adamw_torch" else []
    chosen = ["--optim", optim, "--max_steps", str(steps), "--output_dir", str(folder)]
    recipe = folder.with_suffix(".yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    lines = Path(RECIPE).read_text(encoding="utf-8").splitlines()
    recipe.write_text("\n".join(line for line in lines if not line.startswith(LEFT_OUT)), encoding="utf-8")
    sft.main(["--config", str(recipe), *fixed, *adamw, *chosen])
    found = read_run(folder)
    times = found.record["times"]
    measured = {
        "optim": optim,
        "steps": steps,
        **{part: times[part] / times["total"] for part in ("optimizer", "logging", "snapshots")},
        "taken": len(found.snapshots),
        "matrices": len(found.matrices),
        "spectra": len(found.spectra),
        "steps_measured": sum(any(key.startswith("update_rms") for key in entry) for entry in found.logs),
    }
    shutil.rmtree(folder)  # half a gigabyte of weights
    return measured


def table(runs: list[dict]) -> Table:
    shown = Table(title="Shares of the training time, SmolLM2-135M, full fine-tuning")
    columns = (
        "optimizer",
        "steps",
        "optimizer's",
        "logging",
        "snapshots",
        "both",
        "snapshots",
        "spectra",
        "log entries",
    )
    for column in columns:
        shown.add_column(column, justify="left" if column == "optimizer" else "right")
    for r in runs:
        shown.add_row(
            r["optim"],
            str(r["steps"]),
            *(f"{share:.1%}" for share in (r["optimizer"], r["logging"], r["snapshots"])),
            f"{r['logging'] + r['snapshots']:.1%}",
            str(r["taken"]),
            f"{r['spectra']} of {r['matrices']}",
            str(r["steps_measured"]),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of every run (default: 12)")
    parser.add_argument("--optim", nargs="+", default=OPTIMIZERS, help="which optimizers")
    parser.add_argument("--show", action="store_true", help="print the table of finished runs only")
    arguments = parser.parse_args()
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if not arguments.show:
        for optim in arguments.optim:
            fresh = run(optim, arguments.steps)
            runs = [r for r in runs if (r["optim"], r["steps"]) != (optim, arguments.steps)] + [fresh]
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(runs, indent=1))
    Console(width=120).print(table(runs))


if __name__ == "__main__":
    main()
