"""Orthogonalisation: the polar factor `U V^T` of a matrix `U diag(s) V^T`, batched over leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from pion_hf.errors import unknown
from pion_hf.linalg.gram import gram_polar, require_package
from pion_hf.linalg.products import gram_matrix, product_dtype

POLAR_METHODS = ("express", "quintic", "svd", "gram")
ITERATIONS = ("express", "quintic")  # of which the products run in the dtype they are given
MOST_STEPS = 10

# Polar Express (Amsel et al., arXiv 2505.16932): the optimal odd quintics for singular values in [1e-3, 1]. The first
# five are the published ones; the sixth is their recursion's next, and from there it is the classical iteration.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115952949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.8913013606620532, -1.2679957755017923, 0.37680408429022894),
    (15 / 8, -10 / 8, 3 / 8),
)
# Keeps a value that rounding has lifted above 1 inside the interval the next polynomial was made for: beyond it they
# grow without bound. 1.01 is the authors'; in bfloat16 a few small matrices in a thousand need more.
EXPRESS_SAFETY = 1.01
EXPRESS_SAFETY_HALF = 1.03
# A matrix so many times longer than wide iterates on its Gram matrix: 4 m^2 n + 2 m^3 flops a step become 8 m^3.
SKINNY = 4
# Steps on one Gram matrix: as many as grow values from 1e-3.
GRAM_STEPS = 5
# Muon (Jordan et al., 2024): one quintic, steep at zero; leaves singular values within about [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)


def polar_factor(x: Tensor, *, method: str = "express", steps: int = 5, dtype: str = "float32") -> Tensor:
    """The polar factor of `x`, `(..., m, n)`, in its dtype; odd in `x`, so that a skew matrix stays skew.

    `express` and `quintic` are `steps` iterations on the smaller side, with products in `dtype` (see `product_dtype`;
    `float32` is that of `x`, whatever it is), `svd` is exact. A zero matrix gives zero.
    `gram` is `express` in float16 on an optional package's kernels, for GPUs that have them. The package divides by the
    Frobenius norm, where `express` has a closer bound, so that small singular values need a step or two more.
    Singular values of `express`, from a matrix of condition number 1e3 or less: within 0.13 of 1 after 5 steps (no
    five quintics come nearer than 0.113), within 0.02 after 7, or 8 if most of them are near the largest.

    Raises:
        ValueError: unknown method, `steps` outside 1..10, or `gram` without its package or its GPU.
    """
    check_method(method)
    if method == "svd":
        return _polar_svd(x)
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"polar_steps must lie in 1..{MOST_STEPS}, got {steps}")
    if method == "gram":
        return gram_polar(x, _express_table(steps, torch.float16))
    low, tall = x.to(product_dtype(x, dtype)), x.shape[-2] > x.shape[-1]
    factor = _iterated(low.mT if tall else low, method, steps).to(x.dtype)
    return factor.mT if tall else factor


def _iterated(x: Tensor, method: str, steps: int) -> Tensor:
    """Of `x` no taller than wide."""
    if is_skinny(x) and x.dtype in (torch.float32, torch.float64):
        return polar_map(x, method=method, steps=steps) @ x
    batch = x.reshape(-1, *x.shape[-2:])
    if x.device.type == "cpu" and len(batch) > 1:  # one at a time is faster, and what each would be alone
        return torch.stack([_iterated(each, method, steps) for each in batch]).reshape(x.shape)
    start = batch[0] if len(batch) == 1 else batch
    start = start / torch.linalg.matrix_norm(start, keepdim=True).clamp_min(_smallest_norm(x.dtype))
    return (_express(start, steps) if method == "express" else _iterate(start, [QUINTIC] * steps)).reshape(x.shape)


def check_method(method: str) -> None:
    """Raises ValueError for an unknown method, and for `gram` without its package."""
    if method not in POLAR_METHODS:
        raise unknown("value of polar", method, POLAR_METHODS)
    if method == "gram":
        require_package()


def _smallest_norm(dtype: torch.dtype) -> float:
    """The squares of anything smaller underflow: of a momentum, say, that has decayed for a thousand steps."""
    return torch.finfo(dtype).tiny ** 0.5


def is_skinny(x: Tensor) -> bool:
    """Whether iterations on the Gram matrix of `x`, `(..., m, n)`, are cheaper than on `x` itself."""
    return max(x.shape[-2:]) >= SKINNY * min(x.shape[-2:])


def polar_map(x: Tensor, *, method: str = "express", steps: int = 5) -> Tensor:
    """The symmetric `P`, `(..., m, m)`, whose `P x` is the polar factor of a wide `x`, `(..., m, n)`; full precision.

    The iterations of `polar_factor` are polynomials in `x x^T`, so they run on that: of what is `n` wide only the
    Gram matrix remains. After `GRAM_STEPS` it is formed anew, because what rounding makes of eigenvalues near zero,
    negative ones too, grows with every step.

    Raises:
        ValueError: a method that does not iterate.
    """
    if method not in ITERATIONS:
        raise unknown("iteration of polar_map", method, ITERATIONS)
    table = _express_table(steps, x.dtype) if method == "express" else [QUINTIC] * steps
    gram = x @ x.mT
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].sqrt().clamp_min(_smallest_norm(x.dtype))
    gram = gram / norm / norm
    if method == "express":
        bound = _express_norm(gram @ gram)
        gram, norm = gram / bound**2, norm * bound
    total = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device) / norm
    for step, (a, b, c) in enumerate(table, start=1):
        polynomial = _plus_product(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        total = polynomial @ total
        if step % GRAM_STEPS:
            gram = polynomial @ gram @ polynomial
        elif step < steps:
            seen = total @ x
            gram = seen @ seen.mT
    return total


def _express_table(steps: int, dtype: torch.dtype) -> list[tuple[float, float, float]]:
    """The polynomials of every step, with the safety factor on all but the last."""
    table = [POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)] for i in range(steps)]
    s = EXPRESS_SAFETY_HALF if dtype in (torch.bfloat16, torch.float16) else EXPRESS_SAFETY
    return [(a / s, b / s**3, c / s**5) for a, b, c in table[:-1]] + table[-1:]


def _express_norm(square: Tensor) -> Tensor:
    """`||(X X^T)^2||_F^(1/4)` from that square: bounds the spectral norm from above, `rank^(1/8)` at most too high.

    The first polynomial needs the largest singular value near 1, and none above.
    """
    norm = torch.linalg.matrix_norm(square, dtype=torch.promote_types(square.dtype, torch.float32), keepdim=True)
    return (norm**0.25).clamp_min(1e-4)  # zero stays zero; of any other, ||X||_F being 1, it is at least rank^(-3/8)


def _express(x: Tensor, steps: int) -> Tensor:
    safe = _express_table(steps, x.dtype)
    gram = gram_matrix(x)
    square = gram @ gram
    norm = _express_norm(square)
    a, b, c = safe[0]
    x = x / norm.to(x.dtype)
    polynomial = gram * (b / norm**2).to(x.dtype) + square * (c / norm**4).to(x.dtype)
    return _iterate(_plus_product(x, polynomial, x, beta=a), safe[1:])


def _iterate(x: Tensor, coefficients: list[tuple[float, float, float]]) -> Tensor:
    """`X <- a X + (b X X^T + c (X X^T)^2) X` for every `(a, b, c)`."""
    for a, b, c in coefficients:
        gram = gram_matrix(x)
        x = _plus_product(x, _plus_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _plus_product(c: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """`beta C + alpha A B`."""
    return (torch.addmm if c.ndim == 2 else torch.baddbmm)(c, a, b, beta=beta, alpha=alpha)


def _polar_svd(x: Tensor) -> Tensor:
    """Exact, on the range of `x`: singular values below 1e-9 of the largest (float64; 1e-6 in float32) are dropped."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    tolerance = 1e-9 if x.dtype == torch.float64 else 1e-6
    kept = (s > tolerance * s[..., :1]).to(x.dtype)
    return (u * kept.unsqueeze(-2)) @ vh
