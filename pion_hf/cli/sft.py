"""`pion-hf sft`: TRL's supervised fine-tuning script with this package's optimizer, and a report at the end."""

from __future__ import annotations

from pion_hf.cli import flags
from pion_hf.cli.recipe import RecipeParser
from pion_hf.cli.training import check, readable, train


def parser() -> RecipeParser:
    """Every flag of `trl sft`, the optimizer's `--optim_*`, and the report's."""
    return flags.parser("sft")


def main(argv: list[str]) -> None:
    """Fine-tune; ends with a table, `eval.json` and a model card in the output folder."""
    parsed = parser().parse_recipe(argv)
    check(parsed)
    script_args, *others = parsed
    with readable(script_args.dataset_name):
        train(script_args, *others)
