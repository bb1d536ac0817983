"""What layers take in: sketches of their inputs, and the leading directions that these know."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from pion_hf import Inputs
from pion_hf.linalg import sketch
from pion_hf.optim import inputs as inputs_module
from tests.distributed_worker import launch

KEEP = 3
CPU = torch.device("cpu")


def rows_of(count: int, n: int, *, seed: int = 0, rank: int | None = None) -> Tensor:
    """Inputs of which a few directions are large."""
    draws = torch.Generator().manual_seed(seed)
    scales = 10.0 ** -torch.arange(n)[: rank or n].clamp_max(4)
    directions = torch.linalg.qr(torch.randn(n, n, generator=draws)).Q[:, : len(scales)]
    return (torch.randn(count, len(scales), generator=draws) * scales) @ directions.T


# -- the sketch -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 80), count=st.integers(1, 6), tokens=st.integers(1, 200), seed=st.integers(0, 99))
def test_a_sketch_knows_the_leading_directions(n, count, tokens, seed):
    rows, test = rows_of(tokens, n, seed=seed), sketch.test_matrix(n, count, CPU)
    found = sketch.leading_directions(sum(sketch.sketch_of(part, test) for part in rows.split(7)), test, count)
    assert found.shape == (n, count)
    there = found.norm(dim=0) > 0.5
    gram = found.mT @ found
    torch.testing.assert_close(gram, torch.diag(there.float()), atol=1e-5, rtol=0)
    # What is left of the inputs is as little as the best directions leave, but for what float32 cannot tell.
    values = torch.linalg.svdvals(rows.double())
    best = values[count:].square().sum().sqrt()
    left = (rows - rows @ found @ found.mT).double().norm()
    assert left <= 1.2 * best + 1e-3 * values[0]


def test_directions_that_are_not_there_are_zero():
    rows, test = rows_of(50, 20, rank=2), sketch.test_matrix(20, 5, CPU)
    found = sketch.leading_directions(sketch.sketch_of(rows, test), test, 5)
    assert found.norm(dim=0).round().tolist() == [1, 1, 0, 0, 0]
    assert not sketch.leading_directions(torch.zeros_like(test), test, 5).any()


# -- what is watched --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A linear layer, one stored transposed, one used twice, an embedding, and a layer nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 16)
        self.up, self.down = nn.Linear(16, 24), Conv1D(16, 24)
        self.again, self.idle = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layers(self.embed(ids))

    def layers(self, x: Tensor) -> Tensor:
        x = x + self.down(self.up(x).tanh())
        return self.again(self.again(input=x))


def ids(seed: int = 0) -> Tensor:
    return torch.randint(30, (4, 10), generator=torch.Generator().manual_seed(seed))


def inputs_of(model: nn.Module, layer: str, *calls: Tensor) -> Tensor:
    """All that a layer took in, as rows."""
    seen, module = [], model.get_submodule(layer)
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].detach().flatten(0, -2)),
        with_kwargs=True,
    )
    for call in calls:
        model(call)
    handle.remove()
    return torch.cat(seen)


def leading(rows: Tensor, count: int = KEEP) -> Tensor:
    return torch.linalg.eigh(rows.double().T @ rows.double())[1][:, -count:].float()


def assert_same_span(found: Tensor, expected: Tensor) -> None:
    assert torch.linalg.svdvals(found.mT @ expected).min() > 0.99


@pytest.mark.parametrize("layer", ["up", "down", "again"])
def test_inputs_of_all_passes_with_gradients_count(layer):
    model = Net()
    expected = leading(inputs_of(model, layer, ids(0), ids(1)))
    inputs = Inputs(model, KEEP)
    model(ids(0))
    with torch.no_grad():  # an evaluation, or the generation of what is to be rewarded
        model(ids(5))
        model.eval()(ids(6))
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids(1))
    n = expected.shape[0]
    assert_same_span(inputs.directions(f"{layer}.weight", n, KEEP, CPU), expected)
    assert not inputs.directions("idle.weight", 16, KEEP, CPU).any()
    assert not inputs.directions("embed.weight", 16, KEEP, CPU).any()


def test_a_model_in_eval_mode_may_train():
    """As `from_pretrained` leaves it, in a loop that never says `train()`."""
    model = Net().eval()
    expected = leading(inputs_of(model, "up", ids()))
    inputs = Inputs(model, KEEP)
    model(ids()).sum().backward()
    assert_same_span(inputs.directions("up.weight", 16, KEEP, CPU), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_seen(reentrant):
    model = Net()
    expected = leading(inputs_of(model, "again", ids()))
    inputs = Inputs(model, KEEP)
    checkpoint(model.layers, model.embed(ids()), use_reentrant=reentrant).sum().backward()
    assert_same_span(inputs.directions("again.weight", 16, KEEP, CPU), expected)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_tokens_that_are_masked_do_not_count(reentrant):
    model = Net()
    rows, mask = ids(), torch.ones(ids().shape)
    padded = torch.cat([rows, torch.zeros_like(rows)], dim=1)
    mask = torch.cat([mask, torch.zeros_like(mask)], dim=1)
    expected = leading(inputs_of(model, "up", rows))
    assert torch.linalg.svdvals(leading(inputs_of(model, "up", padded)).mT @ expected).min() < 0.9
    if reentrant is not None:
        through = model.layers
        model.layers = lambda x: checkpoint(through, x, use_reentrant=reentrant)
    inputs = Inputs(model, KEEP)
    model(padded, attention_mask=mask).sum().backward()
    assert_same_span(inputs.directions("up.weight", 16, KEEP, CPU), expected)


def test_a_pass_that_overflows_leaves_nothing_behind():
    model = Net()
    expected = leading(inputs_of(model, "up", ids(1)))
    inputs = Inputs(model, KEEP)
    with torch.no_grad():
        scale = model.embed.weight[0, 0].item()
        model.embed.weight[0, 0] = torch.inf
    model(torch.zeros_like(ids(0)))
    with torch.no_grad():
        model.embed.weight[0, 0] = scale
    model(ids(1))
    assert_same_span(inputs.directions("up.weight", 16, KEEP, CPU), expected)


def test_parts_of_a_model_on_another_device_are_seen():
    """As with `device_map`: the model's mask is where its first layer is. Of GPUs that there need not be."""
    model = nn.Linear(4, 4)
    inputs = Inputs(model, 2)
    see_mask, see = model._forward_pre_hooks.values()
    with FakeTensorMode(allow_non_fake_inputs=True):
        see_mask(model, (), {"attention_mask": torch.ones(2, 3, device="cuda:0")})
        see(model, (torch.randn(2, 3, 4, device="cuda:1"),), {})
    assert [sketch.device for sketch in inputs._sketches["weight"].values()] == [torch.device("cuda:1")]


