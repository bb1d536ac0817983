"""What a share of the change is worth: after training, weights at `start + share * (trained - start)`.

SmolLM2-135M-Instruct, 48 steps of 8 `reasoning-gym` examples, full fine-tuning, as examples/benchmarks/compare.py
--longer; each contender at its best learning rate there, two orders of the data. Every run is an ordinary `pion-hf sft`
with `--blend_shares`.

Needs examples/prepare_smollm2.py, examples/prepare_reasoning.py and data/python_docs.txt (`make demo` makes all three).
A run takes six to ten minutes on 2 CPU cores; finished ones are kept in runs/blend and not repeated. The results are in
results/blend.json and .png (`--show` prints them and runs nothing).
"""

import argparse
import itertools
import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pion_hf.cli import main as pion_hf
from pion_hf.report.looks import COLOURS, MARKERS, add_legend, new_figure, styled
from pion_hf.runs import EVALUATION, read_json

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "blend.json"
RUNS = Path("runs/blend")
SHARES = (0.4, 0.6, 0.8, 1.0)
SEEDS = (0, 1)
SOFT = ("--optim_keep", "16", "--optim_keep_soft", "true")
CONTENDERS = {
    "AdamW, two rates": ("adamw_routed", "4e-4"),
    "AdamW, two rates, keep 16, soft": ("adamw_routed", "8e-4", *SOFT),
    "Muon, keep 16": ("muon", "2e-3", "--optim_keep", "16"),
    "Pion, default": ("pion", "2e-3"),
}
MEASURES = ("task", "other_text")


def folder_of(contender: str, seed: int) -> Path:
    words = "".join(c if c.isalnum() else "-" for c in contender.lower())
    return RUNS / f"{words}-seed{seed}"


def train(contender: str, seed: int) -> None:
    """Unless it has been done."""
    if measured(contender, seed) is not None:
        return
    optim, rate, *options = CONTENDERS[contender]
    flags = {
        "--config": HERE / "compare_recipe.yaml",
        "--max_steps": 48,
        "--exact_match_samples": 0,
        "--seed": seed,
        "--data_seed": seed,
        "--optim": optim,
        "--learning_rate": rate,
        "--output_dir": folder_of(contender, seed),
    }
    shares = map(str, SHARES[:-1])
    pion_hf(["sft", *(str(x) for flag in flags.items() for x in flag), *options, "--blend_shares", *shares])


def measured(contender: str, seed: int) -> dict | None:
    """Losses before training, and by share of the change; None of a run that has not finished."""
    found = read_json(folder_of(contender, seed) / EVALUATION)
    if found is None:
        return None
    shares = {f"{b['share']:g}": {domain: b[domain]["loss"] for domain in MEASURES} for b in found["blends"]}
    return {"before": {domain: found["before"][domain]["loss"] for domain in MEASURES}, "shares": shares}


def forgotten(run: dict, share: str) -> float:
    return run["shares"][share]["other_text"] - run["before"]["other_text"]


def table(record: dict) -> Table:
    """Task loss and what was forgotten, by share."""
    made = Table(box=box.MARKDOWN)
    for heading in ("contender", "lr", "seed", *map("{:g}".format, SHARES)):
        made.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
    for run in record["runs"]:
        cells = [f"{losses['task']:.4f} / {forgotten(run, share):.4f}" for share, losses in run["shares"].items()]
        made.add_row(run["contender"], CONTENDERS[run["contender"]][1], str(run["seed"]), *cells)
    return made


@styled
def picture(record: dict) -> None:
    """Of the first seed, which all have."""
    figure = new_figure(4.2)
    axes, handles = figure.subplots(), []
    runs = [run for run in record["runs"] if run["seed"] == SEEDS[0]]
    for run, colour, marker in zip(runs, COLOURS, MARKERS, strict=False):
        points = {share: (losses["task"], forgotten(run, share)) for share, losses in run["shares"].items()}
        handles += axes.plot(*zip(*points.values(), strict=True), color=colour, marker=marker, label=run["contender"])
        for share, place in points.items():
            axes.annotate(share, place, textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.set_xlabel("task loss after training")
    axes.set_ylabel("forgotten: rise of the loss on documentation")
    axes.set_title(f"Shares of what training changed, seed {SEEDS[0]}")
    add_legend(figure, handles)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="orders of the data (default: 0 1)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--show", action="store_true", help="print the kept results")
    chosen = parser.parse_args()
    if chosen.show:
        record = json.loads(RESULTS.read_text(encoding="utf-8"))
    else:
        for seed, contender in itertools.product(chosen.seeds, chosen.only):
            train(contender, seed)
        found = {(name, seed): measured(name, seed) for name in CONTENDERS for seed in SEEDS}
        record = {"runs": [{"contender": n, "seed": s, **run} for (n, s), run in found.items() if run]}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        picture(record)
    Console(width=150).print(table(record))


if __name__ == "__main__":
    main()
