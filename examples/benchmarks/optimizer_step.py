"""What one optimizer step on whole matrices costs: time, products, state, and memory beyond those.

The hidden matrices of a few layers of known models, and the LoRA factors of SmolLM2-135M. A step moves a matrix by an
RMS of about 2e-4 under every rule, as in fine-tuning. The weights (RMS 0.05) are random with the singular values of
trained ones, `s_i = s_1 exp(-3 i / k)`: in most matrices of SmolLM2 the median is 0.2 to 0.5 of the largest. A gradient
is a persistent part of rank 4 and as much noise; three take turns.

Every contender trains a copy of its own of the same weights on the same gradients. The contenders take turns, one step
each in every round, and so do the bare products that tell what the machine can do in the same minutes. A time is the
mean of two medians, over odd steps and over even ones: rotations act on one side of a matrix at a time, and the two
differ. The first step makes the state; that of a rotation decomposes every matrix.

Products (mm, bmm, addmm, baddbmm) are counted as they run, by torch's own formulas and by precision. A contender's
share is the time that its products alone would take, each at the best rate measured for its precision (a product
hidden x inner x hidden, alone or in a batch of four), of the time that it took.

`literal` is the published rule without a thought for speed (literal_pion.py); stacks need two layers, and are left out
where there is one. LoRA factors are float32 whatever `--dtype` says, as peft keeps them.

Nothing else should run on the machine, and all contenders' weights and states are in memory at once: some 11 GB for
Qwen2.5-1.5B, 45 GB for Llama-3.1-8B, which runs on a GPU or when asked for.

The results are kept in results/optimizer_step.json, by device and model, `--only` excepted; `--show` prints them and
runs nothing.
"""

import argparse
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler warns of state that is older than itself

import lora_step
import torch
from literal_pion import LiteralPion
from lora_step import DEVICE, Blocks, factors, peak_bytes, seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm.auto import tqdm

from pion_hf import param_groups
from pion_hf._version import __version__
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES, resolve_options

