"""Routing: what a user's expressions change, errors, and what is shown and saved."""

import json
import re

import pytest
from torch import nn

from pion_hf import param_groups, routing_table
from tests.architectures import EXPERTS, LAYERS, WIDTH, build, kind, llama

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


def test_rows_add_up_and_are_what_is_saved():
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
    saved = json.loads(json.dumps(routing.record(rates)))
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
