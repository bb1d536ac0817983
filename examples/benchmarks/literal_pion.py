"""The published Pion (arXiv 2605.12492) as its equations read: one matrix at a time, dense n x n throughout.

What the optimizer of this package is timed against in optimizer_step.py. Per matrix `W`, `(m, n)`, with gradient `G`:

    S_in = skew(W^T G), S_out = skew(G W^T), each averaged over the steps        (momentum "lie", the paper's)
    M <- b M + (1 - b) G, S_in = skew(W^T M), S_out = skew(M W^T)                (momentum "transported")
    A = -S_in at odd steps, -S_out at even ones
    alpha = lr rms sqrt(m n) / (||dW||_F + 1e-12), dW = W A or A W,  X = alpha A
    W <- W E or E W, E = I + X + X^2 / 2; a transported M likewise

Both generators are formed at every step and the one of the idle side is thrown away, which momentum `lie` requires and
`transported` does not. Nothing is batched, cast to a lower precision, or updated without a copy.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor


class LiteralPion(torch.optim.Optimizer):
    """The rule above for every given tensor, all 2-D; `rms` as in `pion_hf.Pion`.

    Half-precision weights are updated in float32 and rounded back.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        *,
        momentum: Literal["lie", "transported"] = "lie",
        beta: float = 0.9,
        rms: float = 0.2,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "beta": beta, "rms": rms})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                dtype = torch.promote_types(p.dtype, torch.float32)
                p.copy_(updated(p.to(dtype), p.grad.to(dtype), self.state[p], group))


def updated(w: Tensor, g: Tensor, state: dict, group: dict) -> Tensor:
    """The new weights; `state` is changed."""
    step = state["step"] = state.get("step", 0) + 1
    if group["momentum"] == "lie":
        s_in = average(state, "lie_in", skew(w.T @ g), group["beta"])
        s_out = average(state, "lie_out", skew(g @ w.T), group["beta"])
    else:
        m = average(state, "momentum", g, group["beta"])
        s_in, s_out = skew(w.T @ m), skew(m @ w.T)
    inward = step % 2 == 1
    a = -s_in if inward else -s_out
    moved = w @ a if inward else a @ w
    x = a * (group["lr"] * group["rms"] * w.numel() ** 0.5 / (moved.norm() + 1e-12))
    e = torch.eye(len(x), dtype=x.dtype, device=x.device) + x + x @ x / 2
    if group["momentum"] == "transported":
        state["momentum"] = m @ e if inward else e @ m
    return w @ e if inward else e @ w


def average(state: dict, key: str, value: Tensor, beta: float) -> Tensor:
    state[key] = beta * state.get(key, torch.zeros_like(value)) + (1 - beta) * value
    return state[key]


def skew(x: Tensor) -> Tensor:
    return x - x.T