RESULTS = Path(__file__).parent / "results" / "optimizer_step.json"
LORA = "SmolLM2-135M-LoRA"
# model -> hidden size, width of keys and values, width of the MLP, and layers taken.
MODELS = {
    "SmolLM2-135M": (576, 192, 1536, 4),
    "Qwen2.5-0.5B": (896, 128, 4864, 2),
    "Qwen2.5-1.5B": (1536, 256, 8960, 1),
    "Llama-3.1-8B": (4096, 1024, 14336, 1),
    LORA: (576, 192, 1536, 30),
}
FOR_GPUS = ("Llama-3.1-8B",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GRADIENTS, DOMINANT = 3, 4
PRODUCT_BATCH = 4

LR, RMS = 1e-3, 0.2
STEP = LR * RMS  # for rules whose step has an RMS of about the learning rate

Build = Callable[[nn.Module], torch.optim.Optimizer]


def ours(optim: str, lr: float = LR, **options: object) -> Build:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        own, routed = resolve_options(optim, options)
        return OPTIMIZER_CLASSES[optim](param_groups(model, optim, lr=lr, **routed), lr=lr, **own)

    return build


def pion(direction: str, metric: str, **options: object) -> Build:
    size = {"lr": STEP, "scale": "none"} if direction == "adam" else {}
    frame = {"momentum_frame": "transported"} if direction == "natural" else {}
    return ours("pion", direction=direction, metric=metric, **{**size, **frame, **options})


# Direction and metric of what has a name of its own.
NAMES = {("gradient", "lie"): "pion", ("natural", "ambient"): "pion_ambient"}
CONTENDERS: dict[str, Build] = {
    "AdamW, fused": lambda model: torch.optim.AdamW(factors(model), lr=STEP, weight_decay=0.0, fused=True),
    "torch Muon": lambda model: torch.optim.Muon(
        factors(model), lr=LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    ),
    "literal lie": lambda model: LiteralPion(factors(model), LR, momentum="lie"),
    "literal transported": lambda model: LiteralPion(factors(model), LR, momentum="transported"),
    "pion, paper": ours("pion", preset="paper"),
    "pion, lie momentum": pion("gradient", "lie", momentum_frame="lie"),
    **{
        NAMES.get((direction, metric), f"pion, {direction}, {metric}"): pion(direction, metric)
        for direction in ("gradient", "natural", "adam", "polar", "msign")
        for metric in ("lie", "ambient")
        if (direction, metric) != ("msign", "ambient")
    },
    "pion, transported": pion("gradient", "lie", momentum_frame="transported"),
    "pion_ambient, not transported": pion("natural", "ambient", momentum_frame="ambient"),
    "pion, polar, lie, 3 polar steps": pion("polar", "lie", polar_steps=3),
    "pion, compiled": pion("gradient", "lie", compile=True),
    "pion_ambient, compiled": pion("natural", "ambient", compile=True),
    "teon, stack 1 (muon)": ours("muon"),
    "teon, stack 1 (muon), compiled": ours("muon", compile=True),
    "teon, stack 2": ours("teon", stack=2),
}
LORA_CONTENDERS: dict[str, Build] = {
    name: partial(lora_step.optimizer_of, *lora_step.CONTENDERS[name])
    for name in ("AdamW, fused", "Riemannian AdamW (peft)", "muon", "teon_lora", "pion_lora")
}
# Times are given in units of these where they ran.
UNITS = {
    "AdamW, fused": "AdamW",
    "torch Muon": "Muon",
    "literal lie": "lit. lie",
    "literal transported": "lit. transp.",
}


class Products(TorchDispatchMode):
    """Flops of the matrix products that run under it, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            factors = [a for a in args if isinstance(a, Tensor)]  # of bfloat16 ones the result may be float32
            self.flops[str(factors[-1].dtype).removeprefix("torch.")] += formula(*factors, out_val=out)
        return out


def shapes_of(model: str) -> dict[str, tuple[int, int]]:
    """The `(in, out)` of every projection of a layer."""
    hidden, keys, inner, _ = MODELS[model]
    attention = {"q_proj": (hidden, hidden), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
    mlp = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    return {**attention, "o_proj": (hidden, hidden), **mlp}


def build_model(name: str, layers: int, dtype: torch.dtype) -> nn.Module:
    if name == LORA:
        return lora_step.adapted(layers, shapes_of(name))
    torch.manual_seed(0)
    model = Blocks(layers, shapes_of(name)).to(DEVICE, dtype)
    for p in factors(model):
        p.data.copy_(like_trained(*p.shape))
    return model


def like_trained(m: int, n: int) -> Tensor:
    """Random singular vectors, exponentially decaying singular values, RMS 0.05."""
    k = min(m, n)
    left, right = (torch.linalg.qr(torch.randn(size, k, device=DEVICE)).Q for size in (m, n))
    w = (left * torch.exp(-3 * torch.arange(k, device=DEVICE) / k)) @ right.T
    return w * (0.05 / w.square().mean().sqrt())


def gradients(params: list[nn.Parameter]) -> list[list[Tensor]]:
    """A few gradients of every parameter: a low-rank part that they share, and noise of the same norm."""

    def of(p: nn.Parameter) -> list[Tensor]:
        m, n = p.shape
        shared = torch.randn(m, DOMINANT, device=DEVICE) @ torch.randn(DOMINANT, n, device=DEVICE) / DOMINANT**0.5
        return [(1e-3 * (shared + torch.randn(m, n, device=DEVICE))).to(p.dtype) for _ in range(GRADIENTS)]

    return [list(cycle) for cycle in zip(*map(of, params), strict=True)]


def bare_products(name: str) -> dict[str, list[tuple[int, Callable[[], Tensor]]]]:
    """By dtype: flops and the call, of one product and of a batch."""
    hidden, _, inner, _ = MODELS[name]

    def calls(dtype: torch.dtype) -> list[tuple[int, Callable[[], Tensor]]]:
        x = torch.randn(PRODUCT_BATCH, hidden, inner, device=DEVICE).to(dtype)
        y, flops = x.mT.contiguous(), 2 * hidden**2 * inner
        return [(flops, lambda: x[0] @ y[0]), (PRODUCT_BATCH * flops, lambda: x @ y)]

    return {dtype: calls(DTYPES[dtype]) for dtype in DTYPES}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def twice(step: Callable[[], object]) -> Callable[[], object]:
    return lambda: (step(), step())


def measure(name: str, contenders: dict[str, Build], layers: int, dtype: torch.dtype, rounds: int) -> dict:
    model = build_model(name, layers, dtype)
    params = factors(model)
    cycle = gradients(params)
    weights = {contender: [p.detach().clone() for p in params] for contender in contenders}
    optimizers = {contender: build(model) for contender, build in contenders.items()}

    def ready(contender: str, step: int) -> Callable[[], object]:
        """The contender's step, its weights and the gradients of step number `step` in place."""
        for p, w, g in zip(params, weights[contender], cycle[step % GRADIENTS], strict=True):
            p.data, p.grad = w, g.clone()  # peft's preconditions it in place
        return optimizers[contender].step

    rows = {}
    for contender in contenders:
        first = seconds(ready(contender, 0))
        # Two steps, one on either side. What is compiled cannot be seen into, and holds no products.
        with torch.compiler.set_stance("force_eager"), Products() as products:
            ready(contender, 1)()
            ready(contender, 2)()
        rows[contender] = {"first": first, "flops": {d: products.flops[d] / 2 for d in DTYPES}}

    times = {contender: [] for contender in contenders}
    bare = bare_products(name)
    rates = {d: [[] for _ in calls] for d, calls in bare.items()}
    for step in tqdm(range(3, 3 + rounds), desc=name, leave=False):
        for d, calls in bare.items():
            for (flops, product), seen in zip(calls, rates[d], strict=True):
                seen.append(flops / seconds(product))
        for contender in contenders:
            times[contender].append(seconds(ready(contender, step)))

    for contender, row in rows.items():
        row["seconds"] = statistics.mean(statistics.median(times[contender][side::2]) for side in (0, 1))
        row["state"] = state_bytes(optimizers[contender])
        both_sides = twice(ready(contender, 0))
        row["extra"] = peak_bytes(both_sides, both_sides)
    return {
        "layers": layers,
        "matrices": len(params),
        "parameters": sum(p.numel() for p in params),
        "rounds": rounds,
        "torch": torch.__version__,
        "version": __version__,
        "rates": {d: max(map(statistics.median, seen)) for d, seen in rates.items()},
        "rows": rows,
    }


def table(device: str, title: str, result: dict) -> Table:
    rows, rates, size = result["rows"], result["rates"], result["parameters"]
    shown = Table(title=f"{title}: {result['matrices']} matrices, {size / 1e6:.1f} M parameters; {device}")
    shown.caption = "Products reach " + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {d}" for d, rate in rates.items())
    units = {name: unit for name, unit in UNITS.items() if name in rows}
    counts = [f"GFLOP {d}" for d in rates]
    ratios = [f"/ {unit}" for unit in units.values()]
    for column in ("optimizer", "ms", *ratios, *counts, "share", "state B/param", "extra MB", "first ms"):
        shown.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=True)
    for name, row in rows.items():
        shown.add_row(
            name,
            f"{row['seconds'] * 1e3:.2f}",
            *(f"{row['seconds'] / rows[unit]['seconds']:.2f}" for unit in units),
            *(f"{row['flops'][d] / 1e9:.2f}" for d in rates),
            f"{sum(row['flops'][d] / rate for d, rate in rates.items()) / row['seconds']:.0%}",
            f"{row['state'] / size:.1f}",
            f"{row['extra'] / 1e6:.1f}",
            f"{row['first'] * 1e3:.1f}",
        )
    return shown


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


