"""What a step of the optimizers tells: the self-check after the first one, and observers."""

from __future__ import annotations

import copy
import logging
import warnings

import peft
import pytest
import torch

from pion_hf import Pion, RoutedAdamW, Teon, param_groups
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES
from pion_hf.linalg.rotation import angles, factorized, skew
from pion_hf.optim.observing import SelfCheck, Update
from tests.conftest import toy_llama


def matrices(count: int = 3, shape: tuple[int, int] = (6, 4), dtype: torch.dtype = torch.float32) -> list:
    torch.manual_seed(0)
    return [(f"m{i}", torch.nn.Parameter(torch.randn(shape).to(dtype))) for i in range(count)]


def step(optimizer: torch.optim.Optimizer, *, zero: tuple[str, ...] = ()) -> None:
    """One step with random gradients, zero for the matrices of these names."""
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            p.grad = torch.zeros_like(p) if name in zero else torch.randn_like(p)
    optimizer.step()


@pytest.fixture
def said(caplog):
    """What the self-check says at level info."""
    caplog.set_level(logging.INFO, logger="pion_hf.optim.observing")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "pion_hf.optim.observing"]


# -- the self-check ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Pion(m, lr=1e-2), "pion: 3 of 3 matrices rotated"),
        (lambda m: Pion(m, lr=1e-2, preset="paper"), "pion: 3 of 3 matrices rotated"),
        (lambda m: Teon([{"params": m, "rule": "muon"}], lr=1e-2, stack=1), "muon: 3 of 3 matrices moved"),
        (lambda m: Teon([{"params": m[:2], "rule": "teon", "stacks": [["m0", "m1"]]}]), "teon: 2 of 2 matrices moved"),
        (lambda m: RoutedAdamW(m, lr=1e-2), "adamw_routed: 3 of 3 matrices moved"),
    ],
    ids=["pion", "paper", "muon", "teon", "adamw_routed"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_counts_what_moved_once(make, message, dtype, said):
    optimizer = make(matrices(dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(optimizer)
    assert said() == [message]
    assert optimizer.observers == []


def test_a_warmup_step_of_rate_zero_does_not_count(said):
    optimizer = Pion(matrices(), lr=0.0)
    for _ in range(2):
        step(optimizer)
    assert said() == []
    optimizer.param_groups[0]["lr"] = 1e-2
    step(optimizer)
    assert said() == ["pion: 3 of 3 matrices rotated"]


def test_a_skipped_step_does_not_count(said):
    optimizer = Pion(matrices(), lr=1e-2)
    optimizer.param_groups[0]["params"][0].grad = torch.full((6, 4), torch.nan)
    with pytest.warns(UserWarning, match="this step is skipped"):
        optimizer.step()
    assert said() == []
    step(optimizer)
    assert said() == ["pion: 3 of 3 matrices rotated"]


def test_what_had_no_gradient_is_looked_at_again(said):
    optimizer = Teon([{"params": matrices(), "rule": "muon"}], lr=1e-2, stack=1)
    step(optimizer, zero=("m1",))
    assert said() == []
    step(optimizer)
    assert said() == ["muon: 3 of 3 matrices moved"]


def test_what_never_has_a_gradient_is_no_fault(said):
    optimizer = Pion(matrices(), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            step(optimizer, zero=("m2",))
    assert said() == ["pion: 2 of 3 matrices rotated, 1 had no gradient"]


def test_a_matrix_that_does_not_move_is_named(said):
    class Lame(Pion):
        def update(self, weight, grad, state, *, group, step):
            old = weight.clone()
            new = super().update(weight, grad, state, group=group, step=step)
            return torch.where(torch.arange(len(new)).view(-1, 1, 1) == 1, old, new)

    optimizer = Lame(matrices(8), lr=1e-2)
    step(optimizer)
    with pytest.warns(UserWarning, match=r"^1 of 8 matrices did not move, .*: m1\. "):
        step(optimizer)
    assert said() == ["pion: 7 of 8 matrices rotated"]


def test_a_rate_below_rounding_is_reported():
    optimizer = Pion(matrices(12), lr=1e-12)
    step(optimizer)
    with pytest.warns(UserWarning, match=r"12 of 12 matrices did not move.*m4 and 7 more"):
        step(optimizer)


@pytest.mark.parametrize("optim", ["pion_lora", "teon_lora"])
def test_adapters_whose_a_waits_for_b(optim, said):
    model = peft.get_peft_model(toy_llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    optimizer = OPTIMIZER_CLASSES[optim](param_groups(model, optim, lr=1e-2))
    ids = torch.arange(5, 25).view(2, 10)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rotated = ["pion_lora: 2 of 2 matrices moved", "pion_lora: 2 of 2 matrices rotated"]
    assert sorted(said()) == (rotated if optim == "pion_lora" else ["teon_lora: 4 of 4 matrices moved"])


def test_experts_are_counted_one_by_one(said):
    weight = torch.nn.Parameter(torch.randn(4, 6, 5))
    optimizer = Pion([{"params": [("experts", weight)], "rule": "pion"}], lr=1e-2)
    for idle in (3, 0):
        weight.grad = torch.randn_like(weight)
        weight.grad[idle] = 0
        optimizer.step()
    assert said() == ["pion: 4 of 4 matrices rotated"]


def test_a_copy_takes_no_observers_along():
    optimizer = Pion(matrices(), lr=1e-2)
    optimizer.divides_work = True
    optimizer.observers = [Recorder()]
    optimizer.skipped_steps = 2
    copied = copy.deepcopy(optimizer)
    assert copied.observers == []
    assert copied.divides_work
    assert copied.skipped_steps == 2
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer.observers) == 1


# -- observers --------------------------------------------------------------------------------------


class Recorder(SelfCheck):
    """Keeps every update it sees."""

    def __init__(self) -> None:
        self.updates: list[Update] = []

    def see(self, update: Update) -> None:
        self.updates.append(update)

    def step_done(self) -> bool:
        return True


def test_observers_see_old_and_new_weights_by_name():
    weights = matrices(3)
    optimizer = Pion(weights, lr=1e-2)
    optimizer.observers = [recorder := Recorder()]
    before = {name: p.detach().clone() for name, p in weights}
    step(optimizer)
    seen = {
        name: (old, new)
        for u in recorder.updates
        for name, old, new in zip(u.names, u.before.flatten(0, -3), u.after.flatten(0, -3), strict=True)
    }
    for name, p in weights:
        assert torch.equal(seen[name][0], before[name])
        assert torch.equal(seen[name][1], p.detach())


def test_names_of_stacks_and_experts_follow_the_leading_dimensions():
    torch.manual_seed(0)
    weights = [(f"e{i}", torch.nn.Parameter(torch.randn(2, 6, 4))) for i in range(2)]
    optimizer = Teon([{"params": weights, "rule": "teon", "stacks": [["e0", "e1"]]}], lr=1e-2)
    optimizer.observers = [recorder := Recorder()]
    step(optimizer)
    (update,) = recorder.updates
    assert update.names == ["e0", "e1", "e0", "e1"]
    expected = torch.stack([p.detach() for _, p in weights], dim=1).flatten(0, 1)
    assert torch.equal(update.after.flatten(0, 1), expected)


@pytest.mark.parametrize(("k", "n"), [(5, 5), (40, 40), (3, 40)])
def test_angles_are_those_of_the_rotation(k, n):
    """The angles of `exp(alpha A)` are the moduli of the eigenvalues of `alpha A`."""
    torch.manual_seed(0)
    w, d = torch.randn(2, 2, k, n, dtype=torch.float64)
    q = factorized(w).v
    a = -skew(w.mT @ d)
    alpha = torch.tensor([0.1, 0.2], dtype=torch.float64).view(2, 1, 1)
    turned = torch.linalg.eigvals(a * alpha).abs()
    mean, largest = angles(q, q @ a, alpha)
    torch.testing.assert_close(mean, turned.square().mean(-1).sqrt())
    assert (largest <= turned.amax(-1) * (1 + 1e-9)).all()
    assert (largest > 0.8 * turned.amax(-1)).all()


def test_sides_take_turns():
    optimizer = Pion(matrices(1), lr=1e-2)
    optimizer.observers = [recorder := Recorder()]
    for _ in range(3):
        step(optimizer)
    assert [list(u.rotations) for u in recorder.updates] == [["in"], ["out"], ["in"]]


def test_nothing_is_copied_or_told_where_nobody_wants_it():
    class Elsewhere(Recorder):
        def wants(self, group):
            return False

        def before(self, weights):
            pytest.fail("a copy for nobody")

        see = before

    optimizer = Pion(matrices(1), lr=1e-2)
    optimizer.observers = [Elsewhere()]
    step(optimizer)
    assert len(optimizer.observers) == 1


def test_the_self_check_holds_no_tensors_of_the_step():
    class Shown(SelfCheck):
        def see(self, update):
            super().see(update)
            held = [x for seen in self._seen for x in seen]
            assert all(isinstance(x, (int, str, list, torch.Tensor)) for x in held)
            assert all(isinstance(name, str) for x in held if isinstance(x, list) for name in x)
            assert sum(x.numel() for x in held if isinstance(x, torch.Tensor)) <= 2 * len(update.names)

    optimizer = Pion(matrices(), metric="lie")
    optimizer.observers = [Shown()]
    step(optimizer)
