"""Routing: what every parameter of each architecture is taken for, overrides, and errors."""

import json
import re
from collections import Counter, defaultdict

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from pion_hf import param_groups, routing_table
from pion_hf.optim.blocks import Layout, merge_rows, split

LAYERS, HEADS, KV_HEADS, WIDTH, EXPERTS = 2, 4, 2, 32, 4
COMMON = {
    "vocab_size": 97,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
GROUPED = {**COMMON, "num_key_value_heads": KV_HEADS}
GPT2 = {"vocab_size": 97, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
FALCON = {
    "vocab_size": 97,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    **SPECIAL,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# (role, rule, layout, matrices), as in `Route`.
EMBEDDING = ("embedding", "adamw", "", 0)
HEAD = ("head", "adamw", "", 0)
ROUTER = ("router", "adamw", "", 0)
NORM = ("norm", "adamw", "", 0)
BIAS = ("bias", "adamw", "", 0)
OTHER = ("other", "adamw", "", 0)
MATRIX = ("matrix", "pion", "", 1)
CONV1D = ("matrix", "pion", "transposed", 1)


def matrix(layout, count):
    return ("matrix", "pion", layout, count)


def attention(prefix, out="o_proj"):
    return {f"{prefix}.{p}.weight": MATRIX for p in ("q_proj", "k_proj", "v_proj", out)}


LLAMA_MLP = {f"model.layers.#.mlp.{p}_proj.weight": MATRIX for p in ("gate", "up", "down")}
LLAMA_FRAME = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.layers.#.input_layernorm.weight": NORM,
    "model.layers.#.post_attention_layernorm.weight": NORM,
    "model.norm.weight": NORM,
}
QK_NORMS = {f"model.layers.#.self_attn.{p}_norm.weight": NORM for p in "qk"}
UNTIED = {"lm_head.weight": HEAD}
GPT2_TABLE = {
    "transformer.wte.weight": EMBEDDING,
    "transformer.wpe.weight": EMBEDDING,
    "transformer.h.#.ln_1.weight": NORM,
    "transformer.h.#.ln_1.bias": BIAS,
    "transformer.h.#.attn.c_attn.weight": matrix("transposed;rows=32,32,32", 3),
    "transformer.h.#.attn.c_attn.bias": BIAS,
    "transformer.h.#.attn.c_proj.weight": CONV1D,
    "transformer.h.#.attn.c_proj.bias": BIAS,
    "transformer.h.#.ln_2.weight": NORM,
    "transformer.h.#.ln_2.bias": BIAS,
    "transformer.h.#.mlp.c_fc.weight": CONV1D,
    "transformer.h.#.mlp.c_fc.bias": BIAS,
    "transformer.h.#.mlp.c_proj.weight": CONV1D,
    "transformer.h.#.mlp.c_proj.bias": BIAS,
    "transformer.ln_f.weight": NORM,
    "transformer.ln_f.bias": BIAS,
}


def falcon_table(qkv):
    return {
        "transformer.word_embeddings.weight": EMBEDDING,
        "transformer.h.#.self_attention.query_key_value.weight": qkv,
        "transformer.h.#.self_attention.dense.weight": MATRIX,
        "transformer.h.#.mlp.dense_h_to_4h.weight": MATRIX,
        "transformer.h.#.mlp.dense_4h_to_h.weight": MATRIX,
    }


# Architecture -> (config, table of every kind of parameter; `#` is the layer's index). Falcon's tables
# leave out its norms, which differ between its two decoders.
ARCHITECTURES = {
    "gpt2": (transformers.GPT2Config(**GPT2, **SPECIAL), GPT2_TABLE),
    "gpt2-cross-attention": (
        transformers.GPT2Config(**GPT2, **SPECIAL, add_cross_attention=True),
        GPT2_TABLE
        | {
            "transformer.h.#.crossattention.c_attn.weight": matrix("transposed;rows=32,32", 2),
            "transformer.h.#.crossattention.c_attn.bias": BIAS,
            "transformer.h.#.crossattention.q_attn.weight": CONV1D,
            "transformer.h.#.crossattention.q_attn.bias": BIAS,
            "transformer.h.#.crossattention.c_proj.weight": CONV1D,
            "transformer.h.#.crossattention.c_proj.bias": BIAS,
            "transformer.h.#.ln_cross_attn.weight": NORM,
            "transformer.h.#.ln_cross_attn.bias": BIAS,
        },
    ),
    "llama": (
        transformers.LlamaConfig(**GROUPED),
        LLAMA_FRAME | attention("model.layers.#.self_attn") | LLAMA_MLP | UNTIED,
    ),
    "qwen3-tied": (
        transformers.Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=True),
        LLAMA_FRAME | attention("model.layers.#.self_attn") | QK_NORMS | LLAMA_MLP,
    ),
    "phi3": (
        transformers.Phi3Config(**GROUPED),
        LLAMA_FRAME
        | {
            "model.layers.#.self_attn.qkv_proj.weight": matrix("rows=32,16,16", 3),
            "model.layers.#.self_attn.o_proj.weight": MATRIX,
            "model.layers.#.mlp.gate_up_proj.weight": matrix("rows=48,48", 2),
            "model.layers.#.mlp.down_proj.weight": MATRIX,
        }
        | UNTIED,
    ),
    "gpt-neox": (
        transformers.GPTNeoXConfig(**COMMON),
        {
            "gpt_neox.embed_in.weight": EMBEDDING,
            "gpt_neox.layers.#.input_layernorm.weight": NORM,
            "gpt_neox.layers.#.input_layernorm.bias": BIAS,
            "gpt_neox.layers.#.post_attention_layernorm.weight": NORM,
            "gpt_neox.layers.#.post_attention_layernorm.bias": BIAS,
            "gpt_neox.layers.#.attention.query_key_value.weight": matrix("interleaved=4,3", 3),
            "gpt_neox.layers.#.attention.query_key_value.bias": BIAS,
            "gpt_neox.layers.#.attention.dense.weight": MATRIX,
            "gpt_neox.layers.#.attention.dense.bias": BIAS,
            "gpt_neox.layers.#.mlp.dense_h_to_4h.weight": MATRIX,
            "gpt_neox.layers.#.mlp.dense_h_to_4h.bias": BIAS,
            "gpt_neox.layers.#.mlp.dense_4h_to_h.weight": MATRIX,
            "gpt_neox.layers.#.mlp.dense_4h_to_h.bias": BIAS,
            "gpt_neox.final_layer_norm.weight": NORM,
            "gpt_neox.final_layer_norm.bias": BIAS,
        }
        | UNTIED,
    ),
    "mixtral": (
        transformers.MixtralConfig(**GROUPED, num_local_experts=EXPERTS),
        LLAMA_FRAME
        | attention("model.layers.#.self_attn")
        | {
            "model.layers.#.mlp.gate.weight": ROUTER,
            "model.layers.#.mlp.experts.gate_up_proj": matrix("rows=48,48", 8),
            "model.layers.#.mlp.experts.down_proj": matrix("", 4),
        }
        | UNTIED,
    ),
    "qwen3-moe": (
        transformers.Qwen3MoeConfig(**GROUPED, head_dim=16, num_experts=EXPERTS, moe_intermediate_size=24),
        LLAMA_FRAME
        | attention("model.layers.#.self_attn")
        | QK_NORMS
        | {
            "model.layers.#.mlp.gate.weight": ROUTER,
            "model.layers.#.mlp.experts.gate_up_proj": matrix("rows=24,24", 8),
            "model.layers.#.mlp.experts.down_proj": matrix("", 4),
        }
        | UNTIED,
    ),
    "gpt-oss": (
        transformers.GptOssConfig(**GROUPED, head_dim=16, num_local_experts=EXPERTS, rope_parameters=ROPE),
        LLAMA_FRAME
        | attention("model.layers.#.self_attn")
        | {f"model.layers.#.self_attn.{p}_proj.bias": BIAS for p in "qkvo"}
        | {
            "model.layers.#.self_attn.sinks": OTHER,
            "model.layers.#.mlp.router.weight": ROUTER,
            "model.layers.#.mlp.router.bias": BIAS,
            "model.layers.#.mlp.experts.gate_up_proj": matrix("transposed;interleaved=48,2", 8),
            "model.layers.#.mlp.experts.gate_up_proj_bias": BIAS,
            "model.layers.#.mlp.experts.down_proj": matrix("transposed", 4),
            "model.layers.#.mlp.experts.down_proj_bias": BIAS,
        }
        | UNTIED,
    ),
    "llama4": (  # its experts are transposed and do not say so
        transformers.Llama4TextConfig(**GROUPED, head_dim=8, num_local_experts=EXPERTS, intermediate_size_mlp=48),
        LLAMA_FRAME
        | attention("model.layers.#.self_attn")
        | {
            "model.layers.#.feed_forward.router.weight": ROUTER,
            "model.layers.#.feed_forward.experts.gate_up_proj": matrix("transposed;rows=48,48", 8),
            "model.layers.#.feed_forward.experts.down_proj": matrix("transposed", 4),
        }
        | {f"model.layers.#.feed_forward.shared_expert.{p}_proj.weight": MATRIX for p in ("gate", "up", "down")}
        | UNTIED,
    ),
    "opt-350m": (  # tied, with projections between embeddings and layers
        transformers.OPTConfig(
            **{k: v for k, v in COMMON.items() if k != "intermediate_size"},
            ffn_dim=48,
            word_embed_proj_dim=16,
            do_layer_norm_before=False,
        ),
        {
            "model.decoder.embed_tokens.weight": EMBEDDING,
            "model.decoder.embed_positions.weight": EMBEDDING,
            "model.decoder.project_in.weight": MATRIX,
            "model.decoder.project_out.weight": MATRIX,
        }
        | attention("model.decoder.layers.#.self_attn", out="out_proj")
        | {f"model.decoder.layers.#.self_attn.{p}.bias": BIAS for p in ("q_proj", "k_proj", "v_proj", "out_proj")}
        | {
            f"model.decoder.layers.#.{norm}.{leaf}": route
            for norm in ("self_attn_layer_norm", "final_layer_norm")
            for leaf, route in (("weight", NORM), ("bias", BIAS))
        }
        | {
            "model.decoder.layers.#.fc1.weight": MATRIX,
            "model.decoder.layers.#.fc1.bias": BIAS,
            "model.decoder.layers.#.fc2.weight": MATRIX,
            "model.decoder.layers.#.fc2.bias": BIAS,
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig(**GROUPED, head_dim=16),
        LLAMA_FRAME
        | attention("model.layers.#.self_attn")
        | QK_NORMS
        | LLAMA_MLP
        | {f"model.layers.#.{p}_feedforward_layernorm.weight": NORM for p in ("pre", "post")},
    ),
    "falcon-rw": (
        transformers.FalconConfig(**FALCON, multi_query=False),
        falcon_table(matrix("interleaved=4,3", 3)),
    ),
    "falcon-7b": (transformers.FalconConfig(**FALCON, multi_query=True), falcon_table(matrix("rows=32,8,8", 3))),
    "falcon-40b": (  # groups of (queries, key, value) of unequal size: no layout says that, so it stays whole
        transformers.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=KV_HEADS),
        falcon_table(MATRIX),
    ),
}


def build(architecture):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[architecture][0])
    for p in model.parameters():  # some stay at zero or uninitialised when built from a config
        nn.init.normal_(p, std=0.1)
    return model.eval()


