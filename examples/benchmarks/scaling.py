"""On paper: what a step of sharded matrices costs on 8 and 64 GPUs, and where dividing it stops helping.

Llama-3.1-8B and a 70B of the same family, weights and gradients in bfloat16, FSDP2 over all GPUs. Who owns what is
decided as in training (`owners.Division`); the work of the fullest process counts. What a step on one GPU would take is
that of gpu_estimate.py for the 8B (results/gpu_estimate.json, an H200 at 70 % of its nominal rates), and of the 70B as
much more as it has products. Bytes leave a process at 450 GB/s within 8 GPUs (NVLink) and at 50 GB/s beyond (a 400 Gb/s
card each). The forward pass is of 8,192 tokens a GPU at 40 % of 989 TFLOP/s, as measured runs of such models reach.
"""

import json
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from pion_hf.optim.batches import Block
from pion_hf.optim.owners import Division, Parcel, parcels_of

RESULTS = Path(__file__).parent / "results" / "gpu_estimate.json"
MEASURED = "Llama-3.1-8B"
# model -> layers, hidden size, that of keys and values, of the MLP, and all parameters.
MODELS = {MEASURED: (32, 4096, 1024, 14336, 8.0e9), "70B": (80, 8192, 1024, 28672, 70.6e9)}
CONTENDERS = {"pion": "pion", "muon": "teon, stack 1 (muon)"}
GPUS = (8, 64)
BYTES = 4  # of a parameter: the gradient to its owner, the weight from it
NVLINK, CARD = 450e9, 50e9
TOKENS, FORWARD = 8192, 0.4 * 989e12


def parcels(model: str) -> list[Parcel]:
    layers, hidden, keys, inner, _ = MODELS[model]
    shapes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden), (inner, hidden), (inner, hidden)]
    params = [torch.empty(shape, device="meta") for _ in range(layers) for shape in (*shapes, (hidden, inner))]
    return parcels_of([[Block(p, "", 0, p[None, None], p)] for p in params], lambda p: p.numel())


def main() -> None:
    estimate = json.loads(RESULTS.read_text(encoding="utf-8"))[MEASURED]
    table = Table(title="a step of sharded matrices in bfloat16, on paper", box=box.MARKDOWN)
    for column in ("model", "GPUs", "rule", "GB sent", "in s", "TFLOP", "in s", "kept, GB", "forward pass, s"):
        table.add_column(column, justify="left" if column in ("model", "rule") else "right", no_wrap=True)
    limits = []
    for model, (*_, everything) in MODELS.items():
        found = parcels(model)
        products, weights = sum(p.products for p in found), sum(p.bytes for p in found)
        more = products / sum(p.products for p in parcels(MEASURED))
        costliest = max(parcel.products for parcel in found)
        limits.append(f"{model}: {len(found)} matrices, the costliest takes 1/{products / costliest:.0f} of the work")
        for gpus in GPUS:
            division = Division()
            division.ranks, division.loads = gpus, [(0, 0)] * gpus
            division.assign(found)
            work, held = (max(load) for load in zip(*division.loads, strict=True))
            sent = BYTES * weights / gpus * (gpus - 1) / gpus
            for rule, contender in CONTENDERS.items():
                one = estimate[contender]
                flops = more * sum(one["flops"].values()) * work / products
                table.add_row(
                    *(model, str(gpus), rule, f"{sent / 1e9:.2f}", f"{sent / (NVLINK if gpus <= 8 else CARD):.3f}"),
                    *(f"{flops / 1e12:.1f}", f"{more * one['seconds'] * work / products:.3f}"),
                    *(f"{(one['held'] - 2) * held / 1e9:.1f}", f"{2 * everything * TOKENS / FORWARD:.2f}"),
                )
    Console(width=140).print(table)
    print("\n".join(limits))


if __name__ == "__main__":
    main()
