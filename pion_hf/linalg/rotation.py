"""Rotations of a matrix: skew generators, retractions, and how they act.

Everything is written for rotations from the right, `W <- W E(alpha A)` with `W` of shape
`(..., m, n)` and `A` of shape `(..., n, n)`. A rotation from the left is the same on transposed
views: `-skew(D W^T)`, acting on `W`, is minus the generator of `(W^T, D^T)`, acting on `W^T`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

RETRACTIONS = ("root", "cayley", "taylor")

# Angles (radians) up to which so many terms of the root series are orthogonal to float32 rounding: with odd terms up to
# x^(2j - 1), E^T E - I is 2 |c| theta^(2j + 2), c the next coefficient; with two terms it is theta^4 / 4.
SERIES_ANGLES = ((0.006, 2), (0.05, 3), (0.1, 5), (0.2, 7), (0.35, 9), (0.5, 11))
# Coefficients of x^2, x^3, ... in E(x) - I (those of even powers above 2 are 0): x^2/2 + x (1 + x^2/4)^(1/2).
ROOT_SERIES = {2: 1 / 2, 3: 1 / 8, 5: -1 / 128, 7: 1 / 1024, 9: -5 / 32768, 11: 7 / 262144}
# Side of the blocks in which a large CPU matrix is skewed: reading the whole transposed costs as much as a product.
SKEW_BLOCK = 256


def skew(x: Tensor) -> Tensor:
    """`x - x^T` over the last two dimensions; exactly skew-symmetric in any precision."""
    n = x.shape[-1]
    if x.device.type != "cpu" or n < 2 * SKEW_BLOCK:
        return x - x.mT
    out = torch.empty_like(x)
    blocks = [slice(i, i + SKEW_BLOCK) for i in range(0, n, SKEW_BLOCK)]
    for i, rows in enumerate(blocks):
        for columns in blocks[: i + 1]:
            difference = x[..., rows, columns] - x[..., columns, rows].mT
            out[..., rows, columns] = difference
            if rows != columns:
                out[..., columns, rows] = -difference.mT
    return out


def solve(a: Tensor, b: Tensor) -> Tensor:
    """`a^-1 b` for `a` of shape `(..., k, k)`.

    One matrix at a time on CPU: MKL's batched LU, called from several threads, reports
    "Parameter 6 was incorrect on entry to SLASWP" and may never return (torch 2.13, oneMKL).
    """
    if a.device.type != "cpu" or a.ndim == 2:
        return torch.linalg.solve(a, b)
    batch = a.shape[:-2]
    flat_a, flat_b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    return torch.stack([torch.linalg.solve(x, y) for x, y in zip(flat_a, flat_b, strict=True)]).view(
        *batch, *b.shape[-2:]
    )


def cayley(x: Tensor, gram: Tensor | None = None) -> Tensor:
    """`E(x) - I` of the Cayley transform `E(x) = (I - x/2)^-1 (I + x/2)`, orthogonal for any skew `x`.

    With `gram` (`F F^T`) it returns the core `C` such that `E(F^T x F) = I + F^T C F`: the
    Woodbury form, `C = x (I - gram x / 2)^-1`.
    """
    gx = x if gram is None else gram @ x
    system = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) - gx / 2
    if gram is None:  # (I - x/2)^-1 and x commute: no transposes needed
        return solve(system, x)
    return solve(system.mT, x.mT).mT


def taylor(x: Tensor, gram: Tensor | None = None, *, degree: int = 2) -> Tensor:
    """`E(x) - I` of the truncated exponential `E(x) = sum_k x^k / k!`, `k <= degree`.

    For degree 2, `E^T E = I + x^4 / 4`: singular values grow by `theta^4 / 8` a step. `gram` as in `cayley`.
    """
    gx = x if gram is None else gram @ x
    out = x
    for k in range(degree, 1, -1):
        out = x + (out @ gx) / k
    return out


def root(x: Tensor, *, angle: float, dtype: torch.dtype | None = None) -> Tensor:
    """`E(x) - I` of `E(x) = I + x^2/2 + x (I + x^2/4)^(1/2)`, orthogonal for skew `x` up to angles of 2 rad.

    The even part is exact, so a short series of the odd part leaves it orthogonal to rounding: two to five products
    instead of a decomposition. Angles above 0.5 are halved first, the rotation squared: `(I + F)^2 - I = 2F + F^2`.

    angle: an upper estimate of the largest rotation angle, `||x||_2`, which chooses how many terms are needed;
    dtype: a lower one in which powers below the rounding of the result may be multiplied.
    """
    halvings = root_halvings(angle)
    if halvings:
        x = x / 2**halvings
    square = x @ x
    terms = SERIES_ANGLES[-1][1] if x.dtype == torch.float64 else max(3, root_terms(angle / 2**halvings))
    exact = exact_root_terms(angle / 2**halvings)
    odd = _odd_series(square, terms, dtype=dtype if exact < 5 else None)
    increment = square / 2 + x + matmul(x, odd, dtype=dtype if exact < 3 else None)
    for _ in range(halvings):
        increment = 2 * increment + increment @ increment
    return increment


def _odd_series(square: Tensor, terms: int, *, dtype: torch.dtype | None) -> Tensor:
    """`(I + z/4)^(1/2) - I` of `z = square`, as many coefficients as `terms` of `ROOT_SERIES` have, Horner in `z^2`."""
    coefficients = [0.0, *(ROOT_SERIES[k] for k in range(3, terms + 1, 2))]
    coefficients += [0.0] * (len(coefficients) % 2)
    pairs = list(zip(coefficients[::2], coefficients[1::2], strict=True))
    total = _linear(square, *pairs[-1])
    if len(pairs) > 1:
        fourth = matmul(square, square, dtype=dtype)
        for pair in reversed(pairs[:-1]):
            total = _linear(square, *pair) + matmul(fourth, total, dtype=dtype)
    return total


def _linear(z: Tensor, constant: float, slope: float) -> Tensor:
    """`constant I + slope z`."""
    out = z * slope
    if constant:
        out.diagonal(dim1=-2, dim2=-1).add_(constant)
    return out


def root_halvings(angle: float) -> int:
    """How often a rotation of `angle` is halved before the series takes it."""
    largest = SERIES_ANGLES[-1][0]
    return max(0, math.ceil(math.log2(angle / largest))) if math.isfinite(angle) and angle > 0 else 0


def root_terms(angle: float) -> int:
    """Terms of the root series that leave it orthogonal to float32 rounding at `angle`."""
    return next((terms for limit, terms in SERIES_ANGLES if angle <= limit), SERIES_ANGLES[-1][1])


def exact_root_terms(angle: float) -> int:
    """The last power of the root series whose rounding to 8 bits a float32 result would notice at `angle`."""
    noticed = [k for k, c in ROOT_SERIES.items() if abs(c) * angle**k > 2**-16]
    return max(noticed, default=1)


def matmul(a: Tensor, b: Tensor, *, dtype: torch.dtype | None) -> Tensor:
    """`a b`, multiplied in `dtype` (None: their own) and returned in `a`'s."""
    if dtype is None or dtype == a.dtype:
        return a @ b
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


