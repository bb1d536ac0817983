"""Tables, and their places in a page of the docs: between two comments that name them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pion_hf._version import __version__
from tests.field.trial import CLEAR, HANG, RIGHT, TRACEBACK, UNCLEAR, WRONG

COLUMNS = {
    "clear lines": CLEAR,
    "as it should": RIGHT,
    "unclear": UNCLEAR,
    "tracebacks": TRACEBACK,
    "hangs": HANG,
    "silently wrong": WRONG,
}


def table(counts: Mapping[str, Counter]) -> str:
    """What became of the inputs of every kind, in Markdown."""
    total = sum(counts.values(), Counter())
    rows = [
        [kind, f"{count.total():,}", *(str(count[verdict]) for verdict in COLUMNS.values())]
        for kind, count in {**counts, "**all**": total}.items()
    ]
    return markdown(["kind of input", "tried", *COLUMNS], rows)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers to the right."""
    numbers = [all(re.fullmatch(r"[\d,]*", row[i]) for row in rows) for i in range(len(headings))]
    rule = ["---:" if number else "---" for number in numbers]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows))


def write(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`; the version is added."""
    page = path.read_text(encoding="utf-8")
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not marked.search(page):
        raise ValueError(f"{path} has no place for {name!r}")
    new = f"With version {__version__}:\n\n{text}\n"
    path.write_text(marked.sub(lambda found: found[1] + new + found[2], page), encoding="utf-8")
