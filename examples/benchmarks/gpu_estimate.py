"""What a step on all hidden matrices of a model would cost on a GPU, counted and estimated without one.

The contenders of optimizer_step.py step on fake CUDA tensors (fake_gpu.py) with weights in bfloat16, so that what runs
is what a GPU would run: products, kernels, and the bytes that these read and write are counted, the mean of two steps,
one on either side; so is the memory of weights, gradients and state. Of the larger models as many layers are counted as
fill whole batches, and multiplied.

Every kernel is taken to last as long as its products, or its bytes, need at 70 % of an H200's nominal rates: 989
TFLOP/s in bfloat16, 67 in float32, 4.8 TB/s. What the host needs to launch the kernels is not in it: their number
stands beside it. So this is a bound from below, and says what to expect of a ratio, not of a time.

The results are kept in results/gpu_estimate.json (`--show` prints them and runs nothing).
"""

import argparse
import json
from pathlib import Path

import optimizer_step
import torch
from fake_gpu import Kernel, fake_gpu
from lora_step import Blocks, factors
from optimizer_step import shapes_of, state_bytes
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm

RESULTS = Path(__file__).parent / "results" / "gpu_estimate.json"
REACHED = 0.7
FLOPS = {"bfloat16": 989e12, "float32": 67e12}
BANDWIDTH = 4.8e12
# model -> the layers that it has, and those that are counted.
LAYERS = {"SmolLM2-135M": (30, 30), "Qwen2.5-1.5B": (28, 14), "Llama-3.1-8B": (32, 4)}
CONTENDERS = (
    "AdamW, fused",
    "torch Muon",
    "teon, stack 1 (muon)",
    "pion",
    "pion, transported",
    "pion, polar, lie",
    "pion, adam, ambient",
    "pion_ambient",
    "pion_ambient, not transported",
)
STEPS = 3


def estimate(contender: str, model: str) -> dict:
    """What the second and the third step take on average, one on either side; the first makes the state."""
    layers, counted = LAYERS[model]
    blocks, share = Blocks(counted, shapes_of(model)), 2 * counted / layers
    kernels: list[list[Kernel]] = []
    with fake_gpu() as counts:
        for module in blocks.modules():
            if isinstance(module, nn.Linear):
                shape = module.weight.shape
                module.weight = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="cuda"))
        params = factors(blocks)
        optimizer = optimizer_step.CONTENDERS[contender](blocks)
        for _ in range(STEPS):
            for p in params:
                p.grad = torch.empty_like(p)
            counts.reset()
            optimizer.step()
            kernels.append(counts.kernels)
        size = sum(p.numel() for p in params)
        held = 2 * sum(p.numel() * p.element_size() for p in params) + state_bytes(optimizer)
    every = [kernel for step in kernels[-2:] for kernel in step]
    lasting = sum(max(k.bytes / BANDWIDTH, k.flops / FLOPS[k.dtype] if k.flops else 0) for k in every)
    return {
        "flops": {d: sum(k.flops for k in every if k.dtype == d) / share for d in FLOPS},
        "bytes": sum(k.bytes for k in every) / share,
        "kernels": len(every) / share,
        "held": held / size,
        "seconds": lasting / REACHED / share,
    }


def table(model: str, rows: dict[str, dict]) -> Table:
    made = Table(title=f"{model}, {LAYERS[model][0]} layers in bfloat16; estimated for an H200", box=box.MARKDOWN)
    columns = ("optimizer", "TFLOP bfloat16", "TFLOP float32", "GB", "kernels", "ms", "/ Muon", "held, B/param")
    for column in columns:
        made.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=True)
    for name, row in rows.items():
        made.add_row(
            name,
            *(f"{row['flops'][d] / 1e12:.3f}" for d in FLOPS),
            f"{row['bytes'] / 1e9:.1f}",
            f"{row['kernels']:.0f}",
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['seconds'] / rows['torch Muon']['seconds']:.2f}",
            f"{row['held']:.1f}",
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=list(LAYERS), help="default: all")
    parser.add_argument("--show", action="store_true", help="print the kept results")
    chosen = parser.parse_args()
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for model in () if chosen.show else chosen.models:
        record[model] = {contender: estimate(contender, model) for contender in tqdm(CONTENDERS, model, leave=False)}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for model in chosen.models:
        Console(width=140).print(table(model, record[model]))


if __name__ == "__main__":
    main()
