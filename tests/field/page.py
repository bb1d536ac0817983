"""Tables, and their places in a page of the docs: between two comments that name them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.field.trial import CLEAR, HANG, RIGHT, TRACEBACK, UNCLEAR, WRONG

COLUMNS = {
    "clear lines": CLEAR,
    "as it should": RIGHT,
    "unclear": UNCLEAR,
    "tracebacks": TRACEBACK,
    "hangs": HANG,
    "silently wrong": WRONG,
}
ALL = "**all**"


class Row(NamedTuple):
    """What became of the inputs of a kind, under a version of the package."""

    version: str
    count: Counter


def table(rows: Mapping[str, Row]) -> str:
    """In Markdown, with a sum."""
    total = Row("", sum((row.count for row in rows.values()), Counter()))
    cells = [
        [kind, row.version, f"{row.count.total():,}", *(f"{row.count[verdict]:,}" for verdict in COLUMNS.values())]
        for kind, row in [*sorted(rows.items()), (ALL, total)]
    ]
    return markdown(["kind of input", "version", "tried", *COLUMNS], cells)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers to the right."""
    numbers = [all(re.fullmatch(r"[\d,]+", row[i]) for row in rows) for i in range(len(headings))]
    rule = ["---:" if number else "---" for number in numbers]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows))


def rows_in(path: Path, name: str) -> dict[str, Row]:
    """Those of a table that the page holds already."""
    found = {}
    for line in _place(name).search(path.read_text(encoding="utf-8"))[2].splitlines()[2:]:
        kind, version, _, *numbers = (cell.strip() for cell in line.strip("| ").split(" |"))
        if kind != ALL:
            counts = (int(number.replace(",", "")) for number in numbers)
            found[kind] = Row(version, Counter(dict(zip(COLUMNS.values(), counts, strict=True))))
    return found


def write(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`."""
    page = path.read_text(encoding="utf-8")
    if not _place(name).search(page):
        raise ValueError(f"{path} has no place for {name!r}")
    path.write_text(_place(name).sub(lambda found: f"{found[1]}{text}\n{found[3]}", page), encoding="utf-8")


def _place(name: str) -> re.Pattern:
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)
