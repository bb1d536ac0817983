"""Run folders that `report` reads: damaged files, fields of other types, and text that would be code in a page."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pion_hf.cli import main
from pion_hf.runs.folder import EVALUATION, LOG, MATRICES, RECORD, ROUTING, SPECTRA
from tests.field.checkpoints import a_folder, a_link_to_nowhere, a_pipe, cut_in_half, emptied, missing, noise, zeros
from tests.field.pages import page_of, sketch
from tests.field.trial import Input
from tests.field.world import World
from tests.run_folders import write_run

FILES = (RECORD, LOG, MATRICES, SPECTRA, EVALUATION)


def as_undamaged(world: World, page: str) -> bool:
    return page in (world.page, world.bare_page)


def a_page(world: World, page: str) -> bool:
    """Of what there is: what is not there is no damage."""
    return "</html>" in page


def copy(world: World, folder: Path, *, bare: bool = False) -> Path:
    """bare: without what pictures show, which take most of a report's time."""
    return world.copy(world.bare if bare else world.run, folder / "run")


# -- damaged files ----------------------------------------------------------------------------------------------------


def a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def holding(content: bytes, path: Path) -> None:
    path.write_bytes(content)


DEEP = 100_000
CONTENTS = {
    "null": b"null",
    "a number": b"3",
    "a list": b"[1, 2]",
    "text": b'"finished"',
    "a mapping of something else": b'{"a": 1}',
    "Latin-1": '{"format": 1, "step": 1, "status": "beendet, schön"}'.encode("latin-1"),
    "UTF-16": '{"format": 1, "step": 1}'.encode("utf-16"),
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "a number of 5,000 digits": b'{"format": 1, "step": ' + b"9" * 5000 + b"}",
    "lines": b"\n\n\n",
}
DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f.__name__.replace("_", " "): f for f in (emptied, cut_in_half, zeros, noise, a_folder, a_pipe)},
    **{f.__name__.replace("_", " "): f for f in (a_link_to_nowhere, a_link_to_itself)},
    **{name: partial(holding, content) for name, content in CONTENTS.items()},
}


def damaged(file: str, damage: Callable[[Path], None], world: World, folder: Path) -> str:
    run = copy(world, folder)
    damage(run / file)
    return page_of(run)


def without(file: str, world: World, folder: Path) -> str:
    run = copy(world, folder)
    (run / file).unlink()
    return page_of(run)


def cut_at(share: float, world: World, folder: Path) -> str:
    """A log whose last line was cut off, as of a run that was killed."""
    run = copy(world, folder)
    lines = (run / LOG).read_bytes().splitlines(keepends=True)
    last = lines[-1]
    (run / LOG).write_bytes(b"".join(lines[:-1]) + last[: int(share * len(last))])
    return page_of(run)


def of_nothing(make: Callable[[Path], Any], world: World, folder: Path) -> str:
    """A folder that is no run."""
    make(folder / "run")
    return page_of(folder / "run")


NO_RUNS: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: None,
    "an empty folder": lambda path: path.mkdir(),
    "a file": lambda path: path.write_text("x"),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to itself": lambda path: path.symlink_to("run"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}

# -- fields of other types --------------------------------------------------------------------------------------------


def paths(value: Any, at: tuple[Any, ...] = (), depth: int = 4) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every entry of JSON, of lists the first."""
    if at:
        yield at, value
    if depth and isinstance(value, dict):
        for key, entry in value.items():
            yield from paths(entry, (*at, key), depth - 1)
    elif depth and isinstance(value, list) and value:
        yield from paths(value[0], (*at, 0), depth - 1)


def others(value: Any) -> tuple[Any, ...]:
    """Values of other types."""
    if isinstance(value, str):
        return {"a": 1}, ["x"]
    if isinstance(value, (int, float)):
        return "x", [1.0]
    if isinstance(value, list):
        return "x", {"a": 1}
    return "x", [1]


def put(content: Any, at: tuple[Any, ...], value: Any) -> None:
    for key in at[:-1]:
        content = content[key]
    content[at[-1]] = value


def with_field(file: str, line: int | None, at: tuple[Any, ...], value: Any, world: World, folder: Path) -> str:
    run = copy(world, folder, bare=file in (RECORD, EVALUATION))
    text = (run / file).read_text(encoding="utf-8")
    if line is None:
        content = json.loads(text)
        put(content, at, value)
        text = json.dumps(content)
    else:
        lines = text.splitlines()
        content = json.loads(lines[line])
        put(content, at, value)
        lines[line] = json.dumps(content)
        text = "\n".join(lines) + "\n"
    (run / file).write_text(text, encoding="utf-8")
    return page_of(run)


@cache
def example() -> dict[str, Any]:
    """What the files of a run hold, of which the fields are: file -> content, and of lines one of them."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder), layers=1, steps=4, snapshots=2)
        lines = {file: (run / file).read_text().splitlines()[1] for file in (LOG, MATRICES)}
        return {
            RECORD: json.loads((run / RECORD).read_text()),
            EVALUATION: json.loads((run / EVALUATION).read_text()),
            **{file: json.loads(line) for file, line in lines.items()},
        }


