"""The pages in docs: their tables of options say what the code says, and what they tell a reader to run runs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from pion_hf.cli import answers, compare, main, plan
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES
from pion_hf.integrations.schedules import OPTIONS
from pion_hf.report.page import SECTIONS
from tests import option_tables
from tests.conftest import chat_rows, toy_llama, toy_tokenizer, write_jsonl

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WRITTEN = sorted(DOCS.rglob("*.md"))
READ = [ROOT / "README.md", *WRITTEN]
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


@pytest.mark.parametrize("page", [page for page in READ if fences(page, "python")], ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path, monkeypatch, token_rows, checkpoint):
    """In one interpreter, one after the other, on a toy model with and without adapters."""
    monkeypatch.chdir(tmp_path)
    # TRL's own configs train in bfloat16, which transformers refuses on a CPU unless `use_cpu` is said.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    toy_llama().save_pretrained("out/checkpoint-1000")
    adapted = get_peft_model(toy_llama(), LoraConfig(r=4, target_modules="all-linear"))
    model = toy_llama(num_key_value_heads=4)
    model.config.name_or_path = str(checkpoint)  # where TRL looks for the tokenizer
    names = {"model": model, "peft_model": adapted, "train_dataset": Dataset.from_list(token_rows[:8])}
    for snippet in fences(page, "python"):
        exec(compile(snippet, str(page), "exec"), names)


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("toy")
    toy_llama(num_key_value_heads=4).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


def commands() -> dict[str, list[str]]:
    """Of all pages, by their words."""
    lines = (line for page in READ for fence in fences(page, "bash") for line in fence.splitlines())
    return {" ".join(words): words for words in (shlex.split(line, comments=True) for line in lines) if words}


def without_launcher(words: list[str]) -> list[str]:
    """What `accelerate launch` would start; tests/test_distributed.py starts the same by it, in two processes."""
    for module, command in (("pion_hf.cli", ["pion-hf"]), ("pion_hf.run", ["pion-hf", "run"])):
        if module in words:
            return [*command, *words[words.index(module) + 1 :]]
    return words


def said(words: list[str]) -> str:
    """The words of a command and of its recipe."""
    return " ".join(words + [Path(word).read_text(encoding="utf-8") for word in words if word.endswith(".yaml")])


@pytest.mark.parametrize("words", commands().values(), ids=commands())
def test_commands_can_be_planned(words, toy_folder, monkeypatch, capsys):
    """Each would train, as far as can be told without weights: recipes, options and the optimizer's groups."""
    monkeypatch.chdir(ROOT)
    program, *rest = without_launcher(words)
    if program == "pion-hf" and rest[0] == "compare":
        assert compare.parse(rest[1:]).recipe.is_file()
    elif program == "pion-hf" and rest[0] == "answers":
        assert answers.parser().parse_args(rest[1:]).instructions.is_file()
    elif program == "pion-hf":
        flags = rest[2:] if rest[0] == "run" else rest[1:]  # a script comes before its flags
        narrow = ["--optim_keep", "4"] if "optim_keep_data" in said(flags) else []  # the toy has no 96 directions
        plan.main([*flags, "--model_name_or_path", toy_folder, *narrow])
        assert "Estimated peak memory" in capsys.readouterr().out
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    else:
        assert program in ("python", "pip")


