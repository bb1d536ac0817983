"""The optimizer's share of a training step: SmolLM2-135M, 4,096 tokens, bf16 autocast, float32 weights.

One forward and backward pass over random tokens is timed (4 rows of 1,024, the second of two), then two steps of every
optimizer on its gradients, after one that makes the state: a rotation acts on one side of a matrix at a time, and the
two differ. The share is of the sum of both times.

Needs the model's configuration alone, which the package carries. The results are kept in results/share.json, by device
(`--show` prints them and runs nothing).
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pion_hf import param_groups
from pion_hf._version import __version__
from pion_hf.cli.configs import local_config
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES, resolve_options

RESULTS = Path(__file__).parent / "results" / "share.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODEL, ROWS, LENGTH = "HuggingFaceTB/SmolLM2-135M", 4, 1024
WARMUP, TIMED = 4, 4  # steps: both sides twice, after which everything is loaded

# contender -> the optimizer's name and its options; AdamW is torch's fused one.
CONTENDERS = {
    "AdamW, fused": ("adamw", {}),
    "Muon": ("muon", {}),
    "TEON": ("teon", {}),
    "Pion": ("pion", {}),
    "Pion, ambient": ("pion_ambient", {}),
}


def seconds(call: Callable[[], object]) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def optimizer_of(model: PreTrainedModel, optim: str, options: dict) -> torch.optim.Optimizer:
    if optim == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    own, routed = resolve_options(optim, options)
    return OPTIMIZER_CLASSES[optim](param_groups(model, optim, lr=1e-4, **routed), lr=1e-4, **own)


def measure() -> dict:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(local_config(MODEL))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(DEVICE)
    ids = torch.randint(model.config.vocab_size, (ROWS, LENGTH), device=DEVICE)

    def forward_and_backward() -> None:
        model.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    seconds(forward_and_backward)
    found = {"pass": seconds(forward_and_backward), "torch": torch.__version__, "version": __version__, "steps": {}}
    for name, (optim, options) in tqdm(CONTENDERS.items(), desc="Optimizers", leave=False):
        optimizer = optimizer_of(model, optim, options)
        for _ in range(WARMUP):
            optimizer.step()
        found["steps"][name] = seconds(lambda step=optimizer.step: [step() for _ in range(TIMED)]) / TIMED
    return found


def show(record: dict) -> None:
    for device, found in record.items():
        table = Table(title=f"{MODEL}, {ROWS * LENGTH:,} tokens a step; {device}")
        for column in ("optimizer", "forward and backward, s", "optimizer, s", "share"):
            table.add_column(column, justify="left" if column == "optimizer" else "right")
        for name, step in found["steps"].items():
            cells = f"{found['pass']:.2f}", f"{step:.2f}", f"{step / (step + found['pass']):.0%}"
            table.add_row(name, *cells)
        Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the committed results")
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    if not parser.parse_args().show:
        name = torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        record[name] = measure()
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    show(record)


if __name__ == "__main__":
    main()