def llama(**changes):
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**GROUPED, **changes}))


def kind(name):
    return re.sub(r"\.\d+\.", ".#.", name)


def record(route):
    return route.role, route.rule, route.layout, route.matrices


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_table_of_an_architecture(architecture):
    _, expected = ARCHITECTURES[architecture]
    seen = defaultdict(list)
    for route in routing_table(build(architecture)):
        seen[kind(route.name)].append(record(route))
    norms = {k for k in seen if architecture.startswith("falcon") and re.search(r"\.(ln_\w+|\w*layernorm)\.", k)}
    for name in norms:
        assert set(seen.pop(name)) == {BIAS if name.endswith("bias") else NORM}
    assert seen == {name: [route] * (LAYERS if "#" in name else 1) for name, route in expected.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_groups_hold_every_parameter_once_and_decay_the_right_ones(architecture):
    model = build(architecture)
    groups = param_groups(model, lr=1e-3, weight_decay=0.1, adamw_lr=2e-4, adamw_betas=(0.8, 0.9), adamw_eps=1e-6)
    taken = Counter(id(p) for group in groups for _, p in group["params"])
    assert taken == Counter(id(p) for p in model.parameters())
    roles = {route.name: route.role for route in routing_table(model)}
    own = dict(model.named_parameters())
    for group in groups:
        for name, p in group["params"]:
            assert own[name] is p
            if roles[name] == "matrix":
                assert group["rule"] == "pion"
                assert (group["lr"], group["weight_decay"]) == (1e-3, 0.0)
                split(p, Layout.parse(group["layout"]))
            else:
                assert (group["rule"], group["layout"]) == ("adamw", "")
                assert (group["lr"], group["betas"], group["eps"]) == (2e-4, (0.8, 0.9), 1e-6)
                assert group["weight_decay"] == (0.0 if roles[name] in ("norm", "bias") else 0.1)


def test_the_groups_take_the_matrices_learning_rate_where_none_is_given():
    assert {group["lr"] for group in param_groups(llama(), lr=3e-3)} == {3e-3}


# -- the views are what the model's own forward cuts -----------------------------------------------------------


def attention_module(model, route):
    return model.get_submodule(route.name.removesuffix(".weight").rpartition(".")[0])


def recorded_qkv(architecture, model, module, monkeypatch):
    """Queries, keys and values `(1, heads, 1, dim)` as the attention function receives them, for one token."""
    calls = {}

    def remember(attention, query, key, value, *args, **kwargs):
        calls.setdefault(id(attention), (query, key, value))
        return torch.zeros_like(query).transpose(1, 2), None

    modeling = __import__(type(module).__module__, fromlist=["eager_attention_forward"])
    if architecture.startswith("falcon"):  # it has no such function; cutting is a method of its own
        projected = []
        module.query_key_value.register_forward_hook(lambda m, args, output: projected.append(output))
        model(torch.tensor([[5]]))
        return [x.transpose(1, 2) for x in module._split_heads(projected[0])]
    if architecture == "codegen":
        monkeypatch.setattr(
            type(module), "_attn", lambda self, *qkv, **_: (remember(self, *qkv)[0].transpose(1, 2), None)
        )
    else:
        monkeypatch.setattr(modeling, "eager_attention_forward", remember)
    model(torch.tensor([[5]]))
    return calls[id(module)]


MORE_FUSED = {
    "codegen": transformers.CodeGenConfig(**GPT2, **SPECIAL, rotary_dim=4),
    "bigcode": transformers.GPTBigCodeConfig(**GPT2, **SPECIAL, multi_query=False),
    "bigcode-multi-query": transformers.GPTBigCodeConfig(**GPT2, **SPECIAL, multi_query=True),
}


@pytest.mark.parametrize(
    ("architecture", "projection", "order"),
    [
        ("gpt2", "c_attn", "qkv"),
        ("phi3", "qkv_proj", "qkv"),
        ("gpt-neox", "query_key_value", "qkv"),
        ("falcon-rw", "query_key_value", "qkv"),
        ("falcon-7b", "query_key_value", "qkv"),
        ("codegen", "qkv_proj", "qvk"),
        ("bigcode", "c_attn", "qkv"),
        ("bigcode-multi-query", "c_attn", "qkv"),
    ],
)
@torch.no_grad()
def test_the_views_of_a_fused_projection_are_the_models_queries_keys_and_values(
    architecture, projection, order, monkeypatch
):
    """One token stands at position 0, where rotary embeddings turn nothing: what arrives is the projection itself."""
    if architecture in MORE_FUSED:
        model = transformers.AutoModelForCausalLM.from_config(MORE_FUSED[architecture]).eval()
    else:
        model = build(architecture)
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            p.zero_()
    route = next(r for r in routing_table(model) if r.name.endswith(f"{projection}.weight"))
    module = attention_module(model, route)
    inputs = []
    getattr(module, projection).register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    received = dict(zip("qkv", recorded_qkv(architecture, model, module, monkeypatch), strict=True))
    views = split(route.parameter, Layout.parse(route.layout))
    assert len(views) == 3
    for letter, view in zip(order, views, strict=True):
        expected = received[letter].transpose(1, 2).flatten()
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(merge_rows(view)[0] @ inputs[0].flatten(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_views_of_a_fused_gate_up_projection_are_the_models_gate_and_up():
    model = build("phi3")
    mlp = model.model.layers[0].mlp
    route = next(r for r in routing_table(model) if r.parameter is mlp.gate_up_proj.weight)
    gate, up = (merge_rows(v)[0] for v in split(route.parameter, Layout.parse(route.layout)))
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(mlp.down_proj(functional.silu(x @ gate.T) * (x @ up.T)), mlp(x), rtol=1e-4, atol=1e-5)


def gpt_oss_gate(gate, up):
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


@pytest.mark.parametrize(
    ("architecture", "mlp", "activation"),
    [
        ("mixtral", "mlp", lambda gate, up: functional.silu(gate) * up),
        ("qwen3-moe", "mlp", lambda gate, up: functional.silu(gate) * up),
        ("gpt-oss", "mlp", gpt_oss_gate),
        ("llama4", "feed_forward", lambda gate, up: functional.silu(gate) * up),
    ],
)
@torch.no_grad()
def test_the_views_of_experts_are_the_matrices_their_forward_applies(architecture, mlp, activation):
    model = build(architecture)
    experts = getattr(model.model.layers[0], mlp).experts
    by_identity = {id(r.parameter): r for r in routing_table(model)}

    def matrices(p):
        return [merge_rows(v) for v in split(p, Layout.parse(by_identity[id(p)].layout))]

    gates, ups = matrices(experts.gate_up_proj)
    (downs,) = matrices(experts.down_proj)
    for p in experts.parameters():
        if p.ndim == 2:  # gpt-oss: biases
            p.zero_()
    x = torch.randn(EXPERTS, WIDTH)
    expected = torch.stack([d @ activation(g @ t, u @ t) for g, u, d, t in zip(gates, ups, downs, x, strict=True)])
    if architecture == "llama4":  # token e comes sorted to expert e
        actual = experts(x)
    else:
        experts.config._experts_implementation = "eager"
        actual = experts(x, torch.arange(EXPERTS)[:, None], torch.ones(EXPERTS, 1))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# -- other kinds of model ----------------------------------------------------------------------------------------


def test_a_classification_head_outside_the_base_model_is_a_head():
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**GROUPED, num_labels=3))
    routes = {r.name: record(r) for r in routing_table(model)}
    assert routes["score.weight"] == HEAD
    assert routes["model.layers.1.mlp.down_proj.weight"] == MATRIX


def peft_phi3(**options):
    config = LoraConfig(target_modules=["down_proj"], r=2, **options)
    return get_peft_model(transformers.Phi3ForCausalLM(transformers.Phi3Config(**GROUPED)), config)


def test_copies_that_peft_trains_are_routed_as_what_they_copy():
    model = peft_phi3(modules_to_save=["lm_head", "embed_tokens", "qkv_proj", "input_layernorm"])
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.requires_grad_(False)
    routes = {kind(r.name).removeprefix("base_model.model."): record(r) for r in routing_table(model)}
    assert routes == {
        "lm_head.modules_to_save.default.weight": HEAD,
        "model.embed_tokens.modules_to_save.default.weight": EMBEDDING,
        "model.layers.#.self_attn.qkv_proj.modules_to_save.default.weight": matrix("rows=32,16,16", 3),
        "model.layers.#.input_layernorm.modules_to_save.default.weight": NORM,
    }
    groups = param_groups(model, weight_decay=0.1)
    decays = {kind(n).split(".modules")[0].split(".")[-1]: g["weight_decay"] for g in groups for n, _ in g["params"]}
    assert decays == {"lm_head": 0.1, "embed_tokens": 0.1, "qkv_proj": 0.0, "input_layernorm": 0.0}


def test_experts_and_routers_that_peft_copies_stay_experts_and_routers():
    config = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["experts", "gate"])
    model = get_peft_model(build("mixtral"), config)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.requires_grad_(False)
    routes = {kind(r.name).removeprefix("base_model.model.model."): record(r) for r in routing_table(model)}
    assert routes == {
        "layers.#.mlp.gate.modules_to_save.default.weight": ROUTER,
        "layers.#.mlp.experts.modules_to_save.default.gate_up_proj": matrix("rows=48,48", 8),
        "layers.#.mlp.experts.modules_to_save.default.down_proj": matrix("", 4),
    }


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_adapters_are_not_whole_matrices(target):
    model = get_peft_model(llama(), LoraConfig(target_modules=[target], r=2, modules_to_save=["o_proj"]))
    with pytest.raises(ValueError, match=r"the model has LoRA adapters, .*use optim='pion_lora'"):
        routing_table(model)


