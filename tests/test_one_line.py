"""Whatever a command ends with is one line, which names what was read; code of the user's own keeps its traceback."""

from __future__ import annotations

import errno
import io
import os
import runpy
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from datasets import Dataset
from rich.console import Console

from pion_hf import routing_table
from pion_hf.cli import before_after, comparison, faults, main
from pion_hf.cli.configs import local_config
from pion_hf.errors import first_line
from tests.conftest import toy_llama
from tests.test_cli import fails

CODES = {"EACCES": "Permission denied", "ENOSPC": "No space left", "EROFS": "Read-only", "ENAMETOOLONG": "too long"}


def raising(error: BaseException):
    def raises(argv):
        raise error

    return raises


@pytest.fixture
def ends_with(monkeypatch):
    """The line of `pion-hf report FILE` when that command ends with an exception."""

    def line(error: BaseException, file: Path) -> str:
        monkeypatch.setattr("pion_hf.cli.report.main", raising(error))
        monkeypatch.setattr(faults, "_is_of_library", lambda file: True)  # the test stands for a library
        return fails("report", str(file))

    return line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        *(
            (OSError(getattr(errno, code), os.strerror(getattr(errno, code)), "there"), f"{words}")
            for code, words in CODES.items()
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied (reading "),
        (OSError(), "OSError"),
        (RecursionError("maximum recursion depth exceeded"), "something is nested too deeply"),
        (EOFError("Ran out of input"), "something ends too early: Ran out of input"),
        (StopIteration(), "something is empty"),
        (MemoryError(), "the memory is full"),
        (KeyError("content"), "there is no 'content'"),
        (TypeError("string indices must be integers,\n not 'str'"), "TypeError: string indices must be integers, not"),
        (AttributeError("'NoneType' object has no attribute 'x'"), "AttributeError: "),
        (RuntimeError("CUDA out of memory.\nTried to allocate"), "RuntimeError: CUDA out of memory. Tried to allocate"),
        (AssertionError(), "AssertionError"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "can't decode byte 0xff"),
        (ValueError("x" * 5000), "x … x"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_any_exception_is_one_line_that_names_what_was_read(ends_with, tmp_path, error, said):
    file = tmp_path / "rows.jsonl"
    file.write_text("")
    line = ends_with(error, file)
    assert line.startswith("pion-hf report: ")
    assert said in line
    assert "\n" not in line
    assert len(line) < 1200
    assert str(file) in line
    unexpected = not isinstance(error, (OSError, ValueError))
    assert (f"{faults.TRACEBACK}=1 shows where" in line) == unexpected


def test_a_way_out_and_what_the_exception_was_told(ends_with, tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    full.add_note("the data d or the model m")
    line = ends_with(full, tmp_path)
    assert line.endswith(
        "No space left on device (reading the data d or the model m): make room, or choose another place"
    )


def test_our_own_words_stand_alone(tmp_path):
    line = fails("report", str(tmp_path))
    assert "(reading" not in line
    assert line.startswith(f"pion-hf report: {str(tmp_path)!r} is no run")


def test_the_traceback_is_there_for_those_who_ask(monkeypatch):
    monkeypatch.setattr("pion_hf.cli.report.main", raising(TypeError("why")))
    monkeypatch.setattr(faults, "_is_of_library", lambda file: True)
    monkeypatch.setenv(faults.TRACEBACK, "1")
    with pytest.raises(TypeError, match="why"):
        main(["report", "x"])


def test_compiled_modules_are_not_the_users(tmp_path, monkeypatch):
    """Their frames name sources that are not here: pyarrow/error.pxi, numpy/random/_generator.pyx."""

    def within(raises) -> BaseException:
        try:
            raises()
        except Exception as error:
            return error.with_traceback(error.__traceback__.tb_next)
        raise AssertionError("nothing was raised")

    def skip(error: BaseException) -> BaseException:  # this file's frames
        while error.__traceback__ and error.__traceback__.tb_frame.f_code.co_filename == __file__:
            error.__traceback__ = error.__traceback__.tb_next
        return error

    found = [
        skip(within(lambda: pyarrow.array([1, "a"]))),
        skip(within(lambda: np.random.default_rng(0).integers(3, 1))),
        skip(within(lambda: Dataset.from_list([{"a": 1}])[7])),
    ]
    assert [faults.is_of_user(error) for error in found] == [False, False, False]
    script = tmp_path / "reward.py"
    script.write_text("import pyarrow\npyarrow.array([1, 'a'])\n")
    assert faults.is_of_user(within(lambda: runpy.run_path(str(script))))


@pytest.mark.parametrize("name", ["sft", "cpt", "grpo", "run", "plan", "answers", "report", "compare"])
def test_an_interrupt_is_one_line_and_its_own_status(monkeypatch, capsys, name):
    monkeypatch.setattr(f"pion_hf.cli.{name}.main", raising(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as raised:
        main([name])
    assert raised.value.code == 130
    assert capsys.readouterr().err == f"pion-hf {name}: interrupted.\n"


def test_a_comparison_that_is_interrupted_early_has_that_status(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "sft" / "r.yaml"
    recipe.parent.mkdir()
    recipe.write_text("optim: pion\nlearning_rate: 1.0e-3\n")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "check_grid", lambda *args, **kwargs: None)
    monkeypatch.setattr(comparison, "run_all", interrupted)
    with pytest.raises(SystemExit) as raised:
        main(["compare", str(recipe), "--output_dir", str(tmp_path / "runs")])
    assert raised.value.code == 130
    assert "Interrupted: the same command goes on." in capsys.readouterr().out


def test_names_are_no_markup(monkeypatch):
    """`[/b]` would close what nobody opened, `[b]` would be left out."""
    console = Console(file=io.StringIO(), width=200)
    console.print(before_after.blend_table({0.5: {"a [/b]": {"loss": 1.0}}}))
    model = toy_llama()
    model.model.layers[0].mlp.add_module("[/b]", model.model.layers[0].mlp.down_proj)
    del model.model.layers[0].mlp.down_proj
    console.print(routing_table(model).table({}))
    assert console.file.getvalue().count("[/b]") == 2


def test_what_a_silent_exception_says():
    assert first_line(OSError()) == "OSError"
    assert first_line(ValueError("a\nb")) == "a"


# -- what is not there ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sft", "cpt", "grpo"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset_name", "x.jsonl"], "dataset_name: there is no file or folder 'x.jsonl'"),
        (["--dataset_name", "./rows"], "dataset_name: there is no file or folder './rows'"),
        (["--dataset_name", "a/b/c"], "dataset_name: there is no file or folder 'a/b/c'"),
        (["--dataset_name", "d", "--model_name_or_path", "/no/model"], "there is no file or folder '/no/model'"),
        (
            ["--dataset_name", "d", "--model_name_or_path", "models/smollm2-135m-instruct"],
            "there is no folder 'models/smollm2-135m-instruct': examples/prepare_smollm2.py makes it",
        ),
        (["--dataset_name", "d", "--other_dataset", "y.parquet"], "other_dataset: there is no file or folder"),
    ],
)
def test_what_is_not_there_is_said_to_be_not_there(command, flags, said, tmp_path, monkeypatch):
    if "a/b/c" in flags and command == "cpt":
        pytest.skip("which asks the hub")
    monkeypatch.chdir(tmp_path)
    more = [] if "--model_name_or_path" in flags else ["--model_name_or_path", "m"]
    more += ["--reward_funcs", "answer_similarity_reward"] if command == "grpo" else []
    monkeypatch.setattr("pion_hf.cli.grpo.PACKAGES", {})
    assert said in fails(command, *flags, *more, "--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false")


def test_a_model_that_an_example_prepares_is_planned_before_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_config("models/smollm2-135m-instruct") == local_config("HuggingFaceTB/SmolLM2-135M")
    assert local_config("models/another") is None
    assert local_config("mine/smollm2-135m-instruct") is None


def test_an_orthogonal_start_is_refused_where_a_factor_rotates(tmp_path):
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--use_cpu"]
    flags += ["--bf16", "false", "--use_peft", "--init_lora_weights", "orthogonal"]
    said = "init_lora_weights='orthogonal' gives factors of half their rank"
    assert said in fails("sft", *flags, "--optim", "pion_lora")
    assert said in fails("cpt", *flags, "--optim", "pion_lora", "--optim_lora_a", "adamw", "--optim_lora_b", "rotate")
    assert "cannot load" in fails("sft", *flags, "--optim", "pion_lora", "--optim_lora_a", "orthogonal")
