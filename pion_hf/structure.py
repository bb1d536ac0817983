"""What a model's modules say about a parameter: its role, and which matrices it holds.

By the type and place of the module; names tell only what a fused projection is made of.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pion_hf.optim.blocks import Layout, split

# Fused projections of attention modules whose class does not say how they are put together.
# Interleaved: head by head, (heads, 3, head_dim) output rows. Falcon and GPTBigCode do so without multi_query only.
INTERLEAVED_QKV = {
    "GPTNeoXAttention",
    "BloomAttention",
    "PersimmonAttention",
    "GPTNeoXJapaneseAttention",
    "MiniMaxLightningAttention",
    "FalconAttention",
    "GPTBigCodeAttention",
}
CODEGEN_SHARDS = 4  # CodeGenAttention.forward: `mp_num`, each shard holds its heads' queries, values and keys
QKV_NAMES = {"qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv"}
GATE_UP_NAMES = {"gate_up_proj", "gate_up"}
# Experts stored (E, in, out) that carry no `is_transposed`.
TRANSPOSED_EXPERTS = {"Llama4TextExperts"}


class Structure:
    """What the model's modules say about a parameter."""

    def __init__(self, model: nn.Module) -> None:
        inner = _outermost(model) or [model]
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.config = getattr(inner[0], "config", None)
        self.inputs = set().union(*(_parameters_of(m, "get_input_embeddings") for m in inner))
        self.outputs = set().union(*(_parameters_of(m, "get_output_embeddings") for m in inner))
        inside = {id(m) for whole in inner for m in getattr(whole, "base_model", whole).modules()}
        self.outside = {id(m) for m in model.modules()} - inside

    def classify(self, name: str, p: Tensor) -> tuple[str, Layout]:
        path, _, leaf = name.rpartition(".")
        module = self.modules[path]
        owner_path, _, child = path.rpartition(".")
        owner, child = self._unwrapped(owner_path, child)
        none = Layout()
        if leaf == "bias" or leaf.endswith("_bias"):
            return "bias", none
        if id(p) in self.inputs or isinstance(module, nn.Embedding):
            return "embedding", none
        if _is_norm(module):
            return "norm", none
        if p.ndim < 2:
            return "other", none
        if id(p) in self.outputs or id(module) in self.outside:
            return "head", none
        if isinstance(module, (nn.Linear, Conv1D)) and leaf == "weight":
            if self._is_router(owner_path, owner, p):
                return "router", none
            layout = self._linear_layout(module, owner, child, p)
            return ("matrix" if _is_rotatable(p, layout) else "other"), layout
        if _looks_like_experts(module, p):
            layout = _expert_layout(module, leaf, p)
            return ("matrix" if _is_rotatable(p, layout) else "other"), layout
        if isinstance(module, nn.MultiheadAttention) and leaf.endswith("proj_weight"):
            layout = Layout(rows=(p.shape[0] // 3,) * 3) if leaf == "in_proj_weight" else none
            return ("matrix" if _is_rotatable(p, layout) else "other"), layout
        if p.ndim == 2 and self._is_router(owner_path, owner, p):
            return "router", none
        return "other", none

    def _unwrapped(self, path: str, child: str) -> tuple[nn.Module | None, str]:
        """The owner and attribute name of a module, seen through peft's `ModulesToSaveWrapper`."""
        owner = self.modules.get(path)
        if child and (path.endswith(".modules_to_save") or path == "modules_to_save"):
            wrapper_path = path.rpartition(".")[0]
            grand, _, child = wrapper_path.rpartition(".")
            owner = self.modules.get(grand)
        return owner, child

    def _linear_layout(self, module: nn.Module, owner: nn.Module | None, child: str, p: Tensor) -> Layout:
        transposed = isinstance(module, Conv1D)
        width, out = p.shape if transposed else p.shape[::-1]
        if child in QKV_NAMES:
            return self._qkv_layout(owner, out, width, transposed)
        if child in GATE_UP_NAMES and out % 2 == 0:
            return Layout(transposed, rows=(out // 2,) * 2)
        return Layout(transposed)

    def _qkv_layout(self, owner: nn.Module | None, out: int, width: int, transposed: bool) -> Layout:
        """Rows of q, k and v; one matrix where neither class nor shapes say how they lie."""
        # The vision part of a model has other heads than the text part: an attention's own config comes first.
        config = getattr(owner, "config", None) or self.config
        heads = _attribute(config, "num_attention_heads") or _attribute(config, "num_heads")
        kv = _attribute(config, "num_key_value_heads") or heads
        kind = type(owner).__name__
        if kind == "CodeGenAttention" and out % (CODEGEN_SHARDS * 3) == 0:
            return Layout(transposed, interleaved=(CODEGEN_SHARDS, 3))
        if getattr(owner, "new_decoder_architecture", False):  # Falcon's groups (queries, key, value) of unequal size
            return Layout(transposed)
        if getattr(owner, "multi_query", False):
            kv = 1
        elif kind in INTERLEAVED_QKV and not hasattr(owner, "q_attn"):
            return Layout(transposed, interleaved=(heads, 3) if heads and out % (3 * heads) == 0 else None)
        dim = getattr(owner, "head_dim", None) or _attribute(config, "head_dim") or (heads and width // heads)
        if heads and dim and out == (heads + 2 * kv) * dim:
            return Layout(transposed, rows=(heads * dim, kv * dim, kv * dim))
        if out == 3 * width:
            return Layout(transposed, rows=(width,) * 3)
        if out == 2 * width and hasattr(owner, "q_attn"):  # GPT-2's cross-attention: keys and values
            return Layout(transposed, rows=(width,) * 2)
        return Layout(transposed)

    def _is_router(self, path: str, owner: nn.Module | None, p: Tensor) -> bool:
        """It has one row per expert and sits beside them, itself or inside a module that is nothing but a router."""
        if owner is not None and re.search(r"rout|gat(e|ing)$", type(owner).__name__.lower()):
            beside, _ = self._unwrapped(*_parent(path))
            if p.shape[0] == _expert_count(beside):
                return True
        return p.shape[0] == _expert_count(owner)


def parameter_count(p: Tensor) -> int:
    """How many numbers a parameter stands for: of bitsandbytes' 4 bits, two in every byte."""
    return p.numel() * (2 if type(p).__name__ == "Params4bit" and p.element_size() == 1 else 1)


def _outermost(model: nn.Module) -> list[PreTrainedModel]:
    """The transformers models in no other one, inside whatever wraps them (peft, DDP, a module of the user's)."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return list(dict.fromkeys(m for child in model.children() for m in _outermost(child)))


def text_config(model: nn.Module) -> Any:
    """The config of the (text part of the) transformers model that `model` is or wraps, or None."""
    config = getattr(next(iter(_outermost(model)), model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _parent(path: str) -> tuple[str, str]:
    owner, _, child = path.rpartition(".")
    return owner, child


def _attribute(config: Any, name: str) -> Any:
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, name, None)


def _parameters_of(model: nn.Module, getter: str) -> set[int]:
    """Of the module that `getter` returns; empty where the model has none."""
    try:
        module = getattr(model, getter)() if hasattr(model, getter) else None
    except (NotImplementedError, AttributeError):  # models without one raise rather than return None
        module = None
    return {id(p) for p in module.parameters()} if module is not None else set()


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not isinstance(module, (nn.Linear, Conv1D))


def _is_rotatable(p: Tensor, layout: Layout) -> bool:
    """A vector has no plane to rotate in: both sides need two dimensions or more."""
    return all(min(v.shape[1] * v.shape[2], v.shape[3]) > 1 for v in split(p, layout))


def _expert_count(owner: nn.Module | None) -> int | None:
    """How many experts `owner` chooses between: a child list of modules, or 3-D parameters of a child."""
    for child in owner.children() if owner is not None else ():
        child = getattr(child, "original_module", child)  # peft's ModulesToSaveWrapper
        if isinstance(child, nn.ModuleList) and len(child) > 1 and all(map(is_plain_mlp, child)):
            return len(child)
        for p in child.parameters(recurse=False):
            if _looks_like_experts(child, p):
                return p.shape[0]
    return None


def is_plain_mlp(module: nn.Module) -> bool:
    """Its children are projections and activations: an expert, not a whole layer."""
    children = list(module.children())
    return bool(children) and all(isinstance(c, nn.Linear) or next(c.parameters(), None) is None for c in children)


def _looks_like_experts(module: nn.Module, p: Tensor) -> bool:
    return p.ndim == 3 and (getattr(module, "num_experts", None) == p.shape[0] or hasattr(module, "is_transposed"))


def _expert_layout(module: nn.Module, leaf: str, p: Tensor) -> Layout:
    """transformers' experts say how they store their weights (`use_experts_implementation`)."""
    transposed = bool(getattr(module, "is_transposed", type(module).__name__ in TRANSPOSED_EXPERTS))
    out = p.shape[2] if transposed else p.shape[1]
    if leaf in GATE_UP_NAMES and out % 2 == 0:
        if getattr(module, "is_concatenated", True):
            return Layout(transposed, rows=(out // 2,) * 2)
        return Layout(transposed, interleaved=(out // 2, 2))
    return Layout(transposed)
