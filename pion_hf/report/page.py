"""The page of a report: what ran, what came of it, and every picture, in one file."""

from __future__ import annotations

import base64
import io
import logging
import os
import struct
import warnings as python_warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from pion_hf._version import __version__
from pion_hf.report import figures, spectra, summary
from pion_hf.report.figures import Picture
from pion_hf.report.style import names
from pion_hf.runs.files import fault_of_place, make_folder, new_file, write_text
from pion_hf.runs.folder import SPECTRA, Run, read_run, read_spectra

DPI = 200

logger = logging.getLogger(__name__)


class Section(NamedTuple):
    """A picture of the page: its group, its heading, what it says, and what it needs."""

    group: str
    heading: str
    text: str
    draw: Callable[[Sequence[Run]], Picture | None]
    needs: str

    @property
    def key(self) -> str:
        """The name of its file."""
        return self.draw.__name__


LEARNING, STEPS, MATRICES = "Learning", "Steps", "Matrices"
SECTIONS = (
    Section(
        LEARNING,
        "Learnt and forgotten",
        "How far the loss of the task fell, or its reward rose, and how far the loss of other domains rose.",
        figures.learnt_and_forgotten,
        "measurements before and after training of the task and of another domain",
    ),
    Section(
        LEARNING,
        "Shares of what training changed",
        "With weights so far from the start of training to its end: how much of the task is left, how much forgotten.",
        figures.blends,
        "measured shares (blend_shares) of the task and of another domain",
    ),
    Section(
        STEPS,
        "Rotation angles",
        "Mean and largest over the matrices, on the side of the inputs and of the outputs.",
        figures.angles,
        "logged rotation angles, which only rotations have",
    ),
    Section(
        STEPS,
        "Where it rotates",
        "Rotation angle by layer and role, mean over the snapshots.",
        spectra.angle_map,
        "snapshots with rotation angles, which only rotations have",
    ),
    Section(
        MATRICES,
        "Drift of the spectrum",
        "Largest change of a singular value, relative to its matrix's largest, and how far the rotations are from "
        "orthogonal.",
        figures.drift,
        "a logged spectrum drift",
    ),
    Section(
        MATRICES,
        "Change of the singular values",
        "Before against after training, relative to the matrix's largest: median over the matrices of a role.",
        spectra.spectrum_changes,
        f"singular values before and after training ({SPECTRA})",
    ),
    Section(
        MATRICES,
        "Singular values",
        "Before and after training: median over the matrices of a role.",
        spectra.spectra,
        f"singular values before and after training ({SPECTRA})",
    ),
    Section(
        MATRICES,
        "Change of the spectral norms",
        "Since the first snapshot, in per cent.",
        spectra.spectral_norm_changes,
        "two snapshots with spectral norms",
    ),
    Section(MATRICES, "Spectral norms", "", spectra.spectral_norms, "snapshots with spectral norms"),
    Section(
        MATRICES,
        "Stable ranks",
        "Squared Frobenius norm over squared spectral norm: how many directions carry the matrix.",
        spectra.stable_ranks,
        "snapshots with stable ranks",
    ),
)


class _Drawing(NamedTuple):
    """A picture on the page; `png` in base64, its size in pixels."""

    heading: str
    caption: str
    alt: str
    png: str
    width: int
    height: int


def write_report(
    folders: Iterable[str | os.PathLike],
    path: str | os.PathLike,
    title: str | None = None,
    *,
    pictures: str | os.PathLike | None = None,
    extra: Sequence[tuple[str, str | Figure | Picture]] = (),
) -> Path:
    """Write the page of these run folders to `path`, and its pictures to a folder beside it.

    Nothing is written before all is drawn, and the page is written whole or not at all.

    Args:
        pictures: the folder of the PNGs. Default: `<name of the page>_files` beside it.
        extra: sections of the caller's own before all others: heading, and a figure or HTML, which is taken as it is
            (`table` makes it of text).

    Raises:
        FileNotFoundError, ValueError: a folder that is no run, a damaged file, or a place that cannot be written to.
    """
    path = Path(path)
    pictures = path.with_name(f"{path.stem}_files") if pictures is None else Path(pictures)
    _check_place(path, pictures)
    runs, doubles = _read(folders)
    drawn, missing = _draw(runs)
    page = _render(runs, drawn, missing, title=title, doubles=doubles, extra=extra)
    try:
        make_folder(pictures)
        for section in SECTIONS:
            file = pictures / f"{section.key}.png"
            if section.key in drawn:
                with new_file(file) as png:
                    png.write(base64.b64decode(drawn[section.key].png))
            else:
                file.unlink(missing_ok=True)  # of an earlier report
        write_text(path, page)
    except OSError as error:
        raise ValueError(f"cannot write the report to {str(path)!r}: {error.strerror or error}.") from None
    return path


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], best: Iterable[tuple[int, int]] = ()) -> Markup:
    """HTML of a table of text, escaped, for an `extra` section; `best`: row and column of cells that are set off."""
    module = _environment().get_template("table.html").module
    return Markup(module.tabular(summary.Table(list(columns), [list(row) for row in rows], frozenset(best))))