class OnTop(nn.Module):
    """A user's module around a transformers model: it has no `get_output_embeddings` of its own."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [nn.DataParallel, OnTop])
def test_a_wrapped_model_is_routed_as_the_model_itself(wrap):
    for model in (
        llama(),
        build("gpt-neox"),
        transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**GROUPED)),
    ):
        bare = {f"module.{r.name}": record(r) for r in routing_table(model)}
        assert {r.name: record(r) for r in routing_table(wrap(model))} == bare


def test_a_plain_torch_model():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4, bias=False), nn.Linear(4, 1))
    assert {r.name: record(r) for r in routing_table(model)} == {
        "0.weight": MATRIX,
        "0.bias": BIAS,
        "1.weight": NORM,
        "1.bias": BIAS,
        "3.weight": MATRIX,
        "4.weight": OTHER,  # one row: no plane to rotate in
        "4.bias": BIAS,
    }


def test_torch_modules_that_are_not_linear():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "cross": nn.MultiheadAttention(8, 2, kdim=6, vdim=4),
            "conv": nn.Conv1d(4, 4, 3),
            "norm": nn.LayerNorm((2, 4)),
            "embedding": nn.Embedding(5, 8),
        }
    )
    assert {r.name: record(r) for r in routing_table(model) if r.role != "bias"} == {
        "attention.in_proj_weight": matrix("rows=8,8,8", 3),
        "attention.out_proj.weight": MATRIX,
        "cross.q_proj_weight": MATRIX,
        "cross.k_proj_weight": MATRIX,
        "cross.v_proj_weight": MATRIX,
        "cross.out_proj.weight": MATRIX,
        "conv.weight": OTHER,
        "norm.weight": NORM,  # of two dimensions, and a norm all the same: no decay
        "embedding.weight": EMBEDDING,
    }


class OwnRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3, bias=False)


@pytest.mark.parametrize("router", [nn.Linear(8, 3, bias=False), OwnRouter()])
def test_a_router_beside_a_list_of_experts(router):
    experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 3), nn.GELU(), nn.Linear(3, 8)) for _ in range(3))
    roles = {r.name: r.role for r in routing_table(nn.ModuleDict({"router": router, "experts": experts}))}
    assert {role for name, role in roles.items() if name.startswith("router")} == {"router"}
    assert {roles[f"experts.{i}.{j}.weight"] for i in range(3) for j in (0, 2)} == {"matrix"}


def test_a_vision_attention_is_cut_by_its_own_config():
    """Text heads (4 + 2 * 2) * 12 = 96 rows would fit the vision projection's 3 * 32 as well."""

    class VisionAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = transformers.PreTrainedConfig(num_heads=4)
            self.head_dim = 12
            self.qkv = nn.Linear(32, 96)

    model = OnTop(VisionAttention())
    model.config = transformers.LlamaConfig(**GROUPED)
    assert [r.layout for r in routing_table(model).matrices] == ["rows=32,32,32"]


