"""Draws which room of the package imports which, now or at a commit: `python docs/imports.py [COMMIT]`.

Rooms are packages and modules right under `pion_hf`, each below all that it imports, as far as that can be. A mark is
an import, in functions too: a row imports what its columns number. Left out is what everybody may import.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
EVERYBODYS = {"", "_version", "errors", "lazy", "needs"}


def drawing(folder: Path) -> str:
    """Of the `pion_hf` in `folder`."""
    sys.path.insert(0, str(folder))
    try:
        graph = grimp.build_graph("pion_hf", cache_dir=None)
    finally:
        sys.path.remove(str(folder))
    imports: dict[str, set[str]] = {room: set() for room in sorted({*map(room_of, graph.modules)} - EVERYBODYS)}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            if {room_of(module), room_of(imported)}.isdisjoint(EVERYBODYS):
                imports[room_of(module)].add(room_of(imported))
    others = {room: sorted(of - {room}) for room, of in imports.items()}
    try:
        rooms = list(TopologicalSorter(others).static_order())
    except CycleError:
        rooms = list(others)
    width = max(map(len, rooms))
    lines = [f"{'':{width + 3}} {' '.join(f'{i:2}' for i in range(1, len(rooms) + 1))}"]
    for i, room in enumerate(rooms, 1):
        marks = " ".join(" x" if other in others[room] else " ." for other in rooms)
        lines.append(f"{i:2} {room:{width}} {marks}")
    return "\n".join(lines)


def room_of(module: str) -> str:
    """The second part of its name."""
    return module.partition(".")[2].partition(".")[0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        commit = sys.argv[1] if len(sys.argv) > 1 else None
        if commit:
            packed = subprocess.run(["git", "-C", ROOT, "archive", commit, "pion_hf"], capture_output=True, check=True)
            with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as files:
                files.extractall(folder, filter="data")
        print(drawing(Path(folder) if commit else ROOT))
