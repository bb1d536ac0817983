"""Rotations of a matrix: skew generators, retractions, and how they act.

Everything is written for rotations from the right, `W <- W E(alpha A)` with `W` of shape
`(..., m, n)` and `A` of shape `(..., n, n)`. A rotation from the left is the same on transposed
views: `-skew(D W^T)`, acting on `W`, is minus the generator of `(W^T, D^T)`, acting on `W^T`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pion_hf.linalg.precision import halves_product, split_product, splitting_pays
from pion_hf.linalg.reading import READER, Reader, reading_waits
from pion_hf.linalg.series import ROOT_SERIES, SERIES_ANGLES, Series, root_terms

RETRACTIONS = ("root", "cayley", "taylor")
GOLDEN_RATIO = (5**0.5 - 1) / 2

# A rotation of so many times more columns than rows is a series of products rather than a matrix.
LONG_SERIES = 2
# Transposing a large matrix leaves a core's cache at every element: on CPU it is done in blocks of this size.
SKEW_BLOCK = 384
# Low-rank cores up to this size are inverted as a batch on CPU, by so many products at most.
SMALL_CORE = 128
NEUMANN_PRODUCTS = 6


def skew(x: Tensor) -> Tensor:
    """`x - x^T` of `x`, `(..., n, n)`; exactly skew-symmetric in any precision."""
    n = x.shape[-1]
    if x.device.type != "cpu":
        return x - x.mT
    if n <= 2 * SKEW_BLOCK:  # a copy of the transposed is made block by block, which reading it in place is not
        return x - x.mT.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    cuts = [slice(start, start + SKEW_BLOCK) for start in range(0, n, SKEW_BLOCK)]
    for i, rows in enumerate(cuts):
        for columns in cuts[i:]:
            block = x[..., rows, columns] - x[..., columns, rows].mT.contiguous()
            out[..., rows, columns] = block
            if rows != columns:
                out[..., columns, rows] = block.mT.neg()
    return out


def solve(a: Tensor, b: Tensor) -> Tensor:
    """`a^-1 b` for `a` of shape `(..., k, k)`.

    One matrix at a time on CPU: MKL's batched LU, called from several threads, reports
    "Parameter 6 was incorrect on entry to SLASWP" and may never return (torch 2.13, oneMKL).
    """
    if a.device.type != "cpu":  # without the check for singular matrices, which waits for the device
        return torch.linalg.solve_ex(a, b)[0]
    if a.ndim == 2:
        return torch.linalg.solve(a, b)
    batch = a.shape[:-2]
    flat_a, flat_b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    return torch.stack([torch.linalg.solve(x, y) for x, y in zip(flat_a, flat_b, strict=True)]).view(
        *batch, *b.shape[-2:]
    )


def cayley(x: Tensor, gram: Tensor | None = None) -> Tensor:
    """`E(x) - I`, `(..., n, n)`, of the Cayley transform `E(x) = (I - x/2)^-1 (I + x/2)`, orthogonal for any skew `x`.

    With `gram` (`F F^T`) it returns the core `C` such that `E(F^T x F) = I + F^T C F`: the
    Woodbury form, `C = x (I - gram x / 2)^-1`.
    """
    gx = x if gram is None else gram @ x
    if x.ndim > 2 and x.shape[-1] <= SMALL_CORE and not reading_waits(x):
        inverse = _neumann(gx / 2)
        if inverse is not None:
            return x @ inverse
    system = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) - gx / 2
    if gram is None:  # (I - x/2)^-1 and x commute: no transposes needed
        return solve(system, x)
    return solve(system.mT, x.mT).mT


def _neumann(y: Tensor) -> Tensor | None:
    """`(I - y)^-1 = (I + y) (I + y^2) (I + y^4) ...` of small matrices, a batch at once; None if that takes too long.

    Eigenvalues of half a rotation's angle: below 1 rad it converges to rounding in a few products.
    """
    identity = torch.eye(y.shape[-1], dtype=y.dtype)
    inverse = identity + y
    for _ in range(NEUMANN_PRODUCTS):
        y = y @ y
        inverse = torch.baddbmm(inverse, y, inverse) if y.ndim == 3 else inverse + y @ inverse
        if torch.linalg.matrix_norm(y).amax().item() < torch.finfo(y.dtype).eps:
            return inverse
    return None


def taylor(x: Tensor, gram: Tensor | None = None, *, degree: int = 2) -> Tensor:
    """`E(x) - I`, `(..., n, n)`, of the truncated exponential `E(x) = sum_k x^k / k!`, `k <= degree`.

    For degree 2, `E^T E = I + x^4 / 4`: singular values grow by `theta^4 / 8` a step. `gram` as in `cayley`.
    """
    gx = x if gram is None else gram @ x
    out = x
    for k in range(degree, 1, -1):
        out = x + (out @ gx) / k
    return out


def root(
    x: Tensor, *, angle: float | Tensor, largest: float | None = None, product: Callable[..., Tensor] = torch.matmul
) -> Tensor:
    """`E(x) - I` of `E(x) = I + x^2/2 + x (I + x^2/4)^(1/2)`, orthogonal for skew `x` up to angles of 2 rad.

    The even part is exact, so a short series of the odd part leaves it orthogonal to rounding: two to five products
    instead of a decomposition. Angles above 0.5 are halved first, the rotation squared: `(I + F)^2 - I = 2F + F^2`.

    angle: an upper estimate of the largest rotation angle, `||x||_2`, which chooses how many terms are needed; of every
    matrix, `(..., 1, 1)`, in a batch: how often one is halved, which shows in the result, is no other's affair.
    largest: of these, if it is known already. product: of matrices of the size of `x`.
    """
    angle = torch.as_tensor(angle, dtype=x.dtype, device=x.device)
    largest = angle.max().item() if largest is None else largest
    limit = SERIES_ANGLES[-1][0]
    most = math.ceil(math.log2(largest / limit)) if limit < largest < math.inf else 0
    if most:
        halvings = (angle / limit).log2().ceil().nan_to_num(0).clamp(0, most)
        x = x / 2**halvings
    square = product(x, x)
    terms = max(3, root_terms(largest, x.dtype))
    increment = square / 2 + x + product(x, _odd_series(square, terms, product))
    for done in range(most):
        doubled = 2 * increment + product(increment, increment)
        increment = torch.where(halvings > done, doubled, increment)
    return increment


def _odd_series(square: Tensor, terms: int, product: Callable[..., Tensor]) -> Tensor:
    """`(I + z/4)^(1/2) - I` of `z = square`, as many coefficients as `terms` of `ROOT_SERIES` have, Horner in `z^2`."""
    coefficients = [0.0, *(ROOT_SERIES[k] for k in range(3, terms + 1, 2))]
    coefficients += [0.0] * (len(coefficients) % 2)
    pairs = list(zip(coefficients[::2], coefficients[1::2], strict=True))
    total = _linear(square, *pairs[-1])
    if len(pairs) > 1:
        fourth = product(square, square)
        for pair in reversed(pairs[:-1]):
            total = _linear(square, *pair) + product(fourth, total)
    return total


def _linear(z: Tensor, constant: float, slope: float) -> Tensor:
    """`constant I + slope z`."""
    out = z * slope
    if constant:
        out.diagonal(dim1=-2, dim2=-1).add_(constant)
    return out


class Increment(NamedTuple):
    """`E - I` of one rotation, `(..., n, n)`: `right` itself, or `right^T core right` with `right` `(..., r, n)`.

    low: `right` in lower precision, for a rotation formed from products in it: where splitting pays, `halves_product`
    will do for it.
    """

    right: Tensor
    core: Tensor | None = None
    low: Tensor | None = None

    def change(
        self,
        x: Tensor,
        *,
        side: str = "in",
        low: bool = False,
        first: Tensor | None = None,
        seen: Tensor | None = None,
        name: str = "weight",
    ) -> Tensor:
        """`x (E - I)` for `x` of shape `(..., p, n)`, or for `side="out"` `(E - I)^T x`, `(..., n, p)`.

        low: in lower precision, if there is one, for what is rounded anyway (a momentum). first, name: for a `Series`.
        seen: `x right^T`, if known (low-rank rotations from the right only).
        """
        if self.low is not None:
            if low:
                return _product(x, self.low, side)
            return halves_product(x, self.right) if side == "in" else halves_product(self.right.mT, x)
        power = x
        if self.core is not None:
            power = _product(x, self.right.mT, side) if seen is None else seen
            power = _product(power, self.core, side)
        return _product(power, self.right, side)


def _product(x: Tensor, factor: Tensor, side: str) -> Tensor:
    """`x factor`, or `factor^T x` for `side="out"`: multiplied in the precision of `factor`, given back in `x`'s."""
    low = x.to(factor.dtype)
    return (low @ factor if side == "in" else factor.mT @ low).to(x.dtype)


