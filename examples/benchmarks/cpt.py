"""Continued pretraining: AdamW, Muon and TEON at equal budget, every learning rate of a sweep, by `pion-hf cpt` itself.

Every run is recipes/smollm2-135m/cpt/teon.yaml, 20 steps of 4 rows, with another optimizer, learning rate or seed (of
the order of the data). AdamW is torch's, on everything at the one rate; beside Muon and TEON it takes embeddings and
norms at 1e-4. Prints the losses of every run and, where the best learning rate lies at an end of its sweep, says so.
The best rate of each optimizer is run again with a second seed.

Needs examples/prepare_smollm2.py and examples/prepare_text.py. Finished runs are kept in results/cpt.json and not
repeated (`--show`: none at all).
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pion_hf.cli import cpt

RECIPE = "recipes/smollm2-135m/cpt/teon.yaml"
RESULTS = Path(__file__).parent / "results" / "cpt.json"
FIXED = ["--max_steps", "20", "--per_device_train_batch_size", "4", "--optim_adamw_lr", "1e-4"]
SWEEP = {"adamw_torch": (3e-5, 1e-4, 3e-4), "muon": (1e-4, 3e-4, 1e-3), "teon": (1e-4, 3e-4, 1e-3)}


def run(optim: str, lr: float, seed: int) -> dict:
    folder = Path(f"runs/cpt/{optim}-{lr:g}-{seed}")
    started = time.perf_counter()
    chosen = ["--optim", optim, "--learning_rate", str(lr), "--seed", str(seed), "--output_dir", str(folder)]
    cpt.main(["--config", RECIPE, "--disable_tqdm", "true", *FIXED, *chosen])
    report = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)  # half a gigabyte of weights
    measured = {
        moment: {
            "evaluation loss": report[moment]["task"]["loss"],
            "perplexity": report[moment]["task"]["perplexity"],
            "loss on other text": report[moment]["other_text"]["loss"],
        }
        for moment in ("before", "after")
    }
    minutes, share = (time.perf_counter() - started) / 60, report["optimizer_share"]
    return {"optim": optim, "lr": lr, "seed": seed, "minutes": minutes, **measured, "optimizer_share": share}


def best(runs: list[dict], optim: str) -> float:
    """The learning rate of the lowest evaluation loss at the first seed."""
    return min((r for r in runs if r["optim"] == optim and r["seed"] == 0), key=_loss)["lr"]


def _loss(row: dict) -> float:
    return row["after"]["evaluation loss"]


def table(runs: list[dict]) -> Table:
    before = runs[0]["before"]
    shown = Table(
        title=f"Before: evaluation {before['evaluation loss']:.4f} (perplexity {before['perplexity']:.2f}), "
        f"source code {before['loss on other text']:.4f}"
    )
    for column in ("optimizer", "lr", "seed", "evaluation", "perplexity", "source code", "optimizer share", "minutes"):
        shown.add_column(column, justify="left" if column == "optimizer" else "right")
    for r in sorted(runs, key=lambda r: (list(SWEEP).index(r["optim"]), r["seed"], r["lr"])):
        after = r["after"]
        shown.add_row(
            r["optim"],
            f"{r['lr']:g}",
            str(r["seed"]),
            f"{_loss(r):.4f}",
            f"{after['perplexity']:.2f}",
            f"{after['loss on other text']:.4f}",
            f"{r['optimizer_share']:.0%}",
            f"{r['minutes']:.1f}",
        )
    ends = []
    for optim in {r["optim"]: None for r in runs}:
        rates = sorted(r["lr"] for r in runs if r["optim"] == optim and r["seed"] == 0)
        if best(runs, optim) in (rates[0], rates[-1]):
            ends.append(f"{optim} {best(runs, optim):g}")
    shown.caption = f"Best at an end of its sweep: {', '.join(ends)}." if ends else "Every best rate is interior."
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the table of finished runs only")
    arguments = parser.parse_args()
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []

    def once(optim: str, lr: float, seed: int) -> None:
        if not any((r["optim"], r["lr"], r["seed"]) == (optim, lr, seed) for r in runs):
            runs.append(run(optim, lr, seed))
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(runs, indent=1))

    if not arguments.show:
        for optim, rates in SWEEP.items():
            for lr in rates:
                once(optim, lr, seed=0)
        for optim in SWEEP:
            once(optim, best(runs, optim), seed=1)
    Console(width=120).print(table(runs))


if __name__ == "__main__":
    main()
