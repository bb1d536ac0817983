"""LoRA factors as peft builds them: which are found, what each is routed to, and what is refused."""

from __future__ import annotations

import json
import math
import re

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

from pion_hf import PionLora, PionTrainingArguments, TeonLora, param_groups, routing_table
from pion_hf.integrations.callbacks import watch
from pion_hf.optim.blocks import Layout, merge_rows, split
from pion_hf.routing.adapters import has_adapters, lora_factors
from tests.conftest import toy_llama

LORA_FORMS = ("pion_lora", "teon_lora")


def adapted(model: nn.Module | None = None, **options) -> peft.PeftModel:
    """A toy Llama with adapters, the same at every call."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
    model = toy_llama() if model is None else model
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def mixtral() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))


def gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def factor_names(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad and p.ndim == 2}


def routes(model: nn.Module, optim: str = "pion_lora", **options) -> dict:
    return {r.name: r for r in routing_table(model, optim, **options)}


def partner(model: nn.Module, name: str) -> torch.Tensor:
    """The other factor's tensor."""
    other = re.sub(r"\.lora_(embedding_)?([AB])\.", lambda m: m[0].replace(m[2], "BA"["AB".index(m[2])]), name)
    return dict(model.named_parameters())[other].detach()


RATES = {"pion_lora": lambda rank: 25 * math.sqrt(rank / 16), "teon_lora": lambda rank: 15 * rank / 16}


def growth(model: nn.Module, r, *, scaling: float) -> float:
    """`u sqrt(16 / r) sqrt(out / in) / (s a)` with `a = ||A||_F / sqrt(r)`, of a factor `B` with its partner `A`."""
    a = partner(model, r.name).double()
    size = a.norm().item() / math.sqrt(a.shape[0])
    return (
        RATES[r.rule](len(a)) * 4 / math.sqrt(len(a)) * math.sqrt(r.parameter.shape[0] / a.shape[1]) / (scaling * size)
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2, vocabulary: int = 90) -> list[float]:
    draw, losses = torch.Generator().manual_seed(0), []
    ids = torch.randint(5, vocabulary, (4, 10), generator=draw)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


# -- what is found ----------------------------------------------------------------------------------------------------


def test_a_model_without_adapters_has_no_factors(model):
    assert lora_factors(model) == []
    assert not has_adapters(model)


def test_a_rotates_and_b_grows():
    model = adapted()
    found = routes(model)
    assert set(found) == factor_names(model)
    for name, r in found.items():
        of_a = ".lora_A." in name
        want = ("lora_A", "pion_lora", "rotate", "") if of_a else ("lora_B", "pion_lora", "orthogonal", "transposed")
        assert (r.role, r.rule, r.method, r.layout) == want
        assert r.matrices == 1


@pytest.mark.parametrize("optim", LORA_FORMS)
@pytest.mark.parametrize("rank", [1, 4, 16, 24])
@pytest.mark.parametrize(("options", "scaling"), [({"lora_alpha": 12}, 12), ({"lora_alpha": 8, "use_rslora": True}, 8)])
def test_a_growing_step_knows_width_scaling_and_the_size_of_its_partner(options, scaling, rank, optim):
    model = adapted(r=rank, **options)
    scaling /= math.sqrt(rank) if "use_rslora" in options else rank
    growing = [r for name, r in routes(model, optim).items() if ".lora_B." in name]
    assert len(growing) == 4
    for r in growing:
        assert r.unit_step == pytest.approx(growth(model, r, scaling=scaling), rel=1e-6)


@pytest.mark.parametrize("rank", [2, 4, 16, 24])
def test_a_rotation_turns_by_an_angle_that_grows_with_the_root_of_the_rank(rank):
    model = adapted(r=rank)
    rotating = {name: r for name, r in routes(model).items() if r.method == "rotate"}
    assert [r.unit_step for r in rotating.values()] == pytest.approx([25 * math.sqrt(rank / 16)] * 4)
    before, lr = copies(model), 1e-4
    optimizer = PionLora(param_groups(model, "pion_lora", lr=lr))
    train(model, optimizer, steps=1)
    still = copies(model)
    assert all(torch.equal(still[name], before[name]) for name in rotating), "B is zero: A has no gradient"
    train(model, optimizer, steps=1)
    for name, p in model.named_parameters():
        if name in rotating:
            moved = (p.detach() - before[name]).norm() / before[name].norm()
            assert moved.item() == pytest.approx(lr * 25 * math.sqrt(rank / 16), rel=1e-2)