class Generator(NamedTuple):
    """A skew matrix `A`, `(..., n, n)`: `core` itself, or `factor^T core factor`.

    core: `(..., n, n)`, or that of a pair (`_pair_core`), `(..., 2k, 2k)`. factor: `[L; R]`, `(..., 2k, n)`. gram:
    `factor factor^T`. low: in the lower precision it was formed in, a dense core or the factor.
    """

    core: Tensor
    factor: Tensor | None = None
    gram: Tensor | None = None
    low: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.core.dtype

    def moved(self, x: Tensor, *, side: str = "in") -> Tensor | None:
        """`times(x)`, at first order what a rotation changes, if that is less work than `act_norm`; else None.

        In lower precision where it gives the size of a step and nothing else.
        """
        if self._is_formed(x.shape[-2 if side == "in" else -1]):
            return _product(x, self.low, side)
        return self.times(x, side=side) if self.has_powers else None

    def _is_formed(self, rows: int | None) -> bool:
        """Whether the root is a matrix, although a series is possible: where splitting pays, and rows are many."""
        if self.factor is not None or self.low is None or not splitting_pays(self.core.device):
            return False
        return LONG_SERIES * (rows or 0) >= self.core.shape[-1]

    @property
    def has_powers(self) -> bool:
        """Whether powers of `A` itself are multiplied, not those of a small core."""
        return self.factor is None or self.low is not None

    def times(self, x: Tensor, *, side: str = "in") -> Tensor:
        """`x A`, or `A^T x` for `side="out"`; needs `has_powers`.

        Where splitting `x` is faster to a relative 2^-17 (see `split_product`), else exact.
        """
        if self.factor is None:
            exact = self.core if self.low is None else self.low
            product = _times(x, exact, self.core, left=side == "out")
            return product if side == "in" else product.neg_()  # no transposes, which are slow in low precision
        if side == "in":
            seen = _times(x, self.low.mT)
            return _times(_turned(seen, -1), self.low)
        seen = _times(x, self.low, left=True)
        return _times(_turned(seen, -2), self.low.mT, left=True)

    def act(self, x: Tensor) -> Tensor:
        """`x A` for rows `x` of shape `(..., p, n)`, in the precision of the factor."""
        if self.factor is None:
            return x @ self.core
        seen = x.to(self.factor.dtype) @ self.factor.mT
        return (_turned(seen, -1) @ self.factor).to(x.dtype)

    def act_norm(self, x: Tensor, *, seen: Tensor | None = None) -> Tensor:
        """`||x A||_F`, shape `(..., 1, 1)`; in the factored form from `x factor^T`, which may be given as `seen`."""
        if self.factor is None:
            return torch.linalg.matrix_norm(x @ self.core, keepdim=True)
        factor, gram = self.precise_factor()
        coefficients = (x @ factor.mT if seen is None else seen) @ self.core
        return ((coefficients @ gram) * coefficients).sum((-2, -1), keepdim=True).clamp_min(0).sqrt()

    def spectral_norm(self, *, iterations: int = 8) -> Tensor:
        """Estimate of `||A||_2`, the largest rotation angle at unit step, shape `(..., 1, 1)`.

        Power iteration on `A^T A` from a fixed start: a lower bound, within a few percent.
        """
        n = (self.core if self.factor is None else self.factor).shape[-1]
        # As good as random, and made where it is needed: what comes from the host is waited for.
        squares = torch.arange(1, n + 1, dtype=torch.float64, device=self.core.device).square()
        start = (squares * GOLDEN_RATIO).remainder(1) - 0.5
        v = start.to(self.core.dtype).expand(*self.core.shape[:-2], 1, n)
        norm = v.new_zeros(*v.shape[:-1], 1)
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
        reader: Reader = READER,
    ) -> Increment | Series:
        """`E(alpha A) - I`, with `alpha` of shape `(..., 1, 1)` or a number.

        rows: how many rows it will act on in full precision, if that is known to be few.
        """
        if retraction not in RETRACTIONS:
            raise ValueError(f"retraction must be one of {RETRACTIONS}, got {retraction!r}")
        if retraction == "root" and self.has_powers:
            found = self._root_increment(alpha, rows, reader)
            if found is not None:
                return found
        factor, gram = self.precise_factor()
        x = self.core * alpha
        # A low-rank core without powers of `A` itself, or with large ones, is decomposed instead.
        core = taylor(x, gram, degree=degree) if retraction == "taylor" else cayley(x, gram)
        return Increment(core) if factor is None else Increment(factor, core)

    def precise_factor(self) -> tuple[Tensor | None, Tensor | None]:
        """The factor in the precision of the core, and its Gram matrix."""
        if self.factor is None or self.gram is not None:
            return self.factor, self.gram
        factor = self.factor.to(self.dtype)
        return factor, factor @ factor.mT

    def _root_increment(self, alpha: Tensor | float, rows: int | None, reader: Reader) -> Increment | Series | None:
        """None for a factored generator of an angle that its series does not reach."""
        # Power iteration is a lower bound.
        angles = 1.5 * self.spectral_norm(iterations=4) * alpha
        # Meta tensors (a plan without weights) have shapes and no angle.
        angle = 0.0 if angles.is_meta else reader.read("angle", angles.max())
        dense, lowered, formed = self.factor is None, self.low is not None, self._is_formed(rows)
        few_rows = lowered or (rows is not None and rows < self.core.shape[-1])
        if few_rows and not formed and angle <= SERIES_ANGLES[-1][0]:
            tail = self._lowered(alpha) if lowered else None
            return Series(self, root_terms(angle, self.dtype), alpha, angle, tail, reader)
        if not dense:
            return None
        product = halves_product if lowered else torch.matmul
        increment = root(self.core * alpha, angle=angles, largest=angle, product=product)
        return Increment(increment, low=increment.to(self.low.dtype) if lowered else None)

    def _lowered(self, alpha: Tensor | float) -> Generator:
        """`alpha A` in lower precision."""
        if self.factor is None:
            return Generator(self.low * _like(alpha, self.low))
        left, right = self.low.chunk(2, dim=-2)
        pair = torch.cat((left * _like(alpha, left), right), dim=-2)
        return Generator(_pair_core(left.shape[-2], pair.dtype, pair.device), pair, low=pair)


