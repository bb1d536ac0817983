"""Which rule learns most and forgets least: the sweep that set the defaults of what is `pion_ambient`.

Every run is the demo's recipe (recipes/smollm2-135m/sft/full.yaml: same model, data, seed, batch, schedule), in float32
throughout and 24 steps long, with another rule or learning rate for the hidden matrices; embeddings and norms get AdamW
at the recipe's own rate in all of them, the AdamW baseline included. Prints new-task loss and loss on unrelated
documentation text, and beside every rule what AdamW forgets at the same task loss, interpolated between its learning
rates.

Finished runs are kept in results/rules.json and not repeated (`--only` runs a part, `--show` none). Those with
`hold` are of 0.1, which had the option; `natural, ambient` is `pion_ambient` at a tenth of its RMS, ten times its rate.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from datasets import load_dataset
from rich.console import Console
from rich.table import Table

from pion_hf import param_groups
from pion_hf.cli.sft import parser as sft_parser
from pion_hf.integrations.evaluation import text_loss
from pion_hf.integrations.trl import PionSFTTrainer

STEPS = 24
RECIPE = "recipes/smollm2-135m/sft/full.yaml"
RESULTS = Path(__file__).parent / "results" / "rules.json"

ADAM_AMBIENT = {"direction": "adam", "metric": "ambient", "scale": "none"}
NATURAL_AMBIENT = {"direction": "natural", "metric": "ambient", "scale": "rms", "rms": 0.2}
# rule -> its options and the learning rates tried. The two names are unconstrained steps on the same matrices.
RULES = {
    "adamw": ("adamw", (5e-5, 1e-4, 2e-4)),
    "natural, unconstrained": ("natural", (1e-3,)),
    "natural, ambient": (NATURAL_AMBIENT, (7e-4, 1.2e-3, 2e-3)),
    "adam, ambient": (ADAM_AMBIENT, (1.4e-4,)),
    "paper": ({"preset": "paper"}, (1e-4,)),
}


class Natural(torch.optim.Optimizer):
    """`W <- W - lr 0.2 D / rms(D)` with Pion's natural direction `D` and no rotation: what the direction does alone."""

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                t = state["step"] = state.get("step", 0) + 1
                m = state.setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - beta1)
                v = state.setdefault("second", torch.zeros_like(p)).lerp_(p.grad.square(), 1 - beta2)
                d = m / (1 - beta1**t) / (v / (1 - beta2**t) + 1e-16)
                p.sub_(d, alpha=group["lr"] * 0.2 / d.square().mean().sqrt().item())


class Both(torch.optim.Optimizer):
    """Two optimizers as one: the matrices', then AdamW for the rest."""

    def __init__(self, matrices: torch.optim.Optimizer, rest: torch.optim.Optimizer) -> None:
        self.parts = (matrices, rest)
        super().__init__([p for part in self.parts for g in part.param_groups for p in g["params"]], {})
        self.param_groups = [g for part in self.parts for g in part.param_groups]

    def step(self, closure=None) -> None:
        for part in self.parts:
            part.step()


def trainer_for(rule: str, options: dict | str, lr: float) -> PionSFTTrainer:
    """The recipe's trainer, its optimizer replaced for the unconstrained steps."""
    constrained = options if isinstance(options, dict) else {}
    given = {f"--optim_{key}": str(value) for key, value in constrained.items()}
    fixed = ["--optim", "pion", "--max_steps", str(STEPS), "--bf16", "false", "--learning_rate", str(lr)]
    argv = ["--config", RECIPE, *fixed, *(word for pair in given.items() for word in pair)]
    script, args, model, _, _ = sft_parser().parse_recipe(argv)
    args.output_dir = f"runs/rules/{rule.replace(', ', '-').replace(' ', '')}-{lr:g}"
    args.model_init_kwargs = {"dtype": model.dtype}
    args.disable_tqdm = True
    data = load_dataset(script.dataset_name)
    trainer = PionSFTTrainer(
        model.model_name_or_path,
        args=args,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split],
    )
    if isinstance(options, str):
        trainer.optimizer = unconstrained(options, trainer.model, lr, args)
    return trainer