def test_frozen_parameters_are_counted_and_never_routed():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    routing = routing_table(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {r.name for r in routing} == trainable
    assert not any(n.startswith(("model.embed_tokens", "model.layers.0.")) for n in trainable)
    assert routing.frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad) > 0
    assert {n for g in param_groups(model) for n, _ in g["params"]} == trainable


# -- overrides -----------------------------------------------------------------------------------------------------


def matched(model, **overrides):
    return {kind(r.name) for r in routing_table(model, **overrides).matrices}


@pytest.mark.parametrize("every", [None, "all-linear", "all_linear", ["all-linear"], ("all_linear",)])
def test_all_linear_means_every_matrix(every):
    assert len(routing_table(llama(), targets=every).matrices) == 7 * LAYERS


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        "[qv]_proj",
        r".*\.(q|v)_proj",
        iter(["q_proj", "v_proj"]),
        ["q_proj$", "v_proj$"],  # a module's name may be meant as well as a parameter's
        [r"self_attn\.[qv]_proj\.weight$"],
    ],
)
def test_targets_restrict_the_matrices(targets):
    expected = {"model.layers.#.self_attn.q_proj.weight", "model.layers.#.self_attn.v_proj.weight"}
    assert matched(llama(), targets=targets) == expected


def test_a_matrix_that_is_not_targeted_goes_to_adamw_with_decay():
    groups = param_groups(llama(), targets="q_proj", weight_decay=0.1)
    (rest,) = [g for g in groups if g["rule"] == "adamw" and g["weight_decay"] == 0.1]
    assert "model.layers.0.mlp.up_proj.weight" in dict(rest["params"])


