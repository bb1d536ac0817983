"""What a rule makes of rows whose gradients are small: how much of its update they take.

A 128 x 128 matrix at random, 200 steps of gradients that are noise, two of whose rows are ten times smaller. Printed is
these rows' share of the update's energy, on average over the last 100 steps: of the direction, as it is without
rotations, and of what the optimizer does. Their number makes 1.6 % of the rows.
"""

import torch
from rich.console import Console
from rich.table import Table

from pion_hf import Pion
from pion_hf.optim.batches import Step
from pion_hf.optim.directions import direction_of

SIZE, SMALL, TIMES, STEPS, COUNTED = 128, 2, 10, 200, 100
RULES = {
    "gradient": {},
    "adam": {"direction": "adam", "metric": "ambient"},
    "natural": {"preset": "ambient"},
}


def share(update: torch.Tensor) -> float:
    return (update[:SMALL].square().sum() / update.square().sum()).item()


def shares(options: dict) -> tuple[float, float]:
    """Of the direction, and of the steps that the optimizer takes."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(SIZE, SIZE))
    optimizer, state, found = Pion([weight], lr=1e-4, **options), {}, []
    group = optimizer.param_groups[0]
    kept = {key: group[key] for key in ("betas", "eps", "polar", "polar_steps")}
    for number in range(1, STEPS + 1):
        weight.grad = torch.randn(SIZE, SIZE)
        weight.grad[:SMALL] /= TIMES
        grad, before = weight.grad.unsqueeze(0).clone(), weight.detach().clone()
        direction = direction_of(grad, state, kind=group["direction"], step=Step((number,), None), **kept)[0].clone()
        optimizer.step()
        found.append((share(direction), share(weight.detach() - before)))
    return tuple(sum(column) / COUNTED for column in zip(*found[-COUNTED:], strict=True))


def main() -> None:
    title = f"Share of {SMALL} rows of {SIZE}, {TIMES} times smaller"
    table = Table(title=title)
    for column in ("direction", "of the direction", "of the update"):
        table.add_column(column, justify="left" if column == "direction" else "right")
    for name, options in RULES.items():
        table.add_row(name, *(f"{value:.1%}" for value in shares(options)))
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