def _read(folders: Iterable[str | os.PathLike]) -> tuple[list[Run], list[str]]:
    """The runs of these folders, each once, and the folders that were given again.

    Raises:
        FileNotFoundError, ValueError: as `read_run`; no folder at all.
    """
    runs, doubles, seen = [], [], set()
    for folder in folders:
        place = Path(folder).resolve()
        if place in seen:
            doubles.append(str(folder))
            continue
        seen.add(place)
        runs.append(read_run(folder))
    if not runs:
        raise ValueError("a report takes at least one run folder.")
    return runs, doubles


def _draw(runs: Sequence[Run]) -> tuple[dict[str, _Drawing], list[str]]:
    """Every picture that there is data for, and a line for each of the others."""
    drawn, missing = {}, []
    for section in tqdm(SECTIONS, desc="Drawing", unit="picture", leave=False, disable=None):
        picture = section.draw(runs)
        if picture is None:
            missing.append(f"{section.heading}: no run has {section.needs}.")
        else:
            drawn[section.key] = _drawing(picture, section.heading, section.text)
    for name, run in zip(names(runs), runs, strict=True):
        try:
            if not read_spectra(run.folder):
                missing.append(f"{name}: {SPECTRA} holds none of after training yet.")
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            said = f"{SPECTRA} cannot be read: {error.strerror}" if isinstance(error, OSError) else error
            missing.append(f"{name}: {said}.")
            logger.warning("%s", missing[-1])
    return drawn, missing


def _drawing(picture: Picture, heading: str, text: str) -> _Drawing:
    buffer = io.BytesIO()
    with python_warnings.catch_warnings():
        python_warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page's own text has the name
        picture.figure.savefig(buffer, format="png", dpi=DPI)
    png = buffer.getvalue()
    width, height = struct.unpack(">II", png[16:24])
    data = base64.b64encode(png).decode("ascii")
    caption = " ".join(filter(None, (text, *picture.notes)))
    return _Drawing(heading, caption, picture.alt, data, width, height)


def _render(
    runs: Sequence[Run],
    drawn: dict[str, _Drawing],
    missing: list[str],
    *,
    title: str | None,
    doubles: Sequence[str],
    extra: Sequence[tuple[str, str | Figure | Picture]],
) -> str:
    alone = len(runs) == 1
    warnings = summary.warnings(runs)
    if doubles:
        warnings.append(f"Given twice and shown once: {', '.join(doubles)}.")
    groups = []
    for heading in (LEARNING, STEPS, MATRICES):
        shown = [drawn[section.key] for section in SECTIONS if section.group == heading and section.key in drawn]
        results = summary.results_table(runs) if heading == LEARNING else None
        if shown or results:
            groups.append({"heading": heading, "table": results, "pictures": shown})
    if not any(summary.has_results(run) for run in runs):
        missing.insert(0, "Results: no run was measured before and after training.")
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title or (names(runs)[0] if alone else f"{len(runs)} runs"),
            made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            version=__version__,
            folders=[str(run.folder) for run in runs],
            warnings=warnings,
            extra=[_extra(*part) for part in extra],
            overview=summary.overview(runs[0]) if alone else [],
            rules=summary.rules_table(runs[0]) if alone else None,
            runs=None if alone else summary.runs_table(runs),
            settings=summary.settings(runs[0]) if alone else [],
            groups=groups,
            missing=missing,
        )
    )


def _extra(heading: str, content: str | Figure | Picture) -> dict[str, Any]:
    if isinstance(content, str):
        return {"heading": heading, "html": Markup(content)}
    picture = Picture(content, heading) if isinstance(content, Figure) else content
    return {"heading": heading, "picture": _drawing(picture, "", "")}


def _environment() -> Environment:
    return Environment(loader=PackageLoader("pion_hf.report"), autoescape=True, trim_blocks=True)


def _check_place(path: Path, pictures: Path) -> None:
    """Raise ValueError, before anything is drawn, for places that cannot be written to."""
    if path.is_dir():
        raise ValueError(f"the report cannot be written to {str(path)!r}, a folder: name a file in it.")
    if pictures.exists() and not pictures.is_dir():
        raise ValueError(f"the pictures cannot be written to {str(pictures)!r}, which is no folder.")
    fault = fault_of_place(path.parent) or fault_of_place(pictures)
    if fault:
        raise ValueError(f"the report cannot go to {str(path)!r}: {fault}; choose another place.")
