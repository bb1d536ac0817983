"""`pion-hf compare`: the same recipe under equal budget with every optimizer, learning rate and seed.

Every run is a process of `pion-hf sft`, `cpt` or `grpo` with a folder of its own under `--output_dir`, which holds its
recipe and its log. What is finished is not repeated: after an interrupt or a kill the same command goes on. Given
several times at once, on one machine or on several that share the folder, it divides the runs among them. It ends with
a table, `compare.json`, the learning-forgetting frontier as a picture, and a report page.

    pion-hf compare recipes/smollm2-135m/sft/full.yaml --optim adamw_torch,muon,pion --learning_rate 1e-4,3e-4,1e-3

Optimizers want different learning rates and options: `--contenders FILE.yaml` names them one by one, as a mapping of
names to keys of the recipe, `learning_rate` being a list:

    AdamW: {optim: adamw_torch, learning_rate: [5e-5, 1e-4, 2e-4]}
    Pion, paper: {optim: pion, optim_preset: paper, learning_rate: [1e-4, 3e-4, 1e-3]}
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from pion_hf.cli import TRAINING
from pion_hf.errors import unknown
from pion_hf.needs import OLDEST, require


class _Parser(argparse.ArgumentParser):
    """Mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser() -> argparse.ArgumentParser:
    """The flags of `pion-hf compare`."""
    made = _Parser(
        prog="pion-hf compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("recipe", type=Path, metavar="RECIPE", help="what all runs have in common")
    made.add_argument("--optim", metavar="NAME,NAME", help="optimizers (default: the recipe's)")
    made.add_argument("--learning_rate", metavar="LR,LR", help="tried with each of them (default: the recipe's)")
    made.add_argument("--contenders", type=Path, metavar="FILE", help="YAML, instead of these two: see above")
    made.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=V1,V2",
        help="also compare values of a key of the recipe, each with each; one value replaces the recipe's",
    )
    made.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs of each, with seeds 0 to N-1 (default: 1)"
    )
    made.add_argument("--command", choices=TRAINING, help="what the recipe is for (default: its folder's name)")
    made.add_argument("--output_dir", type=Path, metavar="DIR", help="default: runs/compare-<the recipe's name>")
    made.add_argument("--storage", metavar="URL", help="a database for its study (default: a file in --output_dir)")
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once, on GPUs or cores of their own")
    made.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="where the recipe says so too: let the check before the first run execute the model's own Python",
    )
    made.add_argument("--keep_models", action="store_true", help="keep the trained weights of every run")
    made.add_argument("--report_only", action="store_true", help="show what is finished, run nothing")
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags of a comparison."""
    flags = parser()
    args, rest = flags.parse_known_args(argv)
    if rest:
        if not rest[0].startswith("-"):
            raise ValueError(f"{rest[0]!r} belongs to no flag: one recipe is compared at a time")
        known = [option for action in flags._actions for option in action.option_strings]
        raise unknown("flag", rest[0].split("=")[0], known)
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.contenders and (args.optim or args.learning_rate):
        raise ValueError("--contenders names optimizers and learning rates: leave out --optim and --learning_rate")
    return args


def main(argv: list[str]) -> None:
    """Run what is not finished yet, then show everything."""
    args = parse(argv)
    require(*OLDEST, "optuna")
    from pion_hf.cli.comparison import compare  # takes seconds, not before the flags are right

    compare(args)
