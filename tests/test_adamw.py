"""AdamW with two learning rates: torch's own with two kinds of groups, and what the rest of the package makes of it."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM, Trainer, TrainingArguments

from pion_hf import PionTrainer, PionTrainingArguments, RoutedAdamW, param_groups, routing_table
from pion_hf.cli import main
from pion_hf.cli.grid import make_grid, read_contenders
from pion_hf.cli.plan import make_plan, parse
from pion_hf.integrations.updates import Meter
from pion_hf.optim.groups import named_parameters
from pion_hf.optim.observing import SelfCheck
from tests.conftest import toy_llama
from tests.test_cli import fails

LR, ADAMW_LR, DECAY = 1e-2, 3e-3, 0.1


def is_hidden(name: str, p: torch.Tensor) -> bool:
    return p.ndim == 2 and "embed" not in name


def torchs(model: nn.Module, **options) -> torch.optim.AdamW:
    """torch's AdamW with a group of hidden matrices, one of the embeddings, and norms without decay."""
    groups = {kind: [] for kind in ("matrix", "embedding", "norm")}
    for name, p in model.named_parameters():
        groups["matrix" if is_hidden(name, p) else "embedding" if p.ndim == 2 else "norm"].append(p)
    return torch.optim.AdamW(
        [
            {"params": groups["matrix"], "lr": LR, "weight_decay": DECAY},
            {"params": groups["embedding"], "lr": ADAMW_LR, "weight_decay": DECAY},
            {"params": groups["norm"], "lr": ADAMW_LR, "weight_decay": 0.0},
        ],
        fused=True,
        **options,
    )


def routed(model: nn.Module, **options) -> RoutedAdamW:
    groups = param_groups(model, "adamw_routed", lr=LR, adamw_lr=ADAMW_LR, weight_decay=DECAY, **options)
    return RoutedAdamW(groups)


def take(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    ids = torch.arange(5, 65).view(4, 15)
    for _ in range(steps):
        model(input_ids=ids, labels=ids.roll(1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def fused_projections() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Phi3ForCausalLM(Phi3Config(vocab_size=105, num_key_value_heads=2, pad_token_id=0, **sizes))


# -- the step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_torchs_adamw_with_a_rate_for_matrices_and_one_for_the_rest(steps, dtype):
    """To the bit, in half precision too, and whether somebody watches or not."""
    ours, theirs = toy_llama().to(dtype), toy_llama().to(dtype)
    optimizer, other = routed(ours), torchs(theirs)
    assert optimizer.observers, "the self-check of the first step goes parameter by parameter"
    take(ours, optimizer, steps)
    take(theirs, other, steps)
    for (name, p), q, start in zip(ours.named_parameters(), theirs.parameters(), toy_llama().parameters(), strict=True):
        assert torch.equal(p, q), name
        moved = not torch.equal(p, start.to(dtype))
        assert moved or (dtype == torch.bfloat16 and "norm" in name), f"{name} did not move"
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[p][key], other.state[q][key]), f"{key} of {name}"
    assert set(optimizer.state[next(ours.parameters())]) == {"exp_avg", "exp_avg_sq", "step"}


def test_it_is_near_torchs_adamw_one_tensor_at_a_time():
    ours, theirs = toy_llama().double(), toy_llama().double()
    other = torchs(theirs)
    for group in other.param_groups:
        group.update(fused=False, foreach=False)
    take(ours, routed(ours), 10)
    take(theirs, other, 10)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_betas_and_eps_are_of_matrices_too():
    ours, theirs = toy_llama(), toy_llama()
    take(ours, routed(ours, adamw_betas=(0.8, 0.9), adamw_eps=1e-3), 3)
    take(theirs, torchs(theirs, betas=(0.8, 0.9), eps=1e-3), 3)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("build", [toy_llama, fused_projections])
def test_one_rate_for_both_is_one_adamw(build):
    """However many matrices a parameter holds."""
    ours, theirs = build(), build()
    take(ours, RoutedAdamW(param_groups(ours, "adamw_routed", lr=LR)), 3)
    take(theirs, torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=0.0, fused=True), 3)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_bare_tensors_are_divided_and_what_has_no_gradient_stays():
    params = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 2))]
    optimizer = RoutedAdamW(params, lr=LR)
    assert [(g["rule"], len(g["params"])) for g in optimizer.param_groups] == [("adamw_routed", 2), ("adamw", 1)]
    params[0].grad, params[1].grad = torch.ones(3, 4), torch.ones(4)
    optimizer.step()
    assert (params[0] < 1).all()
    assert (params[2] == 1).all()


