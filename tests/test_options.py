"""Every option is said once: what constructors, checks and help make of `pion_hf.optim.options`."""

from __future__ import annotations

import dataclasses
import inspect
import typing

import pytest
import torch
from torch import nn

from pion_hf import Muon, Pion, PionLora, RoutedAdamW, Teon, TeonLora
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES, default_rate, option_types
from pion_hf.optim.options import PRESETS, USUAL_RATES, ranges_of, types_of

CLASSES = (Pion, Muon, Teon, PionLora, TeonLora, RoutedAdamW)


@pytest.mark.parametrize("cls", CLASSES)
def test_constructors_have_the_options_with_their_types_and_defaults(cls):
    signature = inspect.signature(cls.__init__).parameters
    hints = typing.get_type_hints(cls.__init__)
    fields = {field.name: field.default for field in dataclasses.fields(cls.options)}
    beside = {"self", "params", "inputs"}
    assert {name: p.default for name, p in signature.items() if name not in beside} == fields
    assert {name: hints[name] for name in fields} == types_of(cls.options)


@pytest.mark.parametrize("cls", CLASSES)
def test_options_are_what_groups_begin_with(cls):
    matrices = {"params": [(name, nn.Parameter(torch.eye(3))) for name in "ab"], "rule": cls.matrix_rules[0]}
    matrices |= {"method": "orthogonal", "unit_step": [1.0, 1.0]} if cls in (PionLora, TeonLora) else {}
    matrices |= {"stacks": [["a", "b"]]} if cls in (Teon, TeonLora) else {}
    others = {"params": [("bias", nn.Parameter(torch.ones(3)))], "rule": "adamw"}
    for group in cls([matrices, others]).param_groups:
        fields = {field.name: field.default for field in dataclasses.fields(cls.options)}
        assert fields.keys() - group.keys() <= {"preset", "adamw_betas", "adamw_eps"}
        own = {name: value for name, value in fields.items() if name in group and group["rule"] != "adamw"}
        assert {name: group[name] for name in own} == own


@pytest.mark.parametrize("cls", CLASSES)
def test_numbers_have_ranges_and_defaults_are_within_them(cls):
    allowed = ranges_of(cls.options)
    for field in dataclasses.fields(cls.options):
        kinds = {*typing.get_args(types_of(cls.options)[field.name]), types_of(cls.options)[field.name]}
        assert (field.name in allowed) == bool(kinds & {int, float})
        values = field.default if isinstance(field.default, tuple) else (field.default,)
        assert field.name not in allowed or all(v is None or allowed[field.name].holds(v) for v in values)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_options_to_what_they_can_be(preset):
    types = types_of(Pion.options)
    for option, value in PRESETS[preset].items():
        words = typing.get_args(types[option])
        assert value in words if words else isinstance(value, types[option])


@pytest.mark.parametrize("optim", OPTIMIZER_CLASSES)
def test_every_name_has_usual_rates_and_its_own_is_one(optim):
    low, high = USUAL_RATES[optim]
    assert low <= default_rate(optim) <= high
    assert "lr" not in option_types(optim)
