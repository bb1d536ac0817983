"""Optimizer state of another model, routing, option or precision is refused, and the error shows what differs."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from pion_hf import Pion, PionTrainer, PionTrainingArguments, RoutedAdamW, Teon, param_groups
from pion_hf.optim import MatrixOptimizer
from tests.conftest import toy_llama

LETTERS = "abcd"


def named(
    names: str = "ab", shape: tuple[int, int] = (6, 9), dtype: torch.dtype = torch.float32
) -> list[tuple[str, nn.Parameter]]:
    draw = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(shape, generator=draw).to(dtype))) for name in names]


def pion(names: str = "ab", *, group: dict[str, Any] | None = None, **options: Any) -> Pion:
    form = {key: options.pop(key) for key in ("shape", "dtype") if key in options}
    return Pion([{"params": named(names, **form), "rule": "pion", **(group or {})}], lr=1e-2, **options)


def teon(*stacks: str, names: str = LETTERS) -> Teon:
    return Teon([{"params": named(names), "rule": "teon", "stacks": [list(s) for s in stacks]}], lr=1e-2)


def muon(dtype: torch.dtype = torch.float32) -> Teon:
    return Teon([{"params": named(dtype=dtype), "rule": "muon"}], lr=1e-2)


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
    optimizer.step()


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state after two steps, as it comes out of a file."""
    for seed in range(2):
        step(optimizer, seed)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