def fields() -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    for file, content in example().items():
        for at, value in paths(content):
            yield file, at, others(value)[len(at) % 2]


# Values of the right type that none has.
NONE_HAS: dict[str, list[tuple[tuple[Any, ...], Any]]] = {
    RECORD: [
        *((("format",), value) for value in (0, 2, -1, 1.5, True)),
        (("steps",), -3),
        (("seconds",), -100.0),
        (("status",), "nearly"),
        (("matrices", 0, "shape"), []),
        (("matrices", 0, "shape"), [-1, 64]),
    ],
    LOG: [(("step",), -1), (("step",), True), (("step",), 1.5)],
    MATRICES: [(("step",), -1), (("values", "spectral_norm"), []), (("values", "spectral_norm"), [1.0])],
}

# -- text that would be code ------------------------------------------------------------------------------------------

PAYLOADS = {
    "a script": "<script>planted()</script>",
    "an image": "<img src=x onerror=planted()>",
    "the end of an attribute": '" onmouseover="planted()" x="',
    "of an attribute in single quotes": "' onfocus='planted()' autofocus='",
    "the end of a title": "</title><script>planted()</script>",
    "of a table": "</td></tr></table><iframe src=javascript:planted()>",
    "a comment": "<!--><script>planted()</script>-->",
    "a template": "{{ 7 * 191 }}{% for x in ().__class__.__base__.__subclasses__() %}planted{% endfor %}",
    "a link": "javascript:planted()//<a href=javascript:planted()>",
    "marks of rich": "[link=javascript:planted()][/link][/b]<b onclick=planted()>",
    "mathematics": "$\\frac{<script>planted()</script>}$",
    "zeros": "\0<scr\0ipt>planted()</scr\0ipt>",
}
TEXTS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "status": (RECORD, ("status",)),
    "started": (RECORD, ("started",)),
    "device": (RECORD, ("device",)),
    "model": (RECORD, ("model", "name")),
    "data": (RECORD, ("data", "train")),
    "optimizer": (RECORD, ("optimizer", "name")),
    "schedule": (RECORD, ("optimizer", "schedule")),
    "option": (RECORD, ("optimizer", "options", "side")),
    "argument": (RECORD, ("arguments", "run")),
    "version": (RECORD, ("versions", "pion_hf")),
    "rule": (RECORD, ("optimizer", "rules", 0, "rule")),
    "role": (RECORD, ("matrices", 0, "role")),
    "matrix": (RECORD, ("matrices", 0, "name")),
    "matrix's rule": (RECORD, ("matrices", 0, "rule")),
}
KEYS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "name of an argument": (RECORD, ("arguments",)),
    "name of an option": (RECORD, ("optimizer", "options")),
    "name of a version": (RECORD, ("versions",)),
}