def contenders_for(model: str, layers: int, only: list[str] | None) -> dict[str, Build]:
    of_model = LORA_CONTENDERS if model == LORA else CONTENDERS
    stackable = layers > 1 or model == LORA
    return {
        name: build
        for name, build in of_model.items()
        if (only is None or name in only) and (stackable or name != "teon, stack 2")
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [model for model in MODELS if DEVICE == "cuda" or model not in FOR_GPUS]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=usual, help=f"default: {', '.join(usual)}")
    names = list({**CONTENDERS, **LORA_CONTENDERS})
    parser.add_argument("--only", nargs="+", choices=names, metavar="CONTENDER", help=f"of: {'; '.join(names)}")
    parser.add_argument("--layers", type=int, help="layers of every model (default: 30 of LoRA, else 4 to 1)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each, 2 or more (default: 10)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    parser.add_argument("--threads", type=int, help="of the processor (default: torch's)")
    parser.add_argument("--show", action="store_true", help="print the kept results")
    chosen = parser.parse_args()
    for option in ("layers", "rounds", "threads"):
        least, value = 2 if option == "rounds" else 1, getattr(chosen, option)
        if value is not None and value < least:
            parser.error(f"--{option} must be {least} or more, got {value}")
    return chosen


def main() -> None:
    chosen = arguments()
    console = Console(width=170)
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if chosen.show:
        for device, results in record.items():
            for title, result in results.items():
                console.print(table(device, title, result))
        return
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    for model in chosen.models:
        layers = chosen.layers or MODELS[model][-1]
        contenders = contenders_for(model, layers, chosen.only)
        if not contenders:
            continue
        title = f"{model}, {'float32' if model == LORA else chosen.dtype}"
        result = measure(model, contenders, layers, DTYPES[chosen.dtype], chosen.rounds)
        console.print(table(device_name(), title, result))
        if chosen.only is None:
            record.setdefault(device_name(), {})[title] = result
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
