"""Files of ours: never through a link that somebody planted, whole or not at all, and nothing is waited for."""

from __future__ import annotations

import ast
import os
import stat
from pathlib import Path

import pytest

import pion_hf
from pion_hf.cli import comparison, curves, study
from pion_hf.cli.grid import Trial
from pion_hf.integrations import model_card, run_writer
from pion_hf.integrations.run_writer import RunFolder
from pion_hf.report import page, write_report
from pion_hf.routing.table import routing_table
from pion_hf.runs import files
from pion_hf.runs.folder import BEFORE, EVALUATION, LOG, MATRICES, RECORD, ROUTING, SPECTRA, write_json
from tests.conftest import toy_llama
from tests.run_folders import evaluation, write_run

ROOT = Path(pion_hf.__file__).parent


@pytest.fixture
def precious(tmp_path):
    path = tmp_path / "precious"
    path.write_text("mine")
    return path


def test_a_link_is_replaced_and_not_followed(tmp_path, precious):
    link = tmp_path / "run" / "eval.json"
    link.parent.mkdir()
    for target in (precious, tmp_path / "nothing"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        files.write_text(link, "new")
        assert link.read_text() == "new"
        assert not link.is_symlink()
    assert precious.read_text() == "mine"
    assert not (tmp_path / "nothing").exists()
    assert os.listdir(link.parent) == ["eval.json"]


def test_a_log_that_is_a_link_is_refused(tmp_path, precious):
    (tmp_path / "log.jsonl").symlink_to(precious)
    with pytest.raises(OSError, match=r"log\.jsonl"):
        files.append_text(tmp_path / "log.jsonl", "line\n")
    assert precious.read_text() == "mine"


def test_folders_that_are_links_are_followed_but_not_made_use_of_as_ours(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    files.write_text(tmp_path / "runs" / "a" / "run.json", "{}")
    files.append_text(tmp_path / "runs" / "a" / "log.jsonl", "{}\n")
    files.make_folder(tmp_path / "runs" / "a" / "report_files")
    assert sorted(os.listdir(tmp_path / "disk" / "a")) == ["log.jsonl", "report_files", "run.json"]
    with pytest.raises(OSError, match="is a link"):
        files.make_folder(tmp_path / "runs")


def test_permissions_are_those_of_the_umask_or_of_the_file_before(tmp_path):
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "new", "")
        files.append_text(tmp_path / "log", "")
        assert mode(tmp_path / "new") == mode(tmp_path / "log") == 0o640
        (tmp_path / "new").chmod(0o604)
        files.write_text(tmp_path / "new", "again")
        assert mode(tmp_path / "new") == 0o604
    finally:
        os.umask(before)


def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path):
    def interrupted() -> None:
        with files.new_file(tmp_path / "page.html") as file:
            file.write(b"half")
            assert [files.is_part(p) for p in sorted(tmp_path.iterdir())] == [True, False]
            raise KeyboardInterrupt

    files.write_text(tmp_path / "page.html", "old")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "page.html").read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.timeout(10)