def unconstrained(name: str, model: torch.nn.Module, lr: float, args) -> torch.optim.Optimizer:
    """AdamW, or the natural direction, on the matrices that Pion would rotate; AdamW on the rest."""
    split = {"pion": [], "adamw": []}
    for group in param_groups(model):
        split[group["rule"]] += [p for _, p in group["params"]]
    betas = (args.adam_beta1, args.adam_beta2)
    rest = torch.optim.AdamW(split["adamw"], lr=args.optim_adamw_lr, betas=betas, weight_decay=0.0, fused=True)
    if name == "adamw":
        matrices = torch.optim.AdamW(split["pion"], lr=lr, betas=betas, weight_decay=0.0, fused=True)
    else:
        matrices = Natural(split["pion"], lr=lr)
    return Both(matrices, rest)


def measure(trainer: PionSFTTrainer, text: str) -> dict[str, float]:
    return {
        "task": trainer.evaluate()["eval_loss"],
        "other": text_loss(trainer.model, trainer.processing_class, text),
    }


def run(rule: str, options: dict | str, lr: float, text: str) -> dict:
    trainer = trainer_for(rule, options, lr)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    summary = {key: trainer.run_callback.summary.get(key) for key in ("spectrum_drift", "optimizer_share")}
    return {"rule": rule, "lr": lr, **measure(trainer, text), **summary, "seconds": seconds, "seed": trainer.args.seed}


def adamw_other_loss(task: float, rows: list[dict]) -> float | None:
    """AdamW's loss on other text at `task`, interpolated along its frontier; None outside it."""
    frontier: list[tuple[float, float]] = []
    for point in sorted((r["other"], r["task"]) for r in rows if r["rule"] == "adamw"):
        if not frontier or point[1] < frontier[-1][1]:  # forgetting more must have bought something
            frontier.append(point)
    for (a, high), (b, low) in itertools.pairwise(frontier):
        if low <= task <= high:
            return a + (b - a) * (high - task) / (high - low)
    return None


def table(record: dict) -> Table:
    rows, before = record["runs"], record["before"]
    table = Table(title=f"Before training: task {before['task']:.3f}, other text {before['other']:.4f}")
    columns = ("rule", "lr", "task loss", "other text", "AdamW's there", "drift", "optimizer share", "seconds")
    for column in columns:
        table.add_column(column, justify="left" if column == "rule" else "right")
    order = {rule: i for i, rule in enumerate(RULES)}
    for r in sorted(rows, key=lambda r: (order.get(r["rule"], len(order)), r["lr"])):
        theirs = None if r["rule"] == "adamw" else adamw_other_loss(r["task"], rows)
        table.add_row(
            r["rule"],
            f"{r['lr']:g}",
            f"{r['task']:.3f}",
            f"{r['other']:.4f}",
            f"{theirs:.4f}" if theirs else "",
            f"{r['spectrum_drift']:.0e}" if r["spectrum_drift"] is not None else "",
            f"{r['optimizer_share']:.0%}" if r["optimizer_share"] is not None else "",
            f"{r['seconds']:.0f}",
        )
    return table


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=RULES, help="rules to run")
    arguments.add_argument("--show", action="store_true", help="print the table of finished runs")
    chosen = arguments.parse_args()
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    if chosen.show:
        Console(width=110).print(table(record))
        return
    text = Path("data/python_docs.txt").read_text(encoding="utf-8")
    if "before" not in record:
        record["before"] = measure(trainer_for("before", RULES["paper"][0], 1e-4), text)
    for rule in chosen.only or RULES:
        options, rates = RULES[rule]
        for lr in rates:
            if any(r["rule"] == rule and r["lr"] == lr for r in record["runs"]):
                continue
            record["runs"].append(run(rule, options, lr, text))
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(record, indent=1))
            Console(width=110).print(table(record))


if __name__ == "__main__":
    main()
