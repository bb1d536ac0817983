"""Imports run one way: linalg <- optim, schedules <- routing, arguments <- integrations <- cli."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pion_hf

ROOT = Path(pion_hf.__file__).parent

# A room may import itself and the rooms of a lower floor; those of floor 0 need nothing of this package.
FLOORS = {
    "_version": 0,
    "errors": 0,
    "lazy": 0,
    "needs": 0,
    "files": 0,
    "redaction": 0,
    "values": 1,
    "linalg": 1,
    "optim": 2,
    "schedules": 2,
    "adapters": 2.1,
    "patterns": 2.1,
    "structure": 2.1,
    "stacking": 2.2,
    "routing": 3,
    "arguments": 3,
    "metrics": 3,
    "evaluation": 4,
    "rewards": 4,
    "runs": 3,
    "report": 5.1,
    "initialization": 4,
    "integrations": 4,
    "": 5,  # pion_hf itself: the public names
    "run": 6,
    "cli": 7,
}
HUGGING_FACE = ("transformers", "trl", "peft", "datasets", "accelerate", "evaluate")

WITHOUT_HUGGING_FACE = f"""
import importlib, pathlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HUGGING_FACE!r}:
            raise ModuleNotFoundError(f"{{name}} is absent", name=name)

sys.meta_path.insert(0, Absent())
root = pathlib.Path(sys.argv[1])
for file in sorted([*root.glob("linalg/*.py"), *root.glob("optim/*.py")]):
    name = ".".join(["pion_hf", *file.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")
    importlib.import_module(name)
    print(name)
import torch
from pion_hf.optim import Pion
weight = torch.nn.Parameter(torch.eye(3))
weight.grad = torch.ones(3, 3).triu()
Pion([weight], lr=0.1).step()
assert not torch.equal(weight, torch.eye(3))
"""


def test_linalg_and_optim_need_torch_only():
    command = [sys.executable, "-c", WITHOUT_HUGGING_FACE, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {"pion_hf.linalg.rotation", "pion_hf.optim.pion", "pion_hf.optim.lora"} <= set(done.stdout.split())


def room(module: str) -> str:
    """`pion_hf.optim.base` is in the room `optim`."""
    return module.partition(".")[2].partition(".")[0]


def imported(file: Path) -> set[str]:
    """Every module a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module)
            if node.module == "pion_hf":
                found |= {f"pion_hf.{a.name}" for a in node.names if a.name in FLOORS}
    return found


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    here = "" if parts == ("__init__",) else parts[0]
    for module in imported(file):
        if module.partition(".")[0] == "pion_hf":
            there = room(module)
            allowed = there == here or FLOORS[there] < FLOORS[here]
            assert allowed, f"{here or 'pion_hf'} imports {module}"
        if here in ("linalg", "optim", "schedules"):
            assert module.partition(".")[0] not in HUGGING_FACE, f"{here} imports {module}"
