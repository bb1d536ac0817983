"""How much memory a training step would take on one device, before anything is loaded.

    peak = weights + gradients + optimizer state + activations

The first three are counted: every parameter in its dtype (a quantized one by its bits and scales), every gradient in
that of its parameter, and the state that the optimizer says it will hold. Activations are those of the model's own
forward pass over `B` rows of `L` tokens, run on fake tensors, which have shapes and no memory: every tensor that
autograd keeps is counted once. Layer `i` keeps `s_i` bytes, its input has `x_i`, all the rest keeps `r`; with
activation checkpointing a layer holds `h_i = x_i` until its backward pass makes `s_i` again, else `h_i = s_i`. The
largest of these moments counts, less the gradients that are not there yet (none, where steps accumulate them):

    at the loss                      r + h_1 + ... + h_n + copies + head - all gradients
    at layer i's backward pass       r + h_1 + ... + h_i (+ s_i, if checkpointed) + s_i / 8 - gradients of 1 to i

`copies`: autocast keeps half-precision copies of trained float32 matrices until the forward pass ends (a layer that is
not checkpointed keeps them in `s_i`). `head`: TRL's loss never holds all logits, but one tile of them, of
`min(B L, 4096) x 32768`, the gradient of the hidden states in float32, and that of a trained half-precision head
(before TRL 1.15 another: see `older.loss_bytes`).
`s_i / 8`: for gradients of activations, of which none (full fine-tuning) to `s_i / 3` (LoRA) was measured.

Left out are the temporaries of the optimizer's step, which come when activations are gone (a few times
`batch_elements`, on a GPU 2^25 unless set, or the largest matrix if that has more), what the allocator does not reuse,
buckets of DDP, and in GRPO generation, the reference model and the prompts.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
import transformers
from rich.table import Column, Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_layers import GradientCheckpointingLayer

from pion_hf.cli import older
from pion_hf.cli.training import substituted

# TRL's tiles of logits, (tokens, vocabulary): trl/kernels/chunked_logprob.py and trl/trainer/utils.py.
TILE = (4096, 32768)
# Float32 tensors of a tile's size that its CPU form holds beside the tile; its GPU form works in place.
CPU_TILES = 7
# bitsandbytes: bytes of a weight in blocks of 64 with a float32 scale each, or with scales in blocks of 256 of 8 bits.
BYTES_4BIT = 0.5 + 4 / 64
BYTES_4BIT_NESTED = 0.5 + 1 / 64 + 4 / (64 * 256)
GIB = 2**30
FAKE_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for. `activations` is None where the model's forward pass cannot run on fake tensors."""

    weights: int
    gradients: int
    state: int
    activations: int | None

    @property
    def peak(self) -> int | None:
        """Their sum."""
        return None if self.activations is None else self.weights + self.gradients + self.state + self.activations


class Layer(NamedTuple):
    """Bytes of a layer's input, of what autograd keeps of it, of its gradients, and of autocast's copies of weights."""

    input: int
    kept: int
    gradients: int
    copies: int


def quantized_bytes(model: nn.Module, *, bits: int, nested: bool = False) -> dict[int, int]:
    """Bytes of the matrices that bitsandbytes would quantize, all linear ones but the head, by the parameter's `id`."""
    head = model.get_output_embeddings()
    sizes = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            out, width = module.weight.shape
            if bits == 8:  # and a scale for each row
                sizes[id(module.weight)] = out * width + 4 * out
            else:
                sizes[id(module.weight)] = round(out * width * (BYTES_4BIT_NESTED if nested else BYTES_4BIT))
    return sizes


def estimate(
    model: transformers.PreTrainedModel,
    args: transformers.TrainingArguments,
    *,
    length: int,
    state_bytes: int,
    quantized: dict[int, int] | None = None,
    on_cpu: bool = False,
) -> Memory:
    """What a step of `args.per_device_train_batch_size` rows of `length` tokens takes; `model` may be on meta.

    quantized: bytes of parameters that are not stored as they are (see `quantized_bytes`). on_cpu: the loss is computed
    there, with more temporaries.
    """
    quantized = quantized or {}
    trained = [p for p in model.parameters() if p.requires_grad]
    return Memory(
        weights=sum(quantized.get(id(p), p.nbytes) for p in model.parameters()),
        gradients=sum(p.nbytes for p in trained),
        state=state_bytes,
        activations=activation_bytes(model, args, length=length, on_cpu=on_cpu),
    )


