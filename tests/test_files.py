"""Files of ours: never through a link that somebody planted, whole or not at all, and nothing is waited for."""

from __future__ import annotations

import ast
import os
import stat
from pathlib import Path

import pytest

import pion_hf
from pion_hf import files

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
