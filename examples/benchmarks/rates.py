"""Whether a learning rate that is right for AdamW is right for this package's names.

SmolLM2-135M-Instruct learns `reasoning-gym` answers: all weights, and fresh LoRA adapters on all linear layers (alpha
= 2 rank, no dropout) of rank 4, 16 and 64. Every run takes 16 steps of 4 examples, warmup 2, linear decay, one rate for
everything that trains; its loss is of 32 held-out examples. AdamW's rate is doubled and halved until its best one has
worse neighbours on both sides. Every other name runs at half, one and two times that rate, and then on until its own
best one has worse neighbours too.

Shown is, by name: its best rate over AdamW's, and how far behind its own best loss it is at AdamW's best rate.

Needs examples/prepare_smollm2.py and examples/prepare_reasoning.py. Finished runs are kept in results/rates.json and
not repeated; `--show` runs none. A run takes 15 to 60 seconds on 2 CPU cores.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import disable_progress_bars, load_dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from pion_hf import param_groups
from pion_hf._version import __version__
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES, resolve_options
from pion_hf.linalg.products import bfloat16_speedup
from pion_hf.routing.table import LORA_FORMS

MODEL, DATA = "models/smollm2-135m-instruct", "data/reasoning"
RESULTS = Path(__file__).parent / "results" / "rates.json"
STEPS, BATCH, WARMUP, HELD_OUT, LENGTH = 16, 4, 2, 32, 160
RANKS = (4, 16, 64)
FULL, ADAPTERS = "full", tuple(f"LoRA {rank}" for rank in RANKS)
NAMES = {FULL: ("pion_ambient",), **dict.fromkeys(ADAPTERS, ("pion_lora", "teon_lora", "muon"))}
FIRST = {FULL: 2e-4, "LoRA 4": 4e-3, "LoRA 16": 2e-3, "LoRA 64": 1e-3}  # where the search for AdamW's begins


class Bench:
    """The data, loaded once; every run has a model of its own."""

    def __init__(self) -> None:
        disable_progress_bars()
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        data = load_dataset(DATA)
        self.train = [self.encode(row) for row in data["train"].select(range(STEPS * BATCH))]
        held_out = [self.encode(row) for row in data["validation"].select(range(HELD_OUT))]
        self.held_out = sorted(held_out, key=lambda ids: len(ids[0]))  # rows of like length together
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_speedup() > 1)

    def encode(self, row: dict) -> tuple[list[int], int]:
        """Its tokens, and how many of them are the prompt's."""
        prompt = self.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = self.tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        return whole[:LENGTH], min(len(prompt), LENGTH)

    def batch(self, rows: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
        longest = max(len(ids) for ids, _ in rows)
        padded = [ids + [self.tokenizer.eos_token_id] * (longest - len(ids)) for ids, _ in rows]
        input_ids = torch.tensor(padded)
        position = torch.arange(longest)
        starts, ends = (torch.tensor(x).unsqueeze(1) for x in ([n for _, n in rows], [len(ids) for ids, _ in rows]))
        labels = input_ids.masked_fill((position < starts) | (position >= ends), -100)
        return {"input_ids": input_ids, "attention_mask": (position < ends).long(), "labels": labels}

    def model(self, kind: str) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        set_seed(0)
        if kind != FULL:
            rank = int(kind.split()[1])
            adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, adapter)
        return model

    def run(self, kind: str, name: str, lr: float) -> float:
        """The held-out loss after training, nats per token."""
        model = self.model(kind)
        optimizer = optimizer_of(name, model, lr, adapters=kind != FULL)
        schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
        model.train()
        for step in tqdm(range(STEPS), desc=f"{kind}, {name}, {lr:.1e}", leave=False):
            with self.autocast:
                loss = model(**self.batch(self.train[step * BATCH : (step + 1) * BATCH])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return self.held_out_loss(model)

    @torch.no_grad()
    def held_out_loss(self, model: torch.nn.Module) -> float:
        model.eval()
        total = tokens = 0
        for start in range(0, HELD_OUT, 2 * BATCH):
            batch = self.batch(self.held_out[start : start + 2 * BATCH])
            count = int((batch["labels"][:, 1:] != -100).sum())
            with self.autocast:
                total += model(**batch).loss.item() * count
            tokens += count
        return total / tokens


def optimizer_of(name: str, model: torch.nn.Module, lr: float, *, adapters: bool) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    form, usual = LORA_FORMS[name] if adapters and name in LORA_FORMS else (name, {})
    options, groups = resolve_options(form, usual)
    return OPTIMIZER_CLASSES[form](param_groups(model, form, lr=lr, **groups), lr=lr, **options)


class Study:
    """Losses by kind, name and rate; what is not known yet is measured, if there is a bench."""

    def __init__(self, measure: Callable[[str, str, float], float] | None) -> None:
        self.measure = measure
        self.losses: dict[str, dict[str, dict[str, float]]] = {}
        if RESULTS.exists():
            self.losses = json.loads(RESULTS.read_text())["losses"]

    def loss(self, kind: str, name: str, lr: float) -> float | None:
        known = self.losses.setdefault(kind, {}).setdefault(name, {})
        key = f"{lr:.6g}"
        if key not in known and self.measure is not None:
            known[key] = self.measure(kind, name, lr)
            RESULTS.write_text(json.dumps({"version": __version__, "steps": STEPS, "losses": self.losses}, indent=1))
        return known.get(key)

    def best(self, kind: str, name: str, start: float) -> float | None:
        """The rate, by factors of two from `start`, whose neighbours are both worse; None if it is not known."""
        lr = start
        while True:
            losses = {rate: self.loss(kind, name, rate) for rate in (lr / 2, lr, 2 * lr)}
            if None in losses.values():
                return None
            lowest = min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
            if lowest == lr:
                return lr
            lr = lowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="run nothing, show what is known")
    parser.add_argument("--only", nargs="+", default=[FULL, *ADAPTERS], help="kinds: full, 'LoRA 16', ...")
    args = parser.parse_args()
    study = Study(None if args.show else Bench().run)
    table = Table(title=f"Learning rates on AdamW's scale: held-out loss after {STEPS} steps")
    for column in ("", "name", "at half", "at AdamW's best", "at twice", "own best / AdamW's", "behind its own best"):
        table.add_column(column, justify="left" if column in ("", "name") else "right")
    for kind in args.only:
        rate = study.best(kind, "adamw", FIRST[kind])
        if rate is None:
            continue
        for name in ("adamw", *NAMES[kind]):
            own = study.best(kind, name, rate)
            losses = [study.loss(kind, name, factor * rate) for factor in (0.5, 1, 2)]
            if own is None or None in losses:
                continue
            behind = losses[1] - study.loss(kind, name, own)
            label = f"{kind}, {rate:g}" if name == "adamw" else ""
            table.add_row(label, name, *(f"{loss:.3f}" for loss in losses), f"{own / rate:g}", f"{behind:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