def test_exclude_wins_over_targets():
    assert matched(llama(), targets="self_attn", exclude=["k_proj", "o_proj", r"layers\.1\.self_attn\.v_proj"]) == {
        "model.layers.#.self_attn.q_proj.weight",
        "model.layers.#.self_attn.v_proj.weight",
    }
    names = {r.name for r in routing_table(llama(), exclude=r"layers\.1\.").matrices}
    assert names
    assert all(".layers.0." in name for name in names)


def test_a_tied_parameter_answers_to_both_its_names():
    model = build("qwen3-tied")
    assert len(routing_table(model, exclude="lm_head").matrices) == 7 * LAYERS


def test_a_target_without_effect_is_warned_of():
    with pytest.warns(UserWarning, match="'lm_head' match embeddings, heads, norms or biases only"):
        assert matched(llama(), targets=["q_proj", "lm_head"]) == {"model.layers.#.self_attn.q_proj.weight"}


# -- errors --------------------------------------------------------------------------------------------------------


def test_no_trainable_parameter():
    with pytest.raises(ValueError, match="no trainable parameter: every requires_grad is False"):
        routing_table(llama().requires_grad_(False))


def test_no_matrix():
    with pytest.raises(ValueError, match=r"no trainable matrix .* Use AdamW"):
        routing_table(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)))
    with pytest.raises(ValueError, match="match only embeddings, heads, norms or biases"):
        routing_table(llama(), targets=["lm_head", "norm"])
    with pytest.raises(ValueError, match="optim_exclude_modules leaves none"):
        routing_table(llama(), targets="q_proj", exclude="self_attn")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("qproj", "q_proj"),
        ("gate_up_proj", "gate_proj"),
        ("self_atn.q_proj", "self_attn.q_proj"),
        (r"layers\.0\.self_attn\.q_porj", "layers.0.self_attn.q_proj"),
        ("model.layers.0.mlp.dwon_proj.weight", "down_proj"),
        ("^up_proj", "up_proj"),
    ],
)
@pytest.mark.parametrize(
    ("option", "field"), [("targets", "optim_target_modules"), ("exclude", "optim_exclude_modules")]
)
def test_an_expression_that_matches_nothing_names_the_nearest_right_one(option, field, wrong, right):
    with pytest.raises(ValueError, match=f"{field} matches no trainable parameter") as caught:
        routing_table(llama(), **{option: ["o_proj", wrong]})
    message = str(caught.value)
    assert repr(wrong) in message
    assert re.search(rf"Did you mean '(\S*\.)?{re.escape(right)}'\?", message)


