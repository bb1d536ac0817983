"""What a model's modules say about a parameter: its role, and which matrices it holds.

By the type and place of the module: matrices in a list of layers are hidden ones; outside of every list of layers, what
lies outside of a base model, or makes what nothing in the model takes, is a head. Names tell only what a fused
projection is made of, and that a module is a router where its place does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from pion_hf.needs import needed
from pion_hf.optim.blocks import Layout, split

with needed("transformers"):
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.pytorch_utils import Conv1D

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
# Experts stored (E, in, out) that carry no `is_transposed`; Aria's in early releases of transformers 5.
TRANSPOSED_EXPERTS = {"Llama4TextExperts", "AriaGroupedExpertsGemm"}
# Experts whose rows of gate and up alternate, which early releases do not say (`is_concatenated`).
INTERLEAVED_EXPERTS = {"GptOssExperts"}
ROUTERS = re.compile(r"rout|gat(e|ing)$")  # of classes in lower case, beside experts
# So many outputs are scores or a box, also where other layers take them in again (as reference points).
BOX = 4
# A linear layer beside the layers that takes or makes so many times more is no connector between them, but a head, or
# takes in again what a head has made (reference points, scores of a vocabulary).
UNLIKE = 4


class Structure:
    """What the model's modules say about a parameter."""

    def __init__(self, model: nn.Module) -> None:
        inner = _outermost(model) or [model]
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.config = getattr(inner[0], "config", None)
        models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        self.inputs = {id(p) for m in tables for p in m.parameters(recurse=False)}
        self.inputs = self.inputs.union(*(_parameters_of(m, "get_input_embeddings") for m in models or [model]))
        self.outputs = set().union(*(_parameters_of(m, "get_output_embeddings") for m in models or [model]))
        self.layers = {id(m) for layer in _layers(model) for m in layer.modules()}
        self.frames = {id(m) for m in model.modules() if any(id(part) in self.layers for part in m.modules())}
        self.frames -= self.layers
        self.outside = _outside(model, inner) - self.layers
        takers = [m for m in model.modules() if id(m) in self.layers or not _is_unlike(m)]
        self.taken = {width for m in takers for width in _taken(m) if width > BOX}
        # In a module of the user's own a vocabulary's size tells of a head, also without a list of layers.
        self.vocabularies = set() if models else {m.num_embeddings for m in tables}

    def classify(self, name: str, p: Tensor) -> tuple[str, Layout]:
        path, _, leaf = name.rpartition(".")
        module = self.modules[path]
        owner, child = self._owner(path)
        none = Layout()
        if leaf == "bias" or leaf.endswith("_bias"):
            return "bias", none
        if _is_norm(module):
            return "norm", none
        if id(p) in self.inputs or isinstance(module, nn.Embedding):
            return "embedding", none
        if p.ndim < 2:
            return "other", none
        if id(p) in self.outputs:
            return "head", none
        linear = isinstance(module, (nn.Linear, Conv1D)) and leaf == "weight"
        if (linear or p.ndim == 2) and self._is_router(path, p):
            return "router", none
        if id(module) in self.outside or (linear and self._is_head(path)):
            return "head", none
        if linear:
            layout = self._linear_layout(module, owner, child, p)
        elif _looks_like_experts(module, p):
            layout = _expert_layout(module, leaf, p, owner)
        elif isinstance(module, nn.MultiheadAttention) and leaf.endswith("proj_weight"):
            layout = Layout(rows=(p.shape[0] // 3,) * 3) if leaf == "in_proj_weight" else none
        else:
            return "other", none
        return ("matrix" if _is_rotatable(p, layout) else "other"), layout

    def is_gain(self, name: str, p: Tensor) -> bool:
        """One number or one per feature (LayerScale), DoRA's magnitudes, what a state space holds (Mamba's `A_log`)."""
        module, numbers = self.modules[name.rpartition(".")[0]], p.numel()
        vector = numbers == max(p.shape, default=1) and (numbers == 1 or numbers in self.taken)
        return vector or hasattr(module, "A_log") or ".lora_magnitude_vector." in name

    def is_hidden(self, name: str) -> bool:
        """Whether the parameter lies in a list of layers."""
        return id(self.modules[name.rpartition(".")[0]]) in self.layers

    def _is_head(self, path: str) -> bool:
        """A linear layer beside the layers, not in one, that makes what nothing else takes: labels, boxes, logits.

        All of a chain of projections is a head if its ends are.
        """
        module = self.modules[path]
        if id(module) in self.layers:
            return False
        if _width(module) in self.vocabularies or _width(module) == self._labels(path):
            return True
        chain = path
        for above in _above(path):
            if id(self.modules[above]) in self.frames:
                break
            if not _is_projections(self.modules[above]):
                return False
            chain = above
        else:
            return False
        taken = [(m, next(_taken(m))) for m in _linear_layers(self.modules[chain])]
        ends = {_width(m) for m, _ in taken if not any(_width(m) == n > BOX for other, n in taken if other is not m)}
        return bool(ends) and not ends & self.taken

    def _labels(self, path: str) -> int | None:
        """How many labels the config in force at `path` has."""
        configs = (getattr(self.modules[above], "config", None) for above in _above(path))
        return next((config.num_labels for config in configs if isinstance(config, PreTrainedConfig)), None)

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        """The owner and attribute name of the module at `path`, seen through peft's `ModulesToSaveWrapper`."""
        owner, _, child = path.rpartition(".")
        if owner.rpartition(".")[2] == "modules_to_save":
            owner, _, child = owner.rpartition(".")[0].rpartition(".")
        return self.modules[owner], child

    def _linear_layout(self, module: nn.Module, owner: nn.Module, child: str, p: Tensor) -> Layout:
        transposed = isinstance(module, Conv1D)
        width, out = p.shape if transposed else p.shape[::-1]
        if child in QKV_NAMES:
            return self._qkv_layout(owner, out, width, transposed)
        if child in GATE_UP_NAMES and out % 2 == 0:
            return Layout(transposed, rows=(out // 2,) * 2)
        return Layout(transposed)

    def _qkv_layout(self, owner: nn.Module, out: int, width: int, transposed: bool) -> Layout:
        """Rows of q, k and v; one matrix where neither class nor shapes say how they lie."""
        # The vision part of a model has other heads than the text part: an attention's own config comes first.
        config = getattr(owner, "config", None) or self.config
        heads = _number(config, "num_attention_heads") or _number(config, "num_heads") or _number(owner, "num_heads")
        kv = _number(config, "num_key_value_heads") or heads
        kind = type(owner).__name__
        if kind == "CodeGenAttention" and out % (CODEGEN_SHARDS * 3) == 0:
            return Layout(transposed, interleaved=(CODEGEN_SHARDS, 3))
        if getattr(owner, "new_decoder_architecture", False):  # Falcon's groups (queries, key, value) of unequal size
            return Layout(transposed)
        if getattr(owner, "multi_query", False):
            kv = 1
        elif kind in INTERLEAVED_QKV and not hasattr(owner, "q_attn"):
            return Layout(transposed, interleaved=(heads, 3) if heads and out % (3 * heads) == 0 else None)
        dim = _number(owner, "head_dim") or _number(config, "head_dim") or (heads and width // heads)
        if heads and dim and out == (heads + 2 * kv) * dim:
            return Layout(transposed, rows=(heads * dim, kv * dim, kv * dim))
        if out == 3 * width:
            return Layout(transposed, rows=(width,) * 3)
        if out == 2 * width and hasattr(owner, "q_attn"):  # GPT-2's cross-attention: keys and values
            return Layout(transposed, rows=(width,) * 2)
        return Layout(transposed)

    def _is_router(self, path: str, p: Tensor) -> bool:
        """It has one row per expert and sits beside them, or is part of a router: by class beside experts, or by name.

        Some routers have rows for experts that do nothing, or layers of their own.
        """
        if p.shape[0] == _expert_count(self._owner(path)[0]):
            return True
        for part in filter(None, (path, *_above(path))):
            owner, child = self._owner(part)
            kind = type(self.modules[part]).__name__.lower()
            if "router" in child or (ROUTERS.search(kind) and _expert_count(owner) is not None):
                return True
        return False


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The entries of lists of layers: of more than projections, or such as bring back the width that they take.

    A list of heads has neither: its entries are linear layers, or chains of them that end in labels or boxes.
    """
    for parts in model.modules():
        if isinstance(parts, (nn.ModuleList, nn.Sequential)):
            entries = [m for m in parts.children() if _has_parts(m)]
            entries = [m for m in entries if not any(isinstance(part, PreTrainedModel) for part in m.modules())]
            if isinstance(parts, nn.Sequential) and len({type(m) for m in entries}) == len(entries):
                continue  # a chain of different parts: an encoder and a head
            if any(not _is_projections(m) for m in entries) or all(map(_returns, entries)):
                yield from entries


def _linear_layers(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (nn.Linear, Conv1D))]


def _has_parts(module: nn.Module) -> bool:
    return any(next(part.parameters(), None) is not None for part in module.children())


def _is_projections(module: nn.Module) -> bool:
    """Linear layers, and what has no parameters, however deep."""
    linear = _linear_layers(module)
    return bool(linear) and {id(p) for m in linear for p in m.parameters()} == {id(p) for p in module.parameters()}


def _returns(module: nn.Module) -> bool:
    """Whether its last projection ends in as many features as its first one takes."""
    linear = _linear_layers(module)
    return next(_taken(linear[0])) == _width(linear[-1])


def _is_unlike(module: nn.Module) -> bool:
    """A linear layer between very different widths."""
    if not isinstance(module, (nn.Linear, Conv1D)):
        return False
    small, large = sorted((next(_taken(module)), _width(module)))
    return large > UNLIKE * small


def _width(module: nn.Module) -> int:
    """How many features a linear layer makes."""
    return module.nf if isinstance(module, Conv1D) else module.out_features


def _taken(module: nn.Module) -> Iterator[int]:
    """How many features a module takes: of linear layers first what they read. Of embeddings, what they make."""
    if isinstance(module, nn.Linear):
        yield module.in_features
    elif isinstance(module, Conv1D):
        yield module.nx
    elif isinstance(module, nn.Embedding):
        yield module.embedding_dim
    elif isinstance(module, nn.modules.conv._ConvNd):
        yield module.in_channels
    elif isinstance(module, nn.RNNBase):
        yield module.input_size
    elif isinstance(module, nn.MultiheadAttention):
        yield from (module.embed_dim, module.kdim, module.vdim)
    else:  # of norms, tokens, tables, 3-D weights
        yield from {n for leaf, p in module.named_parameters(recurse=False) if leaf != "bias" for n in p.shape[-2:]}


def _outside(model: nn.Module, inner: list[nn.Module]) -> set[int]:
    """What lies outside of every transformers model, or in one (in others or not) but outside of its base model."""
    found = {id(m) for m in model.modules()} - {id(part) for m in inner for part in m.modules()}
    for whole in (m for m in model.modules() if isinstance(m, PreTrainedModel)):
        base = getattr(whole, "base_model", None) or whole
        found |= {id(m) for m in whole.modules()} - {id(m) for m in base.modules()}
    return found


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


def _above(path: str) -> Iterator[str]:
    """The paths of the modules around the one at `path`, from its owner to the model itself, `""`."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _number(owner: Any, name: str) -> int | None:
    """Of a module, or of the text part of a config; None where there is one for each layer or stage."""
    owner = owner.get_text_config() if hasattr(owner, "get_text_config") else owner
    value = getattr(owner, name, None)
    return value if isinstance(value, int) else None


def _parameters_of(model: nn.Module, getter: str) -> set[int]:
    """Of the module that `getter` returns; empty where the model has none."""
    try:
        module = getattr(model, getter)() if hasattr(model, getter) else None
    except (NotImplementedError, AttributeError):  # models without one raise rather than return None
        module = None
    return {id(p) for p in module.parameters()} if isinstance(module, nn.Module) else set()


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not isinstance(module, (nn.Linear, Conv1D, nn.Embedding))


def _is_rotatable(p: Tensor, layout: Layout) -> bool:
    """A vector has no plane to rotate in: both sides need two dimensions or more."""
    return all(min(v.shape[1] * v.shape[2], v.shape[3]) > 1 for v in split(p, layout))


def _expert_count(owner: nn.Module) -> int | None:
    """How many experts `owner` chooses between: a child list of modules, or 3-D parameters of a child."""
    for child in owner.children():
        child = getattr(child, "original_module", child)  # peft's ModulesToSaveWrapper
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            experts = list(child.children())
            if len(experts) > 1 and all(map(is_plain_mlp, experts)):
                return len(experts)
        for p in child.parameters(recurse=False):
            if _looks_like_experts(child, p):
                return p.shape[0]
    return None


def is_plain_mlp(module: nn.Module) -> bool:
    """Its children are projections and activations: an expert, not a whole layer."""
    children = list(module.children())
    return bool(children) and all(isinstance(c, nn.Linear) or next(c.parameters(), None) is None for c in children)


def _looks_like_experts(module: nn.Module, p: Tensor) -> bool:
    """3-D, in a module that says how they are stored, how many they are, or what it is."""
    if p.ndim != 3:
        return False
    counts = [value for name, value in vars(module).items() if "expert" in name and isinstance(value, int)]
    return hasattr(module, "is_transposed") or p.shape[0] in counts or "expert" in type(module).__name__.lower()


def _expert_layout(module: nn.Module, leaf: str, p: Tensor, owner: nn.Module) -> Layout:
    """transformers' experts say how they store their weights (`use_experts_implementation`); old ones do not.

    Gate and up are one parameter by its name, or where a module beside brings half of what it makes back to the width
    that it takes.
    """
    kind = type(module).__name__
    transposed = bool(getattr(module, "is_transposed", kind in TRANSPOSED_EXPERTS))
    out, width = _sides(p, transposed)
    beside = owner.children() if leaf == "weight" else ()
    beside = (getattr(m, "original_module", m) for m in beside)  # peft's ModulesToSaveWrapper
    others = (q for m in beside if type(m) is type(module) for q in m.parameters(recurse=False))
    halved = any(_sides(q, transposed) == (width, out // 2) for q in others)
    if out % 2 == 0 and (leaf in GATE_UP_NAMES or halved):
        if getattr(module, "is_concatenated", kind not in INTERLEAVED_EXPERTS):
            return Layout(transposed, rows=(out // 2,) * 2)
        return Layout(transposed, interleaved=(out // 2, 2))
    return Layout(transposed)


def _sides(experts: Tensor, transposed: bool) -> tuple[int, ...]:
    """How many features each expert makes, and how many it takes."""
    return tuple(experts.shape[:0:-1] if transposed else experts.shape[1:])