class Increment(NamedTuple):
    """`E - I` of one rotation, `(..., n, n)`: `right` itself, or `left right` with `left` `(..., n, r)`.

    With `terms` the matrix is never formed: `right` is a generator, and so many terms of the root series of
    `alpha right` act on the rows one after another, which is cheaper for fewer rows than `n`. Powers above
    `exact_terms` are below the rounding of the result and may be multiplied in `tail_dtype`.
    """

    right: Tensor
    left: Tensor | None = None
    terms: int = 0
    alpha: Tensor | float = 1.0
    exact_terms: int = 0
    tail_dtype: torch.dtype | None = None

    def rotate(self, x: Tensor, *, side: str = "in", dtype: torch.dtype | None = None) -> Tensor:
        """`x E` for `x` of shape `(..., p, n)`, or for `side="out"` `E^T x`, `(..., n, p)`; products in `dtype`."""
        power = x if self.left is None else _product(x, self.left, side, dtype)
        power = _product(power, self.right, side, dtype)
        if not self.terms:
            return x + power
        # Each power takes its share of alpha at once: the generator itself may be of any size.
        power = power * self.alpha
        total = x + power
        low = None if self.tail_dtype is None else self.right.to(self.tail_dtype)
        # What is rounded anyway needs no more terms than show in half precision.
        terms = self.terms if dtype is None else min(self.terms, 3)
        for term in range(2, terms + 1):
            exact = dtype is None and (low is None or term <= self.exact_terms)
            power = _product(power, self.right if exact or low is None else low, side, None if exact else dtype)
            power = power.mul_(self.alpha)
            if term in ROOT_SERIES:
                total.add_(power, alpha=ROOT_SERIES[term])
        return total


