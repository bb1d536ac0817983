"""Training from scratch: what `spectral_init_` does for Pion, TEON and AdamW, and whether experts should be stacked.

A byte-level Llama of 4 layers and width 128 (and, for the experts, a Mixtral of the same size with 4 of them) learns
the documentation text that examples/prepare_text.py writes; every run sees the same batches, with the schedule
`teon_wsd`. AdamW takes the same parameters everywhere (embeddings, head, norms) at 3e-3. Prints the validation loss of
every learning rate, per seed; finished runs are kept in results/from_scratch.json and not repeated (`--show`: none).
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from pion_hf import Pion, Teon, param_groups, spectral_init_
from pion_hf.integrations.schedules import teon_wsd

STEPS, BATCH, LENGTH, WARMUP = 200, 16, 128, 10
RESULTS = Path(__file__).parent / "results" / "from_scratch.json"
SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "bos_token_id": None,
    "eos_token_id": None,
}
AMBIENT, LIE_POLAR = {"direction": "natural", "metric": "ambient"}, {"direction": "polar", "metric": "lie"}
# name -> optimizer, its routing, constructor's options, learning rates
OPTIMIZERS = {
    "adamw": ("adamw", {}, {}, (1e-3, 3e-3, 1e-2)),
    "teon": ("teon", {}, {}, (3e-3, 1e-2, 3e-2)),
    "pion, natural, ambient": ("pion", {}, AMBIENT, (3e-3, 1e-2, 3e-2)),
    "pion, polar, lie": ("pion", {}, LIE_POLAR, (3e-3, 1e-2, 3e-2)),
}
EXPERTS = {
    "experts alone": ("teon", {}, {}, (1e-2,)),
    "experts stacked by index": ("teon", {"stack_targets": ["q", "k", "v", "experts"]}, {}, (1e-2,)),
}


def batches(split: str, seed: int, count: int) -> list[torch.Tensor]:
    """`count` batches of random stretches of the split's bytes, `(BATCH, LENGTH)`."""
    lines = Path(f"data/docs/{split}.jsonl").read_text(encoding="utf-8").splitlines()
    data = torch.tensor(list("\n".join(json.loads(line)["text"] for line in lines).encode()))
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - LENGTH, (count, BATCH), generator=draw)
    return [torch.stack([data[s : s + LENGTH] for s in row]) for row in starts.tolist()]


def build(experts: bool, init: float | None, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    if experts:
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    if init is not None:
        spectral_init_(model, init)
    return model


def optimizer_for(model: torch.nn.Module, rule: str, routing: dict, options: dict, lr: float) -> torch.optim.Optimizer:
    groups = param_groups(model, "muon" if rule == "adamw" else rule, lr=lr, adamw_lr=3e-3, **routing)
    if rule == "adamw":
        plain = [{"params": [p for _, p in g["params"]], "lr": g["lr"]} for g in groups]
        return torch.optim.AdamW(plain, betas=(0.9, 0.95), weight_decay=0.0)
    return (Pion if rule == "pion" else Teon)(groups, lr=lr, **options)


def validation_loss(model: torch.nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=b, labels=b).loss.item() for b in batches("validation", 0, 16)]
    model.train()
    return sum(losses) / len(losses)


def run(name: str, table: dict, lr: float, init: float | None, seed: int, experts: bool) -> dict:
    model = build(experts, init, seed)
    rule, routing, options, _ = table[name]
    optimizer = optimizer_for(model, rule, routing, options, lr)
    schedule = teon_wsd(optimizer, WARMUP, STEPS)
    started = time.perf_counter()
    label = f"{name}, lr {lr:g}, {'default init' if init is None else 'spectral init'}, seed {seed}"
    for batch in tqdm(batches("train", seed, STEPS), desc=label, leave=False):
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    return {
        "what": "experts" if experts else "init",
        "optimizer": name,
        "lr": lr,
        "spectral_init": init,
        "seed": seed,
        "loss": validation_loss(model),
        "seconds": seconds,
    }


def wanted(seeds: list[int]) -> list[tuple]:
    jobs = [
        (name, OPTIMIZERS, lr, init, seed, False)
        for seed in seeds
        for name, (*_, rates) in OPTIMIZERS.items()
        for init in (None, 1.0)
        for lr in rates
    ]
    return jobs + [(n, EXPERTS, lr, 1.0, s, True) for s in seeds for n, (*_, rates) in EXPERTS.items() for lr in rates]


def tables(runs: list[dict]) -> list[Table]:
    """One row per optimizer and initial weights: the loss at every learning rate, seeds beside each other."""
    shown = []
    for what, title in (("init", "Llama, validation loss (nats per byte)"), ("experts", "Mixtral, validation loss")):
        mine = [r for r in runs if r["what"] == what]
        seeds = sorted({r["seed"] for r in mine})
        table = Table(title=f"{title} after {STEPS} steps, seeds {', '.join(map(str, seeds))}")
        for column in ("optimizer", "initial weights", "lr: loss", "best", "seconds"):
            table.add_column(column)
        kinds = list(dict.fromkeys((r["optimizer"], r["spectral_init"]) for r in mine))
        for optimizer, init in kinds:
            rows = [r for r in mine if (r["optimizer"], r["spectral_init"]) == (optimizer, init)]
            by_lr = {lr: [r["loss"] for r in rows if r["lr"] == lr] for lr in sorted({r["lr"] for r in rows})}
            best = min(sum(v) / len(v) for v in by_lr.values())
            cells = "  ".join(f"{lr:g}: {' '.join(f'{x:.3f}' for x in v)}" for lr, v in by_lr.items())
            seconds = sum(r["seconds"] for r in rows) / len(rows)
            table.add_row(optimizer, "default" if init is None else "spectral", cells, f"{best:.3f}", f"{seconds:.0f}")
        shown.append(table)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and batches")
    parser.add_argument("--show", action="store_true", help="print the tables of finished runs only")
    arguments = parser.parse_args()
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for name, table, lr, init, seed, experts in [] if arguments.show else wanted(arguments.seeds):
        what = "experts" if experts else "init"
        key = {"what": what, "optimizer": name, "lr": lr, "spectral_init": init, "seed": seed}
        if any(key.items() <= r.items() for r in runs):
            continue
        runs.append(run(name, table, lr, init, seed, experts))
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(runs, indent=1))
    for table in tables(runs):
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
