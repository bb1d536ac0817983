"""`pion-hf plan`: routing table, learning rates, and bytes of optimizer state, without training or weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import peft
import torch
import trl
from rich.console import Console
from rich.table import Table

from pion_hf.arguments import OPTIMIZER_CLASSES
from pion_hf.cli.cpt import ScratchArguments
from pion_hf.cli.curves import check_plot, learning_rate_curves, save_plot
from pion_hf.cli.recipe import RecipeParser
from pion_hf.cli.training import ARGUMENTS, check_model, model_from_config
from pion_hf.integrations.registry import choose_form, groups_from


@dataclass
class PlanArguments:
    """What `pion-hf plan` writes besides the tables."""

    routing_file: str | None = field(default=None, metadata={"help": "Also write the routing as JSON to this file."})
    plot: str | None = field(
        default=None,
        metadata={
            "help": "Also draw the learning rates of all groups over max_steps to this picture, as in rates.png."
        },
    )


def main(argv: list[str]) -> None:
    """Build the recipe's model without weights, route it, and print what training would use."""
    arguments = (*ARGUMENTS, ScratchArguments, PlanArguments)
    parser = RecipeParser(arguments, prog="pion-hf plan", description=__doc__)
    # Nothing runs: a recipe for a GPU (bf16) can be planned where there is none.
    _, args, model_args, *_, plan_args = parser.parse_recipe(["--use_cpu", "true", *argv])
    optim = args.optim.value
    if optim not in OPTIMIZER_CLASSES:
        raise ValueError(f"plan shows this package's optimizers ({', '.join(OPTIMIZER_CLASSES)}), not optim={optim!r}")
    check_model(args, model_args)
    if plan_args.plot:
        check_plot(args, plan_args.plot)
    # As TRL's script loads it: the state is in the dtype of the weights.
    dtype = (args.model_init_kwargs or {}).get("dtype", model_args.dtype)
    model = model_without_weights(model_args.model_name_or_path, dtype=dtype, trust_remote_code=args.trust_remote_code)
    adapter = trl.get_peft_config(model_args)
    if adapter is not None:
        with torch.device("meta"):
            model = peft.get_peft_model(model, adapter)
    optim, options, group_options = choose_form(args, model)
    routing, groups = groups_from(args, model, optim, group_options)
    optimizer = OPTIMIZER_CLASSES[optim](groups, lr=args.learning_rate, **options)
    rates = {group["rule"]: group["lr"] for group in groups}
    if plan_args.routing_file:
        routing.save(plan_args.routing_file, rates)
    if plan_args.plot:
        save_plot(args, learning_rate_curves(args, optimizer, routing), plan_args.plot)
    console = Console()
    console.print(routing.table(rates))
    console.print(_cost_table(optimizer, optim, [r.parameter for r in routing]))


def model_without_weights(
    name: str, *, dtype: str | None = "float32", trust_remote_code: bool = False
) -> torch.nn.Module:
    """The model of a checkpoint folder or hub id on the meta device: all shapes, no memory.

    `dtype` is as in `from_pretrained`: `"auto"` or None is the checkpoint's own.
    """
    with torch.device("meta"):
        model = model_from_config(name, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model


def _cost_table(optimizer: torch.optim.Optimizer, optim: str, parameters: list[torch.Tensor]) -> Table:
    ours = optimizer.state_bytes()
    adamw = sum(2 * p.numel() * p.element_size() for p in parameters)
    table = Table(title="Optimizer state")
    table.add_column("optimizer")
    table.add_column("bytes", justify="right")
    table.add_column("of AdamW's", justify="right")
    table.add_row(optim, f"{ours:,}", f"{ours / adamw:.2f}")
    table.add_row("adamw_torch", f"{adamw:,}", "1.00")
    return table
