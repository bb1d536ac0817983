"""`pion-hf plan`: routing table, learning rates, memory of a step and bytes of optimizer state, without weights."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import peft
import torch
import trl
from rich.console import Console
from rich.table import Column, Table
from transformers import PreTrainedModel, TrainingArguments

from pion_hf.cli import flags
from pion_hf.cli.configs import local_config
from pion_hf.cli.corpus import set_budget
from pion_hf.cli.curves import check_plot, learning_rate_curves, save_plot
from pion_hf.cli.flags import FLAGS, CorpusArguments, PlanArguments
from pion_hf.cli.memory import Memory, estimate, memory_table, quantized_bytes
from pion_hf.cli.recipe import named_keys
from pion_hf.cli.training import check_model, model_from_config
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES
from pion_hf.integrations.handler import choose_form, groups_from
from pion_hf.optim.blocks import Layout, merge_rows, split
from pion_hf.optim.lora import USUAL_RANK, rate_at
from pion_hf.routing.routes import Routing
from pion_hf.runs.folder import write_json


@dataclass(frozen=True)
class Plan:
    """What a recipe would do: its optimizer over the routed parameters, and the memory of a step, AdamW's beside it.

    length: tokens of a row, of which a step on one device takes `args.per_device_train_batch_size`.
    """

    args: TrainingArguments
    optim: str
    routing: Routing
    optimizer: torch.optim.Optimizer
    length: int
    memory: Memory
    adamw: Memory

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of every rule."""
        return {group["rule"]: group["lr"] for group in self.optimizer.param_groups}

    def tables(self) -> list[Table]:
        """Routing, memory, and the optimizer's state in bytes."""
        memory = memory_table(self.optim, self.memory, self.adamw)
        memory.caption = (
            f"One device, {self.args.per_device_train_batch_size} rows of {self.length:,} tokens,\n"
            f"activation checkpointing {'on' if self.args.gradient_checkpointing else 'off'}."
        )
        return [
            self.routing.table(self.rates),
            memory,
            _state_table(self.optim, self.memory.state, self.adamw.state),
            _update_table(self.optimizer.param_groups),
        ]


def main(argv: list[str]) -> None:
    """Build the recipe's model without weights, route it, and print what training would use."""
    args, model_args, plan_args, on_cpu = parse(argv)
    if plan_args.plot:
        check_plot(args, plan_args.plot)
    plan = make_plan(args, model_args, on_cpu=on_cpu)
    if plan_args.routing_file:
        write_json(plan_args.routing_file, plan.routing.record(plan.rates))
    if plan_args.plot:
        save_plot(args, learning_rate_curves(args, plan.optimizer, plan.routing), plan_args.plot)
    console = Console()
    for table in plan.tables():
        console.print(table)


def make_plan(args: TrainingArguments, model_args: trl.ModelConfig, *, on_cpu: bool = False) -> Plan:
    """What training with these arguments would do. on_cpu: of the memory that the loss takes."""
    optim = args.optim.value
    if optim not in OPTIMIZER_CLASSES:
        raise ValueError(f"plan shows this package's optimizers ({', '.join(OPTIMIZER_CLASSES)}), not optim={optim!r}")
    check_model(args, model_args)
    model, quantized = _trained_model(args, model_args)
    optim, options, group_options = choose_form(args, model)
    routing, groups = groups_from(args, model, optim, group_options)
    optimizer = OPTIMIZER_CLASSES[optim](groups, lr=args.learning_rate, **options)
    # Rows are as long as SFT cuts them, answers as GRPO does: None is no limit but the model's.
    length = getattr(args, "max_length", None) or getattr(args, "max_completion_length", None)
    length = length or getattr(model.config, "max_position_embeddings", 1024)
    memory = estimate(
        model, args, length=length, state_bytes=optimizer.state_bytes(), quantized=quantized, on_cpu=on_cpu
    )
    adamw = dataclasses.replace(memory, state=sum(2 * r.parameter.nbytes for r in routing))
    return Plan(args, optim, routing, optimizer, length, memory, adamw)


