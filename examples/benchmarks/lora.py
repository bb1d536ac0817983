"""LoRA adapters: which optimizer learns most in few steps, at its own best learning rate.

SmolLM2-135M-Instruct with fresh seeded adapters on all linear layers (rank 16, alpha 32, no dropout), 20 steps of 8
`reasoning-gym` examples under bf16 autocast, warmup 2, linear decay. The base model is loaded once; a checksum after
every run shows that it was not touched. Every contender runs at every learning rate of its sweep, then at its best one
with a second seed (of the adapters and of the order of the data). The losses are of 64 validation rows, after every 5
steps, so that "steps to AdamW's best" can be interpolated: the step at which a run reaches AdamW's lowest final loss.

`--rank 4 16 64` adds the transfer study, AdamW and pion_lora at alpha = 2 rank: how far the best learning rate moves
with the rank. `--exact_match` generates answers to 32 validation rows after the best run of every contender (a run that
has not is made again). `--time` measures seconds per step: five steps of every contender, one after another, on a
machine that should be idle (the runs above need not be).

Needs examples/prepare_smollm2.py, examples/prepare_reasoning.py and data/python_docs.txt (`make demo` makes all three).
Finished runs are kept in results/lora.json and not repeated (`--only` runs a part, `--show` none). Those committed are
of 0.6, in which learning rates of pion_lora were 25 sqrt(r / 16) times as large, of teon_lora and muon 15 sqrt(r / 16)
times: new runs begin a record of their own. A run takes about a minute on 2 CPU cores.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import statistics
import time
from pathlib import Path

import torch
from datasets import disable_progress_bars, load_dataset
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed

from pion_hf.integrations.evaluation import exact_match, generate_answers, text_loss
from pion_hf.integrations.trl import PionSFTConfig, PionSFTTrainer

MODEL, DATA, OTHER_TEXT = "models/smollm2-135m-instruct", "data/reasoning", "data/python_docs.txt"
RESULTS = Path(__file__).parent / "results" / "lora.json"
STEPS, EVERY, ROWS, GENERATED, RANK, LORA_PLUS_RATIO = 20, 5, 64, 32, 16, 16
TIMED_STEPS = 5

# contender -> the optimizer's name, its options (`optim_` and the key), and the learning rates tried.
CONTENDERS = {
    "adamw": ("adamw_torch", {}, (3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)),
    "lora+": ("lora+", {}, (1e-4, 3e-4, 1e-3, 3e-3)),
    "riemannian": ("riemannian", {}, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "muon": ("muon", {}, (7e-4, 2e-3, 7e-3, 2e-2)),
    "pion_lora": ("pion_lora", {}, (4e-4, 1.2e-3, 2e-3, 4e-3, 1.2e-2)),
    "pion_lora, keep 16": ("pion_lora", {"keep": 16}, (1.2e-3, 2e-3, 4e-3, 8e-3)),
    "pion_lora, polar": ("pion_lora", {"direction": "polar"}, (4e-4, 8e-4, 1.2e-3, 2e-3, 4e-3, 1.2e-2)),
    "pion_lora, gradient": ("pion_lora", {"direction": "gradient"}, (4e-4, 1.2e-3, 4e-3, 1.2e-2)),
    "teon_lora": ("teon_lora", {}, (7e-4, 2e-3, 7e-3, 2e-2)),
}
# The contenders of the other ranks and their learning rates.
TRANSFER = {"adamw": (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2), "pion_lora": (6e-4, 1e-3, 2e-3, 4e-3, 8e-3)}
PEFT_OPTIMIZERS = ("lora+", "riemannian")


class StepClock(TrainerCallback):
    """Seconds of every whole step (without evaluation) and of the optimizer's part."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.optimizer: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._entered = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.optimizer.append(time.perf_counter() - self._entered)
        self.steps.append(time.perf_counter() - self._began)


