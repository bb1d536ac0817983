"""The tables of docs/options.md, made from the code: `python -m tests.option_tables` writes them into the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import trl

from pion_hf.cli import flags
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES, by_optimizer, default_of, option_types, options_of
from pion_hf.integrations.trl_config import PionSFTConfig
from tests.field.page import markdown, write

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
WORDS = {
    int: "whole number",
    float: "number",
    bool: "`True`, `False`",
    tuple: "two numbers",
    list: "expressions",
    str: "text",
}


def in_words(kind: Any) -> str:
    """A type: the words that an option may be, or what it holds."""
    kinds = [of for of in get_args(kind) if of is not type(None)] if type(None) in get_args(kind) else [kind]
    words = [word for of in kinds if get_origin(of) is Literal for word in get_args(of)]
    return ", ".join(f"`{word}`" for word in words) or WORDS[get_origin(kinds[0]) or kinds[0]]


def option_rows() -> Iterator[tuple[str, ...]]:
    """A row for every option: its name, whose it is, what it may be, its default, and what `--help` says of it."""
    fields = {optim: options_of(optim, by_trainer=False) for optim in OPTIMIZER_CLASSES}
    types = {optim: option_types(optim, by_trainer=False) for optim in OPTIMIZER_CLASSES}
    for option in dict.fromkeys(option for of in fields.values() for option in of):
        owners = [optim for optim in OPTIMIZER_CLASSES if option in fields[optim]]
        helps = dict.fromkeys(fields[optim][option].metadata["help"] for optim in owners)
        text, _, default = " ".join(helps).partition(" (default: ")
        yield (
            f"`{option}`",
            "all" if len(owners) == len(OPTIMIZER_CLASSES) else ", ".join(owners),
            "; ".join(dict.fromkeys(in_words(types[optim][option]) for optim in owners)),
            default.rstrip(")") or by_optimizer({optim: str(default_of(optim, option)) for optim in owners}),
            text,
        )


def flag_rows() -> Iterator[tuple[str, ...]]:
    """A row for every flag that our commands have beside TRL's and those of the optimizers."""
    everywhere = [f for f in _fields(flags.ModelArguments) if f.name not in {f.name for f in _fields(trl.ModelConfig)}]
    everywhere += [f for f in _fields(PionSFTConfig) if f.name == "max_skipped_steps"]
    added = {
        "sft, cpt, grpo": [*everywhere, *_fields(flags.ReportArguments)],
        "cpt": [*_fields(flags.ScratchArguments), *_fields(flags.CorpusArguments)],
        "plan": _fields(flags.PlanArguments),
    }
    for commands, fields in added.items():
        yield from ((f"`{f.name}`", commands, str(f.default), f.metadata["help"]) for f in fields)


def _fields(kind: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(kind)


def write_tables(page: Path) -> None:
    """Put both into `page`."""
    write(page, "options", markdown(("option", "of", "values", "default", "what it does"), [*option_rows()]))
    write(page, "flags", markdown(("flag", "of", "default", "what it does"), [*flag_rows()]))


if __name__ == "__main__":
    write_tables(PAGE)