FUSED = {"layout": "rows=2,4"}
MISFITS: dict[str, tuple[Callable, Callable, str]] = {
    "names": (pion, lambda: pion("cd"), "only the saved state has a, b, only the optimizer has c, d"),
    "one missing": (pion, lambda: pion("a"), "only the saved state has b"),
    "many missing": (lambda: pion("abcdefgh"), lambda: pion("a"), "only the saved state has b, c, d, e, f and 2 more"),
    "order": (pion, lambda: pion("ba"), "its parameters are in other groups, or in another order"),
    "rule": (muon, pion, "rule of a was 'muon' and is 'pion'"),
    "side": (lambda: pion(side="in"), lambda: pion(side="out"), "side of a was 'in' and is 'out'"),
    "metric": (pion, lambda: pion(metric="ambient"), "metric of a was 'lie' and is 'ambient'"),
    "layout": (pion, lambda: pion(group=FUSED), "layout of a was '' and is 'rows=2,4'"),
    "stacks": (lambda: teon("ab", "cd"), lambda: teon("ab", "dc"), "stacks of a was ['c', 'd'] and is ['d', 'c']"),
    "no stack": (lambda: teon("ab"), lambda: teon("ab", "cd"), "stacks of a was None and is ['c', 'd']"),
    "shape": (pion, lambda: pion(shape=(9, 6)), "a was (6, 9) and is (9, 6), b was (6, 9) and is (9, 6)"),
    "half": (lambda: muon(torch.bfloat16), muon, "a was torch.bfloat16 and is torch.float32"),
    "full": (muon, lambda: muon(torch.bfloat16), "a was of full precision and is torch.bfloat16"),
    "halves": (
        lambda: muon(torch.float16),
        lambda: muon(torch.bfloat16),
        "a was torch.float16 and is torch.bfloat16",
    ),
    "adamw": (lambda: torch.optim.AdamW(named()), pion, "rule of a was None and is 'pion'"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_state_that_does_not_fit_is_refused(misfit):
    before, after, message = MISFITS[misfit]
    state, optimizer = saved(before()), after()
    start = copy.deepcopy(weights(optimizer)), copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"^the saved optimizer state does not fit: .*fresh state\.$") as error:
        optimizer.load_state_dict(state)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not optimizer.state, "half loaded"
    assert [{**g, "params": 0} for g in optimizer.param_groups] == [{**g, "params": 0} for g in start[1]]


FITTING: list[Callable[[], MatrixOptimizer]] = [
    pion,
    lambda: pion(preset="paper"),
    lambda: pion(preset="ambient"),
    lambda: pion(group=FUSED, dtype=torch.bfloat16),
    muon,
    lambda: teon("ab", "cd"),
    lambda: RoutedAdamW(named(), lr=1e-2),
    lambda: RoutedAdamW(named(dtype=torch.bfloat16), lr=1e-2),
    lambda: Pion([p for _, p in named()], lr=1e-2),
]


@pytest.mark.parametrize("build", FITTING)
@pytest.mark.parametrize("how", ["load", "copy", "pickle"])
def test_state_that_fits_continues_to_the_bit(build, how):
    straight = build()
    state = saved(straight)
    if how == "load":
        resumed = build()
        with torch.no_grad():
            for p, q in zip(weights(resumed), weights(straight), strict=True):
                p.copy_(q)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resumed.load_state_dict(state)
    else:
        resumed = copy.deepcopy(straight) if how == "copy" else pickle.loads(pickle.dumps(straight))
    assert [g.keys() for g in resumed.param_groups] == [g.keys() for g in straight.param_groups]
    for seed in range(2, 5):
        step(straight, seed)
        step(resumed, seed)
    assert all(torch.equal(p, q) for p, q in zip(weights(resumed), weights(straight), strict=True))


def test_steps_of_adamw_come_to_the_device_of_the_weights():
    """As where a Trainer reads the file to the CPU and trains on a GPU."""
    away = RoutedAdamW([(name, nn.Parameter(p.to("meta"))) for name, p in named()])
    away.load_state_dict(saved(RoutedAdamW(named())))
    assert {v.device.type for state in away.state.values() for v in state.values()} == {"meta"}


def test_adamw_goes_on_in_another_precision():
    optimizer = RoutedAdamW(named(dtype=torch.bfloat16))
    optimizer.load_state_dict(saved(RoutedAdamW(named(), lr=1e-1)))
    start = [p.clone() for p in weights(optimizer)]
    step(optimizer, 2)
    assert not any(torch.equal(p, q) for p, q in zip(weights(optimizer), start, strict=True))


@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_rotations_go_on_in_another_precision(before, after):
    """The factors are those of the weight as it is now; averages of gradients stay."""
    first, second = pion(dtype=getattr(torch, before)), pion(dtype=getattr(torch, after))
    state = saved(first)
    with torch.no_grad():
        for p, q in zip(weights(second), weights(first), strict=True):
            p.copy_(q)
    start = [p.clone() for p in weights(second)]
    second.load_state_dict(state)
    averages = [second.state[p]["momentum"].clone() for p in second.param_groups[0]["params"]]
    assert all(torch.equal(m, state["state"][i]["momentum"]) for i, m in enumerate(averages))
    step(first, 2)
    step(second, 2)
    for p, q, w in zip(weights(second), weights(first), start, strict=True):
        assert not torch.equal(p, w)
        torch.testing.assert_close(p.float(), q.float(), rtol=2**-6, atol=2**-6)


def test_groups_added_after_loading_are_no_difference():
    loaded = pion("a")
    loaded.load_state_dict(saved(pion("a")))
    loaded.add_param_group({"params": named("b"), "rule": "pion"})
    state = saved(loaded)
    Pion([{"params": named(name), "rule": "pion"} for name in "ab"]).load_state_dict(state)


def test_names_on_one_side_only_are_no_difference():
    Pion([p for _, p in named()]).load_state_dict(saved(pion()))
    pion().load_state_dict(saved(Pion([p for _, p in named()])))


def test_numbers_are_the_saved_ones_and_a_warning_says_so():
    optimizer = pion(rms=0.4, betas=(0.8, 0.95))
    with pytest.warns(UserWarning, match=r"replace those given: betas of a is \(0\.9, .*rms of a is 0\.2, not 0\.4"):
        optimizer.load_state_dict(saved(pion()))
    assert optimizer.param_groups[0]["rms"] == 0.2
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_a_learning_rate_is_a_schedules():
    optimizer = pion()
    state = saved(optimizer)
    optimizer.param_groups[0]["lr"] = 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1e-2


# -- models -----------------------------------------------------------------------------------------------------------


def model_state(optim: str, **options: Any) -> dict[str, Any]:
    return saved(build(optim, **options))


def build(optim: str, *, layers: int = 4, **options: Any) -> MatrixOptimizer:
    groups = param_groups(toy_llama(num_hidden_layers=layers), optim, lr=1e-2, **options)
    return Pion(groups) if optim == "pion" else Teon(groups, stack=1) if optim == "muon" else Teon(groups)


Q = "model.layers.0.self_attn.q_proj.weight"
ROUTINGS = {
    "stacks": ({"optim": "teon"}, {"optim": "muon"}, f"rule of {Q} was 'teon' and is 'muon'"),
    "optim": ({"optim": "muon"}, {"optim": "pion"}, f"rule of {Q} was 'muon' and is 'pion'"),
    "exclude": ({"optim": "pion"}, {"optim": "pion", "exclude": "q_proj"}, f"rule of {Q} was 'pion' and is 'adamw'"),
    "layers": (
        {"optim": "pion"},
        {"optim": "pion", "layers": 3},
        "only the saved state has model.layers.3.self_attn.q",
    ),
    "stack": ({"optim": "teon", "stack": 4}, {"optim": "teon"}, f"stacks of {Q} was ['model.layers.0.self_attn.q_proj"),
    "targets": (
        {"optim": "teon"},
        {"optim": "teon", "stack_targets": ["q", "k"]},
        "v_proj.weight was 'teon' and is 'muon'",
    ),
}


@pytest.mark.parametrize(("before", "after", "message"), ROUTINGS.values(), ids=ROUTINGS)
def test_state_of_another_routing_is_refused(before, after, message):
    state, optimizer = saved(build(**before)), build(**after)
    with pytest.raises(ValueError, match="does not fit") as error:
        optimizer.load_state_dict(state)
    assert message in str(error.value)


def test_a_run_resumed_with_another_option_is_refused(tmp_path, token_rows):
    def trainer(side: str) -> PionTrainer:
        options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_steps": 1, "max_steps": 2}
        args = PionTrainingArguments(output_dir=str(tmp_path), optim_side=side, **options)
        return PionTrainer(model=toy_llama(), args=args, train_dataset=token_rows)

    trainer("in").train()
    with pytest.raises(ValueError, match=r"side of model\.layers\.0\.\S+ was 'in' and is 'out'"):
        trainer("out").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_reach_is_measured_anew_and_no_difference(tmp_path, token_rows):
    """Of trained factors it is another number; state holds the first."""

    def trainer() -> PionTrainer:
        options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_steps": 1, "max_steps": 2}
        args = PionTrainingArguments(output_dir=str(tmp_path), learning_rate=0.1, **options)
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(toy_llama(), config)
        return PionTrainer(model=adapted, args=args, train_dataset=token_rows)

    straight, resumed = trainer(), trainer()
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (name, p), q in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_state_of_what_pion_was_before_names_what_it_is_now():
    """`optim: pion` of an old run, resumed."""
    state, optimizer = saved(pion(preset="ambient")), pion()
    with pytest.raises(ValueError, match=r"that of optim='pion_ambient', as optim='pion' was called before 0\.13\."):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="does not fit") as error:
        pion(preset="ambient").load_state_dict(saved(optimizer))
    assert "before 0.13" not in str(error.value)
