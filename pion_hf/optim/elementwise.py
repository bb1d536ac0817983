"""torch's AdamW, for parameters that no matrix rule updates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pion_hf.optim import sharding

AVERAGES = "exp_avg", "exp_avg_sq"


def begin(p: Tensor) -> dict[str, Tensor]:
    """The state of a parameter before its first step."""
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    return {"step": step, **{key: torch.zeros_like(p) for key in AVERAGES}}


def step(group: dict, state: dict[Tensor, dict[str, Tensor]]) -> None:
    """One step of the group's parameters that have a gradient."""
    params = [p for p in group["params"] if p.grad is not None]
    for p in params:
        if AVERAGES[0] not in state[p]:
            state[p].clear()  # of another rule
            state[p].update(begin(p))
        elif state[p][AVERAGES[0]].dtype != p.dtype:  # they were converted since, which torch's own step does not take
            state[p].update({key: state[p][key].to(p.dtype) for key in AVERAGES})
    states = [state[p] for p in params]
    adamw(
        [sharding.local(p) for p in params],
        [sharding.local(p.grad) for p in params],
        *([sharding.local(own[key]) for own in states] for key in AVERAGES),
        [],
        [own["step"] for own in states],
        fused=all(p.device.type in ("cpu", "cuda") for p in params),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=bool(group.get("maximize")),
    )
