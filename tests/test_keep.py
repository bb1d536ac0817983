"""`keep`: that what a layer makes of the leading directions of its inputs stays as it is."""

from __future__ import annotations

import contextlib
import functools
import itertools
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers import Trainer

from pion_hf import (
    Inputs,
    Pion,
    PionLora,
    PionTrainer,
    PionTrainingArguments,
    RoutedAdamW,
    Teon,
    TeonLora,
    param_groups,
)
from pion_hf.linalg.spectrum import singular_values, spectral_drift
from pion_hf.optim.base import MatrixOptimizer
from tests.conftest import toy_llama
from tests.test_inputs import KEEP, Net, ids, inputs_of, leading, rows_of

AMBIENT = {"direction": "natural", "metric": "ambient", "momentum_frame": "transported"}
DRIFT = 1e-4  # of singular values, relative to the largest

# -- what is kept -----------------------------------------------------------------------------------------------------


def muon(model: nn.Module, **options) -> MatrixOptimizer:
    return Teon(param_groups(model, "muon"), lr=1e-2, stack=1, weight_decay=0.1, **options)


def teon(model: nn.Module, **options) -> MatrixOptimizer:
    return Teon(param_groups(model, "teon"), lr=1e-2, **options)


def pion(model: nn.Module, **options) -> MatrixOptimizer:
    return Pion(param_groups(model, "pion"), lr=3e-2, **options)


def adamw_routed(model: nn.Module, **options) -> MatrixOptimizer:
    return RoutedAdamW(param_groups(model, "adamw_routed"), lr=3e-3, weight_decay=0.1, **options)


OPTIMIZERS = {
    "muon": (muon, {}),
    "adamw_routed": (adamw_routed, {}),
    "teon": (teon, {}),
    "pion": (pion, {"generator_dtype": "float32"}),
    "pion, ambient": (pion, {**AMBIENT, "generator_dtype": "float32"}),
    "pion, natural, both": (pion, {"direction": "natural", "side": "both", "generator_dtype": "float32"}),
    "pion, polar": (pion, {**AMBIENT, "direction": "polar", "generator_dtype": "float32"}),
    "pion, adam": (pion, {**AMBIENT, "direction": "adam", "scale": "none", "generator_dtype": "float32"}),
    "pion, bfloat16": (pion, {"generator_dtype": "bfloat16"}),
    "pion, ambient, bfloat16": (pion, {**AMBIENT, "generator_dtype": "bfloat16"}),
}


def tokens(seed: int) -> Tensor:
    return torch.randint(100, (4, 24), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, optimizer: MatrixOptimizer, steps: int = 12) -> None:
    for number in range(steps):
        optimizer.zero_grad()
        batch = tokens(number)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


