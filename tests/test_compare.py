"""`pion-hf compare`: the grid, the runs, what becomes of them, and every way of getting it wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import optuna
import pytest
import yaml
from filelock import FileLock
from optuna.trial import FrozenTrial

from pion_hf import needs
from pion_hf.cli import main, study
from pion_hf.cli.frontier import frontier, unbeaten
from pion_hf.cli.grid import Trial, check_grid, contenders_from_flags, make_grid, parse_axes, read_contenders
from pion_hf.cli.standings import is_finished, remarks, rows, standings
from pion_hf.cli.study import JOURNAL, LOCK, open_study, run_all, settle, start, states
from pion_hf.report import page
from tests.run_folders import write_run
from tests.test_cli import fails

# One that learns and diverges at the second rate, one of ours, and one that fails: its package is not there.
CONTENDERS = {
    "AdamW": {"optim": "adamw_torch", "learning_rate": ["1e-2", "1e30"]},
    "Pion, polar": {"optim": "pion", "optim_direction": "polar", "optim_metric": "lie", "learning_rate": 1e-2},
    "Not here": {"optim": "galore_adamw", "learning_rate": 1e-2},
}
RUNS = 4
UNTIMED = ("seconds", "process_seconds", "peak_memory_bytes", "optimizer_share")


@pytest.fixture(scope="module")
def compared(tmp_path_factory, checkpoint, chat_data) -> Path:
    """A folder with a recipe, contenders, and a comparison of them in `runs`: killed in the middle of the first run,
    then gone on with by two processes at once. What they and the study said is in `said.json`.
    """
    folder, fork = tmp_path_factory.mktemp("compared"), get_context("fork")  # which has imported all that it needs
    (folder / "sft").mkdir()
    (folder / "other.txt").write_text("Another domain, of which nothing must be forgotten. " * 50, encoding="utf-8")
    recipe = {
        "model_name_or_path": str(checkpoint),
        "dataset_name": str(chat_data),
        "optim": "pion",
        "optim_adamw_lr": 1e-3,
        "optim_args": "degree=3",
        "max_steps": 4,
        "save_steps": 1,
        "save_strategy": "steps",
        "per_device_train_batch_size": 4,
        "bf16": False,
        "use_cpu": True,
        "eval_strategy": "epoch",
        "report_to": "none",
        "exact_match_samples": 2,
        "max_new_tokens": 2,
        "other_text_file": str(folder / "other.txt"),
    }
    (folder / "sft" / "toy.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (folder / "contenders.yaml").write_text(yaml.safe_dump(CONTENDERS, sort_keys=False), encoding="utf-8")
    killed = fork.Process(target=compare, args=(folder,))
    killed.start()
    until(lambda: list(folder.glob("runs/*/checkpoint-2")))
    killed.kill()
    killed.join()
    until(lambda: not processes_of(folder))
    left = [trial.state.name for trial in trials_of(folder / "runs")]
    other = fork.Process(target=compare, args=(folder,))
    other.start()
    with contextlib.redirect_stdout(io.StringIO()) as stdout, pytest.MonkeyPatch.context() as patched:
        patched.setattr(page, "SECTIONS", page.SECTIONS[:1])  # the other one draws them all
        main(command(folder, "runs")[3:])
    other.join()
    assert other.exitcode == 0
    printed = [(folder / "printed.txt").read_text(encoding="utf-8"), stdout.getvalue()]
    (folder / "said.json").write_text(json.dumps({"left": left, "printed": printed}), encoding="utf-8")
    return folder


def compare(folder: Path) -> None:
    """In a process: the comparison of the folder, and what it says in `printed.txt`."""
    with (folder / "printed.txt").open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        main(command(folder, "runs")[3:])


def trials_of(output: Path) -> list[FrozenTrial]:
    """Of the only study of a comparison."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(output / JOURNAL)))
    return optuna.load_study(study_name=None, storage=storage).get_trials()


def command(folder: Path, output: str, *flags: str) -> list[str]:
    start = [sys.executable, "-m", "pion_hf.cli", "compare", str(folder / "sft" / "toy.yaml")]
    return [*start, "--contenders", str(folder / "contenders.yaml"), "--output_dir", str(folder / output), *flags]


def record_of(output: Path) -> dict:
    return json.loads((output / "compare.json").read_text(encoding="utf-8"))


def said_of(compared: Path) -> dict:
    return json.loads((compared / "said.json").read_text(encoding="utf-8"))


