"""The report: what its page says and shows of run folders, and every folder and place it refuses."""

from __future__ import annotations

import io
import json
import math
import os
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from pion_hf.cli import main
from pion_hf.report import figures, page, spectra, style, summary, table, write_report
from pion_hf.runs.files import read_bytes
from pion_hf.runs.folder import (
    EVALUATION,
    LOG,
    MATRICES,
    RECORD,
    SPECTRA,
    append_line,
    read_run,
    read_spectra,
    write_json,
)
from tests.run_folders import ROLES, evaluation, write_run


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    monkeypatch.setattr(page, "DPI", 20)


@pytest.fixture
def one_picture(monkeypatch):
    """For what does not depend on the pictures, which take the time."""
    monkeypatch.setattr(page, "SECTIONS", page.SECTIONS[:1])


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "a-run")


@pytest.fixture
def pair(tmp_path) -> list[Path]:
    """The same recipe with two optimizers."""
    return [write_run(tmp_path / "one"), write_run(tmp_path / "two", optim="adamw_torch", learning_rate=1e-4)]


class Page(HTMLParser):
    """What a browser would find: text, headings, images, tables, and addresses of anything outside."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.headings, self.images, self.addresses, self.open = "", [], [], [], []
        self.rows: list[list[str]] = []
        self.best: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "style":
            return
        self.text += data
        if inside in ("h1", "h2", "h3"):
            self.headings.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if inside == "strong":
            self.best.append(data)

    def column(self, name: str) -> list[str]:
        """Of the first table that has it."""
        start = next(i for i, row in enumerate(self.rows) if name in row)
        width = len(self.rows[start])
        rows = [row for row in self.rows[start + 1 :] if len(row) == width]
        return [row[self.rows[start].index(name)] for row in rows]


def written(folders, path: Path, **options) -> Page:
    return Page(write_report(folders, path, **options))


def change_record(folder: Path, **changes) -> None:
    write_json(folder / RECORD, {**json.loads((folder / RECORD).read_text()), **changes})


def test_page_of_one_run(run, tmp_path):
    found = written([run], tmp_path / "page.html")
    assert set(found.headings) == {"a-run", "What ran", "Learning", "Steps", "Matrices"} | {
        section.heading for section in page.SECTIONS
    }
    assert len(found.images) == len(page.SECTIONS)
    for image in found.images:
        assert image["src"].startswith("data:image/png;base64,")
        assert len(image["alt"]) > 30
        assert int(image["width"]) == round(style.WIDTH * page.DPI)
    assert all(address.startswith("data:") for address in found.addresses), "it is one file"
    for said in (
        "toy, 1,000 parameters, 900 of them trained",
        "pion, learning rate 0.001",
        "3.00\N{NO-BREAK SPACE}GiB",
        str(run),
    ):
        assert said in found.text
    assert ["task", "loss", "4.0000", "2.9000", "-1.1000"] in found.rows
    assert ["forgotten: other text", "", "", "", "+0.0500"] in found.rows
    assert "Not shown" not in found.text
    assert 'name="viewport"' in (tmp_path / "page.html").read_text()
    beside = {file.stem for file in (tmp_path / "page_files").iterdir()}
    assert beside == {section.key for section in page.SECTIONS}


def test_several_runs_stand_side_by_side_with_what_differs(pair, tmp_path):
    found = written(pair, tmp_path / "page.html")
    assert found.column("optim") == ["pion", "adamw_torch"]
    assert found.column("learning_rate") == ["0.001", "0.0001"]
    head = next(row for row in found.rows if "optim" in row)
    assert not {"max_steps", "output_dir", "lr_scheduler_type", "optim_rms"} & set(head)
    assert found.column("task: loss") == ["4.0000", "2.9000", "2.9900"]
    assert found.column("run")[:2] == ["1 one", "2 two"]
    assert {"2.9000", "+1.1000", "+0.0050", "3.0050"} <= set(found.best)
    assert not {"2.9900", "3.0500"} & set(found.best)
    assert "These runs are of different" not in found.text


def test_an_option_differs_within_an_optimizer_and_an_argument_from_its_default(tmp_path):
    other = {"name": "pion", "learning_rate": 1e-3, "schedule": "linear", "options": {"side": "in", "rms": 0.2}}
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", changes={"optimizer": other, "arguments": {"weight_decay": 0.1, "max_steps": 20}}),
        write_run(tmp_path / "c", optim="adamw_torch"),
    ]
    found = summary.differences([read_run(folder) for folder in runs])
    assert found == {
        "optim": ["pion", "pion", "adamw_torch"],
        "weight_decay": ["default", "0.1", "default"],
        "optim_side": ["alternate", "in", ""],
    }


@pytest.mark.usefixtures("one_picture")
def test_names_are_as_long_as_it_takes_and_escaped(tmp_path):
    folders = [tmp_path / "x" / "out", tmp_path / "y" / "out", tmp_path / "<b>$a_1$ & _{"]
    found = written([write_run(folder) for folder in folders], tmp_path / "page.html", title="<i>it</i>")
    assert found.column("run")[:3] == ["1 x/out", "2 y/out", "3 <b>$a_1$ & _{"]
    assert "<i>it</i>" in found.headings
    assert "<b>" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"name": "other"}}, "different models: their losses and spectra cannot be compared"),
        ({"data": {"train": "x", "evaluation": "chat"}}, "different training data"),
        ({"data": {"train": "chat", "evaluation": "x"}}, "different evaluation data"),
        ({"device": "cuda"}, "different devices: their times cannot be compared"),
        ({"status": "running"}, "Still running, or killed, and shown as far as it came: 2 two (step 20)"),
        ({"status": "failed"}, "Failed: 2 two (step 20)"),
    ],
)
def test_what_stands_in_the_way_of_comparing_is_said_first(pair, change, said):
    change_record(pair[1], **change)
    assert any(said in warning for warning in summary.warnings([read_run(folder) for folder in pair]))


def test_of_rewards_the_highest_is_best(pair):
    for folder, reward in zip(pair, (0.5, 0.1), strict=True):
        measured = evaluation(learnt=1.0, forgotten=0.1)
        measured["before"]["task"], measured["after"]["task"] = {"own_reward": 0.0}, {"own_reward": reward}
        write_json(folder / EVALUATION, measured)
    table = summary.results_table([read_run(folder) for folder in pair])
    column = table.columns.index("task: own reward")
    assert {row for row, at in table.best if at == column} == {1}


@pytest.mark.usefixtures("one_picture")
def test_measurements_of_different_beginnings_have_no_best(pair, tmp_path):
    other = evaluation(learnt=1.5, forgotten=0.1)
    other["before"]["task"]["loss"] = 5.0
    write_json(pair[1] / EVALUATION, other)
    found = written(pair, tmp_path / "page.html")
    assert not found.best
    assert found.column("task: loss") == ["4.0000 → 2.9000", "5.0000 → 2.5000"]


def test_a_diverged_run_is_shown_as_such(pair, tmp_path):
    for step in (21, 22):
        append_line(pair[0] / LOG, {"step": step, "loss": math.nan if step == 22 else 1e30, "learning_rate": 0.0})
    lost = evaluation(learnt=math.nan, forgotten=math.nan)
    write_json(pair[0] / EVALUATION, lost)
    found = written(pair, tmp_path / "page.html")
    assert "Diverged, the loss is NaN: 1 one (step 22)." in found.text
    assert found.column("task: loss")[1] == summary.NO_NUMBER
    assert found.column("learnt") == ["", "", "+1.0100"]
    alone = written([pair[0]], tmp_path / "alone.html")
    assert "diverged at step 22" in alone.text


def test_a_run_that_is_all_nan_is_drawn(tmp_path):
    folder = write_run(tmp_path / "run", steps=0, snapshots=0)
    for step in range(3):
        append_line(folder / LOG, {"step": step, "loss": math.nan, "spectrum_drift": math.nan, "angle_in/mean": 0.0})
        values = {"spectral_norm": [math.nan] * 9, "angle_in": [math.nan] * 9, "stable_rank": [0.0] * 9}
        append_line(folder / MATRICES, {"step": step, "values": values})
    found = written([folder], tmp_path / "page.html")
    assert "diverged at step 0" in found.text
    assert "Spectral norms: no run has snapshots with spectral norms." in found.text


def test_a_run_in_progress_is_shown_as_far_as_it_came(run, tmp_path):
    change_record(run, status="running", seconds=None, times=None)
    (run / EVALUATION).unlink()
    (run / SPECTRA).write_bytes(b"\x10\x00")
    with (run / LOG).open("a") as file:
        file.write('{"step": 21, "loss"')
    found = written([run], tmp_path / "page.html")
    assert "Still running, or killed" in found.text
    for line in (
        "Results: no run was measured before and after training.",
        f"a-run: {SPECTRA} is damaged: ",
    ):
        assert line in found.text
    assert "Drift of the spectrum" in found.headings
    assert "Learnt and forgotten" not in found.headings


@pytest.mark.usefixtures("one_picture")
@pytest.mark.parametrize("content", [b"", b"{}", b'{"a": 1}\n'])
def test_damaged_spectra_are_said_on_the_page_and_in_a_line(run, tmp_path, caplog, content):
    (run / SPECTRA).write_bytes(content)
    found = written([run], tmp_path / "page.html")
    assert f"a-run: {SPECTRA} is damaged: " in found.text
    assert [r.message.partition(" is damaged")[0] for r in caplog.records] == [f"a-run: {SPECTRA}"]


@pytest.mark.parametrize("role", [r"$\frac{x}$", "a" * 20 + "$_$" * 3, "$" * 9])
def test_names_are_no_mathematics(tmp_path, role):
    run = write_run(tmp_path / "a-run", layers=1, steps=2, snapshots=2, roles={role: (4, 4)})
    runs = [read_run(run)]
    for draw in (spectra.angle_map, spectra.spectra, spectra.spectral_norms):
        draw(runs).figure.savefig(io.BytesIO(), dpi=20)


def test_a_record_alone_makes_a_page_without_pictures(tmp_path):
    write_json(tmp_path / "run" / RECORD, {"format": 1})
    found = written([tmp_path / "run"], tmp_path / "page.html")
    assert not found.images
    assert all(f"{section.heading}: no run has {section.needs}." in found.text for section in page.SECTIONS)


@pytest.mark.usefixtures("one_picture")
def test_a_folder_given_twice_is_shown_once(run, tmp_path):
    found = written([run, tmp_path / "x" / ".." / "a-run"], tmp_path / "page.html")
    assert "Given twice and shown once" in found.text
    assert found.headings[0] == "a-run"


WRONG_FIELDS = [
    ({"status": []}, "status holds '[]', which is not text"),
    ({"steps": "7"}, "steps holds '7', which is not a whole number"),
    ({"steps": True}, "steps holds 'True'"),
    ({"steps": -3}, "run.json' is damaged: steps holds '-3', which is not a whole number of at least 0"),
    ({"seconds": -1.5}, "seconds holds '-1.5', which is not a number of at least 0"),
    ({"status": "nearly"}, "status holds 'nearly', which is not text that says running, finished or failed"),
    ({"format": True}, "is not of format 1"),
    *(({"matrices": [{"shape": s}]}, "matrices: shape holds") for s in ({}, ["x"], [], [-1, 64], [True, 2])),
    ({"seconds": "long"}, "seconds holds 'long', which is not a number"),
    ({"peak_memory_bytes": {}}, "peak_memory_bytes holds"),
    ({"spectrum_drift": [1]}, "spectrum_drift holds"),
    ({"optimizer_share": "all"}, "optimizer_share holds"),
    ({"model": {"parameters": "many"}}, "model: parameters holds 'many'"),
    ({"data": {"train": [1]}}, "data: train holds"),
    ({"optimizer": {"options": 3}}, "optimizer: options holds '3', which is not fields"),
    ({"optimizer": {"rules": {}}}, "optimizer: rules holds '{}', which is not a list"),
    ({"optimizer": {"rules": [None]}}, "optimizer: rules holds 'None'"),
    ({"optimizer": {"rules": [{"tensors": "x"}]}}, "optimizer: rules: tensors holds"),
    ({"optimizer": {"learning_rate": "x"}}, "optimizer: learning_rate holds"),
    ({"times": {"total": "x"}}, "times: total holds"),
    ({"matrices": {"name": "w"}}, "matrices holds"),
    ({"matrices": ["w"]}, "matrices holds 'w', which is not fields"),
    ({"matrices": [{"name": "w", "layer": "3"}]}, "matrices: layer holds '3'"),
]
LOGGED = ("loss", "eval_loss", "angle_in/mean", "spectrum_drift")
WRONG_MEASURES = [
    ({"before": [], "after": {}}, "eval.json: before holds '[]'"),
    ({"before": {"task": 1.0}}, "eval.json: before: task holds '1.0'"),
    ({"before": {"task": None}}, "eval.json: before: task holds 'None'"),
    ({"after": {"task": {"loss": "low"}}}, "eval.json: after: task: loss holds 'low'"),
    ({"learnt": "much"}, "eval.json: learnt holds"),
    ({"forgotten": {"other_text": []}}, "eval.json: forgotten: other_text holds"),
    ({"blends": {"share": 1}}, "eval.json: blends holds"),
    ({"blend": [1.0]}, "eval.json: blend holds"),
    ({"a": 1}, "eval.json says nothing of before and after training"),
    ({"blends": [{"share": "half"}]}, "eval.json: blends: share holds"),
]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (RECORD, None, "is no run: it holds no run.json"),
        (RECORD, "{", "cannot read"),
        (RECORD, '{"format": 1, "optimizer": "pion"}', "is damaged: optimizer holds 'pion'"),
        (LOG, '{"step": 1}\nnonsense\n{"step": 2}\n', "line 2 of"),
        (LOG, '{"loss": 1}\n{"step": 2}\n', "it says nothing of a step"),
        (MATRICES, "[1]\n[2]\n", "line 1 of"),
        (EVALUATION, "{", "cannot read"),
        (EVALUATION, "[1]", "is damaged: eval.json"),
        *((RECORD, json.dumps({"format": 1, **fields}), said) for fields, said in WRONG_FIELDS),
        *((EVALUATION, json.dumps(fields), said) for fields, said in WRONG_MEASURES),
        (MATRICES, '{"step": 1, "values": {"spectral_norm": ["x"]}}\n{"step": 2}\n', "values: spectral_norm holds 'x'"),
        (MATRICES, '{"step": 1, "values": 7}\n{"step": 2}\n', "values holds '7', which is not fields"),
        (LOG, '{"step": true}\n{"step": 2}\n', "it says nothing of a step"),
        (LOG, f'{{"step": {"9" * 400}}}\n{{"step": 2}}\n', "it says nothing of a step"),
        (LOG, "[" * 100_000 + "\n{}\n", "line 1 of"),
        (LOG, '{"step": 1}\n{"a": 1}\n', "line 2 of"),
        (LOG, '{"step": 1}\n{"a": 1}', "line 2 of"),
        (LOG, '{"step": -1}\n', "log.jsonl' is damaged: step holds '-1'"),
        *(
            (LOG, json.dumps({"step": 7, k: "x"}) + "\n", f"log.jsonl' is damaged: step 7: {k} holds 'x'")
            for k in LOGGED
        ),
        *((LOG, json.dumps({"step": 7, "loss": v}), "loss holds") for v in (True, [1.0], {"a": 1})),
        (MATRICES, '{"step": 1, "values": {"spectral_norm": "x"}}', "line 1 of"),
        (RECORD, "[" * 100_000, "it is nested too deeply"),
    ],
)
def test_a_damaged_run_is_one_line_and_no_page(run, tmp_path, file, content, said, monkeypatch):
    read_when_drawn = [s for s in page.SECTIONS if s.key in ("angles", "drift", "spectral_norms")]
    monkeypatch.setattr(page, "SECTIONS", read_when_drawn)
    earlier = tmp_path / "page.html"
    earlier.write_text("earlier")
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    with pytest.raises(SystemExit) as raised:
        main(["report", str(run), "--output", str(earlier)])
    assert raised.value.code.startswith("pion-hf report: ")
    assert said in raised.value.code
    assert "\n" not in raised.value.code
    assert earlier.read_text() == "earlier"
    assert not (tmp_path / "page_files").exists()


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        (RECORD, {"optimizer": {"rules": [{"rule": "pion"}, {}]}, "model": None, "matrices": [{}], "times": {}}),
        (RECORD, {"seconds": 1e308, "peak_memory_bytes": None, "arguments": {"a": [1, {"b": None}]}}),
        (EVALUATION, {"blends": [{"share": 0.5, "task": {"loss": 1.0}, "new": {"loss": 2.0}}, {}]}),
        (
            EVALUATION,
            {"before": {"task": {"loss": None}}, "after": {"task": {"reward": 1.0}}, "blends": [{"task": {}}]},
        ),
        (
            EVALUATION,
            {"before": {"task": {"loss": 1.0}}, "after": {"other": {"loss": 1.0}}, "learnt": 1, "blends": None},
        ),
    ],
)
@pytest.mark.usefixtures("one_picture")
def test_what_is_missing_is_left_out(run, tmp_path, file, fields, monkeypatch):
    write_json(run / file, {"format": 1, **fields})
    for draw in (figures.learnt_and_forgotten, figures.blends):
        draw([read_run(run)])
    assert written([run], tmp_path / "page.html").headings


@pytest.mark.timeout(20)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders")
@pytest.mark.parametrize("file", [RECORD, LOG, MATRICES, EVALUATION, SPECTRA])
def test_a_pipe_in_a_run_is_not_waited_for(run, tmp_path, file):
    (run / file).unlink()
    os.mkfifo(run / file)
    if file == SPECTRA:
        with pytest.raises(OSError, match="is no regular file"):
            read_spectra(run)
        return
    with pytest.raises(SystemExit, match=r"cannot read .*: is no regular file"):
        main(["report", str(run), "--output", str(tmp_path / "page.html")])


@pytest.mark.usefixtures("one_picture")
def test_what_another_user_may_not_read_is_not_called_damaged(run, tmp_path, monkeypatch):
    def refuses(path):
        if Path(path).name in refused:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr("pion_hf.runs.folder.read_bytes", refuses)
    refused = {RECORD}
    with pytest.raises(ValueError, match=r"cannot read '.*run.json': Permission denied$"):
        read_run(run)
    refused = {SPECTRA}
    assert f"{SPECTRA} cannot be read: Permission denied." in page._draw([read_run(run)])[1][-1]


@pytest.mark.usefixtures("one_picture")
def test_secrets_that_an_older_version_wrote_are_not_shown(run, tmp_path):
    change_record(run, arguments={"hub_token": "SESAME", "model_init_kwargs": {"password": "SESAME"}, "max_steps": 7})
    text = written([run], tmp_path / "page.html").text
    assert "SESAME" not in text
    assert "max_steps=7" in text


def test_no_folder_of_that_name(tmp_path):
    with pytest.raises(SystemExit, match="there is no folder"):
        main(["report", str(tmp_path / "none")])


def test_places_that_cannot_be_written_to(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a folder: name a file in it"):
        write_report([run], tmp_path)
    with pytest.raises(ValueError, match="file' is no folder; choose another"):
        write_report([run], tmp_path / "file" / "page.html")
    with pytest.raises(ValueError, match="pictures cannot be written"):
        write_report([run], tmp_path / "page.html", pictures=tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written to; choose another"):
        write_report([run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.usefixtures("one_picture")
def test_a_page_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    earlier = tmp_path / "page.html"
    earlier.write_text("earlier")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match="No space left on device"):
        write_report([run], earlier)
    assert earlier.read_text() == "earlier"
    assert not (tmp_path / "_page.html").exists()


@pytest.mark.usefixtures("one_picture")
def test_the_command_writes_where_it_says(run, capsys, monkeypatch, tmp_path):
    main(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report_files" / "learnt_and_forgotten.png").is_file()
    (run / EVALUATION).unlink()
    main(["report", str(run), "--title", "Mine", "--pictures", str(run / "report_files")])
    assert Page(run / "report.html").headings[0] == "Mine"
    assert not (run / "report_files" / "learnt_and_forgotten.png").exists(), "of an earlier report"
    monkeypatch.chdir(tmp_path)
    main(["report", str(run), str(write_run(tmp_path / "other"))])
    assert (tmp_path / "report.html").is_file()


@pytest.mark.usefixtures("one_picture")
def test_sections_of_ones_own_come_first(run, tmp_path):
    figure = Figure(figsize=(2, 2))
    extra = [("Table", table(["name", "loss"], [["<a>", "1"], ["b", "2"]], best=[(0, 1)])), ("Frontier", figure)]
    found = written([run], tmp_path / "page.html", extra=extra)
    assert found.headings[:4] == ["a-run", "Table", "Frontier", "What ran"]
    assert found.rows[:3] == [["name", "loss"], ["<a>", "1"], ["b", "2"]]
    assert found.best == ["1"]
    assert found.images[0]["alt"] == "Frontier"


def test_curves_show_the_logs_and_leave_matplotlib_as_it_was(pair):
    before = dict(matplotlib.rcParams)
    runs = [read_run(folder) for folder in pair]
    axes = figures.drift(runs).figure.axes[0]
    shown = [line for line in axes.get_lines() if len(line.get_xdata())]
    logged = [run for run in runs if run.series("spectrum_drift")[0]]
    assert logged
    for line, run in zip(shown, logged, strict=True):
        assert [list(line.get_xdata()), list(line.get_ydata())] == list(map(list, run.series("spectrum_drift")))
    assert {line.get_color() for line in shown} <= set(style.COLOURS[:2])
    assert dict(matplotlib.rcParams) == before


def test_shares_of_the_change_are_a_line_from_little_to_all_of_it(pair):
    runs = [read_run(folder) for folder in pair]
    picture = figures.blends(runs)
    (axes,) = picture.figure.axes
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) == 2 and line.get_marker() != "None"]
    for line, run in zip(lines, runs, strict=True):
        learnt, forgotten = run.evaluation["learnt"], run.evaluation["forgotten"]["other_text"]
        assert list(line.get_xdata()) == pytest.approx([0.8 * learnt, learnt])
        assert list(line.get_ydata()) == pytest.approx([0.3 * forgotten, forgotten])
    assert [text.get_text() for text in axes.texts] == ["0.5", "1"] * 2
    assert "1: 0.5 learns 0.880 and forgets 0.015" in picture.alt
    for run in runs:
        run.evaluation["blends"][0]["task"]["loss"] = None  # not finite
    assert "0.5 learns" not in figures.blends(runs).alt
    for run in runs:
        del run.evaluation["blends"]
    assert figures.blends(runs) is None


def test_more_runs_than_colours_are_told_apart_by_style(tmp_path):
    folders = [write_run(tmp_path / str(i), steps=2, snapshots=0) for i in range(8)]
    found = style.line_styles([read_run(folder) for folder in folders])
    assert len({(look.colour, look.style) for look in found}) == len({look.label for look in found}) == 8


def test_spectra_say_who_changes_them(pair):
    picture = spectra.spectrum_changes([read_run(folder) for folder in pair])
    assert [axes.get_title(loc="left") for axes in picture.figure.axes] == list(ROLES)
    relative = np.exp(-4 * spectra.POINTS[-1])  # the smallest singular value beside the largest
    for axes in picture.figure.axes:
        rotated, changed = (line.get_ydata() for line in axes.get_lines())
        np.testing.assert_allclose(rotated[[0, -1]], [1e-8, 1e-8 * relative], rtol=1e-4)
        np.testing.assert_allclose(changed[[0, -1]], [1e-3, 1e-3 * relative], rtol=1e-4)
    assert "1 one: at most 1.0e-08; 2 two: at most 1.0e-03" in picture.alt


@pytest.mark.filterwarnings("error")
def test_a_factor_that_begins_with_zeros(run, tmp_path):
    tensors = load_file(run / SPECTRA)
    save_file({k: v * 0 if k.startswith("before/") and "q_proj" in k else v for k, v in tensors.items()}, run / SPECTRA)
    lines = [json.loads(line) for line in (run / MATRICES).read_text().splitlines()]
    lines[0]["values"]["spectral_norm"][0::3] = [0.0, 0.0, 0.0]
    (run / MATRICES).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    change_record(run, spectrum_drift=None)
    found = read_run(run)
    write_report([run], tmp_path / "page.html")
    line = spectra.spectrum_changes([found]).figure.axes[0].get_lines()[0]
    assert line.get_ydata()[0] == pytest.approx(1.0), "all of it is new"
    assert summary.drift_of(found) == pytest.approx(1e-8)
    panels = spectra.spectral_norm_changes([found]).figure.axes[:-1]
    assert [axes.get_title(loc="left") for axes in panels] == ["k_proj", "down_proj"]


def test_norms_and_their_changes_are_those_of_the_snapshots(pair):
    runs = [read_run(folder) for folder in pair]
    lines = spectra.spectral_norm_changes(runs).figure.axes[0].get_lines()
    np.testing.assert_allclose(lines[0].get_ydata(), 0)
    np.testing.assert_allclose(lines[1].get_ydata(), [100 * 1e-4 * step for step in (0, 6, 13, 20)], rtol=1e-6)
    layers = spectra.spectral_norms(runs[:1]).figure.axes[1].get_lines()
    assert [line.get_ydata()[0] for line in layers] == pytest.approx([2.1, 3.4, 4.7])


def test_angle_map_is_a_mean_over_what_is_known(run):
    found = spectra.angle_map([read_run(run)])
    inputs, outputs = (axes.images[0].get_array() for axes in found.figure.axes[:2])
    expected = np.tile(1e-3 * np.arange(1, 4)[:, None], (1, len(ROLES)))
    np.testing.assert_allclose(inputs, expected)  # of the first snapshot there is none
    np.testing.assert_allclose(outputs, expected)
    assert "largest 3.0e-03 at layer 2" in found.alt


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_dozen_runs_with_long_names_have_room(tmp_path):
    """matplotlib warns where panels collapse under their titles."""
    runs = [write_run(tmp_path / f"a-rather-long-name-of-a-run_lr0.000{i}_seed0_0123abcd", layers=3) for i in range(12)]
    made = tmp_path / "report.html"
    write_report(runs, made)
    assert "Left out for want of room" in made.read_text(encoding="utf-8")
