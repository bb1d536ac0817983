"""The literal Pion of examples/benchmarks, which this package's is timed against, is the published rule."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "literal_pion.py"
DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "pion_teon_cases.json").read_text())
# The reference configs of the published rule, by momentum.
PUBLISHED = {"side": "alternate", "second": False, "retraction": "taylor", "degree": 2, "betas": [0.9, 0.95]}
CONFIGS = {
    config["momentum"]: i
    for i, config in enumerate(CASES["pion_configs"])
    if config.items() >= PUBLISHED.items() and "direction" not in config and config["momentum"] != "ambient"
}


@pytest.fixture(scope="module")
def literal():
    spec = importlib.util.spec_from_file_location("literal_pion", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trajectories():
    return load_file(DATA / "pion_teon_trajectories.safetensors")


@pytest.mark.parametrize("momentum", ["lie", "transported"])
@pytest.mark.parametrize("shape", range(len(CASES["pion_shapes"])))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_reference_trajectories(literal, trajectories, shape, momentum, dtype, tolerance):
    case = CONFIGS[momentum]
    config, expected = CASES["pion_configs"][case], trajectories[f"pion.{shape}.{case}.trajectory"]
    p = nn.Parameter(trajectories[f"pion.{shape}.weight"].to(dtype, copy=True))
    optimizer = literal.LiteralPion([p], config["lr"], momentum=momentum, rms=config["rms"])
    for grad, want in zip(trajectories[f"pion.{shape}.grads"], expected[-CASES["steps"] :], strict=True):
        p.grad = grad.to(dtype)
        optimizer.step()
        assert (p.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("momentum", ["lie", "transported"])
def test_half_precision_weights_are_updated_in_float32(literal, momentum):
    torch.manual_seed(0)
    w, g = torch.randn(12, 20).bfloat16(), torch.randn(12, 20).bfloat16()
    half, whole = nn.Parameter(w.clone()), nn.Parameter(w.float())
    for p, grad in ((half, g), (whole, g.float())):
        p.grad = grad
        literal.LiteralPion([p], 0.5, momentum=momentum).step()
    assert torch.equal(half, whole.bfloat16())
    assert not torch.equal(half, w)