def matrices(optimizer: MatrixOptimizer) -> dict[str, Tensor]:
    groups = [group for group in optimizer.param_groups if group["rule"] != "adamw"]
    return {name: p for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_outputs_of_kept_directions_stay(case, dtype):
    build, options = OPTIMIZERS[case]
    model = toy_llama().to(dtype)
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    optimizer = build(model, keep=KEEP, inputs=Inputs(model, KEEP), **options)
    train(model, optimizer)
    # Generators from bfloat16 products are skew to the bit, but turn kept directions by what was rounded.
    # AdamW has no masters: what is kept of a bfloat16 weight is kept to its precision.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-2 if "bfloat16" in case else 1e-4
    for name, p in matrices(optimizer).items():
        kept = optimizer.state[p]["kept.0"][0]
        torch.testing.assert_close(kept.mT @ kept, torch.eye(KEEP), atol=1e-5, rtol=0)
        change = p.detach().float() - before[name]
        assert change.norm() > 0.02 * before[name].norm()
        assert (change @ kept).norm() < tolerance * change.norm(), name
        if build is pion and dtype == torch.float32:
            assert spectral_drift(singular_values(before[name]), singular_values(p.detach())) < DRIFT


@pytest.mark.parametrize("rule", [{}, AMBIENT], ids=["default", "ambient"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotations_keep_the_spectrum_beside(dtype, rule):
    """Of long and square matrices whose singular values lie close together, which any cross term would part."""
    draws = torch.Generator().manual_seed(0)
    layers = [nn.Linear(n, m, bias=False) for m, n in ((96, 48), (48, 96), (48, 48), (120, 24))]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, generator=draws)
        layer.weight.data *= torch.linspace(1, 1.05, layer.in_features)
    model = nn.ModuleList(layers)
    before = [layer.weight.detach().clone() for layer in layers]
    options = {"keep": KEEP, "inputs": Inputs(model, KEEP), "generator_dtype": dtype}
    optimizer = Pion(list(model.named_parameters()), lr=2e-2, **options, **rule)
    for number in range(60):
        optimizer.zero_grad()
        for layer in layers:
            layer(rows_of(32, layer.in_features, seed=number)).sub(1).square().mean().backward()
        optimizer.step()
    for start, layer in zip(before, layers, strict=True):
        assert (layer.weight - start).norm() > 0.1 * start.norm()
        assert spectral_drift(singular_values(start), singular_values(layer.weight.detach())) < DRIFT


def test_the_directions_are_those_of_the_first_steps_inputs():
    model = toy_llama()
    rows = inputs_of(model, "model.layers.1.mlp.up_proj", tokens(0))
    optimizer = muon(model, keep=KEEP, inputs=Inputs(model, KEEP))
    train(model, optimizer, steps=3)
    kept = optimizer.state[model.model.layers[1].mlp.up_proj.weight]["kept.0"][0]
    # A fresh model's inputs have no leading directions to speak of: some others hold nearly as much.
    assert (rows @ kept).norm() > 0.97 * (rows @ leading(rows)).norm()
    draws = torch.Generator().manual_seed(0)
    random = torch.linalg.qr(torch.randn(*kept.shape, generator=draws)).Q
    assert (rows @ random).norm() < 0.8 * (rows @ kept).norm()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_it_makes_a_difference_and_zero_makes_none():
    found = {}
    for keep in (None, 0, KEEP):
        model = toy_llama()
        options = {} if keep is None else {"keep": keep}
        train(model, muon(model, inputs=Inputs(model, KEEP) if keep else None, **options))
        found[keep] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(found[None], found[0])
    assert not torch.allclose(found[0], found[KEEP], atol=1e-3)


def test_matrices_that_saw_nothing_move_freely():
    model = Net()
    optimizer = Teon(param_groups(model, "muon"), lr=1e-2, stack=1, keep=KEEP, inputs=Inputs(model, KEEP))
    model(ids()).square().mean().backward()
    model.idle.weight.grad = torch.ones_like(model.idle.weight)
    before = model.idle.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"^keep: no inputs of idle\.weight were seen in a forward pass that trains"):
        optimizer.step()
    assert not torch.equal(model.idle.weight, before)


@pytest.mark.parametrize("options", [{}, {"side": "out"}, AMBIENT, {**AMBIENT, "side": "out"}, {"direction": "polar"}])
def test_rotations_of_matrices_that_saw_nothing_are_free(options):
    """On the side of the outputs too: what zero directions give out is no reason to hold anything."""
    model = Net()
    groups = [{"params": [("idle.weight", model.idle.weight)], "rule": "pion"}]
    optimizer = Pion(groups, lr=1e-2, keep=KEEP, inputs=Inputs(model, KEEP), **options)
    before = model.idle.weight.detach().clone()
    for number in range(2):
        model.idle.weight.grad = torch.randn_like(before)
        with pytest.warns(UserWarning, match="no inputs of idle") if number == 0 else contextlib.nullcontext():
            optimizer.step()
    moved = (model.idle.weight.detach() - before).norm(dim=1)
    assert moved.min() > 0.1 * moved.max()


def test_distributed_checkpoints_know_its_state():
    model = toy_llama()
    optimizer = adamw_routed(model, keep=KEEP, inputs=Inputs(model, KEEP))
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert state["model.layers.0.mlp.down_proj.weight"]["kept.0"].shape == (1, 48, KEEP)
    assert "kept.0" not in state["model.norm.weight"]
    train(model, optimizer, steps=1)  # without loading anything
    assert optimizer.state[model.model.layers[0].mlp.down_proj.weight]["kept.0"].any()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [None, 2])
