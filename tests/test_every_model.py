"""In every model class of the installed transformers: what must never be a matrix, and what must not decay."""

import re
import warnings

import pytest
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pion_hf import routing_table
from tests.catalogue import LABELS, build, model_classes

# Of the 1,935 that transformers 5.23 has; others need timm, natten, scipy, ... or a config that nobody could guess.
FEWEST_BUILT = 1_840
FEWEST_SHARE = 0.9  # of the classes of other versions
SAMPLE = {
    "Blip2ForImageTextRetrieval",  # heads of a model that is its own base model
    "CLIPForImageClassification",
    "SiglipForImageClassification",
    "ParakeetForRNNT",
    "PPLCNetForImageClassification",
    "HGNetV2ForImageClassification",
    "BarkCausalModel",
    "NemotronHForCausalLM",
    "Qwen2_5OmniForConditionalGeneration",  # heads of models in models
    "EncoderDecoderModel",
    "RTDetrForObjectDetection",  # lists of heads beside the lists of layers
    "DFineForObjectDetection",
    "GroundingDinoForObjectDetection",
    "Sam2Model",
    "PerceiverForSequenceClassification",
    "LongcatFlashForCausalLM",  # routers
    "SwitchTransformersForConditionalGeneration",
    "ZayaForCausalLM",
    "ViTMAEForPreTraining",  # layers outside of the base model
    "MambaForCausalLM",
    "ConvNextForImageClassification",
    "Florence2ForConditionalGeneration",
}
HEADS = re.compile(
    r"(^|\.)(lm_heads?|classifier|class_embed|bbox_embed|bbox_predictor|class_labels_classifier|itm_head|qa_outputs|"
    r"codec_head|enc_score_head|enc_bbox_head|joint\.head)\."
)
NO_DECAY = re.compile(r"(^|\.)(A_log|D|layer_scale\w*|lambda_?[12]|gamma(_[12])?)$")
HIDDEN = re.compile(r"(^|\.)layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight$")


def configs(model):
    found = [m.config for m in model.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)]
    return found + [part for config in found for part in vars(config).values() if isinstance(part, PreTrainedConfig)]


def numbers(model, pattern):
    values = (vars(config).items() for config in configs(model))
    return {value for items in values for key, value in items if isinstance(value, int) and re.search(pattern, key)}


def forbidden(model):
    """By parameter, why it must not be a matrix."""
    reasons = {}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    vocabularies = (
        numbers(model, r"vocab_size$") - numbers(model, r"(?<!vocab_size)$") - {m.in_features for m in linear}
    )
    experts = numbers(model, r"^(moe_)?(n|num)_(\w+_)?experts$")
    modules = dict(model.named_modules())
    for path, module in modules.items():
        kind = type(module).__name__
        about = []
        if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
            about.append(kind)
        if "Norm" in kind and not isinstance(module, (nn.Linear, nn.Embedding)):
            about.append("a norm")
        if isinstance(module, nn.Linear) and module.out_features == LABELS:
            about.append("makes labels")
        if isinstance(module, nn.Linear) and module.out_features in vocabularies:
            about.append("makes logits of a vocabulary")
        if HEADS.search(path + "."):
            about.append("a head")
        if re.search(r"router", path) or (isinstance(module, nn.Linear) and module.out_features in experts):
            above = modules[path.rpartition(".")[0]] if path else model
            if "router" in path or any("experts" in name for name, _ in above.named_children()):
                about.append("a router")
        for p in module.parameters(recurse=False):
            reasons.setdefault(id(p), []).extend(about + ["a vector"] * (p.ndim < 2))
        for getter in ("get_input_embeddings", "get_output_embeddings") if isinstance(module, PreTrainedModel) else ():
            try:
                embeddings = getattr(module, getter)()
            except (NotImplementedError, AttributeError):
                continue
            for p in embeddings.parameters() if isinstance(embeddings, nn.Module) else ():
                reasons.setdefault(id(p), []).append(f"of {getter} of {kind}")
    return reasons


def wrong_routes(model):
    """What is routed as it must not be; None where the model has no matrix of a hidden layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            routes = list(routing_table(model))
        except ValueError as error:
            if "no trainable" not in str(error):
                raise
            return None
    reasons, wrong = forbidden(model), []
    for r in routes:
        if r.role == "matrix":
            wrong += [f"{r.name} {list(r.parameter.shape)} is {why}" for why in reasons[id(r.parameter)][:1]]
        elif HIDDEN.search(r.name) and r.role not in ("router", "zero"):
            wrong.append(f"{r.name} is hidden, not {r.role}")
        if NO_DECAY.search(r.name) and r.decays:
            wrong.append(f"{r.name} decays")
    return wrong


@pytest.mark.parametrize("name", sorted(SAMPLE))
def test_a_sample_of_models_is_routed_as_it_must_be(name):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    wrong = wrong_routes(build(getattr(transformers, name)))
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_model_is_routed_as_it_must_be(tried):
    classes, missing = model_classes()
    built, without, wrong, failed = 0, [], {}, {}
    for name, kind in classes.items():
        try:
            model = build(kind)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).strip()[:100]!r}"
            continue
        built += 1
        found = wrong_routes(model)
        if found is None:
            without.append(name)
        elif found:
            wrong[name] = found
    print(f"\n{built:,} of {len(classes):,} classes built, {len(without)} of them without a hidden matrix: {without}")
    print("not built:", *(f"{name}: {error}" for name, error in failed.items()), sep="\n  ")
    print("not imported:", missing)
    assert not wrong, "\n".join(f"{name}: {line}" for name, lines in wrong.items() for line in lines)
    enough = FEWEST_BUILT if transformers.__version__.startswith("5.23.") else FEWEST_SHARE * len(classes)
    assert built >= enough
    tried("model classes routed", built, "classes")
