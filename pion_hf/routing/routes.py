"""Where every parameter of a model goes, and how that is told: as a table, and as `routing.json`."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn

from pion_hf.errors import listing
from pion_hf.optim.blocks import Layout, name_of
from pion_hf.optim.options import usual_rates
from pion_hf.routing.stacks import Stacks

PLAIN_WIDTH = 120  # of a table as text
NO_STACKS = Stacks()


@dataclasses.dataclass(frozen=True)
class Route:
    """Where one parameter goes. `matrices` counts what it holds, `decays` says whether weight decay may act.

    gain: whether it is a factor that weight decay should not pull to zero (see `Structure.is_gain`).
    method, unit_step, effective: of LoRA factors, what they do, how far they step at a learning rate of 1, and whether
    their adapter has an effect already (see `optim.lora`).
    """

    name: str
    parameter: nn.Parameter = dataclasses.field(repr=False, compare=False)
    role: str
    rule: str
    layout: str = ""
    matrices: int = 0
    gain: bool = False
    method: str = ""
    unit_step: float = 0.0
    effective: bool = False

    @property
    def decays(self) -> bool:
        """Decay never touches biases, norms and other gains; a rotated matrix has none either."""
        return not (self.rule == "pion" or self.method == "rotate" or self.gain or self.role in ("norm", "bias"))

    @property
    def matrix_names(self) -> list[str]:
        """One name for every view of the parameter (experts in one tensor are one view)."""
        count = Layout.parse(self.layout).pieces
        return [name_of(self.name, i, count) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Routing:
    """All trainable parameters of a model, routed for the optimizer `optim`; prints as a table."""

    routes: tuple[Route, ...]
    frozen: int
    optim: str
    stack: int = 1
    stacks: Stacks = NO_STACKS

    def __iter__(self) -> Iterator[Route]:
        return iter(self.routes)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=PLAIN_WIDTH)
        with console.capture() as captured:
            console.print(self.table({}))
        return captured.get()

    @property
    def matrices(self) -> tuple[Route, ...]:
        """The routes that do not lead to AdamW."""
        return tuple(r for r in self.routes if r.rule != "adamw")

    @property
    def zeros(self) -> list[str]:
        """Names of hidden matrices that are left to AdamW because they are zero at the start."""
        return [r.name for r in self.routes if r.role == "zero"]

    def rows(self, learning_rates: dict[str, float]) -> list[dict[str, Any]]:
        """One row per role and rule: role, rule, tensors, matrices, stacks, parameters, lr (from `learning_rates`)."""
        collected: dict[tuple, Counter] = defaultdict(Counter)
        first = {names[0] for names in self.stacks.stacks}
        for r in self.routes:
            role = _matrix_role(r) if r.rule != "adamw" else r.role
            row = collected[role, r.rule]
            row["tensors"] += 1
            row["matrices"] += r.matrices
            row["stacks"] += sum(name in first for name in r.matrix_names)
            row["parameters"] += r.parameter.numel()
        roles = [role for role, _ in collected]  # what is left over of a role stands beside its stacks
        return [
            {"role": role, "rule": rule, **counts, "lr": learning_rates.get(rule)}
            for (role, rule), counts in sorted(collected.items(), key=lambda item: roles.index(item[0][0]))
        ]

    def table(self, learning_rates: dict[str, float]) -> Any:
        """The rows as a `rich.table.Table`."""
        from rich.markup import escape
        from rich.table import Table

        stacked = bool(self.stacks.stacks)
        counts = ("tensors", "matrices", "stacks", "parameters") if stacked else ("tensors", "matrices", "parameters")
        table = Table("role", "rule", title="Which rule updates what")
        for column in (*counts, "lr"):
            table.add_column(column, justify="right")
        for row in self.rows(learning_rates):
            lr = "" if row["lr"] is None else f"{row['lr']:g}"
            table.add_row(escape(row["role"]), row["rule"], *(f"{row[c]:,}" for c in counts), lr)
        if self.frozen:
            table.add_row("(frozen)", "-", *("" for _ in counts[:-1]), f"{self.frozen:,}", "")
        said = []
        if learning_rates:
            said.append(f"Usual learning rates of {self.optim} in fine-tuning: {usual_rates(self.optim)}.")
        if stacked:
            said.append(f"Stacks of {self.stack} consecutive layers.")
        if self.stacks.alone:
            said.append(escape(f"Left over, each alone: {listing(self.stacks.alone)}."))
        table.caption = " ".join(said)
        return table

    def record(self, learning_rates: dict[str, float]) -> dict[str, Any]:
        """What `routing.json` holds: the summary rows and, for every parameter, its role, rule, layout and shape."""
        return {
            "summary": self.rows(learning_rates),
            "frozen_parameters": self.frozen,
            "stacks": [list(names) for names in self.stacks.stacks],
            "left_over": list(self.stacks.alone),
            "parameters": [
                {
                    "name": r.name,
                    "role": r.role,
                    "rule": r.rule,
                    "layout": r.layout,
                    "matrices": r.matrices,
                    **({"method": r.method, "unit_step": r.unit_step} if r.method else {}),
                    "shape": list(r.parameter.shape),
                }
                for r in self.routes
            ],
        }


def _matrix_role(route: Route) -> str:
    """The module's own name, which is how people know a projection (`q_proj`); of adapters with the factor."""
    if route.method:
        return (
            f"{route.name.partition('.lora_')[0].rpartition('.')[2]} {route.role.removeprefix('lora_')}, {route.method}"
        )
    parts = [p for p in route.name.split(".") if p not in ("weight", "default", "modules_to_save", "base_layer")]
    return parts[-1] if parts else route.name