def test_nobody_watched(inputs):
    model = toy_llama()
    optimizer = muon(model, keep=KEEP, inputs=inputs and Inputs(model, inputs))
    with pytest.raises(ValueError, match=r"^keep=3 needs the inputs of .*, which nobody watched: .*Inputs\(model, 3\)"):
        train(model, optimizer, steps=1)


@pytest.mark.parametrize("value", [-1, 1.5, True, "many"])
@pytest.mark.parametrize("build", [muon, pion])
def test_what_is_no_number_of_directions(build, value):
    with pytest.raises(ValueError, match="keep must be a whole number of directions, 0 or more, got"):
        build(toy_llama(), keep=value)


@pytest.mark.parametrize("options", [{"preset": "paper"}, {"direction": "msign", "metric": "lie"}])
def test_rules_that_cannot(options):
    with pytest.raises(ValueError, match="keep chooses generators that fix what is kept"):
        pion(toy_llama(), keep=KEEP, **options)


@pytest.mark.parametrize(
    ("rule", "shape", "most"), [("muon", (9, 6), 5), ("pion", (9, 6), 4), ("pion", (6, 9), 4), ("pion", (3, 2), 0)]
)
def test_there_must_be_something_left_to_train(rule, shape, most):
    build = Pion if rule == "pion" else functools.partial(Teon, stack=1)
    params = [{"params": [("w", nn.Parameter(torch.randn(shape)))], "rule": rule}]
    if most:
        build(params, keep=most)
    way_out = f"set keep={most} at most, or exclude" if most else "exclude"
    form = f"{shape[0]} x {shape[1]}"
    with pytest.raises(ValueError, match=rf"^parameter w, .* keep={most + 1} leaves a matrix of {form} .*: {way_out}"):
        build(params, keep=most + 1)


# -- on adapters ------------------------------------------------------------------------------------------------------


def adapted(**config) -> nn.Module:
    model = toy_llama()
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", **config))


def pion_lora(model: nn.Module, lora_a: str = "rotate", **options) -> MatrixOptimizer:
    return PionLora(param_groups(model, "pion_lora", lr=2e-3, lora_a=lora_a), lr=2e-3, **options)


def teon_lora(model: nn.Module, stack: int = 2, **options) -> MatrixOptimizer:
    return TeonLora(param_groups(model, "teon_lora", lr=3e-3, stack=stack), lr=3e-3, stack=stack, **options)


ADAPTERS = {
    "pion_lora": (pion_lora, {}),
    "pion_lora, ambient": (pion_lora, {"metric": "ambient"}),
    "pion_lora, A grows": (pion_lora, {"lora_a": "orthogonal"}),
    "teon_lora": (teon_lora, {}),
    "muon": (teon_lora, {"stack": 1}),
}


