"""Routing: what every parameter of each architecture is taken for."""

import re
from collections import Counter, defaultdict
from importlib import import_module

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from pion_hf import param_groups, routing_table
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES
from pion_hf.optim.blocks import Layout, merge_rows, split
from tests.architectures import (
    ARCHITECTURES,
    BIAS,
    EMBEDDING,
    EXPERTS,
    GPT2,
    GROUPED,
    HEAD,
    LAYERS,
    MATRIX,
    NORM,
    OTHER,
    ROUTER,
    SPECIAL,
    WIDTH,
    build,
    kind,
    llama,
    matrix,
)


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


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("jetmoe", "JetMoeParallelExperts"),
        ("granitemoe", "GraniteMoeParallelExperts"),
        ("aria", "AriaGroupedExpertsGemm"),
    ],
)
@torch.no_grad()
def test_the_views_of_experts_in_a_module_for_each_projection_are_gate_up_and_down(family, name):
    cls = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name, None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has the experts of {family} in one module: no {name}")

    def experts(width, out):
        made = cls(width, out, EXPERTS) if family == "aria" else cls(EXPERTS, width, out)
        nn.init.normal_(made.weight)
        return made

    sizes = {"mlp.first": (WIDTH, 96), "mlp.last": (48, WIDTH), "heads.first": (WIDTH, 64), "heads.last": (64, WIDTH)}
    made = {path: experts(*pair) for path, pair in sizes.items()}
    model = nn.ModuleDict(
        {of: nn.ModuleDict({end: made[f"{of}.{end}"] for end in ("first", "last")}) for of in ("mlp", "heads")}
    )
    views = {r.name: split(r.parameter, Layout.parse(r.layout)) for r in routing_table(model)}
    for path, module in made.items():
        parts = [merge_rows(view) for view in views[f"{path}.weight"]]
        assert len(parts) == (2 if path == "mlp.first" else 1)
        x = torch.randn(EXPERTS, sizes[path][0])
        counts = torch.ones(EXPERTS, dtype=torch.long)  # token e comes to expert e
        outputs = module(x, counts if family == "aria" else counts.tolist()).chunk(len(parts), dim=-1)
        for part, expected in zip(parts, outputs, strict=True):
            torch.testing.assert_close((part @ x[:, :, None])[..., 0], expected, rtol=1e-4, atol=1e-5)


def test_experts_whose_gate_and_up_are_apart_are_not_halved():
    """Each makes twice what the other takes."""

    class Expert(nn.Module):
        def __init__(self, out, width):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(EXPERTS, out, width))

    model = nn.ModuleDict({"gate": Expert(64, 32), "up": Expert(64, 32), "down": Expert(32, 64)})
    assert [r.layout for r in routing_table(model)] == [""] * 3


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


class WithHead(nn.Module):
    """A classifier on models of transformers, as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([llama().model, llama().model])
        self.classifier = nn.Linear(2 * WIDTH, 3)


def test_what_a_users_module_puts_on_models_is_a_head():
    roles = Counter(route.role for route in routing_table(WithHead()))
    assert roles == {"embedding": 2, "matrix": 2 * 7 * LAYERS, "norm": 2 * (2 * LAYERS + 1), "head": 1, "bias": 1}


def test_four_bits_are_two_numbers_a_byte():
    class Params4bit(nn.Parameter):
        pass

    model = llama()
    layer = model.model.layers[0].mlp.up_proj
    whole = layer.weight.numel()
    packed = torch.zeros(whole // 2, 1, dtype=torch.uint8)
    layer.weight = Params4bit(packed, requires_grad=False)
    assert routing_table(model).frozen == whole


def test_it_prints_as_a_table():
    printed = str(routing_table(llama()))
    assert "Which rule updates what" in printed
    assert max(map(len, printed.splitlines())) <= 120


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


def test_a_config_outside_transformers_is_read_too():
    """Of a user's own module: one of four heads of 8, keys and values of one of them."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = transformers.PreTrainedConfig(num_attention_heads=4, num_key_value_heads=1, head_dim=8)
            self.attention = nn.ModuleDict({"qkv_proj": nn.Linear(32, 48)})

    assert [r.layout for r in routing_table(Own()).matrices] == ["rows=32,8,8"]


@pytest.mark.parametrize(("heads", "kv"), [((4, 8), 4), (4, [4, 2]), ((4, 8), None)])
def test_heads_by_stage_or_layer_are_no_number_of_heads(heads, kv):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = transformers.PreTrainedConfig(num_heads=heads, num_key_value_heads=kv)
            self.attention = nn.ModuleDict({"qkv": nn.Linear(32, 96), "qkv_proj": nn.Linear(32, 80)})

    assert [r.layout for r in routing_table(Own()).matrices] == ["rows=32,32,32", ""]


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


# -- what groups bring ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["pion", "pion_ambient", "teon", "muon", "adamw_routed"])
def test_the_optimizers_own_rate_and_decay_hold_where_none_is_given(optim):
    cls = OPTIMIZER_CLASSES[optim]
    optimizer = cls(param_groups(llama(), optim), lr=3e-3, weight_decay=0.1)
    assert {group["lr"] for group in optimizer.param_groups} == {3e-3}
    decays = {(group["rule"], group["weight_decay"]) for group in optimizer.param_groups}
    assert decays >= {("adamw", 0.0), ("adamw", 0.1)}  # norms; embeddings and heads
    assert (optim, 0.1) in decays or optim in ("pion", "pion_ambient")
    own = cls(param_groups(llama(), optim, lr=1e-2, adamw_lr=2e-3), lr=3e-3)
    assert {(group["rule"] == "adamw", group["lr"]) for group in own.param_groups} == {(False, 1e-2), (True, 2e-3)}


def test_a_routing_for_another_optimizer_is_refused():
    model = llama()
    with pytest.raises(ValueError, match="optim='muon' was given beside a routing for 'pion': leave it out"):
        param_groups(model, "muon", routing=routing_table(model))
    assert param_groups(model, routing=routing_table(model, "muon"))[0]["rule"] == "muon"
