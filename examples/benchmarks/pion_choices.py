"""What Pion's choices cost and gain in the demo: where the momentum lives, and in which precision.

Every run is that of `make demo`, 20 steps of 8 riddles on SmolLM2-135M, one seed; embeddings and norms are AdamW's at
3e-5. "Riddles" is the loss on held-out ones, "documentation" that on Python's, before 2.894.

Needs what `make demo` makes. Finished runs are kept in results/pion_choices.json and not repeated; `--show` runs none.
A run takes five minutes on 2 CPU cores.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pion_hf._version import __version__

RECIPE, FOLDER = "recipes/smollm2-135m/sft/demo.yaml", Path("runs/pion_choices")
RESULTS = Path(__file__).parent / "results" / "pion_choices.json"
# name -> options of optim=pion, and rates. Those of the ambient rule are pion_ambient's, whose rms is 2.
AMBIENT = "direction=natural, metric=ambient, rms=2"
CONTENDERS = {
    "pion": ("momentum_frame=ambient", (1.5e-4, 3e-4)),
    "pion, transported": ("momentum_frame=transported", (1.5e-4, 3e-4)),
    "pion, paper": ("preset=paper", (3e-4,)),
    "pion_ambient": (f"{AMBIENT}, momentum_frame=transported", (1.5e-4, 3e-4)),
    "pion_ambient, not transported": (f"{AMBIENT}, momentum_frame=ambient", (1.5e-4, 3e-4)),
    "pion_ambient, bfloat16 state": (f"{AMBIENT}, momentum_frame=transported, state_dtype=bfloat16", (1.5e-4, 3e-4)),
}


def run(name: str, options: str, lr: float) -> dict[str, float]:
    folder = FOLDER / f"{name.replace(', ', '-').replace(' ', '-')}-{lr:g}"
    command = ["sft", "--config", RECIPE, "--optim", "pion", "--optim_args", options, "--learning_rate", f"{lr:g}"]
    flags = ["--max_steps", "20", "--exact_match_samples", "0", "--output_dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pion_hf.cli", *command, *flags], check=True)
    after = json.loads((folder / "eval.json").read_text())["after"]
    return {"riddles": after["task"]["loss"], "documentation": after["other_text"]["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="run nothing, show what is known")
    show = parser.parse_args().show
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"version": __version__, "runs": {}}
    table = Table(title="Pion's choices in the demo")
    for column in ("", "lr", "riddles", "documentation"):
        table.add_column(column, justify="right" if column else "left")
    for name, (options, rates) in CONTENDERS.items():
        for lr in rates:
            key = f"{name} {lr:g}"
            if key not in kept["runs"] and not show:
                kept["runs"][key] = run(name, options, lr)
                RESULTS.write_text(json.dumps(kept, indent=1))
            if key in kept["runs"]:
                losses = kept["runs"][key]
                table.add_row(name, f"{lr:g}", *(f"{losses[of]:.4f}" for of in ("riddles", "documentation")))
    Console().print(table)


if __name__ == "__main__":
    main()