def timeless(record: dict) -> list[dict]:
    return [{key: value for key, value in run.items() if key not in UNTIMED} for run in record["runs"]]


def table_of(record: dict) -> list[list[str]]:
    """All cells but the measurements of time and memory."""
    headings, cells = rows(record)
    kept = [i for i, heading in enumerate(headings) if heading not in ("seconds", "peak memory")]
    return [[row[i] for i in kept] for row in cells]


# -- runs -------------------------------------------------------------------------------------------


def test_the_table_holds_what_the_runs_measured(compared):
    record = record_of(compared / "runs")
    assert len(record["runs"]) == RUNS
    headings, cells = rows(record)
    by_name = {row[0]: dict(zip(headings, row, strict=True)) for row in cells}
    assert list(by_name) == list(CONTENDERS)
    for name, words in (("AdamW", "adamw"), ("Pion, polar", "pion-polar")):
        (folder,) = (compared / "runs").glob(f"{words}_lr0.01_*")
        after = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["after"]
        assert by_name[name]["learning rate"] == "0.01"
        assert by_name[name]["task loss"] == f"{after['task']['loss']:.4f}"
        assert by_name[name]["exact match"] == f"{after['task']['exact_match']:.1%}"
        assert by_name[name]["other text loss"] == f"{after['other_text']['loss']:.4f}"
        assert float(by_name[name]["seconds"]) >= 0
        assert by_name[name]["peak memory"].endswith("GiB")
    assert float(by_name["Pion, polar"]["drift"]) < 1e-5
    printed, _ = said_of(compared)["printed"]
    for row in cells:
        assert any(all(cell in line for cell in row) for line in printed.splitlines() if line.startswith("| ")), row


def test_runs_that_diverge_or_fail_are_shown_as_such(compared):
    record = record_of(compared / "runs")
    status = {(run["contender"], run["learning_rate"]): run for run in record["runs"]}
    assert status["AdamW", 1e30]["status"] == "diverged"
    assert status["Not here", 1e-2]["status"] == "failed"
    assert "galore" in status["Not here", 1e-2]["error"].lower()
    said = "\n".join(remarks(record))
    assert "2 of 4 runs finished" in said
    assert "Diverged: AdamW, learning rate 1e+30, seed 0" in said
    assert "Failed: Not here, learning rate 0.01, seed 0: " in said
    assert next(row for row in rows(record)[1] if row[0] == "Not here")[1] == "none finished"


def test_a_run_keeps_its_recipe_and_log_and_no_weights(compared):
    for run in record_of(compared / "runs")["runs"]:
        folder = compared / "runs" / run["folder"]
        assert (folder / "train.log").is_file()
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        assert (recipe["learning_rate"], recipe["seed"]) == (run["learning_rate"], 0)
        assert [path.name for path in folder.glob("*.safetensors") if path.name != "spectra.safetensors"] == []
        # Its optimizer's options are left out for another: with them a run would be refused.
        assert ("optim_adamw_lr" in recipe) == ("optim_args" in recipe) == (recipe["optim"] == "pion")
        if run["contender"].startswith("Pion"):
            assert (folder / "spectra.safetensors").is_file()
            assert not list(folder.glob("checkpoint-*"))