def products(model: nn.Module, optimizer: MatrixOptimizer) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`A`, `B A` and the kept directions of every adapted layer."""
    named = dict(model.named_parameters())
    found = []
    for name, a in named.items():
        if ".lora_A." in name:
            b = named[name.replace(".lora_A.", ".lora_B.")]
            found.append((a.detach(), (b @ a).detach(), optimizer.state[a]["kept.0"][0]))
    return found


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_have_no_effect_on_what_is_kept(case):
    build, options = ADAPTERS[case]
    model = adapted()
    before, after_init = model(tokens(0)).logits, {}
    optimizer = build(model, keep=KEEP, inputs=Inputs(model, KEEP), **options)
    assert optimizer.inputs is not None
    train(model, optimizer, steps=1)
    after_init = {i: singular_values(a) for i, (a, _, _) in enumerate(products(model, optimizer))}
    train(model, optimizer, steps=12)
    for i, (a, ba, kept) in enumerate(products(model, optimizer)):
        torch.testing.assert_close(kept.mT @ kept, torch.eye(KEEP), atol=1e-5, rtol=0)
        assert ba.norm() > 1e-2
        assert (ba @ kept).norm() < 1e-5 * ba.norm()
        assert (a @ kept).norm() < 1e-5 * a.norm()
        if build is pion_lora and not options.get("lora_a"):
            assert spectral_drift(after_init[i], singular_values(a)) < DRIFT
    assert not torch.allclose(model(tokens(0)).logits, before, atol=1e-2)


def test_that_the_factor_loses_what_is_kept_changes_nothing():
    model, other = adapted(), adapted()
    optimizer, free = pion_lora(model, keep=KEEP, inputs=Inputs(model, KEEP)), pion_lora(other)
    for m, o in ((model, optimizer), (other, free)):
        for group in o.param_groups:
            group["lr"] = 1e-12
        train(m, o, steps=1)
    torch.testing.assert_close(model(tokens(0)).logits, other(tokens(0)).logits)
    assert not torch.allclose(
        products(model, optimizer)[0][0],
        dict(other.named_parameters())[next(name for name, _ in model.named_parameters() if ".lora_A." in name)],
    )


@pytest.mark.parametrize("build", [pion_lora, teon_lora])
def test_adapters_with_an_effect_are_refused(build):
    model = adapted(init_lora_weights=False)
    optimizer = build(model, keep=KEEP, inputs=Inputs(model, KEEP))
    with pytest.raises(ValueError, match=r"^keep=3 is for adapters that begin without an effect, and the partner of "):
        train(model, optimizer, steps=1)


def test_a_factor_keeps_its_rank():
    """Of 32 inputs and rank 4."""
    model = adapted()
    pion_lora(model, keep=28, inputs=Inputs(model, 28))
    with pytest.raises(ValueError, match="keep=29 leaves a matrix of 4 x 32 nothing to train: set keep=28 at most"):
        pion_lora(model, keep=29)


def test_a_factor_of_adamw_keeps_nothing():
    model = adapted()
    with pytest.raises(ValueError, match=r"^keep=3 is for adapters whose factor A rotates or takes"):
        pion_lora(model, lora_a="adamw", keep=KEEP, inputs=Inputs(model, KEEP))


# -- in a Trainer -----------------------------------------------------------------------------------------------------


def arguments(folder: Path, optim: str, **options) -> PionTrainingArguments:
    return PionTrainingArguments(
        output_dir=folder,
        optim=optim,
        optim_keep=KEEP,
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def data() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in itertools.chain(*(tokens(i) for i in range(4)))]


def assert_goes_on(trainer: Trainer, again: Trainer, folder: Path) -> None:
    """From the checkpoint in the middle to the same end."""
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("trainer_class", "optim"),
    [
        *((PionTrainer, optim) for optim in ("pion", "pion_ambient", "teon", "muon", "adamw_routed")),
        (Trainer, "pion"),
    ],
)
def test_a_trainer_watches(trainer_class, optim, tmp_path):
    """Both micro-batches of the first step count; the hooks are gone afterwards; a checkpoint goes on."""
    rate = 3e-4 if optim == "pion_ambient" else 3e-3
    args, rows = arguments(tmp_path, optim, learning_rate=rate, gradient_accumulation_steps=2), data()
    model = toy_llama()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_class(model, args, train_dataset=rows)
    trainer.train()
    assert not any(module._forward_pre_hooks for module in model.modules())
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    for name, p in matrices(optimizer).items():
        kept = optimizer.state[p]["kept.0"][0]
        change = p.detach() - start[name]
        assert change.any()
        assert (change @ kept).norm() < 2e-2 * change.norm()
    assert_goes_on(trainer, trainer_class(toy_llama(), args, train_dataset=rows), tmp_path)


@pytest.mark.parametrize("optim", ["pion", "pion_ambient", "muon"])
def test_a_trainer_watches_adapters(optim, tmp_path):
    args, rows = arguments(tmp_path, optim, learning_rate=2e-3), data()
    trainer = PionTrainer(adapted(), args, train_dataset=rows)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    for _, ba, kept in products(trainer.model, optimizer):
        assert (ba @ kept).norm() < 1e-5 * ba.norm()
    assert_goes_on(trainer, PionTrainer(adapted(), args, train_dataset=rows), tmp_path)
