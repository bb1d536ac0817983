"""What a share of the change is worth: after training, weights at `start + share * (trained - start)`.

SmolLM2-135M-Instruct, full fine-tuning, 48 steps of 8 `reasoning-gym` examples, each contender at the learning rate
that is best in examples/benchmarks/compare.py --longer. Every run is an ordinary `pion-hf sft` with `--blend_shares`,
in one of these settings:

- `reasoning`: tasks and text as in compare.py --longer;
- `stories`: other tasks (word problems, sorting words, counting letters, kinship) and other text (source code). Nothing
  was chosen by what comes out here: rates and the number of directions are those of `reasoning`;
- `stories, half` and `stories, quarter`: the same at half the learning rates, and at a quarter.

Needs examples/prepare_smollm2.py, examples/prepare_reasoning.py and data/python_docs.txt (`make demo` makes all three);
`stories` needs examples/prepare_text.py too and

    python examples/prepare_reasoning.py --output data/stories \\
        --tasks gsm_symbolic word_sorting letter_counting family_relationships

A run of 48 steps takes six to ten minutes on 2 CPU cores; finished ones are kept in runs/blend and not repeated. The
results are in results/blend.json and .png (`--show` prints them and runs nothing). Earlier ones stay there.
"""

import argparse
import itertools
import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pion_hf.cli import main as pion_hf
from pion_hf.report.style import COLOURS, MARKERS, add_legend, new_figure, styled
from pion_hf.runs.folder import EVALUATION, read_json

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "blend.json"
RUNS = Path("runs/blend")
SHARES = (0.4, 0.6, 0.8, 1.0)
SEEDS = (0, 1)
STORIES = ("--dataset_name", "data/stories", "--other_text_file", "data/python_code.txt")
# By name: the factor of all learning rates, and flags.
SETTINGS = {
    "reasoning": (1.0, ()),
    "stories": (1.0, STORIES),
    "stories, half": (0.5, STORIES),
    "stories, quarter": (0.25, STORIES),
}
SOFT = ("--optim_keep", "16", "--optim_keep_soft", "true")
CONTENDERS = {
    "AdamW, two rates": ("adamw_routed", 4e-4),
    "AdamW, two rates, keep 16, soft": ("adamw_routed", 8e-4, *SOFT),
    "Muon, keep 16": ("muon", 2e-3, "--optim_keep", "16"),
    "Pion, ambient": ("pion_ambient", 2e-4),
}
MEASURES = ("task", "other_text")


def folder_of(setting: str, contender: str, seed: int) -> Path:
    where, who = ("".join(c if c.isalnum() else "-" for c in name.lower()) for name in (setting, contender))
    return RUNS / where / f"{who}-seed{seed}"


def rate_of(setting: str, contender: str) -> float:
    return SETTINGS[setting][0] * CONTENDERS[contender][1]


def train(setting: str, contender: str, seed: int) -> None:
    """Unless it has been done."""
    if measured(setting, contender, seed) is not None:
        return
    optim, _, *options = CONTENDERS[contender]
    flags = {
        "--config": HERE / "compare_recipe.yaml",
        "--max_steps": 48,
        "--exact_match_samples": 0,
        "--seed": seed,
        "--data_seed": seed,
        "--optim": optim,
        "--learning_rate": rate_of(setting, contender),
        "--output_dir": folder_of(setting, contender, seed),
    }
    shares = map(str, SHARES[:-1])
    given = [str(x) for flag in flags.items() for x in flag]
    pion_hf(["sft", *given, *SETTINGS[setting][1], *options, "--blend_shares", *shares])


def measured(setting: str, contender: str, seed: int) -> dict | None:
    """Losses before training, and by share of the change; None of a run that has not finished."""
    found = read_json(folder_of(setting, contender, seed) / EVALUATION)
    if found is None:
        return None
    shares = {f"{b['share']:g}": {domain: b[domain]["loss"] for domain in MEASURES} for b in found["blends"]}
    return {"before": {domain: found["before"][domain]["loss"] for domain in MEASURES}, "shares": shares}


def kept() -> dict[tuple[str, str, int], dict]:
    """The runs of results/blend.json by setting, contender and seed."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    return {(run["setting"], run["contender"], run["seed"]): run for run in runs}


def forgotten(run: dict, share: str) -> float:
    return run["shares"][share]["other_text"] - run["before"]["other_text"]


def table(runs: list[dict]) -> Table:
    """Task loss and what was forgotten, by share."""
    made = Table(box=box.MARKDOWN)
    for heading in ("setting", "contender", "lr", "seed", *map("{:g}".format, SHARES)):
        made.add_column(heading, justify="left" if heading in ("setting", "contender") else "right", no_wrap=True)
    for run in runs:
        cells = [f"{losses['task']:.4f} / {forgotten(run, share):.4f}" for share, losses in run["shares"].items()]
        setting, contender = run["setting"], run["contender"]
        made.add_row(setting, contender, f"{rate_of(setting, contender):.0e}", str(run["seed"]), *cells)
    return made


@styled
def picture(runs: list[dict]) -> None:
    """Of every setting's first seed."""
    shown = [setting for setting in SETTINGS if any(run["setting"] == setting for run in runs)]
    figure = new_figure(3.6 * len(shown))
    styles = dict(zip(CONTENDERS, zip(COLOURS, MARKERS, strict=False), strict=False))
    handles = {}
    for axes, setting in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        for run in (run for run in runs if run["setting"] == setting and run["seed"] == SEEDS[0]):
            name, (colour, marker) = run["contender"], styles[run["contender"]]
            points = {share: (losses["task"], forgotten(run, share)) for share, losses in run["shares"].items()}
            handles[name], *_ = axes.plot(*zip(*points.values(), strict=True), color=colour, marker=marker, label=name)
            for share, place in points.items():
                axes.annotate(share, place, textcoords="offset points", xytext=(5, 4), fontsize=7)
        axes.set_title(f"{setting}, seed {SEEDS[0]}")
        axes.set_xlabel("task loss after training")
        axes.set_ylabel("forgotten: rise of\nthe other text's loss")
    add_legend(figure, list(handles.values()))
    figure.savefig(RESULTS.with_suffix(".png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="orders of the data (default: 0 1)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--show", action="store_true", help="print the kept results")
    chosen = parser.parse_args()
    results = kept() if RESULTS.is_file() else {}
    if not chosen.show:
        for seed, setting, contender in itertools.product(chosen.seeds, chosen.setting, chosen.only):
            train(setting, contender, seed)
        for setting, contender, seed in itertools.product(SETTINGS, CONTENDERS, SEEDS):
            run = measured(setting, contender, seed)
            if run is not None:
                named = {"setting": setting, "contender": contender, "seed": seed}
                results[setting, contender, seed] = {**named, **run}
    order = itertools.product(SETTINGS, CONTENDERS, SEEDS)
    runs = [results[key] for key in order if key in results]
    if not chosen.show:
        RESULTS.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
        picture(runs)
    Console(width=160).print(table(runs))


if __name__ == "__main__":
    main()