@pytest.mark.parametrize("optim", LORA_FORMS)
@pytest.mark.parametrize("rank", [1, 4, 16, 24])
def test_a_factor_whose_partner_is_zero_steps_by_its_own_size(rank, optim):
    model = adapted(r=rank)
    options = {"lora_a": "orthogonal"} if optim == "pion_lora" else {}
    growing = [r for name, r in routes(model, optim, **options).items() if ".lora_A." in name]
    assert len(growing) == 4
    for r in growing:
        own = r.parameter.detach().double().norm().item() / math.sqrt(rank)
        assert r.unit_step == pytest.approx(RATES[optim](rank) * own, rel=1e-6)


def test_several_adapters_at_once():
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj", "down_proj"]))
    model.base_model.set_adapter(["default", "second"])
    found = routes(model)
    assert set(found) == factor_names(model)
    per_adapter = [sum(f".{adapter}." in name for name in found) for adapter in ("default", "second")]
    assert per_adapter == [8, 8]
    before = copies(model)
    train(model, PionLora(param_groups(model, "pion_lora", lr=1e-3)), steps=3)
    assert moved(model, before) == set(found)


def test_an_inactive_adapter_is_left_alone():
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    found = routes(model)
    assert len(found) == 8
    assert all(".second." in name for name in found)
    before = copies(model)
    train(model, PionLora(param_groups(model, "pion_lora", lr=1e-3)), steps=3)
    assert moved(model, before) == set(found)


@pytest.mark.parametrize("optim", LORA_FORMS)
def test_ranks_and_alphas_by_pattern(optim):
    model = adapted(rank_pattern={"layers.0.self_attn.v_proj": 2}, alpha_pattern={"q_proj": 32})
    found = routes(model, optim)
    assert set(found) == factor_names(model)
    for name, r in found.items():
        if ".lora_B." not in name:
            continue
        rank = 2 if "layers.0.self_attn.v_proj" in name else 4
        scaling = (32 if "q_proj" in name else 8) / rank
        assert r.unit_step == pytest.approx(growth(model, r, scaling=scaling), rel=1e-6)
    if optim == "teon_lora":
        assert not any("v_proj" in name for names in routing_table(model, optim).stacks.stacks for name in names)
    optimizer = {"pion_lora": PionLora, "teon_lora": TeonLora}[optim](param_groups(model, optim, lr=1e-3))
    before = copies(model)
    train(model, optimizer)
    assert moved(model, before) == set(found)


def test_in_embeddings_the_factors_change_places():
    """peft starts A of an embedding at zero, not B."""
    model = adapted(toy_llama(tie_word_embeddings=False), target_modules=["embed_tokens", "q_proj"])
    found = routes(model)
    assert set(found) == factor_names(model)
    embedding = {r.role: r for n, r in found.items() if "embed_tokens" in n}
    a, b = embedding["lora_embedding_A"], embedding["lora_embedding_B"]
    assert not a.parameter.any()
    assert (a.method, a.layout) == ("orthogonal", "")
    assert (b.method, b.layout) == ("rotate", "transposed")
    size = b.parameter.detach().double().norm().item() / math.sqrt(4)
    spectral = math.sqrt(b.parameter.shape[0] / a.parameter.shape[1]) / (8 / 4 * size)
    assert a.unit_step == pytest.approx(25 * spectral, rel=1e-6)
    assert b.unit_step == pytest.approx(25 * math.sqrt(4 / 16), rel=1e-6)
    optimizer, before = PionLora(param_groups(model, "pion_lora", lr=1e-3)), copies(model)
    spectrum = torch.linalg.svdvals(b.parameter.detach().double())
    train(model, optimizer, steps=3)
    assert moved(model, before) == set(found)
    torch.testing.assert_close(torch.linalg.svdvals(b.parameter.detach().double()), spectrum, rtol=1e-5, atol=0)


def test_dora_magnitudes_go_to_adamw():
    model = adapted(use_dora=True)
    found = routes(model)
    magnitudes = {n: r for n, r in found.items() if "magnitude" in n}
    assert len(magnitudes) == 4
    assert {r.rule for r in magnitudes.values()} == {"adamw"}
    assert {n for n, r in found.items() if r.rule == "pion_lora"} == factor_names(model)
    before = copies(model)
    train(model, PionLora(param_groups(model, "pion_lora", lr=1e-3)), steps=3)
    assert moved(model, before) == set(found)


