"""Routing: heads beside the layers, what does not decay, matrices that are zero at the start."""

import copy
import json
import re
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from pion_hf import Pion, PionTrainer, param_groups, routing_table
from tests.architectures import HEADS, LAYERS, WIDTH, kind, llama
from tests.conftest import toy_llama


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)


class OwnModel(nn.Module):
    """A language model as people write it; its head may come first, and be the embedding."""

    def __init__(self, *, tied, layers=2, width=16, vocabulary=29):
        super().__init__()
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.embed, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(40, width)
        self.narrow = nn.Linear(width, width)
        if layers:
            self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
            self.boxes = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Linear(width, 4)) for _ in range(2))
        if tied:
            self.lm_head.weight = self.embed.weight


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_users_own_model(tied, layers):
    roles = {kind(r.name): r.role for r in routing_table(OwnModel(tied=tied, layers=layers)) if r.role != "bias"}
    assert roles.pop("lm_head.weight") == ("embedding" if tied else "head")
    if layers:
        assert {roles.pop(f"boxes.#.{i}.weight") for i in (0, 1)} == {"head"}
        assert {roles.pop(f"blocks.#.{name}.weight") for name in ("up", "down")} == {"matrix"}
    assert {name: role for name, role in roles.items() if role not in ("embedding", "norm")} == {
        "narrow.weight": "matrix"
    }


def test_a_chain_of_a_model_and_its_head_is_no_list_of_layers():
    """The same routing as of the model itself."""
    model = OwnModel(tied=False)
    own = {f"0.{r.name}": r.role for r in routing_table(model)}
    assert {r.name: r.role for r in routing_table(nn.Sequential(model, nn.Sequential(nn.Linear(29, 5))))} == own | {
        "1.0.weight": "head",
        "1.0.bias": "bias",
    }


def test_vectors_that_scale_and_the_state_of_a_state_space_do_not_decay():
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=97, hidden_size=WIDTH, state_size=4, num_hidden_layers=1)
    )
    beit = transformers.BeitForImageClassification(
        transformers.BeitConfig(
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
            layer_scale_init_value=0.1,
        )
    )
    routes = {r.name: r for model in (mamba, beit) for r in routing_table(model)}
    still = ["backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.D", "beit.layers.0.lambda_1"]
    found = {name: route.decays for name, route in routes.items() if re.search(r"A_log|mixer\.D$|lambda_?1$", name)}
    assert len(found) == len(still)
    assert not any(found.values())
    assert routes["backbone.layers.0.mixer.conv1d.weight"].decays


def test_the_magnitudes_of_dora_do_not_decay():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=2, use_dora=True))
    found = [r for r in routing_table(model, "pion_lora") if "magnitude" in r.name]
    assert len(found) == LAYERS
    assert not any(r.decays for r in found)


def test_layers_of_a_form_that_is_not_known_are_pointed_out():
    model = transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=97, d_model=WIDTH, n_layer=2, n_head=4, d_inner=4 * WIDTH)
    )
    with pytest.warns(UserWarning, match=r"AdamW updates [\d,]+ of the [\d,]+ weights in this model's layers"):
        routing_table(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routing_table(llama())


def with_zeros():
    model = llama()
    for name, p in model.named_parameters():
        if name in ZEROS:
            nn.init.zeros_(p)
    return model


ZEROS = [f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")]
ZEROS += [f"model.layers.1.{name}.weight" for name in ("self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")]


def test_matrices_that_are_zero_at_the_start_go_to_adamw_and_are_all_named():
    with pytest.warns(UserWarning, match="6 matrices are zero.*AdamW") as said:
        routing = routing_table(with_zeros())
    assert len(said) == 1
    assert all(name in str(said[0].message) for name in ZEROS)
    assert routing.zeros == ZEROS
    assert {r.rule for r in routing if r.name in ZEROS} == {"adamw"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert routing_table(llama(), zeros=ZEROS).zeros == ZEROS
        assert not routing_table(with_zeros(), zeros=[]).zeros
        assert not routing_table(with_zeros(), "muon").zeros  # whose steps a zero matrix can take
        assert not routing_table(with_zeros(), exclude="[qov]_proj|mlp").zeros


def test_a_model_of_nothing_but_zeros_is_refused_with_the_reason():
    model = llama()
    for p in model.parameters():
        nn.init.zeros_(p)
    with pytest.raises(ValueError, match="All there are are zero"):
        routing_table(model)


def trained(model, optimizer, steps):
    for _ in range(steps):
        model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:.*matrices are zero")
def test_resumed_training_leaves_them_to_adamw_although_they_are_zero_no_more():
    model = with_zeros()
    optimizer = Pion(param_groups(model, lr=1e-2, weight_decay=0.1))
    trained(model, optimizer, 2)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    trained(model, optimizer, 2)
    again = llama()
    again.load_state_dict(weights)
    resumed = Pion(param_groups(again, lr=1e-2, weight_decay=0.1))
    resumed.load_state_dict(saved)
    trained(again, resumed, 2)
    for (name, p), q in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), name
    late = Pion(param_groups(with_zeros(), lr=1e-2, weight_decay=0.1))  # made before the weights were loaded
    late.load_state_dict(Pion(param_groups(llama(), lr=1e-2, weight_decay=0.1)).state_dict())
    assert {name for group in late.param_groups if group["rule"] == "pion" for name in group["param_names"]} >= {*ZEROS}


@pytest.mark.filterwarnings("ignore:.*matrices are zero")
@pytest.mark.parametrize(("cls", "told"), [(Trainer, True), (Trainer, False), (PionTrainer, False)])
def test_a_resumed_run_of_a_trainer_has_the_checkpoints_routing(cls, told, tmp_path, token_rows):
    """told: whether the arguments say that it is resumed, or `train` alone; PionTrainer tells them."""

    def trainer(folder, **options):
        model = toy_llama()
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.zero_()
        quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False}
        args = TrainingArguments(str(folder), optim="pion", max_steps=4, save_steps=2, **quiet, **options)
        return cls(model, args, train_dataset=token_rows)

    whole = trainer(tmp_path)
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = trainer(tmp_path / "again", resume_from_checkpoint=checkpoint if told else None)
    resumed.train(resume_from_checkpoint=checkpoint)
    for (name, p), q in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    saved = json.loads((tmp_path / "routing.json").read_text())["parameters"]
    assert {p["name"] for p in saved if p["role"] == "zero"} == {"model.layers.0.mlp.down_proj.weight"}
    if told or cls is PionTrainer:
        assert (tmp_path / "again" / "routing.json").read_bytes() == (tmp_path / "routing.json").read_bytes()


def test_a_trainers_own_groups_are_pointed_out_once(tmp_path, token_rows, model):
    args = TrainingArguments(str(tmp_path), max_steps=1, weight_decay=0.1, use_cpu=True, report_to="none")
    trainer = Trainer(model, args, train_dataset=token_rows, optimizer_cls_and_kwargs=(Pion, {"lr": 1e-3}))
    with pytest.warns(UserWarning, match=r"embeddings and heads.*param_groups") as said:
        trainer.create_optimizer()
    assert len([w for w in said if "param_groups" in str(w.message)]) == 1
