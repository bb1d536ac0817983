"""Why `root` is the default retraction: orthogonality and price beside Cayley's and the paper's Taylor series.

For rotation angles of fine-tuning and beyond it prints how far `E^T E` is from the identity in float32 (1e-7 or so is
rounding), and the median time of rotating a matrix of SmolLM2's shape (576 x 1536, from its larger side), relative to
Cayley's.
"""

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from pion_hf.linalg.rotation import RETRACTIONS, Generator, skew

ANGLES = (1e-3, 1e-2, 1e-1, 4e-1, 1.0)
ROWS, SIDE, REPEATS = 576, 1536, 7


def generator(angle: float, n: int) -> Generator:
    """Of that angle, formed in bfloat16 as the optimizer does where that is faster."""
    x = skew(torch.randn(1, n, n, generator=torch.Generator().manual_seed(0)))
    low = (x * (angle / torch.linalg.matrix_norm(x, 2).item())).bfloat16()
    return Generator(low.float(), low=low)


def defect(retraction: str, angle: float, n: int = 256) -> float:
    increment = generator(angle, n).increment(1.0, retraction=retraction, rows=1)
    eye = torch.eye(n).unsqueeze(0)
    e = (eye + increment.change(eye)).double()
    return (e.mT @ e - torch.eye(n, dtype=torch.float64)).abs().max().item()


def seconds(retraction: str, angle: float) -> float:
    a, w = generator(angle, SIDE), torch.randn(1, ROWS, SIDE)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        a.increment(1.0, retraction=retraction, rows=ROWS).change(w)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    table = Table(title=f"Rotating {ROWS} x {SIDE} in float32: |E^T E - I| and time (Cayley = 1)")
    table.add_column("angle")
    for retraction in RETRACTIONS:
        table.add_column(retraction, justify="right")
    for angle in tqdm(ANGLES, desc="Angles", leave=False):
        cost = {r: seconds(r, angle) for r in RETRACTIONS}
        cells = (f"{defect(r, angle):.0e}  {cost[r] / cost['cayley']:.2f}" for r in RETRACTIONS)
        table.add_row(f"{angle:g}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