@pytest.mark.parametrize("optim", LORA_FORMS)
def test_copies_and_biases_go_to_adamw(optim):
    model = adapted(
        toy_llama(attention_bias=True, tie_word_embeddings=False),
        modules_to_save=["o_proj", "lm_head", "input_layernorm"],
        bias="lora_only",
    )
    found = routes(model, optim)
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    others = {n: r for n, r in found.items() if r.rule == "adamw"}
    assert set(found) - set(others) == factor_names(model)
    assert {r.role for r in others.values()} == {"matrix", "head", "norm", "bias"}
    groups = param_groups(model, optim, weight_decay=0.1)
    decays = {n: g["weight_decay"] for g in groups for n, _ in g["params"]}
    for name, r in found.items():
        assert decays[name] == (0.0 if r.role in ("norm", "bias") or r.method == "rotate" else 0.1), name


@pytest.mark.parametrize("optim", LORA_FORMS)
def test_factors_of_experts_are_those_of_each_expert(optim):
    """peft's own product of the factors is that of the views, expert by expert."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(mixtral(), target_modules=[], target_parameters=parameters)
    found = routes(model, optim)
    assert set(found) == factor_names(model)
    assert len(found) == 8
    assert {r.matrices for r in found.values()} == {3}
    for p in (r.parameter for r in found.values()):
        torch.nn.init.normal_(p)
    wrappers = [(n, m) for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(wrappers) == 4
    for name, wrapper in wrappers:
        delta = wrapper.get_delta_weight("default")
        views = {}
        for side in "AB":
            r = found[f"{name}.lora_{side}.default.weight"]
            views[side] = [merge_rows(v).squeeze(0) for v in split(r.parameter.detach(), Layout.parse(r.layout))]
        for e, (a, b) in enumerate(zip(views["A"], views["B"], strict=True)):
            assert a.shape[0] == b.shape[0] == 4
            product = wrapper.scaling["default"] * b.T @ a
            # peft before 0.19 takes a parameter `(experts, out, in)` for `(experts, in, out)`: its factors are swapped.
            torch.testing.assert_close(product, delta[e] if delta[e].shape == product.shape else delta[e].T)


def test_experts_train_and_each_rotated_factor_keeps_its_spectrum():
    model = adapted(mixtral(), target_modules=[], target_parameters=["mlp.experts.down_proj"])
    found = routes(model)
    before = copies(model)
    train(model, PionLora(param_groups(model, "pion_lora", lr=2e-3)), steps=4)
    assert moved(model, before) == set(found)
    for name, r in found.items():
        if r.method == "rotate":
            old, new = (
                [torch.linalg.svdvals(v.double().flatten(0, 2)) for v in split(p, Layout.parse(r.layout))]
                for p in (before[name], r.parameter.detach())
            )
            torch.testing.assert_close(new, old, rtol=1e-5, atol=0)


def test_gpt2_stores_its_layers_transposed_and_its_factors_not():
    model = adapted(gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    found = routes(model)
    assert set(found) == factor_names(model)
    for name, r in found.items():
        if ".lora_B." in name:
            out = {"c_attn": 96, "c_fc": 128}[name.split(".lora_")[0].split(".")[-1]]
            assert (r.parameter.shape, partner(model, name).shape) == ((out, 4), (4, 32))
            assert r.unit_step == pytest.approx(growth(model, r, scaling=8 / 4), rel=1e-6)
    before = copies(model)
    train(model, PionLora(param_groups(model, "pion_lora", lr=1e-3)), steps=3)
    assert moved(model, before) == set(found)


def test_factors_of_convolutions_go_to_adamw():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(24, 5))
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    rules = {n.split("model.")[-1].split(".lora")[0]: set() for n in factor_names(model)}
    for name, r in routes(model).items():
        rules.setdefault(name.split("model.")[-1].split(".lora")[0], set()).add(r.rule)
    assert rules == {"0": {"adamw"}, "2": {"pion_lora"}}


# -- one factor of a pair ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "trains"), [("A", "B"), ("B", "A")])
def test_a_frozen_factor_is_named_and_its_partner_trains(side, trains):
    model = adapted(init_lora_weights=False)
    for name, p in model.named_parameters():
        if f".lora_{side}." in name:
            p.requires_grad_(False)
    with pytest.warns(UserWarning, match=rf"4 LoRA factors are frozen .*q_proj\.lora_{side}\.default\.weight"):
        found = routes(model)
    assert set(found) == factor_names(model)
    assert all(f".lora_{trains}." in name for name in found)
    with pytest.warns(UserWarning, match="frozen while their partners train"):
        groups = param_groups(model, "pion_lora", lr=1e-3)
    before = copies(model)
    train(model, PionLora(groups))
    assert moved(model, before) == set(found)


@pytest.mark.parametrize("optim", LORA_FORMS)
def test_two_zero_factors_are_refused(optim):
    model = adapted()
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    nn.init.zeros_(layer.lora_A["default"].weight)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj\.lora_A\.default\.weight and its partner"):
        routing_table(model, optim)


# -- choices and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", LORA_FORMS)
def test_no_adapters(optim, model):
    whole = {"pion_lora": "pion_ambient", "teon_lora": "teon"}[optim]
    with pytest.raises(ValueError, match=f"the model has none that is trainable.* use optim='{whole}' for whole"):
        routing_table(model, optim)


@pytest.mark.parametrize(
    ("optim", "form"),
    [("pion", "pion_lora"), ("pion_ambient", "pion_lora"), ("teon", "teon_lora"), ("muon", "teon_lora")],
)
def test_adapters_under_a_rule_of_whole_matrices(optim, form):
    with pytest.raises(ValueError, match=f"has LoRA adapters, and optim='{optim}' .*use optim='{form}'"):
        param_groups(adapted(), optim)


@pytest.mark.parametrize("lora_a", [None, "rotate", "orthogonal", "adamw"])
@pytest.mark.parametrize("lora_b", [None, "rotate", "orthogonal", "adamw"])
def test_the_choices_of_both_factors(lora_a, lora_b):
    model = adapted(init_lora_weights=False)
    if lora_a == lora_b == "adamw":
        with pytest.raises(ValueError, match="every LoRA factor is left to AdamW: set lora_a='rotate' or"):
            routing_table(model, "pion_lora", lora_a=lora_a, lora_b=lora_b)
        return
    want = {"A": lora_a or "rotate", "B": lora_b or "orthogonal"}
    groups = param_groups(model, "pion_lora", lr=1e-3, lora_a=lora_a, lora_b=lora_b)
    for group in groups:
        for name, _ in group["params"]:
            method = want["A" if ".lora_A." in name else "B"]
            assert group.get("method", "adamw") == method
            assert group["rule"] == ("adamw" if method == "adamw" else "pion_lora")
    before = copies(model)
    train(model, PionLora(groups))
    assert moved(model, before) == factor_names(model)


@pytest.mark.parametrize(
    ("optim", "options", "message"),
    [
        ("pion_lora", {"lora_a": "rotat"}, "Did you mean 'rotate'"),
        ("pion_lora", {"lora_b": "orthogonl"}, "Did you mean 'orthogonal'"),
        ("pion_lora", {"stack": 2}, "options of optim='teon' and 'teon_lora', not of optim='pion_lora'"),
        ("teon_lora", {"lora_a": "rotate"}, "lora_a is an option of optim='pion_lora', not of optim='teon_lora'"),
        ("pion_lora", {"targets": ["qproj"]}, "Did you mean 'q_proj'"),
        ("pion_lora", {"exclude": ["loraA"]}, "Did you mean 'lora_A'"),
        ("teon_lora", {"stack_targets": ["vproj"]}, "Did you mean 'v_proj'"),
        ("teon_lora", {"stack": 3}, "stack=3 is more than the 2 consecutive layers"),
        ("teon_lora", {"stack": 0}, "stack must be a whole number of layers"),
    ],
)
def test_bad_choices_name_the_right_one(optim, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        routing_table(adapted(), optim, **options)


def test_adapters_of_another_kind_are_none_of_ours(token_rows, tmp_path):
    """AdaLoRA prunes its factors itself, through a diagonal between them."""
    config = peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10, task_type="CAUSAL_LM")
    model = peft.get_peft_model(toy_llama(), config)
    assert not has_adapters(model)
    with pytest.raises(ValueError, match="no trainable matrix"):
        param_groups(model)
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Trainer(model, args, train_dataset=token_rows)
    watch(trainer)
    trainer.train()
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"


def test_targets_and_exclude_choose_among_factors():
    model = adapted()
    chosen = {n for n, r in routes(model, targets=["q_proj"]).items() if r.rule == "pion_lora"}
    assert chosen == {n for n in factor_names(model) if "q_proj" in n}
    chosen = {n for n, r in routes(model, exclude=[r"v_proj\.lora_A"]).items() if r.rule == "pion_lora"}
    assert chosen == {n for n in factor_names(model) if "v_proj.lora_A" not in n}
    assert set(routes(model, targets=["q_proj"])) == factor_names(model), "what is not chosen goes to AdamW"


@pytest.mark.parametrize("optim", LORA_FORMS)
def test_targets_that_leave_no_factor_are_refused(optim):
    with pytest.raises(ValueError, match="every LoRA factor is left to AdamW: widen optim_target_modules or"):
        routing_table(adapted(), optim, exclude=["lora_"])


# -- stacks -----------------------------------------------------------------------------------------------------------


def test_stacks_pair_the_factors_of_consecutive_layers():
    model = adapted(toy_llama(num_hidden_layers=5), target_modules=["q_proj", "down_proj"])
    found = routing_table(model, "teon_lora").stacks
    want = {
        tuple(f"base_model.model.model.layers.{i}.{path}.lora_{side}.default.weight" for i in layers)
        for path in ("self_attn.q_proj", "mlp.down_proj")
        for side in "AB"
        for layers in ((0, 1), (2, 3))
    }
    assert set(found.stacks) == want
    assert len(found.stacks) == 8
    assert len(found.alone) == 4
    assert all(".layers.4." in name for name in found.alone)


def test_stack_targets_choose_among_factors():
    model = adapted()
    found = routing_table(model, "teon_lora", stack_targets=["q"]).stacks.stacks
    assert sorted(names[0].split("self_attn.")[1] for names in found) == [
        "q_proj.lora_A.default.weight",
        "q_proj.lora_B.default.weight",
    ]
    rules = {r.name: r.rule for r in routing_table(model, "teon_lora", stack_targets=["q"])}
    assert set(rules.values()) == {"teon_lora"}
    assert routing_table(model, "teon_lora", stack=1).stacks.stacks == ()


def test_stacks_of_experts_pair_by_index():
    model = adapted(mixtral(), target_modules=[], target_parameters=["mlp.experts.down_proj"])
    for names in routing_table(model, "teon_lora").stacks.stacks:
        assert names[1] == names[0].replace("layers.0", "layers.1")
    assert len(routing_table(model, "teon_lora").stacks.stacks) == 2 * 3


# -- through the Trainer ----------------------------------------------------------------------------------------------


@pytest.fixture
def optimizer_of(tmp_path, monkeypatch):
    """The optimizer that a Trainer builds, and what was logged meanwhile."""

    def build(
        model: nn.Module, classes: type = TrainingArguments, **options
    ) -> tuple[torch.optim.Optimizer, list[str]]:
        logged = []
        monkeypatch.setattr("pion_hf.integrations.handler.logger.warning", logged.append)
        args = classes(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
        return Trainer(model=model, args=args).create_optimizer(), logged

    return build


@pytest.mark.parametrize(
    ("optim", "form", "stack"),
    [("pion", PionLora, None), ("pion_ambient", PionLora, None), ("teon", TeonLora, 2), ("muon", TeonLora, 1)],
)
def test_whole_matrix_names_become_their_lora_forms(optim, form, stack, optimizer_of):
    model = adapted()
    optimizer, logged = optimizer_of(model, optim=optim, learning_rate=5e-4)
    assert type(optimizer) is form
    assert len(logged) == 1
    name = "pion_lora" if form is PionLora else "teon_lora"
    assert f"optim={optim!r} on LoRA adapters is {name!r}" in logged[0]
    assert ("stack=1" in logged[0]) == (optim == "muon")
    assert ("direction=gradient" in logged[0]) == (optim == "pion")
    directions = {"pion": {"gradient"}, "pion_ambient": {"natural"}}.get(optim, {None})
    assert {g.get("direction") for g in optimizer.param_groups} == directions
    matrices = [g for g in optimizer.param_groups if g["rule"] == name]
    assert {g.get("stack") for g in matrices} == {stack}
    if stack:
        assert sum(len(g["stacks"]) for g in matrices) == (4 if stack == 2 else 0)
    before = copies(model)
    train(model, optimizer, steps=3)
    assert moved(model, before) == factor_names(model)


@pytest.mark.parametrize(("optim", "form"), [("pion_lora", PionLora), ("teon_lora", TeonLora)])
def test_the_forms_own_names_say_nothing(optim, form, optimizer_of, tmp_path):
    optimizer, logged = optimizer_of(adapted(), optim=optim)
    assert type(optimizer) is form
    assert not any("on LoRA adapters" in line for line in logged)
    record = json.loads((tmp_path / "routing.json").read_text())
    methods = {(p["role"], p["method"]) for p in record["parameters"]}
    first = "rotate" if form is PionLora else "orthogonal"
    assert methods == {("lora_A", first), ("lora_B", "orthogonal")}
    assert all(p["unit_step"] > 0 for p in record["parameters"])


@pytest.mark.parametrize("words", [{"optim_args": "direction=polar"}, {"optim_direction": "polar"}])
def test_another_direction_wins_over_that_of_the_name(words, optimizer_of):
    for classes in (PionTrainingArguments, TrainingArguments)[: 2 if "optim_args" in words else 1]:
        optimizer, _ = optimizer_of(adapted(), classes, optim="pion", **words)
        assert {g["direction"] for g in optimizer.param_groups} == {"polar"}


def test_options_reach_the_lora_form(optimizer_of):
    options = {"optim_metric": "ambient", "optim_direction": "adam", "optim_betas": [0.8, 0.9], "weight_decay": 0.1}
    optimizer, _ = optimizer_of(adapted(), PionTrainingArguments, optim_adamw_lr=1e-3, **options)
    for group in optimizer.param_groups:
        assert (group["metric"], group["direction"], group["betas"]) == ("ambient", "adam", (0.8, 0.9))
        assert group["weight_decay"] == (0.0 if group["method"] == "rotate" else 0.1)
    optimizer, _ = optimizer_of(adapted(), optim="pion_lora", optim_args="lora_a=orthogonal, lora_b=adamw")
    assert sorted((g["rule"], g.get("method")) for g in optimizer.param_groups) == [
        ("adamw", None),
        ("pion_lora", "orthogonal"),
    ]
    optimizer, _ = optimizer_of(adapted(), optim="pion_lora", optim_target_modules=["q_proj"])
    chosen = {n for g in optimizer.param_groups if g["rule"] == "pion_lora" for n in g["param_names"]}
    assert len(chosen) == 4
    assert all("q_proj" in n for n in chosen)


@pytest.mark.parametrize(
    ("optim", "options", "message"),
    [
        ("pion", {"optim_args": "side=in"}, "'side' is an option of optim='pion' and 'pion_ambient', not of"),
        ("pion_ambient", {"optim_args": "side=in"}, "'side' is an option of optim='pion' and 'pion_ambient', not of"),
        ("pion", {"optim_args": "preset=paper"}, "'preset' is an option of optim='pion', not of optim='pion_lora'"),
        ("pion_ambient", {"optim_args": "rms=0.2"}, "not of optim='pion_lora'"),
        ("pion", {"optim_args": "retraction=taylor"}, "'retraction' is an option of optim='pion' and 'pion_ambient'"),
        ("pion", {"optim_args": "direction=msign"}, "'msign' is not a known value of direction"),
        ("teon", {"optim_args": "scale=rms"}, "not of optim='teon_lora'"),
        ("muon", {"optim_args": "rms=0.1"}, "not of optim='teon_lora'"),
        ("teon_lora", {"optim_args": "lora_a=rotate"}, "'lora_a' is an option of optim='pion_lora'"),
    ],
)
def test_options_that_the_lora_form_lacks_are_errors(optim, options, message, optimizer_of):
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer_of(adapted(), optim=optim, **options)


def test_a_group_without_its_factors_is_refused():
    p = nn.Parameter(torch.randn(4, 8))
    for form, rule in ((PionLora, "pion_lora"), (TeonLora, "teon_lora")):
        for params in ([p], [{"params": [p], "rule": rule, "method": "rotate", "unit_step": []}]):
            with pytest.raises(ValueError, match=rf"make it with pion_hf\.param_groups\(model, '{rule}'\)"):
                form(params)