def test_an_expression_near_to_nothing_lists_the_names():
    with pytest.raises(ValueError, match=r"Known: .*q_proj, .*down_proj"):
        routing_table(llama(), targets="zzzzzz")


@pytest.mark.parametrize(
    ("option", "field"), [("targets", "optim_target_modules"), ("exclude", "optim_exclude_modules")]
)
def test_a_malformed_expression(option, field):
    with pytest.raises(ValueError, match=rf"{field}: '\(q_proj' is not a regular expression: missing \)"):
        routing_table(llama(), **{option: "(q_proj"})


def test_an_unknown_optimizer():
    with pytest.raises(ValueError, match="Did you mean 'pion'"):
        routing_table(llama(), "pionn")


@pytest.mark.parametrize("override", [{"targets": "q_proj"}, {"exclude": "q_proj"}, {"lora_a": "adamw"}])
def test_overrides_beside_a_finished_routing_are_refused(override):
    model = llama()
    with pytest.raises(ValueError, match="no effect on a finished routing"):
        param_groups(model, routing=routing_table(model), **override)


# -- what is shown and saved ------------------------------------------------------------------------------------------


def test_rows_add_up_and_are_what_is_saved(tmp_path):
    model = build("mixtral")
    model.lm_head.requires_grad_(False)
    routing = routing_table(model)
    rates = {"pion": 1e-3, "adamw": 1e-4}
    rows = {(row["role"], row["rule"]): row for row in routing.rows(rates)}
    assert rows["gate_up_proj", "pion"] == {
        "role": "gate_up_proj",
        "rule": "pion",
        "tensors": LAYERS,
        "matrices": LAYERS * 2 * EXPERTS,
        "stacks": 0,
        "parameters": LAYERS * EXPERTS * 96 * WIDTH,
        "lr": 1e-3,
    }
    assert rows["norm", "adamw"]["parameters"] == (2 * LAYERS + 1) * WIDTH
    assert sum(row["parameters"] for row in rows.values()) + 97 * WIDTH == sum(p.numel() for p in model.parameters())
    routing.save(tmp_path / "new" / "routing.json", rates)
    saved = json.loads((tmp_path / "new" / "routing.json").read_text())
    assert saved["summary"] == routing.rows(rates)
    assert saved["frozen_parameters"] == 97 * WIDTH
    assert {
        "name": "model.layers.0.mlp.experts.gate_up_proj",
        "role": "matrix",
        "rule": "pion",
        "layout": "rows=48,48",
        "matrices": 8,
        "shape": [EXPERTS, 96, WIDTH],
    } in saved["parameters"]


def test_the_table_has_a_line_per_row_and_one_for_what_is_frozen():
    model = llama()
    model.lm_head.requires_grad_(False)
    routing = routing_table(model)
    table = routing.table({"pion": 1e-3, "adamw": 1e-4})
    assert table.row_count == len(routing.rows({})) + 1
    assert list(table.columns[0].cells)[-1] == "(frozen)"
    assert list(table.columns[4].cells)[-1] == f"{97 * WIDTH:,}"