def test_a_file_is_no_folder_to_write_into(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for write in (files.write_text, files.append_text):
        for place in ("file/x", "file/folder/x"):
            with pytest.raises(NotADirectoryError, match=r"is no folder: .*file"):
                write(tmp_path / place, "x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"is no regular file: '\.'"):
        files.write_text(".", "x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders")
def test_pipes_devices_and_folders_are_errors_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    for place in ("pipe", "folder", "link"):
        for use in (files.read_bytes, lambda p: files.write_text(p, "x"), lambda p: files.append_text(p, "x")):
            with pytest.raises(OSError, match=place):
                use(tmp_path / place)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


# What writes files, by the name of the function or method that is called.
WRITERS = {"write_text", "write_bytes", "savefig", "save_file", "symlink_to", "touch", "copy", "copyfile", "copytree"}


def writes(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name == "open":
        modes = [a.value for a in (*call.args[:2], *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
        return any(isinstance(m, str) and set(m) & set("wa+") and set(m) <= set("rwabxt+") for m in modes)
    return isinstance(call.func, ast.Attribute) and name in WRITERS


def test_no_other_room_writes_files():
    """Pictures go by `savefig` into a file of `new_file`, or into memory."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and writes(node) and path.name != "files.py":
                into = node.args[0] if node.args else None
                if not (node.func.attr == "savefig" and isinstance(into, ast.Name) and into.id in ("file", "buffer")):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found


# -- everything that is written, with a link in its place --------------------------------------------

OF_A_RUN = (RECORD, LOG, MATRICES, SPECTRA, ROUTING, EVALUATION, BEFORE, "README.md", "report.html", "rates.png")
OF_A_COMPARISON = ("compare.json", "frontier.png", "report.html", ".lock", "study.journal.lock")
OF_A_TRIAL = ("recipe.yaml", "train.log", ".lock")


@pytest.fixture
def planted(tmp_path):
    """Plants links in a folder, under names and under `_` and the name, to files of which none may change."""
    outside = tmp_path / "outside"
    outside.mkdir()

    def plant(folder: Path, names: tuple[str, ...]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*names, *(f"_{name}" for name in names)):
            target = outside / f"{len(os.listdir(outside))}"
            target.write_text("mine")
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(target)

    yield plant
    assert {path.read_text() for path in outside.iterdir()} == {"mine"}


def test_what_a_run_writes_goes_through_no_link(tmp_path, planted, monkeypatch):
    monkeypatch.setattr(page, "SECTIONS", page.SECTIONS[:1])
    monkeypatch.setattr(page, "DPI", 20)
    run = tmp_path / "run"
    planted(run, OF_A_RUN)
    (tmp_path / "report_files").mkdir()
    folder = RunFolder(str(run))
    folder.begin({"matrices": []}, 0)
    planted(run, (LOG, MATRICES))  # while it trains
    folder.log({"step": 1, "loss": 1.0})
    folder.open = True
    folder.snapshot(1, {"spectral_norm": []})
    folder.open = True
    planted(run, (RECORD, SPECTRA))
    folder.write_spectra({}, {})
    folder.write_record()
    write_json(run / EVALUATION, evaluation(learnt=1.0, forgotten=0.1))
    write_json(run / BEFORE, {})
    write_json(run / ROUTING, routing_table(toy_llama()).record({"pion": 1e-3, "adamw": 1e-3}))
    monkeypatch.setattr(curves, "picture", lambda *_: page.Figure())
    curves.save_plot(None, [], str(run / "rates.png"))
    (run / "README.md").unlink()
    (run / "README.md").symlink_to(tmp_path / "card")
    (tmp_path / "card").write_text("---\ntags: [a]\n---\n### Framework versions\n")
    optimizer = {"name": "adamw_torch", "learning_rate": 1e-3, "schedule": "linear"}
    model_card.extend(run / "README.md", {"optimizer": optimizer, "steps": 1})
    assert (tmp_path / "card").read_text().endswith("---\n### Framework versions\n")
    for name in (LOG, MATRICES):
        (run / name).unlink()
    write_run(run / "of-its-own")
    planted(run, ("report.html",))
    planted(run / "report_files", ("learnt_and_forgotten.png",))
    write_report([run / "of-its-own"], run / "report.html")
    assert not any((run / name).is_symlink() for name in OF_A_RUN)
    assert not (run / "report_files" / "learnt_and_forgotten.png").is_symlink()


def test_a_folder_of_pictures_that_is_a_link_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "SECTIONS", page.SECTIONS[:1])
    monkeypatch.setattr(page, "DPI", 20)
    (tmp_path / "outside").mkdir()
    run = write_run(tmp_path / "run")
    (run / "report_files").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="is a link, remove it"):
        write_report([run], run / "report.html")
    assert os.listdir(tmp_path / "outside") == []


def test_what_a_comparison_writes_goes_through_no_link(tmp_path, planted, monkeypatch):
    output = tmp_path / "runs"
    planted(output, OF_A_COMPARISON)
    trial = Trial("pion", 1e-3, 0, "sft", {"optim": "pion", "seed": 0})
    folder = output / trial.folder
    planted(folder, OF_A_TRIAL)
    monkeypatch.setattr(study, "CHILD", "print('trained')")  # instead of a training
    for _ in study.run_all([trial], output, None, slots=1, keep_models=False):
        write_run(folder)
    monkeypatch.setattr(comparison, "DPI", 20)
    monkeypatch.setattr(page, "SECTIONS", page.SECTIONS[:1])
    monkeypatch.setattr(run_writer, "versions", dict)
    record = comparison.make_record(Path("r.yaml"), trial.recipe, [trial], output, {})
    assert record["runs"][0]["status"] == "finished"
    comparison.show(record, output, comparison.Console(quiet=True))
    written = [output / name for name in OF_A_COMPARISON] + [folder / name for name in OF_A_TRIAL]
    assert [path for path in written if path.is_symlink() or not path.is_file()] == []
