"""Long training of bfloat16 weights by steps far below their rounding: masters follow the float32 run, nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import master
from tests.test_precision import ISOSPECTRAL, RULES, gradients, start, step

LR = 3e-6
LENGTHS = [300, pytest.param(10_000, marks=pytest.mark.slow)]


def drift(before: Tensor, after: Tensor) -> float:
    """Largest change of a singular value, relative to the largest one."""
    old, new = (torch.linalg.svdvals(w.detach().double()) for w in (before, after))
    return ((new - old).abs().max() / old[0]).item()


def changed(p: Tensor) -> int:
    """How many of the stored weights are no longer those of the start."""
    return int((p.detach() != start()).sum())


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("rule", RULES)
def test_masters_follow_the_float32_run(rule, steps, tried):
    half, full = nn.Parameter(start()), nn.Parameter(start().float())
    first, second = (RULES[rule](p, LR) for p in (half, full))
    for grad in gradients(steps):
        step(half, grad, first)
        step(full, grad, second)
    kept = master(half, first)
    assert (full - start().float()).norm() > LR / 2 * steps * full.norm(), "the run went nowhere: it shows nothing"
    assert (kept - full).norm() <= 1e-6 * full.norm()
    torch.testing.assert_close(half.float(), kept, rtol=2**-8, atol=0)
    assert changed(half) == changed(full.bfloat16()) > 0
    if rule in ISOSPECTRAL:
        assert drift(start(), kept) < 1e-5
    tried(f"bfloat16 weights at lr {LR:g}: the path of float32", steps, "steps")


@pytest.mark.parametrize("rule", RULES)
def test_without_masters_no_weight_changes(rule):
    """Each step rounded to bfloat16, as it is where nothing keeps the rest."""
    p = nn.Parameter(start().float())
    optimizer = RULES[rule](p, LR)
    for grad in gradients(100):
        step(p, grad, optimizer)
        p.data.copy_(p.data.bfloat16())
    assert changed(p) == 0


def test_adamw_without_masters_changes_no_weight_either():
    p = nn.Parameter(start())
    optimizer = torch.optim.AdamW([p], lr=LR)
    for grad in gradients(100):
        step(p, grad, optimizer)
    assert changed(p) == 0
