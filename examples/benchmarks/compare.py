"""How the optimizers compare, by `pion-hf compare` itself: every contender of compare.yaml on compare_recipe.yaml.

SmolLM2-135M-Instruct, 12 steps of 8 `reasoning-gym` examples, full fine-tuning; the loss on unrelated documentation
shows what is forgotten. Every learning rate runs with two seeds, of the order of the data. With `--longer` it is 48
steps, one seed, and the contenders of compare_longer.yaml; with `--again` as many steps, two seeds, and the best of
these in compare_again.yaml.

Needs examples/prepare_smollm2.py, examples/prepare_reasoning.py and data/python_docs.txt (`make demo` makes all three).
Finished runs are kept in runs/compare-benchmark (runs/compare-longer) and not repeated; results/compare.json and .png
(compare_longer, compare_again) are what is committed, and `--show` prints the table of it. `--again --picture` draws
results/learnt_and_kept.png, the picture of the README. A run takes two to five minutes on 2 CPU cores, a longer one
eight to fifteen.
"""

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from pion_hf.cli import compare
from pion_hf.cli.contest import PLAIN_WIDTH, remarks, table

HERE = Path(__file__).parent
PICTURE = HERE / "results" / "learnt_and_kept.png"
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#e69f00")  # Okabe and Ito's


class Comparison(NamedTuple):
    """Contenders are in NAME.yaml, results in results/NAME.json and .png; settings are further flags."""

    name: str
    runs: str
    seeds: int
    settings: tuple[str, ...] = ()

    def run(self, jobs: str) -> None:
        """Run what is not finished yet."""
        flags = ["--command", "sft", "--contenders", HERE / f"{self.name}.yaml", "--output_dir", self.runs]
        flags += ["--seeds", self.seeds, *self.settings, "--jobs", jobs]
        compare.main([str(word) for word in (HERE / "compare_recipe.yaml", *flags)])
        for made in ("compare.json", "frontier.png"):
            shutil.copy(Path(self.runs, made), self.result(Path(made).suffix))

    def result(self, suffix: str) -> Path:
        return HERE / "results" / f"{self.name}{suffix}"


SETTINGS_OF_LONGER = ("--set", "max_steps=48", "exact_match_samples=32")
USUAL = Comparison("compare", "runs/compare-benchmark", seeds=2)
LONGER = Comparison("compare_longer", "runs/compare-longer", seeds=1, settings=SETTINGS_OF_LONGER)
AGAIN = Comparison("compare_again", "runs/compare-longer", seeds=2, settings=SETTINGS_OF_LONGER)


def every_run(record: dict) -> Table:
    """Losses after training of every run, a line for a contender's learning rate and columns for its seeds."""
    made = Table(box=box.MARKDOWN)
    seeds = range(record["seeds"])
    headings = [f"{what}, seed {seed}" for seed in seeds for what in ("task loss", "other text")]
    for heading in ("contender", "learning rate", *headings):
        made.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
    found = {(run["contender"], run["learning_rate"], run["seed"]): run.get("after") for run in record["runs"]}
    for contender, rate in dict.fromkeys(key[:2] for key in found):
        after = [found.get((contender, rate, seed)) for seed in seeds]
        losses = [f"{a[domain]['loss']:.4f}" if a else "" for a in after for domain in ("task", "other_text")]
        made.add_row(contender, f"{rate:g}", *losses)
    return made


def draw(record: dict) -> None:
    """What each contender learnt against what it forgot: means over seeds, bars to the seeds farthest from them."""
    found = defaultdict(list)
    for run in record["runs"]:
        found[run["contender"], run["learning_rate"]].append((run["learnt"], run["forgotten"]["other_text"]))
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    several = {name: runs for name, runs in found.items() if len(runs) > 1}
    for ((contender, rate), runs), colour in zip(several.items(), COLOURS, strict=True):
        places = list(zip(*runs, strict=True))
        x, y = (sum(values) / len(values) for values in places)
        bars = [[max(abs(value - mean) for value in values)] for values, mean in zip(places, (x, y), strict=True)]
        if contender == "Pion, ambient":  # as it was called, at ten times today's rate
            contender, rate = "pion_ambient", rate / 10
        axes.errorbar(x, y, bars[1], bars[0], "o", color=colour, capsize=3, label=f"{contender}, {rate:g}")
    axes.set_xlabel("learnt: fall of the task's loss (right is better)")
    axes.set_ylabel("forgotten: rise of the loss\nof other text (down is better)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.savefig(PICTURE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(comparison=USUAL)
    which = parser.add_mutually_exclusive_group()
    for flag, comparison, text in (
        ("--longer", LONGER, "four times as many steps"),
        ("--again", AGAIN, "as many, its best learning rates with two seeds, and more directions kept"),
    ):
        which.add_argument(flag, dest="comparison", action="store_const", const=comparison, help=text)
    parser.add_argument("--show", action="store_true", help="print the table of the committed runs")
    parser.add_argument("--picture", action="store_true", help="with --again: draw its committed runs")
    parser.add_argument("--jobs", default="1", help="runs at once")
    chosen = parser.parse_args()
    if chosen.picture:
        return draw(json.loads(AGAIN.result(".json").read_text(encoding="utf-8")))
    if not chosen.show:
        chosen.comparison.run(chosen.jobs)
    record = json.loads(chosen.comparison.result(".json").read_text(encoding="utf-8"))
    console = Console(width=PLAIN_WIDTH)
    console.print(table(record, plain=True))
    for line in remarks(record):
        console.print(line, highlight=False)
    if "version" in record:
        console.print(f"Measured with {record['version']}: rates of 'Pion, ambient' were ten times as large.")
    console.print(every_run(record))


if __name__ == "__main__":
    main()
