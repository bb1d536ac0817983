"""Parsing recipes and command lines: TRL's parser, our typed fields, and errors that name the nearest key."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from pion_hf.errors import unknown


class RecipeParser(TrlParser):
    """TRL's parser, strict: an unknown key or flag is an error with a suggestion, a missing recipe is one line."""

    def parse_recipe(self, argv: list[str]) -> tuple[Any, ...]:
        """The dataclasses of `argv`, whose `--config FILE` gives defaults.

        Raises:
            ValueError: an unknown key or flag, or a recipe that is no YAML mapping. FileNotFoundError: no such recipe.
        """
        known = self.known_keys()
        if "--config" in argv:
            position = argv.index("--config") + 1
            if position >= len(argv):
                raise ValueError("--config needs the path of a recipe")
            _check_recipe(Path(argv[position]), known)
        parsed = self.parse_args_and_config(argv, return_remaining_strings=True)
        *dataclasses, rest = parsed
        if rest:
            flag = next((r for r in rest if r.startswith("--")), rest[0])
            raise unknown("flag", flag.lstrip("-").replace("-", "_").split("=")[0], known)
        return tuple(dataclasses)

    def known_keys(self) -> list[str]:
        return [a.dest for a in self._actions if not isinstance(a, argparse._HelpAction)]


def _check_recipe(path: Path, known: list[str]) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {str(path)!r}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold keys and values (a YAML mapping)")
    for key in recipe:
        if key not in known and key != "env":
            raise ValueError(f"{path}: {unknown('key', key, known)}")
