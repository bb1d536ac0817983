"""What is built and installed: a source distribution, a wheel of it, and what the wheel holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pion_hf

ROOT = Path(pion_hf.__file__).parents[1]
BUILT_FROM = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"

USE = """
import sys
from importlib.metadata import version
from pathlib import Path
import pion_hf
from pion_hf import Pion
from pion_hf.cli import main
home = Path(pion_hf.__file__).parent
assert home == Path(sys.argv[1]) / "pion_hf", home
assert version("pion-hf") == pion_hf.__version__
main(["--version"])
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {**os.environ, **environment}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


def modules(folder: Path) -> set[str]:
    """And all other files of the package that belong to it."""
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {file.as_posix() for file in found if "__pycache__" not in file.parts}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds the wheel alone, which was made of the source distribution."""
    folder = tmp_path_factory.mktemp("package")
    source, unpacked, target = folder / "source", folder / "unpacked", folder / "target"
    shutil.copytree(ROOT / "pion_hf", source / "pion_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-c", BUILD, "sdist", folder, cwd=source)
    (archive,) = folder.glob("pion_hf-*.tar.gz")
    shutil.unpack_archive(archive, unpacked, filter="data")
    run(sys.executable, "-c", BUILD, "wheel", folder, cwd=next(unpacked.iterdir()))
    (wheel,) = folder.glob("pion_hf-*.whl")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile")
    run(*pip, "--target", target, wheel, cwd=folder)
    return target


def test_the_wheel_holds_the_package_and_nothing_else(installed):
    assert modules(installed / "pion_hf") == modules(ROOT / "pion_hf")
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"pion_hf", "bin"}
    assert {"py.typed", "cli/instructions.txt", "report/templates/page.html"} <= modules(installed / "pion_hf")
    assert any(file.startswith("configs/") for file in modules(installed / "pion_hf"))


def test_what_is_installed_works_alone(installed, tmp_path):
    said = run(sys.executable, "-c", USE, installed, cwd=tmp_path, PYTHONPATH=str(installed))
    assert said == f"pion-hf {pion_hf.__version__}\n"
    said = run(installed / "bin" / "pion-hf", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert said.startswith("usage: pion-hf COMMAND")