def model_without_weights(
    name: str, *, dtype: str | None = "float32", revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a checkpoint folder or hub id on the meta device: all shapes, no memory.

    `dtype` is as in `from_pretrained`: `"auto"` or None is the checkpoint's own.
    """
    remote = {"revision": revision, "trust_remote_code": trust_remote_code}
    source = local_config(name, **remote)
    try:
        with torch.device("meta"):
            model = model_from_config(name if source is None else source, dtype=dtype, **remote)
    except ValueError as error:
        if source is not None:
            raise
        raise ValueError(
            f"{error} It is no folder with a config, nor in the hub's cache or in this package: with a network, "
            f"`hf download {name} config.json` brings it."
        ) from None
    model.tie_weights()
    return model


def parse(argv: list[str]) -> tuple[TrainingArguments, trl.ModelConfig, PlanArguments, bool]:
    """What `argv` says, by the flags of `grpo` if it names one of its own; the last: whether it is for a CPU."""
    of = "grpo" if named_keys(argv) & (_flags(FLAGS["grpo"]) - _flags(FLAGS["cpt"])) else "cpt"
    parser = flags.parser("plan", (*FLAGS[of], PlanArguments))
    # Nothing runs: a recipe for a GPU (bf16) can be planned where there is none.
    _, args, model_args, *rest, plan_args = parser.parse_recipe(["--use_cpu", "true", *argv], trains=False)
    if isinstance(rest[-1], CorpusArguments):
        set_budget(args, rest[-1])
    return args, model_args, plan_args, bool(parser.get_default("use_cpu"))


def _flags(arguments: tuple[Any, ...]) -> set[str]:
    return {f.name for of in arguments for f in dataclasses.fields(of)}


def _trained_model(args: TrainingArguments, model_args: trl.ModelConfig) -> tuple[torch.nn.Module, dict[int, int]]:
    """The model as TRL's script would load it, on meta, and the bytes of parameters that it would quantize."""
    options = args.model_init_kwargs or {}
    model = model_without_weights(
        model_args.model_name_or_path,
        dtype=options.get("dtype", model_args.dtype),
        revision=options.get("revision", model_args.model_revision),
        trust_remote_code=args.trust_remote_code,
    )
    quantized = {}
    if model_args.load_in_4bit or model_args.load_in_8bit:
        bits = 4 if model_args.load_in_4bit else 8
        quantized = quantized_bytes(model, bits=bits, nested=model_args.use_bnb_nested_quant)
    adapter = trl.get_peft_config(model_args)
    if adapter is not None:
        with torch.device("meta"):
            model = peft.get_peft_model(model, adapter)
    if quantized:  # TRL trains adapters of such a model in bfloat16, but for DoRA's magnitudes
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_magnitude_vector" not in name:
                p.data = p.data.to(torch.bfloat16)
    return model, quantized


def _update_table(groups: list[dict[str, Any]]) -> Table:
    table = Table("rule", "lr", "size", title="The first update, at the full learning rate")
    for rule, lr, size in dict.fromkeys((group["rule"], group["lr"], first_update(group)) for group in groups):
        table.add_row(rule, f"{lr:g}", size)
    return table


def first_update(group: dict[str, Any]) -> str:
    """How far a group's options let its parameters move in a step, in words."""
    lr, rule = group["lr"], group["rule"]
    if rule.startswith("adamw"):
        return f"RMS {lr:.1e}"
    if "method" in group:
        layout = Layout.parse(group["layout"])
        ranks = {min(merge_rows(split(p, layout)[0]).shape[-2:]) for p in group["params"]}
        turns = {rank: lr * rate_at(rule, rank) for rank in (min(ranks), max(ranks))}
        if group["method"] == "rotate":
            return f"{' to '.join(f'{turn:.1e}' for turn in turns.values())} of a factor's norm"
        sizes = [f"{turn * math.sqrt(USUAL_RANK / rank):.1e}" for rank, turn in turns.items()]
        return f"each singular value of the factors' product {' to '.join(sizes)} x sqrt(out / in)"
    sizes = {
        "rms": f"RMS {lr * group['rms']:.1e}",
        "none": "what the direction says, times the learning rate",
        "spectral": f"the largest angle {lr:.1e} rad",
        "paper": f"each singular value {lr:.1e} x sqrt(out / in)",
        "original": f"each singular value {lr:.1e} x sqrt(max(1, out / in))",
    }
    return sizes[group["scale"]]


def _state_table(optim: str, ours: int, adamw: int) -> Table:
    columns = (Column(name, justify="right") for name in ("bytes", "of AdamW's"))
    table = Table("optimizer", *columns, title="Optimizer state")
    table.add_row(optim, f"{ours:,}", f"{ours / adamw:.2f}")
    table.add_row("adamw_torch", f"{adamw:,}", "1.00")
    return table
