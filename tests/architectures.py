"""Small models of every architecture whose routing is tested, and what their parameters must be taken for."""

import re

import torch
import transformers
from torch import nn

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
(NEOX_HEAD,) = transformers.GPTNeoXForCausalLM._tied_weights_keys  # of embed_out in early releases of transformers 5
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
            NEOX_HEAD: HEAD,
        },
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
