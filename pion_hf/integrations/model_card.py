"""What a model card says of the optimizer: its options, who took which parameters, papers, drift and measurements."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from jinja2 import Environment
from torch import nn
from transformers import TrainingArguments
from transformers.modelcard import make_markdown_table

from pion_hf._version import __version__
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES
from pion_hf.integrations.optimizers import class_name, unwrap
from pion_hf.optim import MatrixOptimizer
from pion_hf.optim.blocks import Layout
from pion_hf.routing.structure import parameter_count
from pion_hf.routing.table import LORA_FORMS
from pion_hf.runs.files import write_text

TEMPLATES = Path(__file__).parent / "templates"
METHODS: dict[str, dict[str, str]] = yaml.safe_load((TEMPLATES / "methods.yaml").read_text(encoding="utf-8"))

STANDARD_ERROR = "_stderr"  # in the name of a metric, as lm_eval has it
NUMBER_FORMATS = {"exact_match": "{:.1%}", "perplexity": "{:.2f}"}  # see `number_format`

# Files beside the card, and what it says of them.
FILES = {
    "routing.json": "Every parameter and its rule: [routing.json](routing.json).",
    "training_args.bin": "Reading training_args.bin takes the package pion_hf, the model itself transformers alone.",
}
HEADING = "### Framework versions"  # of transformers' cards and TRL's: what is added stands before it
# What TRL's template makes of a base model from a folder, and of a model that is not pushed.
NO_BASE, NO_ADDRESS = "[None](https://huggingface.co/None)", 'model="None"'


def describe(args: TrainingArguments, wrapped: Any, model: nn.Module) -> dict[str, Any]:
    """The optimizer of a run: name, learning rate, schedule; of this package's also all options and who took what.

    `rules` has a row for every rule, method and learning rate, with counts of tensors, matrices, stacks and parameters.
    """
    optim, optimizer = args.optim.value, unwrap(wrapped)
    said = {"name": optim, "learning_rate": args.learning_rate, "schedule": args.lr_scheduler_type.value}
    if optimizer is None:
        if optim in OPTIMIZER_CLASSES and wrapped is not None:  # built by hand
            said |= {"name": class_name(wrapped), "learning_rate": _rate(wrapped.param_groups[0])}
        return said
    matrices = [group for group in optimizer.param_groups if group["rule"] != "adamw"]
    leading = min(matrices, key=lambda group: optimizer.matrix_rules.index(group["rule"]))
    said["learning_rate"] = _rate(leading)
    forms = {optim, *LORA_FORMS.get(optim, ())[:1]}
    if not any(type(optimizer) is OPTIMIZER_CLASSES.get(form) for form in forms):  # built by hand
        said["name"] = leading["rule"]
    elsewhere = ("params", "inputs", "lr", "weight_decay")
    names = [name for name in inspect.signature(type(optimizer)).parameters if name not in elsewhere]
    options = {name: leading[name] for name in names if name in leading}
    if leading["rule"] in optimizer.elementwise_rules:
        options = {name: leading[name.removeprefix("adamw_")] for name in names}
    return {
        **said,
        "options": {name: value for name, value in options.items() if value is not None},
        "rules": list(_rules(optimizer).values()),
        "frozen_parameters": sum(parameter_count(p) for p in model.parameters() if not p.requires_grad),
    }


def _rate(group: dict[str, Any]) -> float:
    """What its schedule starts from: at the end of one, the group's own is often 0."""
    return float(group.get("initial_lr", group["lr"]))


