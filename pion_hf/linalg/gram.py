"""Polar factors by the package `gram-newton-schulz`: half-precision products of symmetric matrices on newer GPUs.

The package is optional (`pip install 'pion-hf[gram]'`) and imported at the first use. This adapter follows the source
of its version 0.1.6. Its arithmetic was tried on a CPU, without the kernels; on a GPU it has not been run.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn.functional import pad

PACKAGE = "gram_newton_schulz"
LOWEST_CAPABILITY = (9, 0)  # Hopper; below it the package's own optimizer leaves its kernels aside
# The kernels move 16 bytes at a time: rows of so many float16 numbers.
ALIGNMENT = 8
# Iterations between fresh Gram matrices, the first after two. What rounding makes of eigenvalues near zero grows with
# every iteration: with the first restart alone, the package's default, ten of them ended at norms above 1,000.
RESTART_EVERY = 3


def require_package() -> None:
    """Raises ValueError where the package is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError(
            "polar='gram' needs the package gram-newton-schulz, which is not installed: "
            "pip install 'pion-hf[gram]', or set polar='express'."
        )


def require_gpu(device: torch.device) -> None:
    """Raises ValueError unless `device` is a GPU that the kernels are made for."""
    found = device.type
    if found == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability >= LOWEST_CAPABILITY:
            return
        found = f"a GPU of compute capability {capability[0]}.{capability[1]}"
    elif found == "cuda":
        found = "an AMD GPU"
    raise ValueError(
        f"polar='gram' needs an NVIDIA GPU of compute capability {LOWEST_CAPABILITY[0]}.{LOWEST_CAPABILITY[1]} or "
        f"higher (Hopper, Blackwell), and the matrices are on {found}: set polar='express'."
    )


def gram_polar(x: Tensor, coefficients: list[tuple[float, float, float]]) -> Tensor:
    """The polar factor of `x`, `(..., m, n)`, in its dtype, by an iteration for each `(a, b, c)`, in float16.

    Matrices whose smaller side is below 256 get the package's plain products instead of its kernels.

    Raises:
        ValueError: `x` is not on a GPU that the kernels are made for.
    """
    if x.is_meta:  # who asks for a form
        return torch.empty_like(x)
    require_gpu(x.device)
    from gram_newton_schulz import GramNewtonSchulz

    m, n = x.shape[-2:]
    batch = x.reshape(-1, m, n)
    # The package adds 1e-7 to the norm it divides by: too much for a momentum that has decayed.
    largest = torch.linalg.vector_norm(batch, float("inf"), dim=(-2, -1), keepdim=True)
    batch = batch / largest.clamp_min(torch.finfo(x.dtype).tiny)
    if m % ALIGNMENT or n % ALIGNMENT:
        batch = pad(batch, (0, -n % ALIGNMENT, 0, -m % ALIGNMENT))  # zeros stay zeros
    # Not compiled: the package would do it for every shape anew, in CUDA graphs whose results the next call overwrites.
    newton_schulz = GramNewtonSchulz(
        ns_coefficients=coefficients,
        gram_newton_schulz_reset_iterations=list(range(2, len(coefficients), RESTART_EVERY)),
        compile_kwargs=None,
    )
    return newton_schulz(batch)[:, :m, :n].reshape(x.shape)