def test_table_picture_and_page_are_written(compared):
    output = compared / "runs"
    assert (output / "frontier.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "Pion, polar" in page
    assert "Learning and forgetting" in page
    assert "<p>2 of 4 runs finished." in page
    assert not list(output.glob("_*"))
    for line in ("optim_adamw_lr is left out for AdamW; Not here.", "optim_args is left out for AdamW; Not here."):
        assert [printed.count(line) for printed in said_of(compared)["printed"]] == [1, 1]


def test_killed_and_gone_on_with_by_two_processes_it_is_one_table_and_no_run_twice(compared):
    output, said = compared / "runs", said_of(compared)
    assert said["left"] == ["RUNNING", "WAITING", "WAITING", "WAITING"]
    trials = trials_of(output)
    finished = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert [trial.number for trial in finished] == [0, 1, 2], "the one that was killed too, under its number"
    assert {trial.user_attrs["folder"] for trial in trials[3:]} == {next(output.glob("not-here*")).name}
    first, *others = [yaml.safe_load((output / t.user_attrs["folder"] / "recipe.yaml").read_text()) for t in finished]
    assert first["resume_from_checkpoint"] is True, "it went on from its last checkpoint"
    assert not any("resume_from_checkpoint" in recipe for recipe in others)
    lines = "".join(said["printed"]).splitlines()
    for trial in finished:
        of_run = "{contender}, learning rate {learning_rate:g}, seed {seed}: ".format(**trial.params)
        assert sum(line.startswith(of_run) for line in lines) == 1, of_run
    tables = [[line for line in printed.splitlines() if line.startswith("| ")] for printed in said["printed"]]
    assert tables[0] == tables[1]
    assert "2 of 4 runs finished" in said["printed"][0]


def test_what_is_finished_is_not_repeated_and_what_failed_is(compared, small_page):
    output = compared / "runs"
    began = {path: path.stat().st_mtime_ns for path in output.glob("*/recipe.yaml")}
    before = record_of(output)
    main(command(compared, "runs")[3:])
    for path, written in began.items():
        assert (path.stat().st_mtime_ns == written) == is_finished(path.parent), path
    assert timeless(record_of(output)) == timeless(before)
    assert trials_of(output)[-1].system_attrs["failed_trial"] == 3


def test_report_only_makes_the_same_of_finished_runs(compared, small_page, monkeypatch):
    output = compared / "runs"
    record = record_of(output)
    for name in ("compare.json", "frontier.png", "report.html"):
        (output / name).unlink()
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing may run
    main([*command(compared, "runs", "--report_only")[3:]])
    assert record_of(output) == record
    assert (output / "frontier.png").is_file()
    assert (output / "report.html").is_file()


@pytest.fixture
def small_page(monkeypatch):
    monkeypatch.setattr(page, "SECTIONS", page.SECTIONS[:1])
    monkeypatch.setattr(page, "DPI", 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_twice_it_ends_with_the_same_table(compared):
    output = compared / "killed"
    for killed_at in (1, 3):
        process = subprocess.Popen(command(compared, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda n=killed_at: len(list(output.glob("*/train.log"))) >= n and list(output.glob("*/run.json")))
        time.sleep(1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: not processes_of(output))
        assert sum(is_finished(folder) for folder in output.iterdir() if folder.is_dir()) < RUNS - 1
    subprocess.run(command(compared, "killed"), check=True, capture_output=True)
    assert table_of(record_of(output)) == table_of(record_of(compared / "runs"))
    assert timeless(record_of(output)) == timeless(record_of(compared / "runs"))


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def processes_of(output: Path) -> list[str]:
    """Runs whose command line names the folder."""
    return [line for line in command_lines() if str(output) in line and "os.killpg" in line]


def command_lines() -> list[str]:
    """Of all processes."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().decode(errors="replace"))
    return lines


def test_a_run_ends_with_what_started_it():
    process = subprocess.Popen(
        [sys.executable, "-c", study.CHILD, "sft"], stdin=subprocess.PIPE, start_new_session=True
    )
    process.stdin.close()  # as when the parent is gone
    assert process.wait(60) == -signal.SIGKILL


# -- the study --------------------------------------------------------------------------------------

DATABASES = [pytest.param(f"{kind}://", marks=pytest.mark.slow, id=kind) for kind in ("sqlite", "postgresql+psycopg")]
# In place of a training: says that it began, takes a moment, and leaves what a finished run does.
RUN = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[3]).parent
with open("began", "a") as file:
    file.write(f"{folder.name}\\n")
time.sleep(0.2)
(folder / "eval.json").write_text('{"before": {"task": {"loss": 2}}, "after": {"task": {"loss": 1}}, "learnt": 1}')
"""


@pytest.fixture
def runs(tmp_path, monkeypatch) -> list[Trial]:
    """A grid of twelve runs that train nothing, and the working folder is a new one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "CHILD", RUN)
    monkeypatch.setattr(study, "POLL", 0.02)
    return make_grid(BASE, "sft", contenders_from_flags(BASE, "pion,muon", "1e-3,2e-3,3e-3"), {}, 2)[0]


@pytest.fixture(params=[None, *DATABASES])
def storage(request, runs, tmp_path):
    """None is the journal; a database is a new one."""
    if request.param is None:
        yield None
    elif request.param.startswith("sqlite"):
        yield f"{request.param}/study.db"
    elif (initdb := shutil.which("initdb")) is None or (server := shutil.which("postgres")) is None:
        pytest.skip("Debian's package postgresql is not installed")
    else:
        user = {"user": "nobody"} if os.getuid() == 0 else {}  # it runs as root for nobody
        place = Path(tempfile.mkdtemp(dir="/tmp"))  # its socket's path must be short
        if user:
            shutil.chown(place, **user)
        options = {**user, "cwd": place, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([initdb, "-D", place / "data", "-U", "me", "--auth=trust"], check=True, **options)
        settings = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={place}"]
        process = subprocess.Popen([server, "-D", place / "data", *settings], **options)
        until(lambda: (place / ".s.PGSQL.5432").exists())
        yield f"{request.param}me@/postgres?host={place}"
        process.send_signal(signal.SIGINT)
        process.wait(60)
        shutil.rmtree(place)


def work(runs: list[Trial], storage: str | None) -> None:
    list(run_all(runs, Path("runs"), storage, slots=2, keep_models=False))


def test_processes_divide_the_runs_and_take_over_those_of_one_that_dies(runs, storage):
    processes = [get_context("fork").Process(target=work, args=(runs, storage)) for _ in range(3)]
    for process in processes:
        process.start()
    until(lambda: Path("began").is_file() and len(Path("began").read_text().split()) > 3)
    processes[0].kill()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0]
    found = open_study(runs, Path("runs"), storage).get_trials()
    assert [(trial.number, trial.state.name, trial.value) for trial in found] == [
        (n, "COMPLETE", 1.0) for n in range(12)
    ]
    assert [trial.user_attrs["folder"] for trial in found] == [run.folder for run in runs]
    began = Counter(Path("began").read_text().split())
    assert began.keys() == {run.folder for run in runs}
    assert sum(began.values()) <= 12 + 2, "no run twice but the two of the process that was killed"


def test_what_failed_or_was_removed_runs_again_and_nothing_else(runs, storage, monkeypatch):
    monkeypatch.setattr(study, "CHILD", "print('no such thing')")
    work(runs[:1], storage)
    assert states(runs[:1], Path("runs"), storage) == {runs[0].folder: "FAIL"}
    monkeypatch.setattr(study, "CHILD", RUN)
    work(runs[:1], storage)
    work(runs[:3], storage)  # another comparison in the same folder
    work(runs[:3], storage)
    shutil.rmtree(Path("runs", runs[2].folder))
    work(runs[:3], storage)
    began = Counter(Path("began").read_text().split())
    assert began == {runs[0].folder: 1, runs[1].folder: 1, runs[2].folder: 2}
    assert set(states(runs[:3], Path("runs"), storage).values()) == {"COMPLETE"}
    assert states(runs[:2], Path("elsewhere"), None) == {}


def test_an_interrupt_ends_the_runs_and_the_same_command_goes_on_with_them(runs, monkeypatch):
    monkeypatch.setattr(study, "CHILD", "import time; time.sleep(600)")
    changes = run_all(runs[:1], Path("runs"), None, slots=1, keep_models=False)
    assert next(changes) == (runs[:1], None)
    changes.close()
    assert not [line for line in command_lines() if str(Path("runs", runs[0].folder)) in line]
    assert states(runs[:1], Path("runs"), None) == {runs[0].folder: "RUNNING"}
    monkeypatch.setattr(study, "CHILD", RUN)
    work(runs[:1], None)
    assert [(t.number, t.state.name) for t in open_study(runs[:1], Path("runs"), None).get_trials()] == [
        (0, "COMPLETE")
    ]


def test_finished_runs_of_before_there_were_studies_are_read(runs):
    folder = Path("runs", runs[0].folder)
    write_run(folder)
    (folder / "recipe.yaml").write_text("")
    (folder / "trial.json").write_text('{"format": 1, "status": "finished", "seconds": 3.0}')
    work(runs[:2], None)
    assert Path("began").read_text().split() == [runs[1].folder]
    assert (folder / "trial.json").is_file()


@pytest.mark.parametrize("damage", ["{", "{}\n{}\n", "\\udcff\n0\n"])
def test_a_damaged_journal_is_one_line_and_costs_no_run(runs, damage):
    work(runs[:2], None)
    journal = Path("runs", JOURNAL)
    journal.write_bytes(damage.encode("utf-8", "surrogateescape") + journal.read_bytes())
    with pytest.raises(ValueError, match=r"^'runs/study.journal' is damaged: .*; remove it: what is finished stays so"):
        work(runs[:2], None)
    journal.unlink()
    work(runs[:2], None)
    assert len(Path("began").read_text().split()) == 2


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:////dev/null/x", "unable to open database file"),
        ("postgres", "Could not parse SQLAlchemy URL"),
        ("no://me:SESAME@here/x", "no"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line(recipe, tmp_path, url, said):
    line = refuse(recipe(), "--output_dir", str(tmp_path / "runs"), "--storage", url)
    assert line.startswith("pion-hf compare: --storage ")
    assert said in line
    assert "SESAME" not in line


def test_without_optuna_a_line_says_what_to_install(recipe, monkeypatch):
    monkeypatch.setitem(needs.OPTIONAL, "optuna", "999")
    assert refuse(recipe()).endswith("pip install 'optuna>=999'")


def test_checkpoints_go_with_the_weights(runs):
    """A recipe may save some by its own strategy."""
    for keep in (False, True):
        output = Path(str(keep))
        (job,) = [study._take(open_study(runs[:1], output, None), {runs[0].folder: runs[0]}, output)]
        start(job, slot=0, slots=1)
        job.process.wait(60)
        for file in ("model.safetensors", "spectra.safetensors", "checkpoint-2/model.safetensors"):
            (job.folder / file).parent.mkdir(exist_ok=True)
            (job.folder / file).write_text("{}")
        settle(open_study(runs[:1], output, None), job, keep_models=keep)
        left = {path.name for path in job.folder.iterdir()}
        weights = {"model.safetensors", "checkpoint-2"}
        assert left & weights == (weights if keep else set())
        assert {"spectra.safetensors", "eval.json"} <= left


def test_what_only_the_command_knows_is_checked_for_every_contender(tmp_path):
    recipe = {"model_name_or_path": "m", "dataset_name": "d", "eval_strategy": "epoch", "bf16": False}
    for command, keys, message in (
        ("grpo", {"reward_funcs": ["zzz"]}, "'zzz' is not a known reward function"),
        ("cpt", {"spectral_init": 1.0}, "spectral_init is for fresh weights"),
        ("cpt", {"max_tokens": 5}, "max_tokens=5 is less than one step"),
        ("cpt", {"dataset_name": "./nowhere"}, "dataset_name: there is no file or folder './nowhere'"),
    ):
        contenders = contenders_from_flags({}, "pion", "1e-3")
        grid, _ = make_grid({**recipe, **keys}, command, contenders, {}, 1)
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
            check_grid(grid, Path("r.yaml"), tmp_path)


# -- what is found ----------------------------------------------------------------------------------


def run_of(contender: str, rate: float, loss: float | None, seed: int = 0, *, other: float = 3.0, **more) -> dict:
    """A finished run as compare.json has it; of a loss that is no number, a diverged one."""
    measured = {
        "before": {"task": {"loss": 4.0}, "other_text": {"loss": 3.0}},
        "after": {"task": {"loss": loss}, "other_text": {"loss": other}},
    }
    gained = {} if loss is None else {"learnt": 4.0 - loss, "forgotten": {"other_text": other - 3.0}}
    told = {"contender": contender, "learning_rate": rate, "seed": seed, "folder": f"{contender}{rate}{seed}"}
    return {**told, "status": "diverged" if loss is None else "finished", **measured, **gained, **more}


def record(*runs: dict) -> dict:
    found = list(runs)
    seeds = len({run["seed"] for run in found})
    return {"recipe": {"path": "r.yaml"}, "seeds": seeds, "standings": standings(found), "runs": found}


def test_the_best_rate_has_the_lowest_mean_over_seeds():
    # The lowest loss of all is at 1e-2, but so is a bad one.
    runs = [run_of("a", 1e-3, 2.0), run_of("a", 1e-3, 2.2, 1), run_of("a", 1e-2, 1.5), run_of("a", 1e-2, 3.0, 1)]
    (place,) = standings(runs)
    assert place["learning_rate"] == 1e-3
    assert place["figures"]["task loss"] == {"mean": pytest.approx(2.1), "spread": pytest.approx(0.1)}
    assert place["figures"]["learnt"]["mean"] == pytest.approx(1.9)
    assert place["seeds"] == 2


def test_figures_are_of_the_seeds_that_all_have_finished():
    # The second seed is harder, and only the better rate has run with it so far.
    runs = [run_of("a", 1e-3, 2.1), run_of("a", 1e-2, 2.0), run_of("a", 1e-2, 2.8, 1), run_of("b", 1e-3, 2.2)]
    first, second = standings(runs)
    assert (first["learning_rate"], first["seeds"], first["figures"]["task loss"]["mean"]) == (1e-2, 1, 2.0)
    assert second["seeds"] == 1
    both = standings([*runs, run_of("a", 1e-3, 3.0, 1), run_of("b", 1e-3, 2.9, 1)])
    assert [place["seeds"] for place in both] == [2, 2]
    alone = standings([run_of("a", 1e-3, 2.1), run_of("b", 1e-3, 2.2, 1)])
    assert [place["seeds"] for place in alone] == [1, 1]


@pytest.mark.parametrize(
    ("losses", "best", "interior"),
    [
        ({1e-3: 2.0, 1e-2: 1.5, 1e-1: 1.8}, 1e-2, True),
        ({1e-3: 2.0, 1e-2: 1.5, 1e-1: None}, 1e-2, True),  # what diverges is a worse rate too
        ({1e-3: 1.4, 1e-2: 1.5, 1e-1: 1.8}, 1e-3, False),
        ({1e-3: 2.0, 1e-2: 1.5, 1e-1: 1.4}, 1e-1, False),
        ({1e-3: 2.0}, 1e-3, False),
        ({1e-3: None, 1e-2: None}, None, None),
    ],
)
def test_whether_the_best_rate_is_interior(losses, best, interior):
    (place,) = standings(run_of("a", rate, loss) for rate, loss in losses.items())
    assert (place["learning_rate"], place["interior"]) == (best, interior)


def test_a_rate_at_which_a_seed_diverged_is_not_the_best():
    runs = [run_of("a", 1e-3, 2.0), run_of("a", 1e-3, 2.0, 1), run_of("a", 1e-2, 1.0), run_of("a", 1e-2, None, 1)]
    assert standings(runs)[0]["learning_rate"] == 1e-3


def test_of_rewards_the_highest_is_the_best():
    runs = [run_of("a", rate, 0.0, after={"task": {"reward": reward}}) for rate, reward in ((1e-3, 0.2), (1e-2, 0.7))]
    assert standings(runs)[0]["learning_rate"] == 1e-2


def test_the_table_tells_of_missing_seeds_and_takes_any_name():
    runs = [run_of("[b] a", 1e-3, 2.0), {**run_of("[b] a", 1e-3, 2.1, 1), "status": "not run"}]
    _, cells = rows(record(*runs))
    assert cells[0][0] == "[b] a (1 of 2 seeds)"
    assert cells[0][3] == "2.0000"


def test_unbeaten_is_what_no_other_point_betters():
    points = [(1.0, 3.0), (2.0, 3.1), (1.5, 3.2), (2.0, 3.0), (0.5, 2.9)]
    assert unbeaten(points) == [False, False, False, True, True]
    assert unbeaten([(1.0, 3.0), (1.0, 3.0)]) == [True, True]


def test_the_frontier_joins_points_by_rate_and_tells_contenders_apart():
    names = [f"contender {i}" for i in range(9)]
    runs = [run_of(name, rate, 2.0 - 10 * rate, other=3 + rate) for name in names for rate in (1e-2, 1e-3)]
    picture = frontier(record(*runs))
    lines = [line for line in picture.figure.axes[0].get_lines() if line.get_label() in names]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(names)
    assert list(lines[0].get_xdata()) == pytest.approx([2.01, 2.1])  # rising rates, whatever the order of the runs
    assert list(lines[0].get_ydata()) == pytest.approx([3.001, 3.01])
    assert "contender 0 0.01" in picture.notes[0]


def test_the_frontier_leaves_out_of_sight_what_would_flatten_it_and_says_so():
    runs = [run_of("a", rate, 2.0 - rate, other=3 + rate) for rate in (1e-3, 1e-2, 1e-1)]
    picture = frontier(record(*runs, run_of("b", 1e-2, 1.95, other=3.05), run_of("b", 1.0, 3.9, other=9.0)))
    assert picture.figure.axes[0].get_ylim()[1] < 4
    assert "Out of sight in other text: b 1 (fall 0.1000, loss 9.0000)." in picture.notes
    assert not any("Out of sight" in note for note in frontier(record(*runs)).notes)


def test_without_another_domain_there_is_no_frontier():
    run = run_of("a", 1e-3, 2.0)
    del run["after"]["other_text"], run["before"]["other_text"]
    assert frontier(record(run)) is None


# -- the grid ---------------------------------------------------------------------------------------

BASE = {"optim": "pion", "optim_degree": 3, "optim_args": "rms=0.1", "learning_rate": 1e-3, "max_steps": 2}


def grid_of(base: dict, contenders: str, tmp_path: Path, *axes: str, seeds: int = 1):
    path = tmp_path / "contenders.yaml"
    path.write_text(contenders, encoding="utf-8")
    return make_grid(base, "sft", read_contenders(path, base), parse_axes(axes), seeds)


def test_options_of_one_optimizer_are_left_out_for_another_and_said_once(tmp_path):
    grid, said = grid_of(BASE, "A: {optim: adamw_torch}\nM: {optim: muon}\nP: {optim: pion}", tmp_path, seeds=2)
    by_name = {trial.contender: trial.recipe for trial in grid}
    assert "optim_degree" not in {**by_name["A"], **by_name["M"]}
    assert by_name["P"]["optim_degree"] == 3
    assert by_name["P"]["optim_args"] == "rms=0.1"
    assert said == ["optim_args is left out for A; M.", "optim_degree is left out for A; M."]
    assert [trial.seed for trial in grid] == [0, 0, 0, 1, 1, 1]
    assert all(trial.recipe["data_seed"] == trial.recipe["seed"] == trial.seed for trial in grid)


def test_an_axis_multiplies_those_it_says_something_to(tmp_path):
    contenders = "A: {optim: adamw_torch, learning_rate: [1e-3, 1e-4]}\nP: {optim: pion}"
    grid, _ = grid_of(BASE, contenders, tmp_path, "optim_side=in,out", "warmup_steps=1")
    told = [(trial.contender, trial.learning_rate) for trial in grid]
    assert told == [("A", 1e-4), ("A", 1e-3), ("P, optim_side=in", 1e-3), ("P, optim_side=out", 1e-3)]
    assert all(trial.recipe["warmup_steps"] == "1" for trial in grid)


def test_folders_are_readable_safe_and_differ_where_runs_do(tmp_path):
    names = "'Pion, paper': {}\n'Pion paper': {}\n'../../x': {}\n'π': {}\n'" + 200 * "long" + "': {}"
    grid, _ = grid_of(BASE, names, tmp_path, seeds=2)
    folders = [trial.folder for trial in grid]
    assert len(set(folders)) == 10
    assert folders[0].startswith("pion-paper_lr0.001_seed0_")
    assert all(
        len(folder) < 120 and set(folder) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.") for folder in folders
    )
    assert not any(folder.startswith(".") for folder in folders)
    again, _ = grid_of({**BASE, "max_steps": 3}, names, tmp_path, seeds=2)
    assert not set(folders) & {trial.folder for trial in again}


def test_values_stay_text_and_brackets_are_yaml():
    axes = parse_axes(["save_strategy=no", "lr-scheduler-kwargs={min_lr_ratio: 0.1},{}", "optim_betas=[0.9, 0.95]"])
    assert axes == {
        "save_strategy": ["no"],
        "lr_scheduler_kwargs": [{"min_lr_ratio": 0.1}, {}],
        "optim_betas": [[0.9, 0.95]],
    }


# -- bad input --------------------------------------------------------------------------------------


def refuse(recipe: str, *flags: str) -> str:
    line = fails("compare", recipe, "--command", "sft", *flags)
    assert line.startswith("pion-hf compare: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--set", "optim_rsm=0.1,0.2"], ["'optim_rsm' is not a known key", "'optim_rms'"]),
        (["--set", "max_seq_length=8"], ["'max_seq_length' is outdated", "'max_length'"]),
        (["--set", "optim_side=inn"], ["'inn'", "Did you mean 'in'"]),
        (["--set", "max_steps=2,4"], ["max_steps is '2' for", "'4' for", "no comparison under equal budget"]),
        (["--set", "seed=1"], ["--set seed", "--seeds"]),
        (["--set", "learning_rate=1"], ["--learning_rate"]),
        (["--set", "optim_rms"], ["--set optim_rms", "key=value"]),
        (["--set", "optim_rms="], ["holds an empty value"]),
        (["--set", "optim_rms=[1"], ["no list of values"]),
        (["--set", "optim_rms=0.1,0.1"], ["'0.1' is given twice"]),
        (["--set", "optim_rms=0.2", "optim_rms=0.1"], ["given twice"]),
        (["--optim", "muon", "--set", "optim_degree=2,3"], ["none of the optimizers"]),
        (["--optim", "adamw_troch"], ["'adamw_troch' is not a known", "'adamw_torch'"]),
        (["--optim", "pion,pion"], ["'pion' is given twice"]),
        (["--learning_rate", "1e-3,fast"], ["'fast' is no learning rate"]),
        (["--learning_rate", "0"], ["above 0"]),
        (["--learning_rate", "1e-3,0.001"], ["each once"]),
        (["--seeds", "0"], ["--seeds must be at least 1"]),
        (["--jobs", "0"], ["--jobs must be at least 1"]),
        (["--seeds", "two"], ["--seeds", "'two'"]),
        (["--learning_rates", "1"], ["'--learning_rates' is not a known flag", "'--learning_rate'"]),
        (["another.yaml"], ["'another.yaml' belongs to no flag"]),
        (["--set", "eval_strategy=no"], ["nothing to compare", "eval_strategy"]),
        (["--contenders", "absent.yaml"], ["--contenders", "'absent.yaml'"]),
        (["--contenders", "absent.yaml", "--optim", "pion"], ["leave out --optim"]),
        (["--report_only"], ["nothing to show"]),
    ],
)
def test_flags_that_are_wrong_are_refused_before_anything_runs(recipe, tmp_path, flags, said):
    line = refuse(recipe(), "--output_dir", str(tmp_path / "runs"), *flags)
    assert all(part in line for part in said), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("contenders", "said"),
    [
        ("A: {optim: muon, optim_degree: 3}", ["A", "optim_degree", "muon"]),
        ("A: {optim: muon, momentun: 0.1}", ["A", "'momentun' is not a known key"]),
        ("A: {max_steps: 3}\nB: {}", ["max_steps is 3 for A and 2 for B"]),
        ("A: {per_device_train_batch_size: 3}\nB: {}", ["per_device_train_batch_size is 3 for A and 4 for B"]),
        ("A: {seed: 3}", ["A: seed is set by --seeds"]),
        ("A: pion", ["A must hold keys of a recipe"]),
        ("{}", ["names no contenders"]),
        ("A: {}\nA: {}", ["'A' is given twice"]),
        ("A: {learning_rate: [high]}", ["A: learning_rate: 'high'"]),
        ("A: {learning_rate: []}", ["A: learning_rate: needs learning rates"]),
    ],
)
def test_contenders_that_are_wrong_are_refused(recipe, tmp_path, contenders, said):
    path = tmp_path / "contenders.yaml"
    path.write_text(contenders, encoding="utf-8")
    line = refuse(recipe(), "--contenders", str(path), "--output_dir", str(tmp_path / "runs"))
    assert all(part in line for part in said), line


def test_a_recipe_that_is_not_there_or_does_not_say_its_command(recipe, tmp_path):
    assert "there is no recipe 'absent.yaml'" in refuse("absent.yaml")
    assert "add --command sft" in fails("compare", recipe())
    assert "'sfd'" in fails("compare", recipe(), "--command", "sfd")


def test_a_place_that_cannot_be_written_to(recipe, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "is no folder" in refuse(recipe(), "--output_dir", str(tmp_path / "file" / "runs"))


def test_a_folder_without_permission(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # root may write anywhere
    assert "cannot be written to" in refuse(recipe(), "--output_dir", str(tmp_path))


def test_a_folder_that_another_comparison_holds(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "PATIENCE", 0)
    with FileLock(tmp_path / "runs" / LOCK):
        assert "another comparison holds it" in refuse(recipe(), "--output_dir", str(tmp_path / "runs"))


def test_a_folder_with_other_things_is_left_alone(recipe, tmp_path):
    base = yaml.safe_load(Path(recipe()).read_text(encoding="utf-8"))
    (trial,), _ = grid_of(base, "pion: {optim: pion}", tmp_path)
    folder = tmp_path / "runs" / trial.folder
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("all of it", encoding="utf-8")
    assert "no run of a comparison" in refuse(recipe(), "--output_dir", str(tmp_path / "runs"))
    (tmp_path / "runs" / JOURNAL).mkdir()
    (folder / "recipe.yaml").write_text("", encoding="utf-8")
    assert "is damaged: it is no regular file" in refuse(recipe(), "--output_dir", str(tmp_path / "runs"))
    assert (folder / "thesis.txt").read_text(encoding="utf-8") == "all of it"


def test_checking_leaves_no_trace_in_the_environment(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("KEPT", "1")
    before = dict(os.environ)
    refuse(recipe(env={"LEAKED": "1"}), "--output_dir", str(tmp_path / "runs"), "--set", "eval_strategy=no")
    assert dict(os.environ) == before
