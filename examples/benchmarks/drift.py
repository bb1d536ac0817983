"""What precision and retraction do to the spectrum: drift of singular values over a thousand steps.

Two matrices of SmolLM2-135M-Instruct's first layer (the wide `k_proj` and `v_proj`) take 1,000 steps under every
combination, on gradients that are a persistent part of rank 4 and as much noise. "Turning" ones jump and turn every
hundred steps: the persistent part lies along the matrix's leading singular directions, then along its last ones, and
the gradient is a thousand times larger, as before, a thousand times smaller, as before.

The drift is the largest change of a singular value of the float32 weights, those of the state where the parameters are
bfloat16, relative to the matrix's largest; "moved" is how far the matrices have come, relative to their norm; "clipped"
counts steps of a matrix that were shortened. "As on a GPU": the processor cuts float32 products in halves of bfloat16.

Needs models/smollm2-135m-instruct (`make demo` makes it). The results are kept in results/drift.json (`--show` prints
them and runs nothing).
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from fake_gpu import like_a_gpu
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from pion_hf import Pion
from pion_hf.linalg.rotation import Factors, product_of
from pion_hf.linalg.spectrum import singular_values, spectral_drift

RESULTS = Path(__file__).parent / "results" / "drift.json"
MODEL = "models/smollm2-135m-instruct"
MATRICES = ("self_attn.k_proj", "self_attn.v_proj")
STEPS, DOMINANT = 1000, 4

AMBIENT, LIE = "natural, ambient", "gradient, lie"
RULES = {AMBIENT: {"direction": "natural", "metric": "ambient", "momentum_frame": "transported"}, LIE: {}}
RATE = 1e-3
AS_ON_A_GPU = {"generator_dtype": "bfloat16", "products": "as on a GPU"}
TURN = 100
JUMPS = (1.0, 1e3, 1.0, 1e-3)
# (rule, what is unlike the default, weights' dtype, whether gradients turn); the learning rate is RATE times the last.
COMBINATIONS = [
    (LIE, AS_ON_A_GPU, "float32", False, 1),
    (LIE, AS_ON_A_GPU, "float32", True, 100),
    (AMBIENT, AS_ON_A_GPU, "bfloat16", True, 10),
    (AMBIENT, AS_ON_A_GPU, "float32", True, 300),
]


def weights() -> dict[str, Tensor]:
    layer = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).model.layers[0]
    return {name: layer.get_submodule(name).weight.detach().clone() for name in MATRICES}


def gradients(start: dict[str, Tensor], turning: bool) -> Iterator[dict[str, Tensor]]:
    """Of every step, of all matrices."""
    draw = torch.Generator().manual_seed(0)
    lasting = {n: [_low_rank(*_directions(w, turning, last), draw) for last in (False, True)] for n, w in start.items()}
    for step in range(STEPS):
        turn = step // TURN if turning else 0
        noise = {name: torch.randn(w.shape, generator=draw) for name, w in start.items()}
        yield {n: 1e-3 * JUMPS[turn % len(JUMPS)] * (lasting[n][turn % 2] + noise[n]) for n in start}


def _directions(w: Tensor, singular: bool, last: bool) -> tuple[Tensor, Tensor]:
    """Outputs and inputs that the persistent part is of: all of them, or the leading or last singular directions."""
    if not singular:
        return torch.eye(w.shape[0]), torch.eye(w.shape[1])
    u, _, vh = torch.linalg.svd(w.double(), full_matrices=False)
    chosen = slice(-DOMINANT, None) if last else slice(DOMINANT)
    return u[:, chosen].float(), vh[chosen].float()


def _low_rank(outputs: Tensor, inputs: Tensor, draw: torch.Generator) -> Tensor:
    """Of rank `DOMINANT`, with entries of a root mean square of 1."""
    left = torch.randn(outputs.shape[1], DOMINANT, generator=draw)
    x = outputs @ left @ torch.randn(DOMINANT, inputs.shape[0], generator=draw) @ inputs
    return x / x.square().mean().sqrt()


def run(start: dict[str, Tensor], rule: str, options: dict, dtype: str, turning: bool, factor: float) -> dict:
    params = {name: nn.Parameter(w.to(getattr(torch, dtype), copy=True)) for name, w in start.items()}
    before = {name: p.detach().clone().float() for name, p in params.items()}
    options = dict(options)
    products = like_a_gpu() if options.pop("products", None) else contextlib.nullcontext()
    optimizer = Pion(list(params.items()), lr=factor * RATE, **RULES[rule], **options)
    title = f"{rule}, {options}, {dtype}"
    with products:
        for given in tqdm(gradients(start, turning), title, total=STEPS, leave=False):
            for name, p in params.items():
                p.grad = given[name].to(p.dtype)
            optimizer.step()
    after = {name: whole(p, optimizer.state[p]) for name, p in params.items()}
    drift = [spectral_drift(singular_values(before[n]), singular_values(after[n])).item() for n in params]
    moved = [((after[n] - before[n]).norm() / before[n].norm()).item() for n in params]
    return {"drift": max(drift), "moved": min(moved), "clipped": optimizer.clipped_steps}


def whole(p: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The float32 weight; of a half-precision parameter that of the state."""
    if p.dtype == torch.float32:
        return p.detach()
    factors = Factors(*(state[f"{name}.0"] for name in Factors._fields))
    return product_of(factors, transposed=p.shape[0] > p.shape[1])[0]


def show(rows: list[dict]) -> None:
    table = Table(title=f"Drift of the spectrum over {STEPS:,} steps")
    numbers = "lr", "drift", "moved", "clipped"
    for column in ("rule", "lr", "weights", "gradients", "option", "drift", "moved", "clipped"):
        table.add_column(column, justify="right" if column in numbers else "left")
    for row in rows:
        option = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        gradients = "turning" if row["turning"] else "steady"
        figures = f"{row['drift']:.0e}", f"{row['moved']:.2f}", f"{row['clipped']:,}"
        table.add_row(row["rule"], f"{row['lr']:g}", row["dtype"], gradients, option, *figures)
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the committed results")
    if not parser.parse_args().show:
        start, rows = weights(), []
        for rule, options, dtype, turning, factor in COMBINATIONS:
            measured = run(start, rule, options, dtype, turning, factor)
            kind = {"rule": rule, "options": options, "dtype": dtype, "turning": turning, "lr": factor * RATE}
            rows.append({**kind, **measured})
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