def _turned(x: Tensor, dim: int) -> Tensor:
    """`x K`, or with `dim=-2` `K^T x`, of the core of a pair."""
    first, second = x.chunk(2, dim=dim)
    return torch.cat((second, -first), dim=dim)


def _times(x: Tensor, a: Tensor, precise: Tensor | None = None, *, left: bool = False) -> Tensor:
    """`x a`, or `a x` with `left`, in the precision of `x`. precise: `a` in it, if that is at hand."""
    if a.dtype != x.dtype and x.dtype == torch.float32 and x.ndim == 3 and splitting_pays(x.device):
        return split_product(x, a, left=left)
    a = a if a.dtype == x.dtype else a.to(x.dtype) if precise is None else precise
    return a @ x if left else x @ a


def _like(alpha: Tensor | float, x: Tensor) -> Tensor | float:
    return alpha.to(x.dtype) if isinstance(alpha, Tensor) else alpha


def without(x: Tensor, fixed: Tensor) -> Tensor:
    """Rows `x`, `(..., p, n)`, less their part along the orthonormal columns `fixed`, `(..., n, k)`."""
    return x - (x @ fixed) @ fixed.mT


def generator(
    left: Tensor,
    right: Tensor,
    *,
    rows: int = 0,
    dense: bool | None = None,
    dtype: torch.dtype | None = None,
    fixed: Tensor | None = None,
) -> Generator:
    """The generator `A = -skew(L^T R)` of factors `L`, `R` of shape `(..., k, n)`.

    `L = W`, `R = D` is the paper's generator of the direction `D` (the `lie` metric). `A` has rank
    at most `2k`; the factored form `[L; R]^T K [L; R]` with `K = [[0, -I], [I, 0]]` is kept when
    rotating `rows` rows with it costs fewer flops than the dense one, unless `dense` says which. `A` has the
    given `dtype`; factors of a lower one are multiplied in it, and the dense form is skewed exactly afterwards.
    fixed: directions that the rotation leaves as they are, orthonormal columns `(..., n, j)`: `A` is restricted to what
    is orthogonal to them.
    """
    if fixed is not None:
        left, right = (without(x.to(fixed.dtype), fixed).to(x.dtype) for x in (left, right))
    k, n = left.shape[-2:]
    dtype = dtype or left.dtype
    if dense is None and dtype != left.dtype:
        dense = dense_series_flops(k, n, rows) <= factored_series_flops(k, n, rows)
    elif dense is None:
        dense = dense_flops(k, n, rows) <= factored_flops(k, n, rows)
    if dense:
        core = skew(right.mT @ left)
        return Generator(core.to(dtype), low=core if core.dtype != dtype else None)
    factor = torch.cat((left, right), dim=-2)
    core = _pair_core(k, dtype, left.device).expand(*left.shape[:-2], 2 * k, 2 * k)
    if factor.dtype != dtype:
        return Generator(core, factor, low=factor)
    return Generator(core, factor, factor @ factor.mT)


