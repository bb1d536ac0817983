"""Fresh weights rescaled to muP's spectral condition."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from pion_hf import spectral_init_
from tests.conftest import toy_llama


def llama() -> PreTrainedModel:
    return toy_llama(hidden_size=24)


def gpt2() -> PreTrainedModel:
    """`Conv1D`, stored (in, out), and a fused projection of queries, keys and values."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=32))


def mixtral() -> PreTrainedModel:
    """Experts as 3-D parameters, gate and up projections fused."""
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    return MixtralForCausalLM(config)


def matrices(model: PreTrainedModel) -> dict[tuple[str, str], torch.Tensor]:
    """Every hidden matrix as (out, in), by its parameter and place in it: a literal reading of the three models."""
    others = ("embed", "wte", "wpe", "lm_head", "gate.weight")  # the last is Mixtral's router
    found = {}
    for name, p in model.named_parameters():
        if p.ndim < 2 or any(other in name for other in others):
            continue
        p = p.detach().double()
        p = p.T if isinstance(model, GPT2LMHeadModel) else p
        for expert, matrix in enumerate(p if p.ndim == 3 else [p]):
            parts = 3 if "c_attn" in name else 2 if "gate_up_proj" in name else 1
            found.update({(name, f"{expert}, {i}"): part for i, part in enumerate(matrix.chunk(parts))})
    return found


@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_every_hidden_matrix_gets_its_norm_and_keeps_its_direction(make, scale):
    torch.manual_seed(0)
    model = make()
    before = copy.deepcopy(model)
    old, count = matrices(before), spectral_init_(model, scale)
    new = matrices(model)
    assert count == len(new) > 10
    for name, matrix in new.items():
        out, width = matrix.shape
        norm = torch.linalg.matrix_norm(matrix, ord=2).item()
        assert norm == pytest.approx(scale * math.sqrt(out / width), rel=1e-5), name
        torch.testing.assert_close(matrix / matrix.norm(), old[name] / old[name].norm(), msg=str(name))
    scaled = {name for name, _ in new}
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q) == (name not in scaled), name


def test_embeddings_norms_and_head_are_left_alone():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    before = copy.deepcopy(model)
    assert spectral_init_(model) == 7
    for get in ("model.embed_tokens", "model.norm", "model.layers.0.input_layernorm", "lm_head"):
        assert torch.equal(model.get_submodule(get).weight, before.get_submodule(get).weight), get


def test_half_precision_is_rounded_once():
    model = toy_llama().to(torch.bfloat16)
    spectral_init_(model)
    for name, matrix in matrices(model).items():
        out, width = matrix.shape
        assert torch.linalg.matrix_norm(matrix, ord=2).item() == pytest.approx(math.sqrt(out / width), rel=4e-3), name


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_not_positive(model, scale):
    with pytest.raises(ValueError, match="must be positive, got"):
        spectral_init_(model, scale)


@pytest.mark.parametrize(("value", "message"), [(0.0, "is zero"), (math.nan, "not finite")])
def test_a_bad_matrix_is_named_and_nothing_is_changed(model, value, message):
    torch.nn.init.constant_(model.model.layers[1].mlp.down_proj.weight, value)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.mlp\.down_proj\.weight .*{message}"):
        spectral_init_(model)
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


def test_a_bad_expert_is_named_with_its_place():
    torch.manual_seed(0)
    model = mixtral()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[2, 40:] = 0
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj\[2\]\[1\] is zero"):
        spectral_init_(model)


def test_a_model_without_weights():
    with torch.device("meta"):
        model = toy_llama()
    with pytest.raises(ValueError, match=r"q_proj\.weight is on the meta device"):
        spectral_init_(model)
