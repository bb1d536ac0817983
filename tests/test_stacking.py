"""Which matrices share a stack, in real architectures built here with a few tiny layers."""

from __future__ import annotations

import io
import json
import re
import warnings

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM, AutoConfig, AutoModel, AutoModelForCausalLM

from pion_hf import Teon, param_groups, routing_table
from tests.conftest import toy_llama

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(kind: str, auto: type = AutoModelForCausalLM, **options) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **options})
    return auto.from_config(config)


def stacks(model: nn.Module, **options) -> list[tuple[str, ...]]:
    """Stacks as names without what all of them have in common."""
    found = routing_table(model, "teon", **options).stacks.stacks
    return [tuple(name.removesuffix(".weight") for name in names) for names in found]


def pairs(pattern: str, layers=((0, 1), (2, 3))) -> list[tuple[str, ...]]:
    return [tuple(pattern.format(i) for i in group) for group in layers]


def test_a_llama_stacks_queries_keys_and_values_of_neighbours():
    path = "model.layers.{}.self_attn."
    want = [s for p in ("q_proj", "k_proj", "v_proj") for s in pairs(path + p)]
    assert stacks(build("llama")) == want


def test_what_fills_no_stack_is_left_alone_and_listed():
    routing = routing_table(build("llama", num_hidden_layers=5), "teon")
    assert routing.stacks.alone == tuple(f"model.layers.4.self_attn.{p}_proj.weight" for p in "qkv")
    rules = {r.name: r.rule for r in routing}
    assert rules["model.layers.3.self_attn.q_proj.weight"] == "teon"
    assert rules["model.layers.4.self_attn.q_proj.weight"] == "muon"
    assert rules["model.layers.0.mlp.up_proj.weight"] == "muon"
    rows = {(r["role"], r["rule"]): (r["tensors"], r["stacks"]) for r in routing.rows({})}
    assert rows["q_proj", "teon"] == (4, 2)
    assert rows["q_proj", "muon"] == (1, 0)
    saved = json.loads(json.dumps(routing.record({})))
    assert saved["left_over"] == list(routing.stacks.alone)
    assert len(saved["stacks"]) == 6
    console = Console(record=True, file=io.StringIO())
    console.print(routing.table({}))
    shown = " ".join(console.export_text().split())
    assert "Left over, each alone: model.layers.4.self_attn.q_proj.weight" in shown


def test_larger_stacks():
    assert stacks(build("llama", num_hidden_layers=7), stack=3, stack_targets="q") == pairs(
        "model.layers.{}.self_attn.q_proj", ((0, 1, 2), (3, 4, 5))
    )


def test_a_fused_projection_is_cut_first():
    model = build("gpt2", n_embd=32, n_layer=4, n_head=4)
    want = [s for i in range(3) for s in pairs(f"transformer.h.{{}}.attn.c_attn.weight[{i}]")]
    assert sorted(stacks(model)) == sorted(want)
    assert stacks(model, stack_targets=["k"]) == pairs("transformer.h.{}.attn.c_attn.weight[1]")


def test_an_interleaved_projection_is_cut_first():
    assert stacks(build("gpt_neox"), stack_targets=["v"]) == pairs(
        "gpt_neox.layers.{}.attention.query_key_value.weight[2]"
    )


def test_layers_of_another_kind_share_no_stack():
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    kinds += ["full_attention"]
    model = build("gemma3_text", num_hidden_layers=6, layer_types=kinds)
    found = stacks(model, stack_targets="q")
    assert found == pairs("model.layers.{}.self_attn.q_proj", ((0, 1), (3, 4), (2, 5)))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, width, bias=False)


class OtherLayer(Layer):
    pass


def plain(*layers: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    return model


def test_layers_of_unequal_shape_share_no_stack():
    model = plain(Layer(8), Layer(4), Layer(8), Layer(4), Layer(4))
    assert stacks(model) == pairs("layers.{}.q_proj", ((0, 2), (1, 3)))


def test_layers_of_unequal_class_share_no_stack():
    assert stacks(plain(Layer(8), OtherLayer(8), Layer(8))) == pairs("layers.{}.q_proj", ((0, 2),))


def test_layers_stand_in_their_own_order_not_in_that_of_their_names():
    model = plain(*(Layer(8) for _ in range(12)))
    assert stacks(model)[-1] == ("layers.10.q_proj", "layers.11.q_proj")
    assert stacks(model)[0] == ("layers.0.q_proj", "layers.1.q_proj")


def test_lists_inside_a_layer_are_no_layers():
    """T5 keeps attention and feed-forward of a block in a list of their own."""
    model = build("t5", AutoModel, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4)
    assert ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.0.SelfAttention.q") in stacks(model)
    cross = ("decoder.block.0.layer.1.EncDecAttention.k", "decoder.block.1.layer.1.EncDecAttention.k")
    assert cross in stacks(model)
    assert not any("SelfAttention" in a and "EncDec" in b for a, b in stacks(model))


@pytest.mark.parametrize(
    ("kind", "target", "want"),
    [
        ("mixtral", "down_proj", "model.layers.{}.mlp.experts.down_proj"),
        ("mixtral", "gate_up_proj", "model.layers.{}.mlp.experts.gate_up_proj[1]"),
    ],
)
def test_experts_stack_by_index(kind, target, want):
    found = stacks(build(kind, num_local_experts=3), stack_targets=[target])
    assert set(pairs(want)) <= set(found)


def test_lists_of_experts_stack_across_layers():
    def layer() -> nn.Module:
        block = nn.Module()
        block.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3))
        return block

    model = plain(layer(), layer())
    found = stacks(model, stack_targets=["experts"])
    assert ("layers.0.experts.1.0", "layers.1.experts.1.0") in found
    assert all(a.replace("layers.0", "layers.1") == b for a, b in found)