def test_sketches_of_several_devices_are_added():
    """As of `DataParallel`, whose replicas have one name."""
    model, rows = Net(), ids()
    expected = leading(inputs_of(model, "up", rows, ids(1)))
    inputs = Inputs(model, KEEP)
    model(rows)
    inputs._sketches["up.weight"][torch.device("cuda:1")] = inputs._sketches["up.weight"].pop(CPU)
    model(ids(1))
    assert_same_span(inputs.directions("up.weight", 16, KEEP, CPU), expected)


def test_nothing_is_drawn_in_a_pass(monkeypatch):
    """A generator cuts a compiled model into pieces, which stay."""
    model = Net()
    Inputs(model, KEEP)
    monkeypatch.setattr(inputs_module, "test_matrix", lambda *_: pytest.fail("drawn"))
    model(ids())


def test_closed_it_sees_nothing():
    model = Net()
    inputs = Inputs(model, KEEP)
    model(ids())
    inputs.close()
    assert not any(module._forward_pre_hooks for module in model.modules())
    model(ids())
    assert not inputs.directions("up.weight", 16, KEEP, CPU).any()


# -- several processes ------------------------------------------------------------------------------------------------


def directions_of_one() -> tuple[Tensor, Tensor]:
    """In a process: what it saw itself, and the directions that all agree on."""
    model = Net()
    inputs = Inputs(model, KEEP)
    rows = inputs_of(model, "up", ids(dist.get_rank()))
    return rows, inputs.directions("up.weight", 16, KEEP, CPU)


def test_processes_agree_on_directions():
    (first, found), (second, same) = launch(directions_of_one, 2)
    assert not torch.equal(first, second)
    assert torch.equal(found, same)
    assert_same_span(found, leading(torch.cat([first, second])))