def _product(x: Tensor, factor: Tensor, side: str, dtype: torch.dtype | None) -> Tensor:
    """`x factor`, or `factor^T x` for `side="out"`: the same on transposed views, without transposed memory.

    Multiplied in `dtype` (None: that of `factor`), returned in that of `x`.
    """
    dtype = dtype or factor.dtype
    factor, low = factor.to(dtype), x.to(dtype)
    return (low @ factor if side == "in" else factor.mT @ low).to(x.dtype)


class Generator(NamedTuple):
    """A skew matrix `A`, `(..., n, n)`: `core` itself, or `factor^T core factor`.

    core: `(..., n, n)` or `(..., r, r)`, skew. factor: `(..., r, n)`. gram: `factor factor^T`.
    """

    core: Tensor
    factor: Tensor | None = None
    gram: Tensor | None = None

    def act(self, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """`x A` for rows `x` of shape `(..., p, n)`, multiplied in `dtype`."""
        if self.factor is not None:
            x = matmul(x, self.factor.mT, dtype=dtype)
        x = matmul(x, self.core, dtype=dtype)
        return x if self.factor is None else matmul(x, self.factor, dtype=dtype)

    def act_norm(self, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """`||x A||_F`, shape `(..., 1, 1)`, without an `n`-wide product in the factored form."""
        if self.factor is None:
            return torch.linalg.matrix_norm(matmul(x, self.core, dtype=dtype), keepdim=True)
        coefficients = matmul(matmul(x, self.factor.mT, dtype=dtype), self.core, dtype=dtype)
        squared = (matmul(coefficients, self.gram, dtype=dtype) * coefficients).sum((-2, -1), keepdim=True)
        return squared.clamp_min(0).sqrt()

    def spectral_norm(self, *, iterations: int = 8) -> Tensor:
        """Estimate of `||A||_2`, the largest rotation angle at unit step, shape `(..., 1, 1)`.

        Power iteration on `A^T A` from a fixed random start: a lower bound, within a few percent.
        """
        n = (self.core if self.factor is None else self.factor).shape[-1]
        seed = torch.Generator().manual_seed(0)
        v = torch.randn(1, n, generator=seed, dtype=torch.float64).to(self.core).expand(*self.core.shape[:-2], 1, n)
        norm = torch.zeros_like(v[..., :1])
        tiny = torch.finfo(v.dtype).tiny
        for _ in range(iterations):
            v = v / torch.linalg.matrix_norm(v, keepdim=True).clamp_min(tiny)
            u = self.act(v)
            norm = torch.linalg.matrix_norm(u, keepdim=True)
            v = self.act(u / norm.clamp_min(tiny))
        return norm

    def increment(
        self,
        alpha: Tensor | float,
        *,
        retraction: str,
        degree: int = 2,
        rows: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Increment:
        """`E(alpha A) - I`, with `alpha` of shape `(..., 1, 1)` or a number.

        rows: how many rows it will act on in full precision, if that is known to be few; dtype: a lower one that
        terms below the rounding of the result may be multiplied in.
        """
        if retraction == "root" and self.factor is None:
            return self._root_increment(alpha, rows, dtype)
        x = self.core * alpha
        if retraction == "taylor":
            core = taylor(x, self.gram, degree=degree)
        elif retraction in ("cayley", "root"):
            # The root's series wants powers of A itself; a low-rank core is small enough to decompose.
            core = cayley(x, self.gram)
        else:
            raise ValueError(f"retraction must be one of {RETRACTIONS}, got {retraction!r}")
        return Increment(core) if self.factor is None else Increment(core @ self.factor, self.factor.mT)

    def _root_increment(self, alpha: Tensor | float, rows: int | None, dtype: torch.dtype | None) -> Increment:
        angles = self.spectral_norm(iterations=4) * alpha
        # Power iteration is a lower bound. Meta tensors (a plan without weights) have shapes and no angle.
        angle = 0.0 if angles.is_meta else 1.5 * angles.max().item()
        terms = root_terms(angle)
        few_rows = rows is not None and rows < self.core.shape[-1]
        if few_rows and angle <= SERIES_ANGLES[-1][0]:
            exact = exact_root_terms(angle)
            return Increment(self.core, terms=terms, alpha=alpha, exact_terms=exact, tail_dtype=dtype)
        return Increment(root(self.core * alpha, angle=angle, dtype=dtype))


def generator(
    left: Tensor, right: Tensor, *, rows: int = 0, dense: bool | None = None, dtype: torch.dtype | None = None
) -> Generator:
    """The generator `A = -skew(L^T R)` of factors `L`, `R` of shape `(..., k, n)`.

    `L = W`, `R = D` is the paper's generator of the direction `D` (the `lie` metric). `A` has rank
    at most `2k`; the factored form `[L; R]^T K [L; R]` with `K = [[0, -I], [I, 0]]` is kept when
    rotating `rows` rows with it costs fewer flops than the dense one, unless `dense` says which. `A` has the
    given `dtype`; factors of a lower one are multiplied in it, and the dense form is skewed exactly afterwards.
    """
    k, n = left.shape[-2:]
    if dense is None:
        dense = dense_flops(k, n, rows) <= factored_flops(k, n, rows)
    dtype = dtype or left.dtype
    if dense:
        return Generator(skew(right.mT @ left).to(dtype))
    factor = torch.cat((left, right), dim=-2).to(dtype)
    core = torch.zeros(2 * k, 2 * k, dtype=dtype, device=left.device)
    core[:k, k:] = -torch.eye(k, dtype=dtype, device=left.device)
    core[k:, :k] = torch.eye(k, dtype=dtype, device=left.device)
    core = core.expand(*left.shape[:-2], 2 * k, 2 * k)
    return Generator(core, factor, factor @ factor.mT)


def dense_flops(k: int, n: int, rows: int) -> float:
    """Flops to form `A` from `(k, n)` factors, take its Cayley increment and apply it to `rows` rows."""
    return 2 * k * n**2 + (2 / 3 + 2) * n**3 + 2 * rows * n**2


def factored_flops(k: int, n: int, rows: int) -> float:
    """The same in the factored form, whose core is `(2k, 2k)`."""
    r = 2 * k
    return 2 * r**2 * n + (2 / 3 + 4) * r**3 + rows * (4 * r * n + 2 * r**2)


def rms_scale(norm: Tensor, *, lr: float, rms: float, numel: int) -> Tensor:
    """`alpha = lr * rms * sqrt(m n) / (||dW||_F + 1e-12)`: the update's RMS becomes `lr * rms`.

    0 where the norm is: a matrix without a gradient (an expert that saw no token) stays as it is to the bit.
    """
    return torch.where(norm > 0, lr * rms * math.sqrt(numel) / (norm + 1e-12), 0)