# -- what is seen of it -----------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "matrices"), [(toy_llama, 14), (fused_projections, 14)])
def test_the_self_check_counts_what_each_parameter_holds(build, matrices, caplog):
    caplog.set_level(logging.INFO, logger="pion_hf.optim.observing")
    model = build()
    take(model, routed(model), 3)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("pion_hf")]  # transformers may speak up too
    assert said == [f"adamw_routed: {matrices} of {matrices} matrices moved"]


def test_experts_are_counted_one_by_one(caplog):
    caplog.set_level(logging.INFO, logger="pion_hf.optim.observing")
    weight = nn.Parameter(torch.randn(4, 6, 5))
    optimizer = RoutedAdamW([{"params": [("experts", weight)], "rule": "adamw_routed"}], lr=LR)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert [r.getMessage() for r in caplog.records] == ["adamw_routed: 4 of 4 matrices moved"]


def test_the_self_check_names_what_does_not_move():
    model = toy_llama().to(torch.bfloat16)
    optimizer = RoutedAdamW(param_groups(model, "adamw_routed", lr=1e-12, adamw_lr=1e-3))
    with pytest.warns(UserWarning, match=r"^14 of 14 matrices did not move"):
        take(model, optimizer, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [toy_llama, fused_projections])
def test_updates_are_measured_by_matrix(build, dtype):
    model = build().to(dtype)
    optimizer = routed(model)
    optimizer.observers.clear()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    meter = Meter(model, optimizer, optimizer)
    optimizer.observers.append(meter)
    optimizer.register_step_pre_hook(lambda *_: meter.begin())
    take(model, optimizer, 1)
    meter.end()
    meter.read()
    assert set(meter.rule_rms) == {"adamw_routed", "adamw"}
    assert not any(meter.angles.values())
    names = [name for r in routing_table(model, "adamw_routed").matrices for name in r.matrix_names]
    assert set(names) <= meter.update_rms.keys()
    total = count = 0.0
    for group in optimizer.param_groups:
        for name, p in named_parameters(group):
            if group["rule"] == "adamw_routed":
                squares = (p.float() - before[name].float()).square()
                total, count = total + squares.sum().item(), count + p.numel()
                if name in names:
                    assert meter.update_rms[name] == pytest.approx(squares.mean().sqrt().item(), rel=1e-4)
    assert meter.rule_rms["adamw_routed"] == pytest.approx((total / count) ** 0.5, rel=1e-4)


def test_one_matrix_is_kept_at_a_time():
    """Of a large model nobody has room for a second copy of all."""

    class Counting(SelfCheck):
        open = most = 0

        def before(self, weights):
            self.open += 1
            self.most = max(self.most, self.open)
            return super().before(weights)

        def see(self, update):
            self.open -= 1
            super().see(update)

    model = toy_llama()
    optimizer = routed(model)
    optimizer.observers = [watcher := Counting()]
    take(model, optimizer, 1)
    assert (watcher.open, watcher.most) == (0, 1)


# -- in a Trainer -----------------------------------------------------------------------------------


def test_a_plain_trainer_gives_both_rates(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path),
        optim="adamw_routed",
        optim_args="adamw_lr=3e-5",
        learning_rate=1e-4,
        adam_beta2=0.97,
        adam_epsilon=1e-6,
        weight_decay=0.1,
        use_cpu=True,
        report_to="none",
    )
    optimizer = Trainer(model=toy_llama(), args=args).create_optimizer()
    assert type(optimizer) is RoutedAdamW
    for group in optimizer.param_groups:
        matrices = group["rule"] == "adamw_routed"
        assert group["lr"] == (1e-4 if matrices else 3e-5)
        assert (group["betas"], group["eps"]) == ((0.9, 0.97), 1e-6)
        for name, p in named_parameters(group):
            assert is_hidden(name, p) == matrices
            assert group["weight_decay"] == (0.1 if p.ndim == 2 else 0.0)


