"""What one optimizer step on LoRA factors costs: time, and memory beyond parameters, gradients and state.

Two sets of rank-16 factors, float32, random weights and gradients: two layers with a matrix of 4096 x 11008 in either
direction, and all linear layers of SmolLM2-135M. The contenders take turns, one step each in every round, on the same
factors; the time is the median over the rounds. The memory is the most that a later step had allocated at once, by the
allocator's own account, in units of the factors' bytes.

The results are kept in results/lora_step.json, by device (`--show` prints them and runs nothing).
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would report its own comings and goings

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm.auto import tqdm

from pion_hf import param_groups
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES, resolve_options

RESULTS = Path(__file__).parent / "results" / "lora_step.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK, LR = 16, 1e-4

HIDDEN, KEYS, INNER = 576, 192, 1536  # SmolLM2-135M
# set -> layers, and the (in, out) of every projection of a layer.
MODELS = {
    "4096 x 11008": (2, {"up_proj": (4096, 11008), "down_proj": (11008, 4096)}),
    "SmolLM2-135M": (
        30,
        {
            "q_proj": (HIDDEN, HIDDEN),
            "k_proj": (HIDDEN, KEYS),
            "v_proj": (HIDDEN, KEYS),
            "o_proj": (HIDDEN, HIDDEN),
            "gate_proj": (HIDDEN, INNER),
            "up_proj": (HIDDEN, INNER),
            "down_proj": (INNER, HIDDEN),
        },
    ),
}
# contender -> the optimizer's name and its options.
CONTENDERS = {
    "AdamW, fused": ("adamw", {}),
    "Riemannian AdamW (peft)": ("riemannian", {}),
    "muon": ("teon_lora", {"stack": 1}),  # what optim="muon" becomes on adapters
    "teon_lora": ("teon_lora", {}),
    "pion_lora": ("pion_lora", {}),
    "pion_lora, gradient": ("pion_lora", {"direction": "gradient"}),
    "pion_lora, polar": ("pion_lora", {"direction": "polar"}),
    "pion_lora, ambient": ("pion_lora", {"metric": "ambient"}),
    "pion_lora, A by AdamW": ("pion_lora", {"lora_a": "adamw"}),
    "pion_lora, B by AdamW": ("pion_lora", {"lora_b": "adamw"}),
}


class Blocks(nn.Module):
    """Layers of nothing but projections, for the routing to find."""

    def __init__(self, layers: int, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.utils.skip_init(nn.Linear, *sizes, bias=False) for name, sizes in shapes.items()})
            for _ in range(layers)
        )


def adapted(layers: int, shapes: dict[str, tuple[int, int]]) -> nn.Module:
    """Adapters with random factors and gradients; the layers under them are half as large, for nobody reads them."""
    torch.manual_seed(0)
    model = Blocks(layers, shapes).to(DEVICE, torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(shapes))).to(DEVICE)
    for p in factors(model):
        p.data = p.data.float()
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return model


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def optimizer_of(name: str, options: dict, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(factors(model), lr=LR, weight_decay=0.0, fused=True)
    if name == "riemannian":
        return create_riemannian_optimizer(model, torch.optim.AdamW, lr=LR, weight_decay=0.0, fused=True)
    own, routed = resolve_options(name, options)
    return OPTIMIZER_CLASSES[name](param_groups(model, name, lr=LR, **routed), lr=LR, **own)


def seconds(step) -> float:
    synchronize()
    started = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak_bytes(step, again) -> int:
    """The most that `again` holds at once beyond what lived before it; `step` goes before it."""
    if DEVICE == "cuda":
        step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        again()
        return torch.cuda.max_memory_allocated() - before
    # The profiler sees a release only of what it has seen allocated: hence a step before, which makes the state anew.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
        with record_function("again"):
            again()
    # Every allocation (positive) and release (negative); torch offers no public running total.
    events = sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    began = next(e.start_ns() for e in events if e.name() == "again")
    live = peak = 0
    for event in events:
        if event.name() == "[memory]" and event.start_ns() >= began:
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def measure(layers: int, shapes: dict[str, tuple[int, int]], rounds: int, bar: tqdm) -> dict:
    model = adapted(layers, shapes)
    gradients = [torch.randn_like(p) * 1e-3 for p in factors(model)]
    optimizers = {name: optimizer_of(*choice, model) for name, choice in CONTENDERS.items()}

    def stepper(name: str):
        for p, g in zip(factors(model), gradients, strict=True):
            p.grad = g.clone()  # peft's preconditions it in place
        return optimizers[name].step

    for name in optimizers:  # the first step makes the state, the second warms up
        stepper(name)()
        stepper(name)()
    times = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name in optimizers:
            times[name].append(seconds(stepper(name)))
            bar.update()
    size = sum(p.numel() * p.element_size() for p in factors(model))
    rows = {}
    for name, optimizer in optimizers.items():
        extra = peak_bytes(optimizer.step, stepper(name)) / size
        rows[name] = {"seconds": statistics.median(times[name]), "extra": extra}
    return {"bytes": size, "rows": rows}


def table(device: str, title: str, result: dict) -> Table:
    shown = Table(title=f"{title}, factors of {result['bytes'] / 1e6:.1f} MB, {device}")
    for column in ("optimizer", "ms per step", "of AdamW's", "extra memory / factors"):
        shown.add_column(column, justify="left" if column == "optimizer" else "right")
    adamw = next(iter(result["rows"].values()))["seconds"]
    for name, row in result["rows"].items():
        shown.add_row(name, f"{row['seconds'] * 1e3:.2f}", f"{row['seconds'] / adamw:.1f}", f"{row['extra']:.2f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of every contender (default: 15)")
    parser.add_argument("--show", action="store_true", help="print the kept results")
    chosen = parser.parse_args()
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if not chosen.show:
        with tqdm(total=len(MODELS) * chosen.rounds * len(CONTENDERS), desc="Steps") as bar:
            record[DEVICE] = {name: measure(*shapes, chosen.rounds, bar) for name, shapes in MODELS.items()}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for device, results in record.items():
        for title, result in results.items():
            Console(width=110).print(table(device, title, result))


if __name__ == "__main__":
    main()
