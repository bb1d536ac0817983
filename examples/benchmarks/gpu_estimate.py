"""What a step on whole matrices would cost on a GPU, estimated without one.

The contenders of optimizer_step.py step on fake CUDA tensors (fake_gpu.py), so that what runs is what a GPU would run.
Every kernel is taken to last as long as its products, or the bytes that it reads and writes, need at 70 % of an H200's
nominal rates: 989 TFLOP/s in bfloat16, 67 in float32, 4.8 TB/s. What the host needs to launch the kernels is not in it:
their number stands beside it. So this is a bound from below, and says what to expect of a ratio, not of a time.

How many terms a rotation's series has follows from norms and angles. These are those of real steps on one layer of
SmolLM2-135M's shapes, on this machine's processor, read a step late as on a GPU.

The results are kept in results/gpu_estimate.json (`--show` prints them and runs nothing).
"""

import argparse
import json
from pathlib import Path
from unittest import mock

import optimizer_step
import torch
from fake_gpu import Kernel, fake_gpu, like_a_gpu
from lora_step import Blocks, factors
from optimizer_step import MODELS, shapes_of
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm

from pion_hf.linalg import reading

RESULTS = Path(__file__).parent / "results" / "gpu_estimate.json"
REACHED = 0.7
FLOPS = {"bfloat16": 989e12, "float32": 67e12}
BANDWIDTH = 4.8e12
ESTIMATED = ("SmolLM2-135M", "Qwen2.5-1.5B", "Llama-3.1-8B")
CONTENDERS = (
    "AdamW, fused",
    "torch Muon",
    "teon, stack 1 (muon)",
    "pion, gradient, lie",
    "pion, polar, lie",
    "pion, adam, ambient",
    "pion, natural, ambient",
)
STEPS = 4


def values_read(contender: str) -> dict[str, float]:
    """The largest of every key that a contender's rule reads on the host."""
    model = optimizer_step.build_model("SmolLM2-135M", 1, torch.float32)
    params = factors(model)
    cycle = optimizer_step.gradients(params)
    optimizer = optimizer_step.CONTENDERS[contender](model)
    found, read = {}, reading.LateReader.read

    def recorded(self, key, value, **options):
        late = read(self, key, value, **options)
        found[key] = max(late, found.get(key, late))
        return late

    with like_a_gpu(), mock.patch.object(reading.LateReader, "read", recorded):
        for step in range(STEPS + 2):
            if step == STEPS:  # the first ones of a side wait, and read what is not late
                found.clear()
            for p, g in zip(params, cycle[step % len(cycle)], strict=True):
                p.grad = g.clone()
            optimizer.step()
    return found


def kernels_of(contender: str, model: str, layers: int, values: dict[str, float]) -> list[list[Kernel]]:
    """Those of two steps, one on either side."""
    blocks, steps = Blocks(layers, shapes_of(model)), []
    with fake_gpu(values.__getitem__) as counts:
        for module in blocks.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(torch.empty(module.weight.shape, device="cuda"))
        optimizer = optimizer_step.CONTENDERS[contender](blocks)
        for _ in range(STEPS):
            for p in factors(blocks):
                p.grad = torch.empty_like(p)
            counts.reset()
            optimizer.step()
            steps.append(counts.kernels)
    return steps[-2:]


def estimate(contender: str, model: str, layers: int, values: dict[str, float]) -> dict:
    steps = kernels_of(contender, model, layers, values)
    every = [kernel for step in steps for kernel in step]
    products = {d: sum(k.flops for k in every if k.dtype == d) / len(steps) for d in FLOPS}
    lasting = sum(max(k.bytes / BANDWIDTH, k.flops / FLOPS[k.dtype] if k.flops else 0) for k in every)
    return {
        "flops": products,
        "bytes": sum(k.bytes for k in every) / len(steps),
        "kernels": len(every) / len(steps),
        "seconds": lasting / REACHED / len(steps),
    }


def table(model: str, rows: dict[str, dict]) -> Table:
    made = Table(title=f"{model}, layers: {MODELS[model][-1]}; estimated for an H200", box=box.MARKDOWN)
    columns = ("optimizer", "TFLOP bfloat16", "TFLOP float32", "GB", "kernels", "ms", "/ Muon")
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
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the kept results")
    if not parser.parse_args().show:
        record: dict[str, dict] = {model: {} for model in ESTIMATED}
        for contender in tqdm(CONTENDERS, leave=False):
            values = values_read(contender)
            for model in ESTIMATED:
                record[model][contender] = estimate(contender, model, MODELS[model][-1], values)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for model, rows in json.loads(RESULTS.read_text(encoding="utf-8")).items():
        Console(width=140).print(table(model, rows))


if __name__ == "__main__":
    main()
