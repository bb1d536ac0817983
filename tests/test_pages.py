"""The pages in docs: their tables of options say what the code says, and what they tell a reader to run runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from peft import LoraConfig, get_peft_model

from pion_hf.arguments import FIXED_OPTIONS, OPTIMIZER_CLASSES, option_types, options_of
from pion_hf.cli import plan
from pion_hf.optim.pion import PRESETS
from tests.conftest import toy_llama

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {name: DOCS / "optimizers" / f"{name}.md" for name in OPTIMIZER_CLASSES}
OTHERS = ("choosing", "elsewhere", "keep", "migration")
WRITTEN = [*sorted((DOCS / "optimizers").glob("*.md")), *(DOCS / f"{name}.md" for name in OTHERS)]
MOST_LINES = 60


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def table(page: Path, heading: str) -> dict[str, list[str]]:
    """Rows of all tables of a page whose first column has this heading, by what stands there."""
    found, inside = {}, False
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        inside = bool(cells) and (inside or cells[0] == heading)
        if inside and cells[0].startswith("`"):
            assert cells[0] not in found, f"{page.name}: {cells[0]} twice"
            found[cells[0].strip("`")] = cells[1:]
    return found


def in_words(kind: Any) -> str:
    """A type, as the tables say it."""
    arguments = [argument for argument in get_args(kind) if argument is not type(None)]
    if type(None) in get_args(kind):
        return in_words(arguments[0]) if len(arguments) == 1 else in_words(Literal[tuple(arguments)])
    if get_origin(kind) is Literal:
        return ", ".join(f"`{word}`" for word in arguments)
    words = {int: "whole number", float: "number", bool: "true, false", tuple: "two numbers", list: "expressions"}
    return words[get_origin(kind) or kind]


@pytest.mark.parametrize("name", PAGES)
def test_tables_of_options_are_those_of_the_code(name):
    fields, types = (read(name, by_trainer=False) for read in (options_of, option_types))
    common = table(DOCS / "optimizers" / "README.md", "option")
    said = table(PAGES[name], "option")
    assert not said.keys() & common.keys()
    if name == "pion_ambient":  # whose page has those that the name sets, and Pion's has the others
        fixed = table(PAGES[name], "the name sets")
        assert {option: value for option, (value, *_) in fixed.items()} == {
            option: str(value) for option, value in PRESETS["ambient"].items()
        }
        said = {option: row for option, row in table(PAGES["pion"], "option").items() if option in fields}
    assert FIXED_OPTIONS.get(name, {}).keys().isdisjoint(fields)
    rows = {**{option: row for option, row in common.items() if option in fields}, **said}
    assert rows.keys() == fields.keys()
    for option, (kind, default, what, why) in rows.items():
        assert (kind, default) == (in_words(types[option]), str(fields[option].default)), option
        assert what
        assert why, f"{option}: nothing speaks for it"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_the_optimizer_is_for_and_what_not(name):
    text = PAGES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for words in ("**Use it**", "**Learning rate**", "**Memory**", "**Source"):
        assert words in text
    assert "**Not for**" in text or "must not be used" in text


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            other = (page.parent / path).resolve() if path else page
            assert other.exists(), target
            headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path, monkeypatch, token_rows):
    """In one interpreter, one after the other, on a toy model with and without adapters."""
    monkeypatch.chdir(tmp_path)
    toy_llama().save_pretrained("out/checkpoint-1000")
    adapted = get_peft_model(toy_llama(), LoraConfig(r=4, target_modules="all-linear"))
    names = {"model": toy_llama(num_key_value_heads=4), "peft_model": adapted, "train_dataset": token_rows}
    for snippet in fences(page, "python"):
        exec(compile(snippet, str(page), "exec"), names)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_commands_can_be_planned(page, monkeypatch, capsys):
    """Each would train, as far as can be told without weights: recipes, options and the optimizer's groups."""
    monkeypatch.chdir(ROOT)
    for line in "\n".join(fences(page, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] in (["pion-hf", "sft"], ["pion-hf", "cpt"]):
            plan.main(words[2:])
            assert "Estimated peak memory" in capsys.readouterr().out, line