class Structure(HTMLParser):
    """What a page consists of, without its text: its tags and the names of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: Counter = Counter()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag, tuple(sorted(name for name, _ in attrs))] += 1
        if any((value or "").lower().lstrip().startswith("javascript:") for _, value in attrs):
            self.found["javascript"] += 1

    def handle_comment(self, data: str) -> None:
        self.found["comment"] += 1


def planted(file: str, at: tuple[Any, ...], payload: str, world: World, folder: Path) -> Counter:
    return Structure(with_field(file, None, at, payload, world, folder)).found


def planted_key(file: str, at: tuple[Any, ...], payload: str, world: World, folder: Path) -> Counter:
    return Structure(with_field(file, None, (*at, payload), 1, world, folder)).found


def planted_domain(payload: str, world: World, folder: Path) -> Counter:
    run = copy(world, folder, bare=True)
    evaluation = json.loads((run / EVALUATION).read_text())
    for moment in ("before", "after"):
        evaluation[moment][payload] = {payload: 1.0}
    (run / EVALUATION).write_text(json.dumps(evaluation))
    return Structure(page_of(run)).found


def planted_title(payload: str, world: World, folder: Path) -> Counter:
    Figure.savefig = sketch
    main(["report", str(world.bare), "--output", "page.html", f"--title={payload}"])
    return Structure(Path("page.html").read_text(encoding="utf-8")).found


def planted_folder(payload: str, world: World, folder: Path) -> Counter:
    run = copy(world, folder, bare=True).rename(folder / payload.replace("/", "\N{FRACTION SLASH}").replace("\0", ""))
    return Structure(page_of(run)).found


def planted_pictures(payload: str, world: World, folder: Path) -> Counter:
    """Names that the pictures show, which are drawn here."""
    run = copy(world, folder)
    record = json.loads((run / RECORD).read_text())
    for matrix in record["matrices"]:
        matrix["role"] += payload
    (run / RECORD).write_text(json.dumps(record))
    return Structure(page_of(run, drawn=True)).found


def no_code(world: World, found: Counter) -> bool:
    """A table may have gained a row or lost one, and a picture its lines: no other tag, attribute or comment."""
    usual = Structure(world.page).found
    return set(found) <= set(usual) | {("code", ()), ("strong", ()), ("ul", ()), ("li", ())} | WARNED


WARNED = {("div", ("class", "role")), ("div", ("class",)), ("p", ()), ("tr", ()), ("td", ()), ("th", ("scope",))}


# What is as if it were not there.
ABSENT = {
    **{(file, "a link to nowhere"): a_page for file in (*FILES[1:], ROUTING)},
    **{(file, words): a_page for file in (LOG, MATRICES) for words in ("emptied", "lines")},
}
READ, TYPES, INJECTED = "reports: damaged files", "reports: fields of other types", "reports: text that would be code"
INPUTS = [
    *(
        Input(
            READ, f"{file}: {words}", partial(damaged, file, damage), (file,), ABSENT.get((file, words), as_undamaged)
        )
        for file in FILES
        for words, damage in DAMAGES.items()
    ),
    Input(READ, f"{RECORD}: missing", partial(damaged, RECORD, missing), (RECORD,)),
    *(Input(READ, f"{file}: missing", partial(without, file), (file,), a_page) for file in FILES[1:]),
    *(Input(READ, f"{LOG}: its end cut to {s:.0%}", partial(cut_at, s), (LOG,), a_page) for s in (0.01, 0.5, 0.99)),
    *(Input(READ, f"no run: {words}", partial(of_nothing, make), ("run",)) for words, make in NO_RUNS.items()),
    *(
        Input(
            TYPES,
            f"{file}: {'.'.join(map(str, at))}: {value}",
            partial(with_field, file, None if file in (RECORD, EVALUATION) else 1, at, value),
            (file, str(at[-1])),
            a_page if at[0] in ("arguments", "versions") or "options" in at[:-1] else as_undamaged,
        )
        for file, at, value in (
            *fields(),
            *((file, at, value) for file, entries in NONE_HAS.items() for at, value in entries),
        )
    ),
    *(
        Input(INJECTED, f"{place}: {words}", partial(plant, file, at, payload), (file, *map(str, at)), no_code)
        for plant, places in ((planted, TEXTS), (planted_key, KEYS))
        for place, (file, at) in places.items()
        for words, payload in PAYLOADS.items()
    ),
    *(
        Input(INJECTED, f"{plant.__name__.removeprefix('planted_')}: {words}", partial(plant, payload), (), no_code)
        for plant in (planted_domain, planted_title, planted_folder, planted_pictures)
        for words, payload in PAYLOADS.items()
        if not (plant is planted_title and "\0" in payload)
        if plant is not planted_pictures or words in ("a script", "marks of rich", "mathematics")
    ),
]
