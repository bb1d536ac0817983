"""Whether an order of optimizers after 300 steps is the order after 3,000 and 10,000.

A byte-level Llama of 2 layers and width 128 is pretrained on the documentation of Python's standard library, and then
goes on with its source code (docstrings and comments taken out), 8 stretches of 64 bytes a step. Every contender has
the same batches, clipping, warmup of 20 steps and linear decay to 0. Embeddings, head and norms are AdamW's everywhere,
at the rate that is best for AdamW alone; the matrices' rate is the best of a sweep by factors of two at 300 steps,
whose neighbours are both worse, and is kept for the longer runs.

Shown is what was learnt (loss on held-out source code), what was forgotten (the rise of the loss on held-out
documentation), in nats per byte, and what became of the hidden matrices' spectra: the drift (largest change of a
singular value, relative to the largest; mean of the matrices) and the stable rank (mean).

Texts are made from the interpreter's own library, in runs/long_runs. Finished runs are kept in results/long_runs.json
and not repeated, and a long one goes on from its last checkpoint; `--show` runs none.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

from pion_hf import param_groups
from pion_hf._version import __version__
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES, resolve_options
from pion_hf.linalg.spectrum import singular_values, spectral_drift
from pion_hf.runs.folder import read_json, write_json

sys.path.append(str(Path(__file__).parents[1]))
from prepare_text import STDLIB, code, documents, module_files, split

RESULTS = Path(__file__).parent / "results" / "long_runs.json"
WORK = Path("runs/long_runs")
OLD, NEW = "documentation", "source code"
SWEEP, LENGTHS = 300, (300, 3_000, 10_000)
BATCH, LENGTH, WARMUP, CHECKPOINT = 8, 64, 20, 500
PRETRAINING, PRETRAINING_RATE = 6_000, 2e-3
FIRST = {"adamw": 1e-3, "muon": 4e-3, "teon": 4e-3, "pion": 4e-3, "pion_ambient": 2e-3}  # where the sweep begins
HELD_OUT = 0.05  # of the documents of either text
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=LENGTH,
    bos_token_id=None,
    eos_token_id=None,
    use_cache=False,
)


def texts() -> dict[str, dict[str, Tensor]]:
    """By text and split, its bytes."""
    folder = WORK / "texts"
    if not (folder / f"{NEW}.validation").is_file():
        modules = [file.relative_to(STDLIB).with_suffix("") for _, file in module_files(STDLIB)]
        sources = [{"text": code([str(module)], STDLIB)} for module in modules]
        made = {OLD: split(documents(STDLIB), HELD_OUT, 0), NEW: split(sources, HELD_OUT, 0)}
        folder.mkdir(parents=True, exist_ok=True)
        for name, parts in made.items():
            for part, rows in zip(("train", "validation"), parts, strict=True):
                (folder / f"{name}.{part}").write_text("\n\n".join(row["text"] for row in rows), encoding="utf-8")
    return {
        name: {part: torch.tensor(list((folder / f"{name}.{part}").read_bytes())) for part in ("train", "validation")}
        for name in (OLD, NEW)
    }


def batch(data: Tensor, seed: int) -> Tensor:
    """Random stretches, `(BATCH, LENGTH)`."""
    starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[start : start + LENGTH] for start in starts.tolist()])


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Tensor, batches: int = 64) -> float:
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in (batch(data, seed) for seed in range(batches))]
    return sum(losses) / batches


def optimizer_for(model: nn.Module, name: str, lr: float, adamw_lr: float) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    options, groups = resolve_options(name, {"adamw_lr": adamw_lr})
    return OPTIMIZER_CLASSES[name](param_groups(model, name, lr=lr, **groups), lr=lr, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor, steps: int, name: str) -> float:
    """Seconds that it took; of a run that was broken off, from the last checkpoint on."""
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, steps)
    parts, path = {"model": model, "optimizer": optimizer, "schedule": schedule}, WORK / f"{name}.checkpoint.pt"
    begin, before = 0, 0.0
    if path.is_file():
        saved = torch.load(path)
        begin, before = saved["step"], saved["seconds"]
        for key, part in parts.items():
            part.load_state_dict(saved[key])
    start = time.perf_counter()
    for step in tqdm(range(begin, steps), name, initial=begin, total=steps, leave=False):
        if step > begin and step % CHECKPOINT == 0:
            states = {key: part.state_dict() for key, part in parts.items()}
            torch.save({**states, "step": step, "seconds": before + time.perf_counter() - start}, f"{path}.new")
            Path(f"{path}.new").replace(path)
        ids = batch(data, 1_000 + step)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    path.unlink(missing_ok=True)
    return before + time.perf_counter() - start


class Bench:
    """Texts and the pretrained model, made when first needed."""

    def __init__(self) -> None:
        self.texts = texts()
        path = WORK / "pretrained.pt"
        if not path.is_file():
            torch.manual_seed(0)
            model = LlamaForCausalLM(CONFIG)
            optimizer = optimizer_for(model, "adamw", PRETRAINING_RATE, 0)
            train(model, optimizer, self.texts[OLD]["train"], PRETRAINING, "pretraining")
            torch.save(model.state_dict(), path)
        self.start = torch.load(path)

    def model(self) -> nn.Module:
        model = LlamaForCausalLM(CONFIG)
        model.load_state_dict(self.start)
        return model

    def losses(self, model: nn.Module) -> dict[str, float]:
        return {name: held_out_loss(model, self.texts[name]["validation"]) for name in (OLD, NEW)}

    def run(self, name: str, lr: float, steps: int, adamw_lr: float) -> dict:
        model = self.model()
        before = spectra(model)
        optimizer = optimizer_for(model, name, lr, adamw_lr)
        seconds = train(model, optimizer, self.texts[NEW]["train"], steps, f"{name}-{lr:.4g}-{steps}")
        after = spectra(model)
        drift = [spectral_drift(before[key], after[key]).item() for key in before]
        return {**self.losses(model), "drift": mean(drift), "stable_rank": stable_rank(after), "seconds": seconds}


def spectra(model: nn.Module) -> dict[str, Tensor]:
    """Singular values of the matrices of hidden layers."""
    return {name: singular_values(p.detach()) for name, p in model.model.layers.named_parameters() if p.ndim == 2}


def stable_rank(values: dict[str, Tensor]) -> float:
    return mean([(s.square().sum() / s[0].square()).item() for s in values.values()])


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


class Study:
    """Finished runs by name, rate and length; what is not known is run, if there is a bench."""

    def __init__(self, *, show: bool) -> None:
        self.record = read_json(RESULTS) or {"version": __version__, "runs": []}
        self.bench = None if show else Bench()
        if self.bench and "before" not in self.record:
            model = self.bench.model()
            self.record["before"] = {**self.bench.losses(model), "stable_rank": stable_rank(spectra(model))}

    def run(self, name: str, lr: float, steps: int, adamw_lr: float = 0.0) -> dict | None:
        key = {"name": name, "lr": float(f"{lr:.6g}"), "steps": steps}
        found = next((run for run in self.record["runs"] if key.items() <= run.items()), None)
        if found is None and self.bench:
            found = {**key, **self.bench.run(name, lr, steps, adamw_lr)}
            self.record["runs"].append(found)
            write_json(RESULTS, self.record)
            tqdm.write(f"{name} {lr:g}, {steps} steps: {found[NEW]:.4f} {found[OLD]:.4f} ({found['seconds']:.0f} s)")
        return found

    def best(self, run: Callable[[float], dict | None], lr: float) -> float | None:
        """The rate, by factors of two from `lr`, that learns most in `SWEEP` steps; None if that is not known."""
        while True:
            tried = {rate: run(rate) for rate in (lr / 2, lr, 2 * lr)}
            if None in tried.values():
                return None
            lowest = min(tried, key=lambda rate: tried[rate][NEW])
            if lowest == lr:
                return lr
            lr = lowest


def table(study: Study, chosen: dict[str, float]) -> Table:
    before = study.record["before"]
    made = Table(title="Learnt / forgotten, nats per byte", box=box.MARKDOWN)
    for heading in ("contender", "rate", *(f"{steps:,} steps" for steps in LENGTHS), "drift", "stable rank", "seconds"):
        made.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
    for name, lr in chosen.items():
        runs = [run for run in (study.run(name, lr, steps) for steps in LENGTHS) if run]
        cells = [f"{before[NEW] - run[NEW]:.3f} / {run[OLD] - before[OLD]:.3f}" for run in runs]
        cells += [""] * (len(LENGTHS) - len(runs))
        spectra = [" ".join(f"{run[key]:{form}}" for run in runs) for key, form in SPECTRA.items()]
        made.add_row(name, f"{lr:g}", *cells, *spectra, f"{sum(run['seconds'] for run in runs):,.0f}")
    return made


SPECTRA = {"drift": ".2g", "stable_rank": ".1f"}


def orders(study: Study, chosen: dict[str, float]) -> list[str]:
    """Who learnt most and who forgot least, by length, of those lengths that everybody has run."""
    lines = []
    for steps in LENGTHS:
        runs = {name: study.run(name, lr, steps) for name, lr in chosen.items()}
        if runs.keys() == FIRST.keys() and all(runs.values()):
            for what, text in (("learnt most", NEW), ("forgot least", OLD)):
                lines.append(f"{steps:,} steps, {what} first: {', '.join(sorted(runs, key=lambda n: runs[n][text]))}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="run nothing, print what is known")
    study = Study(show=parser.parse_args().show)
    adamw_lr = study.best(lambda lr: study.run("adamw", lr, SWEEP), FIRST["adamw"])
    chosen = {
        name: study.best(partial(study.run, name, steps=SWEEP, adamw_lr=adamw_lr), first)
        for name, first in FIRST.items()
    }
    chosen = {name: lr for name, lr in chosen.items() if lr}
    for steps in LENGTHS:
        for name, lr in chosen.items():
            study.run(name, lr, steps, adamw_lr)
    if "before" not in study.record:
        raise SystemExit("no finished runs to show")
    console = Console(width=150)
    console.print(table(study, chosen))
    before = study.record["before"]
    console.print(f"Before: {NEW} {before[NEW]:.3f}, {OLD} {before[OLD]:.3f}, stable rank {before['stable_rank']:.1f}.")
    for line in orders(study, chosen):
        console.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