def test_a_frozen_layer_takes_part_in_nothing():
    model = build("llama")
    model.model.layers[1].requires_grad_(False)
    assert stacks(model, stack_targets="q") == pairs("model.layers.{}.self_attn.q_proj", ((0, 2),))


def test_groups_carry_their_stacks_and_train():
    model = build("gpt2", n_embd=32, n_layer=4, n_head=4)
    groups = param_groups(model, "teon", lr=1e-2, weight_decay=0.1)
    kinds = {g["rule"]: len(g.get("stacks", [])) for g in groups if g["rule"] != "adamw"}
    assert kinds == {"teon": 6, "muon": 0}
    assert {g["weight_decay"] for g in groups if g["rule"] != "adamw"} == {0.1}
    optimizer = Teon(groups)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("optim", ["muon", "teon"])
def test_stacks_of_one_are_muon(optim):
    model = build("llama")
    options = {"stack": 1} if optim == "teon" else {}
    groups = param_groups(model, optim, lr=1e-2, **options)
    assert {g["rule"] for g in groups} == {"muon", "adamw"}
    assert len(routing_table(model, optim, **options).matrices) == 4 * 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stack": 0}, "stack must be a whole number of layers, 1 (Muon) or more, got 0"),
        ({"stack": -1}, "got -1"),
        ({"stack": 3}, "stack=3 is more than the 2 consecutive layers"),
        ({"stack": 3, "stack_targets": ["down_proj"]}, "that have 'down_proj' matrices: set stack to at most 2"),
        ({"stack_targets": ["qproj"]}, "Did you mean 'q_proj'"),
        ({"stack_targets": ["embed_tokens"]}, "stack_targets matches none that is trained"),
        ({"stack_targets": ["q", "lm_head"]}, "'lm_head' is not a known matrix"),
        ({"stack_targets": ["*"]}, "stack_targets: '*' is not a regular expression"),
    ],
)
def test_bad_input_names_the_right_form(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        routing_table(toy_llama(), "teon", **options)


def test_targets_whose_shapes_never_agree():
    message = "stack=2 is more than the 1 consecutive layers of one kind and shape"
    with pytest.raises(ValueError, match=message):
        routing_table(plain(Layer(8), Layer(4)), "teon", stack=2)
    with pytest.raises(ValueError, match=message):
        routing_table(plain(Layer(8), Layer(4)), "teon", stack_targets="q")


def test_what_fills_no_stack_of_the_default_options_is_updated_alone():
    """ALBERT shares one layer; nobody has asked for stacks of it."""
    config = AlbertConfig(vocab_size=97, embedding_size=16, hidden_size=32, num_attention_heads=4, intermediate_size=48)
    model = AlbertForMaskedLM(config)
    with pytest.warns(UserWarning, match="stack=2 is more than the 1 .* Until then each is orthogonalised alone"):
        routing = routing_table(model, "teon")
    assert {r.rule for r in routing.matrices} == {"muon"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = Teon(param_groups(model, "teon"), lr=1e-2)
    before = [r.parameter.detach().clone() for r in routing.matrices]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert not any(torch.equal(r.parameter, old) for r, old in zip(routing.matrices, before, strict=True))


def test_a_model_without_attention_must_name_its_stacks():
    model = plain(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="name the matrices to stack"):
        routing_table(model, "teon")
    assert stacks(model, stack_targets=["layers"]) == [("layers.0", "layers.1")]


@pytest.mark.parametrize("optim", ["pion", "muon"])
@pytest.mark.parametrize("options", [{"stack": 2}, {"stack_targets": ["q"]}])
def test_stacks_are_teons_alone(optim, options):
    with pytest.raises(ValueError, match="stack and stack_targets are options of optim='teon'"):
        param_groups(toy_llama(), optim, **options)
