"""What the lower rooms can do without: see also the contracts of `lint-imports` in setup.cfg."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pion_hf

ROOT = Path(pion_hf.__file__).parent
DOCS = ROOT.parent / "docs"

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


def test_the_drawing_of_imports_is_that_of_the_code():
    """If this fails, `python docs/imports.py` draws it anew for docs/architecture.md."""
    drawing = subprocess.run([sys.executable, DOCS / "imports.py"], capture_output=True, text=True, check=True).stdout
    assert f"```text\n{drawing}```" in (DOCS / "architecture.md").read_text(encoding="utf-8")


def test_linalg_and_optim_need_torch_only():
    command = [sys.executable, "-c", WITHOUT_HUGGING_FACE, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {"pion_hf.linalg.rotation", "pion_hf.optim.pion", "pion_hf.optim.lora"} <= set(done.stdout.split())
