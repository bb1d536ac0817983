"""What a report says in words and tables: what ran, how the runs differ, and what stands in the way of comparing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pion_hf.integrations.model_card import figure, in_words, metrics, number_format
from pion_hf.linalg.spectrum import spectral_drift
from pion_hf.report.figures import diverged
from pion_hf.report.style import numbered
from pion_hf.runs.folder import FAILED, RUNNING, Run, finite
from pion_hf.runs.redaction import without_secrets

# Arguments that say where a run goes, not what it does; and those that `optimizer` says too, under its own names.
PLACES = {"output_dir", "logging_dir", "run_name", "hub_model_id", "project", "trackio_space_id", "push_to_hub"}
OPTIMIZER_ARGUMENTS = {"name": "optim", "learning_rate": "learning_rate", "schedule": "lr_scheduler_type"}
NO_NUMBER = "NaN"
# Every reward has a name of its own.
LOWER_IS_BETTER = {"loss", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
SAME = 1e-4  # relative: measurements before training that agree to this are of the same model and data


class Table(NamedTuple):
    """Columns and rows of text; a cell in `best` is set off."""

    columns: list[str]
    rows: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()


def steps_of(run: Run) -> int:
    """How far the run came."""
    return max([int(run.record.get("steps") or 0), *(entry["step"] for entry in run.logs)])


def status_of(run: Run) -> str:
    """Finished or not, and whether it diverged."""
    said = "running, or killed" if run.status == RUNNING else run.status
    step = diverged(run)
    return said if step is None else f"{said}, diverged at step {step:,}"


def drift_of(run: Run) -> float | None:
    """The largest change of a singular value relative to its matrix's largest: as noted, or as the spectra say."""
    noted = finite(run.record.get("spectrum_drift"))
    if noted is not None:
        return noted
    drifts = (spectral_drift(*pair).max().item() for pair in run.spectra.values() if pair[0].amax(-1).min() > 0)
    return max(drifts, default=None)


def overview(run: Run) -> list[tuple[str, str]]:
    """Name and value of what there is to know of a run, in the order in which to read it."""
    record, model, optimizer, data = run.record, *(_part(run, key) for key in ("model", "optimizer", "data"))
    rate, schedule = optimizer.get("learning_rate"), optimizer.get("schedule")
    found = {
        "status": status_of(run),
        "model": _listed(
            str(model.get("name") or ""),
            f"{model['parameters']:,} parameters" if model.get("parameters") else "",
            f"{model['trainable']:,} of them trained" if model.get("trainable") else "",
        ),
        "data": _listed(
            f"trained on {data['train']}" if data.get("train") else "",
            f"evaluated on {data['evaluation']}" if data.get("evaluation") else "",
        ),
        "optimizer": _listed(
            str(optimizer.get("name") or ""),
            "" if rate is None else f"learning rate {text(rate)}",
            "" if schedule is None else f"schedule {schedule}",
        ),
        "steps": f"{steps_of(run):,}",
        "time": duration(record.get("seconds")),
        "peak memory": memory(record.get("peak_memory_bytes")),
        "device": str(record.get("device") or ""),
        "started": str(record.get("started") or ""),
        "drift of the spectrum": _formatted(drift_of(run), "{:.1e}"),
        "optimizer's share of the time": _formatted(record.get("optimizer_share"), "{:.1%}"),
        "skipped steps": _formatted(record.get("skipped_steps"), "{:,}"),
        "clipped steps of a matrix": _formatted(record.get("clipped_steps"), "{:,}"),
    }
    return [(name, value) for name, value in found.items() if value]


def settings(run: Run) -> list[tuple[str, str]]:
    """Optimizer options, the arguments that differ from their defaults, and versions, as one line each."""
    groups = {
        "optimizer options": _part(run, "optimizer").get("options") or {},
        "arguments that differ from their defaults": _given(run),
        "versions": _part(run, "versions"),
    }
    return [(name, ", ".join(f"{k}={text(v)}" for k, v in of.items())) for name, of in groups.items() if of]


def rules_table(run: Run) -> Table | None:
    """Which rule trained how much, of this package's optimizers."""
    rules = _part(run, "optimizer").get("rules") or []
    if not rules:
        return None
    counts = ["tensors", "matrices", "parameters"]
    rows = [
        [
            _listed(rule.get("rule"), rule.get("method")),
            *(_formatted(rule.get(count), "{:,}") for count in counts),
            text(rule.get("learning_rate")),
            text(rule.get("weight_decay")),
        ]
        for rule in rules
    ]
    return Table(["rule", *counts, "learning rate", "weight decay"], rows)


