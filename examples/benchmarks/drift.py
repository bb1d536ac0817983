"""What precision and retraction do to the spectrum: drift of singular values over a thousand steps.

Two matrices of SmolLM2-135M-Instruct's first layer (its `q_proj`, which is rank-deficient, and the wide `k_proj`) take
1,000 steps under every combination, on gradients that are a persistent part of rank 4 and as much noise. The drift is
the largest change of a singular value, relative to the matrix's largest; "moved" is how far the matrices have come,
relative to their norm. "As on a GPU": the processor cuts large float32 products in halves of bfloat16, as steps do on a
GPU, and knows norms and angles a step late.

Needs models/smollm2-135m-instruct (`make demo` makes it). The results are kept in results/drift.json (`--show` prints
them and runs nothing).
"""

import argparse
import contextlib
import json
from pathlib import Path

import torch
from fake_gpu import like_a_gpu
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from pion_hf import Pion
from pion_hf.linalg.spectrum import singular_values, spectral_drift
from pion_hf.optim.precision import join

RESULTS = Path(__file__).parent / "results" / "drift.json"
MODEL = "models/smollm2-135m-instruct"
MATRICES = ("self_attn.q_proj", "self_attn.k_proj")
STEPS, DOMINANT = 1000, 4

DEFAULT, LIE = "default (natural, ambient)", "gradient, lie"
RULES = {DEFAULT: {}, LIE: {"direction": "gradient", "metric": "lie"}}
RATE = 1e-3
AS_ON_A_GPU = {"generator_dtype": "bfloat16", "products": "as on a GPU"}
# (rule, what is unlike the default, weights' dtype); the learning rate is RATE times the last entry.
COMBINATIONS = [
    (LIE, {"generator_dtype": "float32"}, "float32", 1),
    (LIE, {"generator_dtype": "bfloat16"}, "float32", 1),
    (DEFAULT, {"generator_dtype": "float32"}, "float32", 1),
    (DEFAULT, {"generator_dtype": "bfloat16"}, "float32", 1),
    (DEFAULT, {"generator_dtype": "bfloat16"}, "float32", 10),
    (DEFAULT, {"retraction": "taylor"}, "float32", 10),
    (DEFAULT, {"generator_dtype": "bfloat16"}, "bfloat16", 1),
    (LIE, AS_ON_A_GPU, "float32", 1),
    (DEFAULT, AS_ON_A_GPU, "float32", 1),
    (DEFAULT, AS_ON_A_GPU, "float32", 10),
]


def weights() -> dict[str, Tensor]:
    layer = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).model.layers[0]
    return {name: layer.get_submodule(name).weight.detach().clone() for name in MATRICES}


def run(start: dict[str, Tensor], rule: str, options: dict, dtype: str, factor: float) -> dict:
    draw = torch.Generator().manual_seed(0)
    params = {name: nn.Parameter(w.to(getattr(torch, dtype), copy=True)) for name, w in start.items()}
    before = {name: p.detach().clone().float() for name, p in params.items()}
    lasting = {n: torch.randn(len(p), DOMINANT, generator=draw) for n, p in params.items()}
    lasting = {n: a @ torch.randn(DOMINANT, params[n].shape[1], generator=draw) for n, a in lasting.items()}
    options = dict(options)
    products = like_a_gpu() if options.pop("products", None) else contextlib.nullcontext()
    optimizer = Pion(list(params.items()), lr=factor * RATE, **RULES[rule], **options)
    with products:
        for _ in tqdm(range(STEPS), desc=f"{rule}, {options}, {dtype}", leave=False):
            for name, p in params.items():
                noise = torch.randn(p.shape, generator=draw)
                p.grad = (1e-3 * (lasting[name] / DOMINANT**0.5 + noise)).to(p.dtype)
            optimizer.step()
    after = {name: whole(p, optimizer.state[p]) for name, p in params.items()}
    drift = [spectral_drift(singular_values(before[n]), singular_values(after[n])).item() for n in params]
    moved = [((after[n] - before[n]).norm() / before[n].norm()).item() for n in params]
    return {"drift": max(drift), "moved": min(moved)}


def whole(p: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The weight with the bits that a half-precision parameter drops."""
    return join(p.detach(), state["rest"]) if "rest" in state else p.detach()


def show(rows: list[dict]) -> None:
    table = Table(title=f"Drift of the spectrum over {STEPS:,} steps")
    for column in ("rule", "lr", "weights", "option", "drift", "moved"):
        table.add_column(column, justify="right" if column in ("lr", "drift", "moved") else "left")
    for row in rows:
        option = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        cells = f"{row['lr']:g}", row["dtype"], option, f"{row['drift']:.0e}", f"{row['moved']:.2f}"
        table.add_row(row["rule"], *cells)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the committed results")
    if not parser.parse_args().show:
        start, rows = weights(), []
        for rule, options, dtype, factor in COMBINATIONS:
            measured = run(start, rule, options, dtype, factor)
            rows.append({"rule": rule, "options": options, "dtype": dtype, "lr": factor * RATE, **measured})
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