def test_training_logs_both_rules(tmp_path, token_rows):
    args = PionTrainingArguments(
        output_dir=str(tmp_path),
        optim="adamw_routed",
        optim_adamw_lr=3e-4,
        optim_adamw_betas=[0.8, 0.9],
        learning_rate=1e-3,
        lr_scheduler_type="pion_cosine",
        warmup_steps=2,
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
    )
    trainer = PionTrainer(model=toy_llama(), args=args, train_dataset=token_rows)
    trainer.train()
    first = trainer.state.log_history[0]
    # Matrices begin without the warmup, the rest with it.
    assert first["learning_rate/adamw_routed"] == 1e-3
    assert first["learning_rate/adamw"] < 3e-4
    assert first["update_rms/adamw_routed"] == pytest.approx(1e-3, rel=0.2)
    assert "angle_in/mean" not in first
    described = trainer.run_summary()["optimizer"]
    assert described["name"] == "adamw_routed"
    assert described["options"] == {"keep": 0, "keep_soft": False, "adamw_betas": (0.8, 0.9), "adamw_eps": 1e-8}
    assert {row["rule"]: row["matrices"] for row in described["rules"]} == {"adamw_routed": 14, "adamw": 0}


# -- adapters ---------------------------------------------------------------------------------------

REFUSED = "optim='adamw_routed' tells hidden matrices from embeddings, .* use optim='adamw_torch' for them"


def test_adapters_are_refused():
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=REFUSED):
        routing_table(peft.get_peft_model(toy_llama(), config), "adamw_routed")


@pytest.mark.parametrize("command", ["sft", "cpt", "plan"])
def test_adapters_are_refused_before_anything_is_loaded(command, tmp_path):
    flags = ["--optim", "adamw_routed", "--use_peft", "--model_name_or_path", "no/such-model", "--dataset_name", "x"]
    said = fails(command, *flags, "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path))
    assert "use optim='adamw_torch' for them" in said


# -- on the command line ----------------------------------------------------------------------------


def test_a_plan_of_it(checkpoint, capsys):
    flags = ["--model_name_or_path", str(checkpoint), "--optim", "adamw_routed", "--learning_rate", "1e-4"]
    args, model_args, *_ = parse([*flags, "--optim_adamw_lr", "3e-5"])
    plan = make_plan(args, model_args)
    assert plan.rates == {"adamw_routed": 1e-4, "adamw": 3e-5}
    assert plan.memory == plan.adamw
    main(["plan", *flags])
    assert "adamw_routed" in capsys.readouterr().out


def test_a_contender_keeps_what_a_recipe_says_of_the_rest(tmp_path):
    """What is meant for Pion's matrices is left out, what is meant for embeddings and norms is not."""
    path = tmp_path / "contenders.yaml"
    path.write_text(
        "AdamW: {optim: adamw_torch}\nAdamW, two rates: {optim: adamw_routed, learning_rate: [1e-4, 2e-4]}",
        encoding="utf-8",
    )
    base = {"optim": "pion", "learning_rate": 1e-3, "max_steps": 2, "optim_betas": [0.9, 0.95], "optim_degree": 3}
    base |= {"optim_adamw_lr": 3e-5, "optim_adamw_betas": [0.9, 0.99], "optim_exclude_modules": ["down_proj"]}
    grid, said = make_grid(base, "sft", read_contenders(path, base), {}, 1)
    plain, *two = [{k: v for k, v in trial.recipe.items() if k.startswith("optim")} for trial in grid]
    assert plain == {"optim": "adamw_torch"}
    kept = ("optim_adamw_lr", "optim_adamw_betas", "optim_exclude_modules")
    assert two == [{"optim": "adamw_routed", **{key: base[key] for key in kept}}] * 2
    assert "optim_adamw_lr is left out for AdamW." in said


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value):
    p = nn.Parameter(torch.eye(3))
    p.data[1, 2] = value
    p.grad = torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"layer\.weight holds values that are not finite"):
        RoutedAdamW([("layer.weight", p)]).step()