def runs_table(runs: Sequence[Run]) -> Table:
    """The runs side by side; of the options only those that differ."""
    differing = differences(runs)
    columns = ["run", "status", "steps", *differing, "time", "peak memory", "spectrum drift", "optimizer's share"]
    rows = [
        [
            name,
            status_of(run),
            f"{steps_of(run):,}",
            *(values[i] for values in differing.values()),
            duration(run.record.get("seconds")),
            memory(run.record.get("peak_memory_bytes")),
            _formatted(drift_of(run), "{:.1e}"),
            _formatted(run.record.get("optimizer_share"), "{:.0%}"),
        ]
        for i, (name, run) in enumerate(zip(numbered(runs), runs, strict=True))
    ]
    kept = [c for c in range(len(columns)) if any(row[c] for row in rows)]
    return Table([columns[c] for c in kept], [[row[c] for c in kept] for row in rows])


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Options that differ between runs, under the names by which they are set, and their value in every run.

    An argument that a run does not name has its default there. The options of an optimizer are compared among the runs
    that use it; that another has no such option is no difference.
    """
    optimizers = [_part(run, "optimizer") for run in runs]
    arguments = [_arguments(run) for run in runs]
    found = {}
    for key in dict.fromkeys(key for of in arguments for key in of):
        values = [text(of[key]) if key in of else "default" for of in arguments]
        if len(set(values)) > 1:
            found[key] = values
    options = [of.get("options") or {} for of in optimizers]
    for key in dict.fromkeys(key for of in options for key in of):
        seen: dict[Any, set[str]] = {}
        for optimizer, of in zip(optimizers, options, strict=True):
            if key in of:
                seen.setdefault(optimizer.get("name"), set()).add(text(of[key]))
        if any(len(values) > 1 for values in seen.values()):
            found[f"optim_{key}"] = [text(of[key]) if key in of else "" for of in options]
    return found


def results_table(runs: Sequence[Run]) -> Table | None:
    """Before and after by domain and metric; of several runs a row each. None without a measurement."""
    measured = {name: run for name, run in zip(numbered(runs), runs, strict=True) if has_results(run)}
    if not measured:
        return None
    return _result_of_one(runs[0]) if len(runs) == 1 else _results_of_several(measured)


def has_results(run: Run) -> bool:
    """Whether what the model could do was measured before training and after it."""
    return isinstance(run.evaluation, dict) and bool(run.evaluation.get("before")) and bool(run.evaluation.get("after"))


def warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before comparing these runs, or believing them."""
    kinds: dict[str, list[str]] = {
        "Still running, or killed, and shown as far as it came": [],
        "Failed": [],
        "Diverged, the loss is NaN": [],
        "Not measured before and after training, so without results": [],
    }
    running, failed, lost, unmeasured = kinds.values()
    for name, run in zip(numbered(runs), runs, strict=True):
        for status, of in ((RUNNING, running), (FAILED, failed)):
            of += [f"{name} (step {steps_of(run):,})"] if run.status == status else []
        if diverged(run) is not None:
            lost.append(f"{name} (step {diverged(run):,})")
        elif has_results(run) and any(finite(v) is None for d in run.evaluation["after"].values() for v in d.values()):
            lost.append(f"{name} (measured after training)")
        if run.status != RUNNING and not has_results(run) and any(map(has_results, runs)):
            unmeasured.append(name)
    return [*_incomparable(runs), *(f"{kind}: {', '.join(which)}." for kind, which in kinds.items() if which)]


def text(value: Any) -> str:
    """A setting as one would type it."""
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if finite(seconds) is None:
        return ""
    if seconds < 120:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    size, unit = (3600, "h") if seconds >= 7200 else (60, "min")
    return f"{seconds / size:.1f}\N{NO-BREAK SPACE}{unit}"


def memory(count: float | None) -> str:
    """Bytes as GiB or MiB."""
    if not count:
        return ""
    large = count >= 2**30
    return f"{count / 2**30:.2f}\N{NO-BREAK SPACE}GiB" if large else f"{count / 2**20:.0f}\N{NO-BREAK SPACE}MiB"


def _part(run: Run, key: str) -> dict[str, Any]:
    return without_secrets(run.record.get(key) or {})  # an older version may have written some


def _listed(*words: str | None) -> str:
    return ", ".join(filter(None, words))


def _given(run: Run) -> dict[str, Any]:
    return {key: value for key, value in _part(run, "arguments").items() if key not in PLACES}


def _formatted(value: Any, form: str) -> str:
    return "" if finite(value) is None else form.format(value)


