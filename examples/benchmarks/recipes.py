"""The memory of a step of every recipe, as `pion-hf plan --config RECIPE` estimates it: tables of recipes/*/README.md.

`python examples/benchmarks/recipes.py` prints them; `--write` also puts them into the README files.
Where a recipe leaves the precision to the processor (`bf16: auto`), it is that of autocast.
"""

import argparse
import re
from pathlib import Path

from pion_hf.cli.memory import in_gib
from pion_hf.cli.plan import make_plan, parse
from pion_hf.cli.recipe import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
# The folder that examples/prepare_smollm2.py makes has this model's shapes.
SHAPES = {"models/smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
PARTS = ("weights", "gradients", "state", "activations", "peak")
TABLE = re.compile(r"\| recipe \|.*\n(\|.*\n)+")
HEADER = f"| recipe | optimizer | {' | '.join(PARTS)} | peak with AdamW |\n|{'---|' * (len(PARTS) + 3)}\n"


def row(recipe: Path) -> str:
    """The table's line of one recipe."""
    autocast = ["--bf16", "true"] if read_recipe(recipe).get("bf16") == "auto" else []  # on any machine the same table
    args, model_args, _, on_cpu = parse(["--config", str(recipe), *autocast])
    model_args.model_name_or_path = SHAPES.get(model_args.model_name_or_path, model_args.model_name_or_path)
    plan = make_plan(args, model_args, on_cpu=on_cpu)
    cells = [in_gib(getattr(plan.memory, part)) for part in PARTS]
    name = recipe.relative_to(recipe.parents[1])
    return f"| {' | '.join([f'`{name}`', plan.optim, *cells, in_gib(plan.adamw.peak)])} |\n"


def table(folder: Path) -> str:
    """The table of one model's recipes."""
    return HEADER + "".join(map(row, sorted(folder.glob("*/*.yaml"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the tables in recipes/*/README.md")
    write = parser.parse_args().write
    for readme in sorted(RECIPES.glob("*/README.md")):
        rows = table(readme.parent)
        print(f"{readme.parent.name}\n\n{rows}")
        if write:
            before, _, after = TABLE.split(readme.read_text(encoding="utf-8"))
            readme.write_text(before + rows + after, encoding="utf-8")


if __name__ == "__main__":
    main()
