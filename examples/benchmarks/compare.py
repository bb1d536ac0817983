"""How the optimizers compare, by `pion-hf compare` itself: every contender of compare.yaml on compare_recipe.yaml.

SmolLM2-135M-Instruct, 12 steps of 8 `reasoning-gym` examples, full fine-tuning; the loss on unrelated documentation
shows what is forgotten. Every learning rate runs with two seeds, of the order of the data.

Needs examples/prepare_smollm2.py, examples/prepare_reasoning.py and data/python_docs.txt (`make demo` makes all three).
Finished runs are kept in runs/compare-benchmark and not repeated; results/compare.json is what is committed, and
`--show` prints the table of it. A run takes about two minutes on 2 CPU cores.
"""

import argparse
import json
import shutil
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pion_hf.cli import compare
from pion_hf.cli.contest import remarks, table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "compare.json"
RUNS = Path("runs/compare-benchmark")
SEEDS = 2


def every_run(record: dict) -> Table:
    """Losses after training of every run, a line for a contender's learning rate and columns for its seeds."""
    made = Table(box=box.MARKDOWN)
    headings = [f"{what}, seed {seed}" for seed in range(SEEDS) for what in ("task loss", "other text")]
    for heading in ("contender", "learning rate", *headings):
        made.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
    found = {(run["contender"], run["learning_rate"], run["seed"]): run.get("after") for run in record["runs"]}
    for contender, rate in dict.fromkeys(key[:2] for key in found):
        after = [found.get((contender, rate, seed)) for seed in range(SEEDS)]
        losses = [f"{a[domain]['loss']:.4f}" if a else "" for a in after for domain in ("task", "other_text")]
        made.add_row(contender, f"{rate:g}", *losses)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the table of the committed runs")
    parser.add_argument("--jobs", default="1", help="runs at once")
    chosen = parser.parse_args()
    if not chosen.show:
        recipe, contenders = HERE / "compare_recipe.yaml", HERE / "compare.yaml"
        flags = ["--command", "sft", "--contenders", contenders, "--seeds", SEEDS, "--output_dir", RUNS]
        compare.main([str(word) for word in (recipe, *flags, "--jobs", chosen.jobs)])
        shutil.copy(RUNS / compare.RESULTS, RESULTS)
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    console = Console(width=compare.PLAIN_WIDTH)
    console.print(table(record, plain=True))
    for line in remarks(record):
        console.print(line, highlight=False)
    console.print(every_run(record))


if __name__ == "__main__":
    main()