class Bench:
    """The base model and the data, loaded once; `run` puts fresh adapters on it and takes them off again."""

    def __init__(self) -> None:
        disable_progress_bars()
        self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.checksum = self.sum_of_base()
        data = load_dataset(DATA)
        self.train_rows, self.answered = data["train"], list(data["validation"].select(range(GENERATED)))
        # Rows of like length together: less padding in a batch.
        rows = sorted(data["validation"].select(range(ROWS)), key=lambda row: len(str(row["prompt"])))
        self.validation = data["validation"].from_list(rows)
        self.text = Path(OTHER_TEXT).read_text(encoding="utf-8")

    def sum_of_base(self) -> int:
        """Of the bits of all weights: an exact checksum."""
        return sum(p.detach().view(torch.int32).sum(dtype=torch.int64).item() for p in self.model.parameters())

    def adapted(self, rank: int, seed: int) -> torch.nn.Module:
        set_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(self.model, config)

    def trainer(self, model: torch.nn.Module, optim: str, options: dict, lr: float, seed: int) -> PionSFTTrainer:
        args = PionSFTConfig(
            output_dir="runs/lora",
            optim="adamw_torch" if optim in PEFT_OPTIMIZERS else optim,
            **{f"optim_{name}": value for name, value in options.items()},
            learning_rate=lr,
            lr_scheduler_type="linear",
            warmup_steps=2,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=16,
            max_length=256,
            bf16=True,  # autocast: weights and adapters are float32
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            seed=seed,
            eval_strategy="steps",
            eval_steps=EVERY,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = PionSFTTrainer(
            model,
            args=args,
            train_dataset=self.train_rows,
            eval_dataset=self.validation,
            processing_class=self.tokenizer,
            optimizers=(peft_optimizer(optim, model, lr, args), None),
        )
        trainer.remove_callback(PrinterCallback)
        with contextlib.redirect_stderr(io.StringIO()):  # the routing table, at every run the same
            trainer.create_optimizer()
        return trainer

    def before(self) -> dict:
        """The losses of the untouched model."""
        model = self.adapted(RANK, seed=0)
        trainer = self.trainer(model, "adamw_torch", {}, 1e-3, seed=0)
        losses = {"task": trainer.evaluate()["eval_loss"], "other": self.other_loss(trainer)}
        self.strip(model)
        return losses

    def run(self, contender: str, lr: float, seed: int, rank: int, *, answer: bool = False) -> dict:
        """One training; all losses are means per token in nats, all times seconds."""
        optim, options, _ = CONTENDERS[contender]
        model = self.adapted(rank, seed)
        trainer = self.trainer(model, optim, options, lr, seed)
        trainer.train()
        losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
        result = {
            "contender": contender,
            "lr": lr,
            "seed": seed,
            "rank": rank,
            "optim": optim,
            "options": options,
            "task": losses[STEPS],
            "curve": [[step, loss] for step, loss in sorted(losses.items())],
            "other": self.other_loss(trainer),
            "spectrum_drift": trainer.run_callback.summary.get("spectrum_drift"),
            "exact_match": None,
        }
        if answer:
            with trainer.accelerator.autocast():
                answers = generate_answers(trainer.model, self.tokenizer, self.answered, max_new_tokens=24)
            result["exact_match"] = exact_match(answers, self.answered)
        self.strip(model)
        return result

    def seconds(self, contender: str) -> dict:
        """Medians of five steps at the contender's first learning rate."""
        optim, options, rates = CONTENDERS[contender]
        model = self.adapted(RANK, seed=0)
        trainer = self.trainer(model, optim, options, rates[0], seed=0)
        trainer.args.max_steps, trainer.args.eval_strategy = TIMED_STEPS, "no"
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.train()
        self.strip(model)
        return {"step": statistics.median(clock.steps), "optimizer": statistics.median(clock.optimizer)}

    def other_loss(self, trainer: PionSFTTrainer) -> float:
        with trainer.accelerator.autocast():
            return text_loss(trainer.model, self.tokenizer, self.text, windows=16)

    def strip(self, model: torch.nn.Module) -> None:
        self.model = model.unload()
        self.model.__dict__.pop("peft_config", None)  # or peft warns of a second adapter
        if self.sum_of_base() != self.checksum:
            raise RuntimeError("the run has changed the base model")


def peft_optimizer(name: str, model: torch.nn.Module, lr: float, args: PionSFTConfig) -> torch.optim.Optimizer | None:
    """peft's own two, over torch's AdamW with the Trainer's settings; None for all that have a name there."""
    settings = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, "weight_decay": 0.0}
    if name == "lora+":
        return create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=LORA_PLUS_RATIO, loraplus_weight_decay=0.0, **settings
        )
    if name == "riemannian":
        return create_riemannian_optimizer(model, torch.optim.AdamW, lr=lr, **settings)
    return None