# Commands that are not run as they stand, and what runs them instead.
ELSEWHERE = {
    "pip install": "tests/test_package.py installs the package",
    "make demo": "tests/test_demo.py trains its recipe",
    "make test-distributed": "a target of tests, run by hand",
    "python examples/prepare_": "they need the hub or large packages; make demo runs two of them",
}
# What the others get beside their own flags, and why.
TRAINS = {
    "max_steps": ("2", "hours else"),
    "use_cpu": ("true", "recipes for large models are for GPUs"),
    "output_dir": ("out", "what is left behind is looked at"),
}
OF_RECIPES = {
    **TRAINS,
    "bf16": ("false", "the same"),
    "dtype": ("float32", "the same"),
    "model_name_or_path": ("toy", "two layers, instead of one from the hub"),
    "per_device_train_batch_size": ("4", "few rows are enough"),
    "gradient_accumulation_steps": ("1", "the same"),
    "other_text_file": ("other.txt", "instead of what examples/prepare_*.py write"),
}
INSTEAD = {
    "plan": {"model_name_or_path": ("toy", "other commands are planned by their own configs elsewhere")},
    "answers": {"model": ("toy", "two layers, instead of a real one"), "new_tokens": ("4", "short answers")},
    "run": TRAINS,
    "cpt": {**OF_RECIPES, "dataset_name": ("texts", "as other_text_file"), "max_length": ("64", "short rows")},
    "grpo": {
        **OF_RECIPES,
        "dataset_name": ("chats", "as other_text_file"),
        "reward_funcs": ("think_format_reward", "rewards of reasoning-gym need its columns"),
        "num_generations": ("2", "few answers are enough"),
        "max_completion_length": ("4", "short answers"),
    },
    "sft": {
        **OF_RECIPES,
        "dataset_name": ("chats", "as other_text_file"),
        "dataset_test_split": ("test", "as other_text_file"),
        "max_length": ("64", "short rows"),
        "exact_match_samples": ("2", "few answers are enough"),
        "max_new_tokens": ("4", "short answers"),
    },
}
# And where their recipe or they themselves name these.
WHERE_NAMED = {
    "other_dataset": {
        "other_dataset": ("chats", "as other_text_file"),
        "other_dataset_split": ("test", "as other_text_file"),
    },
    "optim_keep_data": {
        "optim_keep_data": ("chats/train.jsonl", "as other_text_file"),
        "optim_keep": ("4", "the toy is narrow"),
    },
    "lm_eval_tasks": {
        "lm_eval_tasks": ("sums_choice", "other tasks are the hub's"),
        "lm_eval_include_path": ("tests/data/lm_eval", "its folder"),
    },
}
# The script of `pion-hf run`.
SCRIPT = """
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
rows = [{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(5, 13)]
Trainer(AutoModelForCausalLM.from_pretrained("toy"), args, train_dataset=rows).train()
"""


def cases() -> list:
    """Commands of the pages; those of `ELSEWHERE` are skipped, with the reason."""
    found = []
    for text, words in commands().items():
        why = next((why for start, why in ELSEWHERE.items() if text.startswith(start)), None)
        if "--lm_eval_tasks" in words and not find_spec("lm_eval"):
            why = "needs the extra eval, as make test-eval does"
        found.append(pytest.param(words, id=text, marks=[pytest.mark.skip(reason=why)] if why else []))
    return found


@pytest.fixture
def workplace(tmp_path, toy_folder, monkeypatch) -> Path:
    """A folder with nothing but recipes, a toy model and toy data."""
    for name in ("recipes", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "toy").symlink_to(toy_folder)
    for kind, rows in {
        "chats": chat_rows(16),
        "texts": [{"text": f"{i} and {i + 1} make {2 * i + 1}. " * 9} for i in range(16)],
    }.items():
        (tmp_path / kind).mkdir()
        for split in ("train", "validation", "test"):
            write_jsonl(tmp_path / kind / f"{split}.jsonl", rows)
    (tmp_path / "other.txt").write_text("Sphinx of black quartz, judge my vow. " * 20, encoding="utf-8")
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))  # `run` replaces both
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def stand_ins(kind: str, words: list[str]) -> dict[str, str]:
    """Flags and values of `INSTEAD` and `WHERE_NAMED` for a command."""
    found = dict(INSTEAD[kind])
    for named, more in WHERE_NAMED.items():
        found |= more if re.search(rf"\b{named}\b", said(words)) else {}
    return {flag: value for flag, (value, _) in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("words", cases())
def test_commands_run(words, workplace, capsys):
    """To their ends, with `INSTEAD` of what is large or not here."""
    _, kind, *rest = without_launcher(words)
    if kind == "compare":  # one run of its grid
        values = stand_ins("sft", rest)
        folder = values.pop("output_dir")
        setting = [f"{flag}={value}" for flag, value in values.items()]
        main([kind, rest[0], "--optim", "muon", "--learning_rate", "1e-3", "--output_dir", folder, "--set", *setting])
        assert (workplace / folder / "compare.json").is_file()
        return
    main([kind, *rest, *(f"--{flag}={value}" for flag, value in stand_ins(kind, rest).items())])
    if kind in ("plan", "answers"):
        assert ("Estimated peak memory" if kind == "plan" else "100 answers") in capsys.readouterr().out
    else:
        assert (workplace / "out" / ("routing.json" if kind == "run" else "eval.json")).is_file()


def told() -> list[str]:
    """Commands within the text of pages that print what is kept, or help."""
    spans = (span for page in READ for span in re.findall(r"`((?:python|pion-hf) [^`]+)`", page.read_text("utf-8")))
    return sorted({span for span in spans if span.endswith(("--show", "--help"))})


@pytest.mark.slow
@pytest.mark.parametrize("command", told())
def test_what_prints_runs(command, workplace):
    (workplace / "examples").symlink_to(ROOT / "examples")
    program, *rest = shlex.split(command)
    start = [sys.executable] if program == "python" else [sys.executable, "-m", "pion_hf.cli"]
    done = subprocess.run([*start, *rest], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5