def _arguments(run: Run) -> dict[str, Any]:
    optimizer = _part(run, "optimizer")
    said = {argument: optimizer[key] for key, argument in OPTIMIZER_ARGUMENTS.items() if optimizer.get(key) is not None}
    options = {f"optim_{key}" for key in optimizer.get("options") or {}}
    return {**said, **{key: value for key, value in _given(run).items() if key not in said and key not in options}}


def _incomparable(runs: Sequence[Run]) -> Iterator[str]:
    """Of which models, data and machines the runs are, where those differ."""
    kinds = {
        "models": ([_part(run, "model").get("name") for run in runs], "their losses and spectra cannot be compared"),
        "training data": ([_part(run, "data").get("train") for run in runs], "they learnt different things"),
        "evaluation data": (
            [_part(run, "data").get("evaluation") for run in runs],
            "their evaluation losses and results cannot be compared",
        ),
        "devices": ([run.record.get("device") for run in runs], "their times cannot be compared"),
    }
    for kind, (found, consequence) in kinds.items():
        values: dict[str, list[str]] = {}
        for name, value in zip(numbered(runs), found, strict=True):
            values.setdefault(str(value or "none"), []).append(name)
        if len(values) > 1:
            said = "; ".join(f"{value} ({', '.join(of)})" for value, of in values.items())
            yield f"These runs are of different {kind}: {consequence}. {said}."


def _result_of_one(run: Run) -> Table:
    rows = []
    for domain, before in run.evaluation["before"].items():
        after = run.evaluation["after"].get(domain) or {}
        for metric in metrics(before):
            both = finite(before[metric]) is not None and finite(after.get(metric)) is not None
            change = _signed(metric, after[metric] - before[metric]) if both else ""
            rows.append([in_words(domain), in_words(metric), _figure(before, metric), _figure(after, metric), change])
    gains = {"learnt: task": run.learnt} if "learnt" in run.evaluation else {}
    gains |= {f"forgotten: {in_words(domain)}": value for domain, value in run.forgotten.items()}
    rows += [[name, "", "", "", NO_NUMBER if gain is None else f"{gain:+.4f}"] for name, gain in gains.items()]
    return Table(["domain", "measure", "before", "after", "change"], rows)


def _results_of_several(measured: Mapping[str, Run]) -> Table:
    """A row for every run; a first one of what all of them began with, where that was the same."""
    starts = [run.evaluation["before"] for run in measured.values()]
    keys = list(dict.fromkeys((domain, metric) for of in starts for domain in of for metric in metrics(of[domain])))
    domains = list(dict.fromkeys(domain for run in measured.values() for domain in run.forgotten))

    def values(measures: Mapping[str, Any]) -> list[Any]:
        return [(measures.get(domain) or {}).get(metric) for domain, metric in keys]

    def figures(measures: Mapping[str, Any]) -> list[str]:
        return [_figure(measures.get(domain) or {}, metric) for domain, metric in keys]

    same = all(map(_agree, zip(*map(values, starts), strict=True)))
    columns = ["run", *(f"{in_words(d)}: {in_words(m)}" for d, m in keys), "learnt"]
    columns += [f"forgotten: {in_words(d)}" for d in domains]
    rows, numbers = [], []
    if same:
        rows.append(["before training", *figures(starts[0]), "", *("" for _ in domains)])
    for name, run in measured.items():
        before, after = run.evaluation["before"], run.evaluation["after"]
        gains = [run.learnt, *map(run.forgotten.get, domains)]
        cells = figures(after)
        if not same:
            cells = [" → ".join(both) for both in zip(figures(before), cells, strict=True)]
        rows.append([name, *cells, *("" if gain is None else f"{gain:+.4f}" for gain in gains)])
        numbers.append([*values(after), *gains])
    best = set()
    if same and len(measured) > 1:  # of one model and the same data
        signs = [-1 if m in LOWER_IS_BETTER else 1 for _, m in keys] + [1] + [-1] * len(domains)
        for column, (sign, found) in enumerate(zip(signs, zip(*numbers, strict=True), strict=True), start=1):
            scores = {row: sign * value for row, value in enumerate(found, start=1) if finite(value) is not None}
            best |= {(row, column) for row, score in scores.items() if score == max(scores.values())}
    return Table(columns, rows, frozenset(best))


def _agree(values: Sequence[Any]) -> bool:
    known = [value for value in values if finite(value) is not None]
    return len(known) == len(values) and max(known) - min(known) <= SAME * max(map(abs, known))


def _figure(values: Mapping[str, Any], metric: str) -> str:
    return NO_NUMBER if finite(values.get(metric)) is None else figure(values, metric)


def _signed(metric: str, value: float) -> str:
    return number_format(metric).replace("{:", "{:+").format(value)
