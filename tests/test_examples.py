"""Every script in examples/ that trains, as `__main__` on the toy model: two steps each."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType

import peft
import pytest
from packaging.version import Version

EXAMPLES = Path(__file__).parent.parent / "examples"
TRAINING = ["--max_steps", "2", "--report_to", "none", "--save_strategy", "no"]
SMALL = ["--per_device_train_batch_size", "4", "--logging_steps", "1", "--learning_rate", "1e-2", *TRAINING]
CHAT = ["--chats", "{chats}", *SMALL]
# script -> its arguments, and what its output must say.
SCRIPTS = {
    "plain_trainer.py": (["--text", "{text}", *SMALL], "spectrum_drift"),
    "sft.py": (CHAT, "teon"),
    "lora.py": ([*CHAT, "--rank", "2"], "pion_lora"),
    "grpo.py": (["--chats", "{chats}", "--num_generations", "2", "--max_completion_length", "4", *SMALL], "reward"),
    "torch_loop.py": (["--text", "{text}", "--steps", "2", "--keep", "4"], "step 2: loss"),
    "one_line.py": (["--optim", "pion_ambient", *SMALL], "pion"),
}


def test_no_example_is_left_out():
    others = ("prepare_", "demo.py")
    scripts = {path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith(others)}
    assert scripts == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_trains(script, checkpoint, chat_data, tmp_path, monkeypatch, capsys, caplog):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} says that {i} and {i} make {2 * i}, as everyone knows.\n" for i in range(60)))
    arguments, said = SCRIPTS[script]
    arguments = [a.format(chats=chat_data, text=text) for a in arguments]
    if script != "torch_loop.py":
        arguments += ["--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [script, "--model", str(checkpoint), *arguments])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    printed = capsys.readouterr()
    assert said in printed.out + printed.err + caplog.text
    assert "loss" in printed.out


@pytest.mark.parametrize("script", sorted((EXAMPLES / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_a_benchmark_can_be_imported(script, monkeypatch):
    monkeypatch.syspath_prepend(script.parent)  # as where it is run: some import others
    try:
        loaded(script)
    except ImportError as error:
        if Version(peft.__version__) >= Version("0.21") or "create_riemannian_optimizer" not in str(error):
            raise
        pytest.skip("it compares with an optimizer of peft 0.21")


def loaded(path: Path) -> ModuleType:
    return importlib.util.spec_from_file_location(path.stem, path).loader.load_module()


@pytest.mark.parametrize(
    ("rate", "speedup", "steps"),
    [(190.0, 2.2, 20), (30.0, 3.0, 20), (290.0, 0.05, 19), (100.0, 0.05, 12), (40.0, 0.05, 12), (1.0, 0.5, 12)],
)
def test_the_demo_is_as_long_as_the_machine_affords(rate, speedup, steps):
    demo = loaded(EXAMPLES / "demo.py")
    assert demo.chosen_steps(rate, speedup) == steps
    seconds = (demo.EVALUATION_GFLOP + steps * demo.STEP_GFLOP) / rate
    assert speedup > 1 or seconds <= max(360, 900 * 40 / rate)


def test_the_demo_measures_a_rate():
    assert loaded(EXAMPLES / "demo.py").gflops(side=256) > 0.01


def trials(matches: dict[tuple[float, str], float]) -> dict[tuple[float, str], dict[str, float]]:
    """Measures by rate and share; KL is ten times the rate times the share."""
    return {
        (lr, share): {"exact_match": match, "own_kl": 10 * lr * float(share)} for (lr, share), match in matches.items()
    }


@pytest.fixture
def evidence(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    return loaded(EXAMPLES / "benchmarks" / "evidence.py")


def test_what_is_kept_is_read_at_the_wanted_exact_match(evidence):
    known = trials(
        {
            **{(0.01, "0.8"): 0.2, (0.01, "1"): 0.4},  # KL 0.08 and 0.1
            **{(0.02, "0.8"): 0.5, (0.02, "1"): 0.9},  # 0.16 and 0.2
            **{(0.04, "0.8"): 0.9, (0.04, "1"): 1.0},  # 0.32 and 0.4
        }
    )
    point = evidence.at(known, 0.8)
    assert str(point) == "0.01 to 0.02"
    assert point.measures(known) == pytest.approx({"exact_match": 0.8, "own_kl": 0.18})
    assert str(evidence.at(known, 0.9)) == "0.02"
    assert str(evidence.at(known, 0.95)) == "0.02 to 0.04"
    assert str(evidence.at(known, 1.0)) == "0.04"
    assert evidence.at(known, 1.01) is None


@pytest.mark.parametrize(
    ("matches", "rate"),
    [
        ({1e-4: 0.2, 2e-4: 0.8, 4e-4: 0.7}, None),  # the best is interior
        ({1e-4: 0.2, 2e-4: 0.8, 4e-4: 0.9}, 8e-4),
        ({1e-4: 0.2, 2e-4: 0.8, 4e-4: 0.99}, None),  # more than that cannot be seen
        ({1e-4: 0.9, 2e-4: 0.91, 4e-4: 0.7}, 5e-5),  # a smaller one may answer as well
        ({1.25e-5: 0.9, 1e-4: 0.9, 2e-4: 0.91, 4e-4: 0.7}, None),  # far enough
    ],
)
def test_a_sweep_goes_on_until_its_best_rate_is_interior(matches, rate, evidence):
    assert evidence.next_rate(trials({(lr, "1"): match for lr, match in matches.items()}), [1e-4, 2e-4, 4e-4]) == rate