def _rules(optimizer: MatrixOptimizer) -> dict[tuple, dict[str, Any]]:
    rows: dict[tuple, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        rule, method = group["rule"], group.get("method", "")
        lr = _rate(group)
        row = rows.setdefault(
            (rule, method, lr),
            {
                "rule": rule,
                **({"method": method} if method else {}),
                **dict.fromkeys(("tensors", "matrices", "stacks", "parameters"), 0),
                "learning_rate": lr,
                "weight_decay": 0.0,
            },
        )
        row["tensors"] += len(group["params"])
        row["parameters"] += sum(p.numel() for p in group["params"])
        row["weight_decay"] = max(row["weight_decay"], group["weight_decay"])
        row["stacks"] += len(group.get("stacks", ()))
        if rule == "adamw":
            row.update(betas=list(group["betas"]), eps=group["eps"])
        else:
            pieces = Layout.parse(group["layout"]).pieces
            row["matrices"] += sum(pieces * (p.shape[0] if p.ndim == 3 else 1) for p in group["params"])
    return rows


def methods_of(optimizer: dict[str, Any]) -> list[str]:
    """The keys of `METHODS` that the optimizer of `describe` makes use of."""
    used = set()
    for row in optimizer.get("rules", ()):
        if row["rule"] == "pion" or row.get("method") == "rotate":
            used.add("pion")
        elif row["rule"] == "adamw_routed":
            used.add("adamw_routed")
        elif row["rule"] != "adamw":
            used.add("teon" if row["stacks"] else "muon")
    return [key for key in METHODS if key in used]


def extend(path: Path, summary: dict[str, Any], *, dataset_name: str | None = None) -> None:
    """Add to the card at `path`, as transformers or TRL wrote it, what `summary` says.

    Args:
        summary: of `PionTrainerMixin.run_summary`; `before` and `after`, if there, become a table.
        dataset_name: the evaluation data's name at the hub. With it the measurements are in the metadata as well, which
            has no place for those of data that nobody else can find.
    """
    card = ModelCard.load(path)
    name = path.absolute().parent.name
    places = {str(path.absolute().parent) if name else "", *_local_paths(card)}
    methods = methods_of(summary["optimizer"])
    if methods:
        card.data.tags = sorted({*(card.data.tags or ()), *methods, "pion_hf"})
    results = list(_results(summary, dataset_name)) if dataset_name else []
    if results:
        card.data.model_name = card.data.model_name or path.parent.name
        card.data.eval_results = results
    text = card.text.replace(NO_BASE, "a model that is not on the Hub").replace(NO_ADDRESS, f'model="{name}"')
    for place in sorted(filter(None, places), key=len, reverse=True):
        text = text.replace(place, Path(place).name)
    beginning, heading, end = text.partition(HEADING)
    citations = [f"Cite {m['name']} as:\n\n```bibtex\n{m['citation']}\n```" for m in map(METHODS.get, methods)]
    parts = [beginning.rstrip(), _sections(summary, methods, path.parent), (heading + end).rstrip(), *citations]
    if methods and "## Citations" not in text:
        parts.insert(-len(methods), "## Citations")
    card.text = "\n\n".join(filter(None, parts)) + "\n"
    write_text(path, str(card))


def _local_paths(card: ModelCard) -> set[str]:
    """Absolute paths of this machine, of which the metadata are rid: peft's name the base model, others the data."""
    found = set()
    for key, value in card.data.to_dict().items():
        entries = value if isinstance(value, list) else [value]
        paths = {e: e[e.find("/") :] for e in entries if isinstance(e, str) and re.match(r"(base_model:\w+:)?/", e)}
        if paths:
            kept = [entry for entry in entries if entry not in paths]
            setattr(card.data, key, kept if isinstance(value, list) and kept else None)
            found.update(paths.values())
    return found


def _sections(summary: dict[str, Any], methods: list[str], folder: Path) -> str:
    """What `templates/card.md` makes of a summary, and of the files that lie beside the card."""
    optimizer = summary["optimizer"]
    counts = ["tensors", "matrices", *(["stacks"] if "teon" in methods else []), "parameters"]
    rules = make_markdown_table([_rule_row(row, counts) for row in optimizer.get("rules", ())]) if methods else ""
    frozen = optimizer.get("frozen_parameters")
    notes = [f"{frozen:,} parameters were frozen."] if frozen else []
    notes += [words for name, words in FILES.items() if (folder / name).is_file()]
    rows = table_rows(summary["before"], summary["after"]) if "after" in summary else []
    # Lines of the template end in a backslash where the text goes on.
    template = (TEMPLATES / "card.md").read_text(encoding="utf-8").replace("\\\n", "")
    text = (
        Environment(trim_blocks=True)
        .from_string(template)
        .render(
            **summary,
            methods=[METHODS[method] for method in methods],
            version=__version__,
            rules=rules.rstrip(),
            notes=notes,
            measurements=make_markdown_table(rows).rstrip() if rows else "",
            has_figures=(folder / "eval.json").is_file(),
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _rule_row(row: dict[str, Any], counts: list[str]) -> dict[str, str]:
    """Words and figures: transformers' table would round a small learning rate to 0."""
    name = ", ".join(filter(None, (row["rule"], row.get("method"))))
    rates = {"learning rate": f"{row['learning_rate']:g}", "weight decay": f"{row['weight_decay']:g}"}
    return {"rule": name, **{key: f"{row[key]:,}" for key in counts}, **rates}


def table_rows(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    """Rows of `domain`, `measure`, `before` and `after`, in words and figures (see `evaluation.Measures`)."""
    rows = []
    for domain, values in after.items():
        for metric in metrics(values):
            words = {"domain": in_words(domain), "measure": in_words(metric)}
            cells = {"before": figure(before.get(domain, {}), metric), "after": figure(values, metric)}
            rows.append({**words, **cells})
    return rows


def in_words(name: str) -> str:
    """A domain or metric; a task of `lm_eval/` is called what it is called there."""
    return name if "/" in name else name.replace("_", " ").replace(",", ", ")


def metrics(values: dict[str, float]) -> list[str]:
    """Without their standard errors, which `figure` says."""
    return [metric for metric in values if STANDARD_ERROR not in metric]


def figure(values: dict[str, float], metric: str) -> str:
    """A number, and its standard error where there is one; nothing where it was not measured."""
    name, comma, kind = metric.partition(",")
    measured = (values.get(key) for key in (metric, f"{name}{STANDARD_ERROR}{comma}{kind}"))
    return " ± ".join(number_format(metric).format(value) for value in measured if value is not None)


def number_format(metric: str) -> str:
    """Of its values; lm_eval names a filter of the answers behind a comma."""
    return NUMBER_FORMATS.get(metric.partition(",")[0], "{:.4f}")


def _results(summary: dict[str, Any], dataset_name: str) -> Iterator[EvalResult]:
    for metric, value in summary.get("after", {}).get("task", {}).items():
        if math.isfinite(value):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=dataset_name,
                dataset_name=dataset_name,
                metric_type=metric,
                metric_value=value,
            )