def _pair_core(k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`K = [[0, -I], [I, 0]]`, `(2k, 2k)`: `[L; R]^T K [L; R] = R^T L - L^T R`."""
    core = torch.zeros(2 * k, 2 * k, dtype=dtype, device=device)
    core[:k, k:] = -torch.eye(k, dtype=dtype, device=device)
    core[k:, :k] = torch.eye(k, dtype=dtype, device=device)
    return core


def dense_flops(k: int, n: int, rows: int) -> float:
    """Flops to form `A` from `(k, n)` factors, take its Cayley increment and apply it to `rows` rows."""
    return 2 * k * n**2 + (2 / 3 + 2) * n**3 + 2 * rows * n**2


def factored_flops(k: int, n: int, rows: int) -> float:
    """The same in the factored form, whose core is `(2k, 2k)`."""
    r = 2 * k
    return 2 * r**2 * n + (2 / 3 + 4) * r**3 + rows * (4 * r * n + 2 * r**2)


def dense_series_flops(k: int, n: int, rows: int) -> float:
    """Flops to form `A` from `(k, n)` factors of lower precision and multiply `rows` rows by it, twice each."""
    return 2 * k * n**2 + 2 * (2 * rows * n**2)


def factored_series_flops(k: int, n: int, rows: int) -> float:
    """The same without forming `A`."""
    return 2 * (8 * rows * k * n)


def rms_scale(norm: Tensor, *, lr: float, rms: float, numel: int) -> Tensor:
    """`alpha = lr * rms * sqrt(m n) / (||dW||_F + 1e-12)`: the update's RMS becomes `lr * rms`.

    norm: `||dW||_F` at `alpha = 1`, `(..., 1, 1)`, as the result; numel: `m n`.
    0 where the norm is: a matrix without a gradient (an expert that saw no token) stays as it is to the bit.
    """
    return torch.where(norm > 0, lr * rms * math.sqrt(numel) / (norm + 1e-12), 0)