# -- what the runs say -----------------------------------------------------------------------------


def sweep(runs: list[dict], contender: str, rank: int = RANK) -> list[dict]:
    """The first seed's runs of one contender, by learning rate; those that diverged to NaN are left out."""
    found = [r for r in runs if (r["contender"], r["rank"], r["seed"]) == (contender, rank, 0)]
    return sorted((r for r in found if math.isfinite(r["task"])), key=lambda r: r["lr"])


def best(runs: list[dict], contender: str, rank: int = RANK) -> dict | None:
    return min(sweep(runs, contender, rank), key=lambda r: r["task"], default=None)


def interior(runs: list[dict], contender: str, rank: int = RANK) -> bool:
    tried = sweep(runs, contender, rank)
    return best(runs, contender, rank)["lr"] not in (tried[0]["lr"], tried[-1]["lr"])


def steps_to(run: dict, target: float, before: float) -> float | None:
    """The step at which the validation loss falls to `target`, linear between evaluations; None if it does not."""
    points = [(0, before), *run["curve"]]
    for (step, loss), (later, lower) in itertools.pairwise(points):
        if lower <= target < loss:
            return step + (later - step) * (loss - target) / (loss - lower)
    return None


def vertex(tried: list[dict]) -> float | None:
    """The learning rate at the bottom of the parabola through the three lowest losses, over log lr; kept in the sweep.

    None with fewer than three runs, or where the parabola has no bottom.
    """
    if len(tried) < 3:
        return None
    (x0, y0), (x1, y1), (x2, y2) = sorted((math.log(r["lr"]), r["task"]) for r in sorted(tried, key=_task)[:3])
    slope, later = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (later - slope) / (x2 - x0)
    if curvature <= 0:
        return None
    x = (x0 + x1) / 2 - slope / (2 * curvature)
    return min(max(math.exp(x), tried[0]["lr"]), tried[-1]["lr"])


def _task(run: dict) -> float:
    return run["task"]


COLUMNS = ("contender", "lr", "seed", "task", "other text", "steps to AdamW's best", "exact match", "drift")


