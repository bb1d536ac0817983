"""The pages in docs: their tables of options say what the code says, and what they tell a reader to run runs."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from pion_hf.cli import compare, plan
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES
from pion_hf.integrations.schedules import OPTIONS
from pion_hf.report.page import SECTIONS
from tests import option_tables
from tests.conftest import toy_llama

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WRITTEN = sorted(DOCS.rglob("*.md"))
OUTSIDE = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("recipes/*/README.md")),
    ROOT / "tests/field/README.md",
]  # which mkdocs does not see
MOST_PAGES = 12


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


def test_tables_of_options_and_flags_are_those_of_the_code(tmp_path):
    """If this fails, `python -m tests.option_tables` writes them anew."""
    page = Path(shutil.copy(option_tables.PAGE, tmp_path))
    option_tables.write_tables(page)
    assert page.read_text(encoding="utf-8") == option_tables.PAGE.read_text(encoding="utf-8")


def test_every_optimizer_is_described():
    said = "".join((DOCS / page).read_text(encoding="utf-8") for page in ("choosing.md", "lora.md"))
    assert not [name for name in OPTIMIZER_CLASSES if said.count(f"`{name}`") < 3]


def test_pages_are_few():
    assert len(WRITTEN) <= MOST_PAGES


def test_the_table_of_schedules_is_that_of_the_code():
    said = {name: row[-1] for name, row in table(DOCS / "recipes.md", "name").items()}
    assert said == {
        name: ", ".join(f"`{option}={default}`" for option, default in options.items())
        for name, options in OPTIONS.items()
    }


def test_the_table_of_pictures_is_that_of_the_report():
    rows = (DOCS / "report.md").read_text(encoding="utf-8").partition("| picture |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([A-Z][^|]*) \|", rows, re.MULTILINE) == [section.heading for section in SECTIONS]


@pytest.mark.parametrize("page", OUTSIDE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Of pages in docs the build says it (`make docs`)."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            other = (page.parent / path).resolve() if path else page
            assert other.exists(), target
            headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


@pytest.mark.parametrize("page", [*WRITTEN, *OUTSIDE], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.-])(?:pion_hf|examples|recipes|tests)/[\w/.-]*\.(?:py|yaml|md|png)\b", text)
    named += [f"examples/benchmarks/{script}" for script in re.findall(r"`(\w+\.py) --show", text)]
    assert page.name == "CHANGELOG.md" or not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", [page for page in WRITTEN if fences(page, "python")], ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path, monkeypatch, token_rows):
    """In one interpreter, one after the other, on a toy model with and without adapters."""
    monkeypatch.chdir(tmp_path)
    toy_llama().save_pretrained("out/checkpoint-1000")
    adapted = get_peft_model(toy_llama(), LoraConfig(r=4, target_modules="all-linear"))
    names = {"model": toy_llama(num_key_value_heads=4), "peft_model": adapted, "train_dataset": token_rows[:8]}
    for snippet in fences(page, "python"):
        exec(compile(snippet, str(page), "exec"), names)


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("toy")
    toy_llama(num_key_value_heads=4).save_pretrained(folder)
    return str(folder)


def commands() -> dict[str, list[str]]:
    """Of all pages, by their words."""
    lines = (line for page in WRITTEN for fence in fences(page, "bash") for line in fence.splitlines())
    return {" ".join(words): words for words in (shlex.split(line, comments=True) for line in lines) if words}


@pytest.mark.parametrize("words", commands().values(), ids=commands())
def test_commands_can_be_planned(words, toy_folder, monkeypatch, capsys):
    """Each would train, as far as can be told without weights: recipes, options and the optimizer's groups."""
    monkeypatch.chdir(ROOT)
    if "pion_hf.cli" in words:  # behind a launcher
        words = ["pion-hf", *words[words.index("pion_hf.cli") + 1 :]]
    program, *rest = words
    if program == "pion-hf" and rest[0] == "compare":
        assert compare.parse(rest[1:]).recipe.is_file()
    elif program == "pion-hf":
        plan.main([*rest[1:], "--model_name_or_path", toy_folder])
        assert "Estimated peak memory" in capsys.readouterr().out
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    else:
        assert program in ("python", "pip")
