"""What layers take in: sketches of their inputs, and the leading directions that these know."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from pion_hf import Inputs, Teon
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
@example(n=5, count=5, tokens=74, seed=38)
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


# -- which call a layer belongs to -------------------------------------------------------------------------------------


def padded(rows: Tensor, value: int = 0) -> tuple[Tensor, Tensor]:
    """Half of it padding, and the mask of the other half."""
    mask = torch.ones_like(rows)
    return torch.cat([rows, torch.full_like(rows, value)], dim=1), torch.cat([mask, torch.zeros_like(mask)], dim=1)


def test_a_mask_may_come_by_position():
    model = Net()
    expected = leading(inputs_of(model, "up", ids()))
    inputs = Inputs(model, KEEP)
    model(*padded(ids())).sum().backward()
    assert_same_span(inputs.directions("up.weight", 16, KEEP, CPU), expected)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_every_call_has_its_own_mask(reentrant):
    """Of two calls before one backward pass, in which checkpointed layers run again."""
    model = Net()
    expected = leading(inputs_of(model, "up", ids(0), ids(1)))
    if reentrant is not None:
        through = model.layers
        model.layers = lambda x: checkpoint(through, x, use_reentrant=reentrant)
    inputs = Inputs(model, KEEP)
    rows, mask = padded(ids(1), value=7)
    first, second = model(torch.cat([ids(0)[:, :5]] * 4, 1), torch.ones_like(rows)), model(rows, attention_mask=mask)
    (first.sum() + second.sum()).backward()
    sketch_of_calls = inputs._sketches["up.weight"][CPU]
    known = torch.cat([model.embed(torch.cat([ids(0)[:, :5]] * 4, 1)).flatten(0, 1), model.embed(ids(1)).flatten(0, 1)])
    torch.testing.assert_close(
        sketch_of_calls, sketch.sketch_of(known.detach(), inputs._test(16, CPU)), rtol=1e-4, atol=1e-4
    )
    assert expected.shape == (16, KEEP)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("given", ["labels", "mask"])
def test_decoders_count_their_own_tokens(kind, given):
    """Source and target of one length, both padded: an encoder's mask would fit a decoder's tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "t5":
        config = T5Config(d_kv=4, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2, dropout_rate=0, **sizes)
        model, layer = T5ForConditionalGeneration(config), "decoder.block.0.layer.{}Attention.{}.weight"
        own, cross = layer.format("0.Self", "q"), layer.format("1.EncDec", "k")
    else:
        layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
        heads = {
            f"{part}_{name}": n
            for part in ("encoder", "decoder")
            for name, n in (("attention_heads", 2), ("ffn_dim", 24))
        }
        model = BartForConditionalGeneration(BartConfig(dropout=0.0, bos_token_id=2, **sizes, **layers, **heads))
        own, cross = (f"model.decoder.layers.0.{name}.weight" for name in ("self_attn.q_proj", "encoder_attn.k_proj"))
    draw = torch.Generator().manual_seed(0)
    source, target = (torch.randint(3, 40, (2, 8), generator=draw) for _ in range(2))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 2:] = 0
    labels = target.clone()
    labels[1, 3:] = -100
    call = {"input_ids": source, "attention_mask": mask, "labels": labels}
    if given == "mask":
        call["decoder_attention_mask"] = (labels != -100).long()
    taken = {}
    for name in (own, cross, "lm_head.weight"):
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, args, name=name: taken.update({name: args[0].detach()}))
    inputs = Inputs(model, 2)
    model(**call)
    for name, counted in ((own, labels != -100), (cross, mask.bool()), ("lm_head.weight", labels != -100)):
        expected = sketch.sketch_of(taken[name][counted], inputs._test(16, CPU))
        torch.testing.assert_close(inputs._sketches[name][CPU], expected, rtol=1e-4, atol=1e-4)


def test_hooks_go_with_their_optimizer():
    model = Net()
    for _ in range(3):
        optimizer = Teon([("up.weight", model.up.weight)], stack=1, keep=2, inputs=Inputs(model, 2))
        assert optimizer.inputs.open
    del optimizer
    gc.collect()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_copy_before_the_first_step_says_that_it_sees_nothing():
    model = Net()
    optimizer = Teon([("up.weight", model.up.weight)], stack=1, keep=2, inputs=Inputs(model, 2))
    with pytest.warns(UserWarning, match="give it `inputs`"):
        copy.deepcopy(optimizer)
    optimizer.inputs.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(optimizer)


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