def comparison(record: dict) -> Table:
    runs, before = [r for r in record["runs"] if r["rank"] == RANK], record["before"]
    target = best(runs, "adamw")
    table = Table(title=f"LoRA, rank {RANK}. Before training: task {before['task']:.4f}, other {before['other']:.4f}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "contender" else "right", no_wrap=column == "contender")
    ends = []
    for contender in CONTENDERS:
        lowest = best(runs, contender)
        for r in sorted((r for r in runs if r["contender"] == contender), key=lambda r: (r["seed"], r["lr"])):
            reached = steps_to(r, target["task"], before["task"]) if target else None
            table.add_row(
                contender,
                f"{r['lr']:g}",
                str(r["seed"]),
                f"{r['task']:.4f}",
                f"{r['other']:.4f}",
                "" if reached is None else f"{reached:.1f}",
                "" if r["exact_match"] is None else f"{r['exact_match']:.0%}",
                "" if r["spectrum_drift"] is None else f"{r['spectrum_drift']:.0e}",
                style="bold" if r is lowest else None,
            )
        if lowest:
            table.add_section()
            if not interior(runs, contender):
                ends.append(f"{contender} {lowest['lr']:g}")
    table.caption = "Bold: the best of its sweep. " + (
        f"At an end of its sweep: {', '.join(ends)}." if ends else "Every best rate is interior."
    )
    return table


def times(record: dict) -> Table:
    table = Table(title=f"Seconds per step, {record['seconds_on']}")
    for column in ("contender", "step", "optimizer"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for contender, measured in record["seconds"].items():
        table.add_row(contender, f"{measured['step']:.2f}", f"{measured['optimizer']:.3f}")
    return table


def transfer(runs: list[dict]) -> Table:
    """The best learning rate at every rank, and how far it moves."""
    table = Table(title="Learning rate and rank, alpha = 2 rank")
    for column in ("contender", "rank", "best lr", "by parabola", "task", "interior"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for contender in TRANSFER:
        ranks = sorted({r["rank"] for r in runs if r["contender"] == contender and best(runs, contender, r["rank"])})
        grid, fitted = [], []
        for rank in ranks:
            lowest, bottom = best(runs, contender, rank), vertex(sweep(runs, contender, rank))
            grid.append(lowest["lr"])
            fitted.append(bottom)
            shown = f"{bottom:.2g}" if bottom else ""
            inside = "yes" if interior(runs, contender, rank) else "no"
            table.add_row(contender, str(rank), f"{grid[-1]:g}", shown, f"{lowest['task']:.4f}", inside)
        if len(ranks) > 1:
            ratios = (f"{max(v) / min(v):.1f}" if all(v) else "" for v in (grid, fitted))
            table.add_row("", "largest / smallest", *ratios, "", "", style="italic")
        table.add_section()
    return table


# -- the command -----------------------------------------------------------------------------------


class Ledger:
    """The record on disk, and the bench, which is loaded when the first run is due."""

    def __init__(self) -> None:
        self.record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"runs": []}
        self.bench: Bench | None = None

    @property
    def runs(self) -> list[dict]:
        return self.record["runs"]

    def find(self, contender: str, lr: float, seed: int, rank: int) -> dict | None:
        key = (contender, lr, seed, rank)
        return next((r for r in self.runs if (r["contender"], r["lr"], r["seed"], r["rank"]) == key), None)

    def once(self, contender: str, lr: float, seed: int, rank: int, *, answer: bool = False) -> None:
        """Run and save, unless that has been done (with answers, if they are wanted)."""
        done = self.find(contender, lr, seed, rank)
        if done and not (answer and done["exact_match"] is None):
            return
        self.bench = self.bench or Bench()
        if "before" not in self.record:
            self.record["before"] = self.bench.before()
        result = self.bench.run(contender, lr, seed, rank, answer=answer)
        self.record["runs"] = [r for r in self.runs if r is not done] + [result]
        self.save()
        tqdm.write(f"{contender}, lr {lr:g}, seed {seed}, rank {rank}: task {result['task']:.4f}")

    def time(self) -> None:
        self.bench = self.bench or Bench()
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        )
        self.record["seconds_on"] = device
        self.record["seconds"] = {c: self.bench.seconds(c) for c in tqdm(CONTENDERS, desc="Timing")}
        self.save()

    def save(self) -> None:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, metavar="NAME", help=f"of: {'; '.join(CONTENDERS)}")
    parser.add_argument("--rank", nargs="+", type=int, default=[RANK], help="ranks to run (default: 16)")
    parser.add_argument("--exact_match", action="store_true", help="generate answers after the best runs (slow)")
    parser.add_argument("--time", action="store_true", help="measure seconds per step, and nothing else")
    parser.add_argument("--show", action="store_true", help="print the tables of finished runs")
    chosen = parser.parse_args()
    ledger = Ledger()
    todo = [
        (contender, lr, 0, rank)
        for rank in chosen.rank
        for contender in chosen.only or CONTENDERS
        if rank == RANK or contender in TRANSFER
        for lr in (CONTENDERS[contender][2] if rank == RANK else TRANSFER[contender])
    ]
    if chosen.time:
        ledger.time()
    elif not chosen.show:
        if "version" in ledger.record:  # of other learning rates
            ledger.record = {"runs": []}
        for job in tqdm([job for job in todo if not ledger.find(*job)], desc="Learning rates"):
            ledger.once(*job)
        for contender in tqdm(list(chosen.only or CONTENDERS) if RANK in chosen.rank else [], desc="Second seed"):
            lowest = best(ledger.runs, contender)
            for seed in (0, 1) if lowest else ():  # answers of the first
                ledger.once(contender, lowest["lr"], seed, RANK, answer=chosen.exact_match and seed == 0)
    if not ledger.runs:
        raise SystemExit("no finished runs to show")
    console = Console(width=130)
    if "version" in ledger.record:
        console.print(f"Measured with {ledger.record['version']}, whose learning rates of LoRA forms were radians.")
    console.print(comparison(ledger.record))
    if "seconds" in ledger.record:
        console.print(times(ledger.record))
    if any(r["rank"] != RANK for r in ledger.runs):
        console.print(transfer(ledger.runs))


if __name__ == "__main__":
    main()