def activation_bytes(
    model: transformers.PreTrainedModel, args: transformers.TrainingArguments, *, length: int, on_cpu: bool = False
) -> int | None:
    """The formula of this module; None if the forward pass depends on values, which fake tensors do not have."""
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone, head = base.base_model, base.get_output_embeddings().weight
    tokens = args.per_device_train_batch_size * length
    was_training = backbone.training
    try:
        total, layers = _kept(backbone.train(), args.per_device_train_batch_size, length, half)
    except RuntimeError:
        return None
    finally:
        backbone.train(was_training)
    accumulated = args.gradient_accumulation_steps > 1
    # By this name in every release: from transformers 5.23 on it mirrors `activation_checkpointing`.
    every = (args.gradient_checkpointing_kwargs or {}).get("every_n_layers", 1)
    held = total - sum(layer.kept for layer in layers)
    peak = absent = copies = 0
    for index, layer in enumerate(layers):
        checkpointed = args.gradient_checkpointing and index % every == 0
        held += layer.input if checkpointed else layer.kept
        copies += layer.copies if checkpointed else 0
        absent += 0 if accumulated else layer.gradients
        peak = max(peak, held + (layer.kept if checkpointed else 0) + layer.kept // 8 - absent)
    absent = 0 if accumulated else sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return max(peak, held + copies + _loss_bytes(tokens, head, half or head.dtype, on_cpu=on_cpu) - absent)


def _kept(
    backbone: transformers.PreTrainedModel, rows: int, length: int, half: torch.dtype | None
) -> tuple[int, list[Layer]]:
    """Bytes that autograd keeps of a forward pass, and what its layers have to do with it."""
    seen, layers, kept = {}, [], 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage  # held, so that no other gets its address
            kept += storage.nbytes()
        return tensor

    def enter(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        trained = [p for p in layer.parameters() if p.requires_grad]
        copied = sum(2 * p.numel() for p in trained if half and p.dtype == torch.float32 and p.ndim == 2)
        layers.append(Layer(inputs[0].nbytes, -kept, sum(p.nbytes for p in trained), copied))

    def leave(layer: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        layers[-1] = layers[-1]._replace(kept=layers[-1].kept + kept)

    with ExitStack() as stack:
        for layer in backbone.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                stack.enter_context(layer.register_forward_pre_hook(enter))
                stack.enter_context(layer.register_forward_hook(leave))
        # torch logs a traceback before it raises: what cannot run on fake tensors is an answer here.
        stack.enter_context(substituted(FAKE_LOGGER, "disabled", True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        weights = {
            name: torch.empty(t.shape, dtype=t.dtype).requires_grad_(t.requires_grad)
            for name, t in (*backbone.named_parameters(), *backbone.named_buffers())
        }
        ids = torch.zeros(rows, length, dtype=torch.long)
        seen.update((t.untyped_storage()._cdata, t.untyped_storage()) for t in (*weights.values(), ids))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        stack.enter_context(torch.autocast("cpu", half, enabled=half is not None))
        torch.func.functional_call(backbone, weights, kwargs={"input_ids": ids, "use_cache": False})
    return kept, layers


def _loss_bytes(tokens: int, head: Tensor, computed: torch.dtype, *, on_cpu: bool) -> int:
    if not older.TILED_LOSS:
        return older.loss_bytes(tokens, head, computed)
    vocabulary, width = head.shape
    rows = min(tokens, TILE[0])
    tile = rows * TILE[1] * computed.itemsize
    if on_cpu:
        tile += CPU_TILES * 4 * rows * min(vocabulary, TILE[1])
    gradient = 4 * head.numel() if head.requires_grad and head.dtype != torch.float32 else 0
    return tile + 4 * tokens * width + gradient


def memory_table(optim: str, ours: Memory, adamw: Memory) -> Table:
    """Both side by side, in GiB."""
    columns = (Column(name, justify="right") for name in (optim, "adamw_torch"))
    table = Table("", *columns, title="Estimated peak memory of a step, GiB")
    for part in ("weights", "gradients", "state", "activations", "peak"):
        table.add_row(part, *(in_gib(getattr(memory, part)) for memory in (ours, adamw)))
    return table


def in_gib(size: int | None) -> str:
    """Of bytes, as the tables have them."""
    return "unknown" if size is None else f"{size / GIB:.2f}"
