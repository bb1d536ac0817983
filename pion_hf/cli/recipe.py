"""Parsing recipes and command lines: TRL's parser, our typed fields, and errors that name the nearest key."""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from pion_hf.errors import unknown


class RecipeParser(TrlParser):
    """TRL's parser, strict: every mistake in a recipe or on the command line is one line with a suggestion."""

    def parse_recipe(self, argv: list[str]) -> tuple[Any, ...]:
        """The dataclasses of `argv`, whose `--config FILE` gives defaults.

        Raises:
            ValueError: an unknown key or flag, a value of the wrong type or not among the choices, or a recipe that is
                no YAML mapping. FileNotFoundError: no such recipe.
        """
        argv = _split_config_flag(argv)
        if "--config" in argv:
            position = argv.index("--config") + 1
            if position >= len(argv):
                raise ValueError("--config needs the path of a recipe")
            self._check_recipe(Path(argv[position]))
        *dataclasses, rest = self.parse_args_and_config(argv, return_remaining_strings=True)
        if rest:
            flag = next((r for r in rest if r.startswith("--")), None)
            if flag is None:
                raise ValueError(f"{rest[0]!r} belongs to no flag; a recipe is named by --config FILE")
            raise unknown("flag", flag.lstrip("-").replace("-", "_").split("=")[0], self._by_key())
        return tuple(dataclasses)

    def error(self, message: str) -> NoReturn:
        """argparse would print the usage of all flags, pages of it, and exit."""
        raise ValueError(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, str(unknown("value", value, action.choices)))

    def _by_key(self) -> dict[str, argparse.Action]:
        return {a.dest: a for a in self._actions if not isinstance(a, argparse._HelpAction)}

    def _check_recipe(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"there is no recipe {str(path)!r}")
        try:
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from None
        if not isinstance(recipe, dict):
            raise ValueError(f"{path} must hold keys and values (a YAML mapping)")
        actions = self._by_key()
        for key, value in recipe.items():
            if key == "env":
                continue
            if key not in actions:
                raise ValueError(f"{path}: {unknown('key', key, actions)}")
            # argparse does not hold defaults, which is what a recipe's values become, to the choices.
            choices = actions[key].choices
            if choices is not None and value is not None and value not in choices:
                raise ValueError(f"{path}: {unknown(f'value of {key}', value, choices)}")


def _split_config_flag(argv: list[str]) -> list[str]:
    """`--config=FILE` as `--config FILE`, the one form that TRL knows."""
    return list(chain.from_iterable(a.split("=", 1) if a.startswith("--config=") else [a] for a in argv))
