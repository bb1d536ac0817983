"""Every model class of the installed transformers, small, on the meta device: modules and shapes without memory."""

from __future__ import annotations

import importlib
import re
from copy import deepcopy
from pathlib import Path

import torch
import transformers.models
from transformers import PreTrainedConfig, PreTrainedModel, ResNetConfig

LABELS = 13  # a size that nothing else in these configs has
COUNTS = re.compile(r"layers?$|blocks?$|depth$|^n_layer")
OTHER_COUNTS = re.compile(r"per_|norm|first|attn_layer|_layer$")  # positions and choices of layers

# What models of two parts are by default in later releases of transformers, and what 5.0 must be told.
DECODER = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}
PARTS = {
    f"{prefix}encoder-decoder": {"encoder": {"model_type": encoder}, "decoder": DECODER}
    for prefix, encoder in (("", "bert"), ("speech-", "wav2vec2"), ("vision-", "vit"))
}


def model_classes() -> tuple[dict[str, type], list[str]]:
    """All that can be built, by name, and the modules that cannot be imported here."""
    found, missing = {}, []
    for file in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        name = f"transformers.models.{file.parent.name}.{file.stem}"
        try:
            module = importlib.import_module(name)
        except ImportError:
            missing.append(name)
            continue
        for kind in vars(module).values():
            own = isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.__module__ == name
            if own and not kind.__name__.endswith("PreTrainedModel"):
                found[kind.__name__] = kind
    return found, missing


def build(kind: type) -> PreTrainedModel:
    """With two layers in the place of many, as it is by default where that does not fit. Raises the first error."""
    first = None
    for changes in ((_complete, _two_layers), (_complete,), ()):
        for labels in (LABELS, None):
            try:
                config = _config(kind.config_class)
                if labels:
                    config.num_labels = labels
                for change in changes:
                    change(config)
                with torch.device("meta"):
                    model = kind(config)
                model.tie_weights()  # transformers 5.0 leaves that out on the meta device
                return model
            except Exception as error:
                first = first or error
    raise first


def _config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    try:
        return kind()
    except ValueError:
        if kind.model_type in PARTS:
            return kind(**deepcopy(PARTS[kind.model_type]))  # which it takes apart
        raise


def _two_layers(config: PreTrainedConfig) -> None:
    values = vars(config)
    cut = set()
    for key, value in list(values.items()):
        if isinstance(value, PreTrainedConfig):
            _two_layers(value)
        elif type(value) is int and value > 2 and COUNTS.search(key) and not OTHER_COUNTS.search(key):
            cut.add(value)
            values[key] = 2
    for key, value in list(values.items()):
        if key == "depths" and isinstance(value, (list, tuple)):
            values[key] = type(value)(min(depth, 1) for depth in value)
        elif isinstance(value, (list, tuple)) and len(value) in cut:
            values[key] = value[:2]


def _complete(config: PreTrainedConfig) -> None:
    """A backbone of transformers in the place of one of timm, and sizes that some configs leave open."""
    values = vars(config)
    for key, value in list(values.items()):
        if type(value).__name__.startswith("Timm") or (key == "backbone_config" and value is None):
            values[key] = ResNetConfig(out_features=["stage2", "stage3", "stage4"])
        elif isinstance(value, PreTrainedConfig):
            _complete(value)
    if "use_timm_backbone" in values:
        values.update(use_timm_backbone=False, backbone=None, backbone_kwargs=None, use_pretrained_backbone=False)
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    sizes = {"vocab_size": 97, "context_length": 8, "prediction_length": 8, "num_key_value_heads": heads}
    if isinstance(width, int) and isinstance(heads, int):
        sizes["head_dim"] = width // heads
    values.update({key: size for key, size in sizes.items() if key in values and values[key] is None})
    if not hasattr(config, "pad_token_id"):  # as in transformers 5.0, whose models ask for it all the same
        values["pad_token_id"] = None
