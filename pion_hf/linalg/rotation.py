"""Rotations of matrices through their factors: `W = U diag(s) V^T` moves by moving `U` or `V`, and `s` never changes.

Matrices are wide here, `(..., k, l)` with `k <= l`: a tall one is given transposed. Its *long* side is that of `V`, on
which a rotation acts as `W <- W E`, and its *short* side that of `U`, `W^T <- W^T E`. A skew generator `A` moves the
factor of its side, `Q^T = V^T` or `U^T`, along `X = Q^T A`, and the polar factor of `Q^T + alpha X` is the new one. It
is orthogonal whatever rounding has made of `X`, and of the old one, so that errors do not add up. Nothing of the long
side's size squared is formed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pion_hf.linalg.products import Halves, gram_error, gram_matrix, halves_product, product, product_dtype
from pion_hf.linalg.spectrum import numerical_zero

# The largest angle of a step (radians): longer ones are clipped to it.
MAX_ANGLE = 0.25
# `(1 + x)^(-1/2) - 1` is about `a x + b x^2`: up to `x = MAX_ANGLE^2` the squares of both are within 5.4e-6 (minimax).
ROOT = (-0.4995140607657675, 0.3493735746225349)
# In the ambient metric, singular values below this fraction of the largest count as zero: pairs of them would turn by
# large angles to move almost nothing.
RANK_TOLERANCE = 0.02
# What rounding makes of the norm that bounds an angle is less.
SAFETY = 1.01
POWER_ITERATIONS = 8
GOLDEN_RATIO = (5**0.5 - 1) / 2


class Factors(NamedTuple):
    """`W = U diag(s) V^T`, `(..., k, l)` with `k <= l`: `u` is `U^T`, `(..., k, k)`; `s`, `(..., k)`, descends; `v` is
    `V^T`, `(..., k, l)`.

    Where some of `W` stays (`Fixed`), rows of `v` that `s` gives no weight are zero.
    """

    u: Tensor
    s: Tensor
    v: Tensor

    def side(self, long: bool) -> Tensor:
        """`Q^T` of one of the two sides."""
        return self.v if long else self.u

    def turned(self, long: bool, q: Tensor) -> Factors:
        """With another `Q^T`."""
        return self._replace(v=q) if long else self._replace(u=q)

    def over_norm(self) -> tuple[Factors, Tensor]:
        """Those of `W / s_1`, so that no power of it overflows, and `s_1`, `(..., 1, 1)`."""
        norm = self.s[..., :1].clamp_min(torch.finfo(self.s.dtype).tiny)
        return self._replace(s=self.s / norm), norm.unsqueeze(-1)


class Fixed(NamedTuple):
    """What rotations leave alone: `W L` of some directions `L`, and therefore `L` itself and the span `S` of `W L`.

    long: `L`, `(..., l, j)`; short: `S`, `(..., k, j)`; orthonormal columns, or zero ones. coupling: `U^T W L`. The
    factors are those of `W - W L L^T`.
    """

    long: Tensor
    short: Tensor
    coupling: Tensor


def skew(x: Tensor) -> Tensor:
    """`x - x^T` of `x`, `(..., n, n)`; exactly skew-symmetric in any precision."""
    return x - x.mT


def largest_entry(x: Tensor) -> Tensor:
    """`max |x_ij|`, `(..., 1, 1)`; of what is zero something to divide by."""
    return x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def without(x: Tensor, fixed: Tensor) -> Tensor:
    """Rows `x`, `(..., p, n)`, less their part along the orthonormal columns `fixed`, `(..., n, j)`."""
    return x - along(x, fixed, x.dtype)


def along(x: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """The part of rows `x`, `(..., p, n)`, along orthogonal `columns`, `(..., n, j)`, by products in `dtype`.

    Of a column that is shorter than 1, the square of its length is the share that counts.
    """
    columns = columns.to(dtype)
    return ((x.to(dtype) @ columns) @ columns.mT).to(x.dtype)


# -- a matrix and its factors -----------------------------------------------------------------------------------------


def factorized(w: Tensor, fixed: Tensor | None = None) -> Factors:
    """The factors of `w`, `(..., k, l)`, or of `W - W L L^T` with `L = fixed`, in `w`'s dtype, computed in float64.

    `U` comes from `W W^T`, `V` and `s` from a QR of `U^T W`: orthogonal to rounding for singular values of any size,
    and completed where they are zero.
    """
    x = (w.cpu() if w.device.type == "mps" else w).double()  # where there is no float64
    if fixed is not None:
        x = without(x, fixed.to(x.device).to(x.dtype))
    u = torch.linalg.eigh(x @ x.mT).eigenvectors.flip(-1).mT
    q, r = torch.linalg.qr((u @ x).mT)
    signed = r.diagonal(dim1=-2, dim2=-1)
    s, v = signed.abs(), q.mT * torch.where(signed < 0, -1.0, 1.0).unsqueeze(-1)
    if fixed is not None:
        zero = numerical_zero(s.to(w.dtype))
        s = s.masked_fill(zero, 0)
        v = without(v.masked_fill(zero.unsqueeze(-1), 0), fixed.to(v.device).to(v.dtype))
    return Factors(*(factor.to(w.dtype).to(w.device).contiguous() for factor in (u, s, v)))


def product_of(factors: Factors, fixed: Fixed | None = None, *, transposed: bool = False) -> Tensor:
    """`W`, or `W^T`, `(..., l, k)`, to the precision of the factors."""
    u, s, v = factors
    right = v * s.unsqueeze(-1)
    if fixed is not None:
        right = right + fixed.coupling @ fixed.long.mT
    return halves_product(right.mT, u) if transposed else halves_product(u.mT, right)


# -- generators: what stands for a direction --------------------------------------------------------------------------


def tangent(
    factors: Factors,
    d: Tensor,
    size: Tensor,
    *,
    long: bool,
    ambient: bool = False,
    dtype: str = "float32",
    fixed: Fixed | None = None,
) -> Tensor:
    """`X = Q^T A`, in the shape of `Q^T`, of the generator `A` that stands for the direction `-d`, `(..., k, l)`.

    In the Lie metric `A = -skew(W^T D)` on the long side and `-skew(W D^T)` on the short one; in the ambient one it
    is the skew matrix for which `W A` (or `W^T A`) comes nearest to `-D` (or `-D^T`). With `B = U^T D V` (transposed on
    the short side) and `z = s`, or in the ambient metric `s` where that does not count as zero,

        Q^T A Q = -(diag(z) B - B^T diag(z)),  over z_i^2 + z_j^2 in the ambient metric,

    and outside the row space `Q^T A` is what is left of `-diag(f) U^T D` with `f = s`, in the ambient metric `1 / z`.

    size: what `D` is divided by, `(..., 1, 1)`. dtype: of the products with `D` (see `product_dtype`), and of `X`.
    """
    s, low = factors.s, product_dtype(factors.v, dtype)
    u, v, d = factors.u.to(low), factors.v.to(low), d.to(low)
    reduced = (factors.u / size).to(low)
    if long:
        p = product(reduced, d)
        p = p if fixed is None else without(p, fixed.long.to(low))
        b = product(p, v.mT).to(s.dtype)
    else:
        b = product(reduced, product(d, v.mT)).to(s.dtype).mT
    inside, outside = _ambient(b, s) if ambient else (skew((s.unsqueeze(-1) * b).mT), s)
    if not long:
        if fixed is not None:
            stays = factors.u @ fixed.short
            inside = without(without(inside, stays).mT, stays).mT
        return product(inside.to(low), u)
    if v.shape[-2] == v.shape[-1] and fixed is None:  # nothing is outside
        return product(inside.to(low), v)
    outside = outside.unsqueeze(-1)
    return product(torch.addcmul(inside, outside, b).to(low), v).addcmul_(outside.to(low), p, value=-1)


def _ambient(b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """`Q^T A Q` and `f` in the ambient metric."""
    zero = numerical_zero(s, tolerance=RANK_TOLERANCE)
    z = s.masked_fill(zero, 0)
    sums = z.square().unsqueeze(-1) + z.square().unsqueeze(-2)
    # Where both are 0 it is 0 over the smallest number.
    inside = skew((z.unsqueeze(-1) * b).mT).div_(sums.clamp_min_(torch.finfo(s.dtype).tiny))
    return inside, torch.where(zero, 0, s.reciprocal())


# -- steps: how far, and where it ends --------------------------------------------------------------------------------


class Extent(NamedTuple):
    """Of a tangent `X`: how far a step goes. All `(..., 1, 1)`.

    moved: `||W A||_F`, what `W` moves at first order. bound: at least `||X||_2`, the largest angle, for a step of 1.
    """

    moved: Tensor
    bound: Tensor


def extent(factors: Factors, x: Tensor) -> Extent:
    """From `H = X X^T`: `||W A||_F^2 = sum_i s_i^2 H_ii`, and `||H^2||_F^(1/4) >= ||X||_2`."""
    h, dtype = gram_matrix(x), factors.s.dtype
    moved = (h.diagonal(dim1=-2, dim2=-1) * factors.s.square()).sum(-1).sqrt()[..., None, None]
    norm = torch.linalg.matrix_norm(h, keepdim=True, dtype=dtype)
    unit = h * norm.clamp_min(torch.finfo(dtype).tiny).reciprocal().to(h.dtype)
    square = torch.linalg.matrix_norm(product(unit, unit), keepdim=True, dtype=dtype)
    return Extent(moved, SAFETY * (norm * square.sqrt()).sqrt())


def retracted(q: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """The polar factor of `Y = Q^T + alpha X`, `(I + K)^(-1/2) Y` with `Y Y^T = I + K`; `Q^T` where `alpha` is 0.

    `K` holds what is wrong with `Q^T` and `X` too. The root is a polynomial, good up to `||alpha X||_2 = MAX_ANGLE`; in
    float64 it is exact. Rows of zeros stay zeros. alpha: `(..., 1, 1)`.
    """
    y = torch.addcmul(q, x, alpha)
    halves = Halves.of(y)
    k = gram_error(y, halves)
    if k.dtype == torch.float64:
        values, vectors = torch.linalg.eigh(k)
        root = torch.where(values > -0.5, (1 + values).rsqrt() - 1, 0)
        p = (vectors * root.unsqueeze(-2)) @ vectors.mT
        return y + torch.where(alpha > 0, p, 0) @ y
    low = k.to(x.dtype)
    p = torch.add(ROOT[0] * k, product(low, low).to(k.dtype), alpha=ROOT[1])
    p = torch.where(alpha > 0, p, 0)
    # What a row keeps of itself is exact: only small numbers are rounded.
    own = p.diagonal(dim1=-2, dim2=-1)
    kept = 1 + own.unsqueeze(-1)
    own.zero_()
    rounded = y.to(x.dtype) if halves is None or x.dtype == y.dtype else halves.high
    return torch.addcmul(product(p.to(x.dtype), rounded), y, kept)


def step_size(want: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """`alpha`, at most `want` and such that the angle is at most `MAX_ANGLE`; and whether that made it shorter."""
    most = MAX_ANGLE / bound.clamp_min(torch.finfo(bound.dtype).tiny)
    return torch.minimum(want, most), want > most


def anchored(new: Tensor, old: Tensor, fixed: Fixed, *, long: bool) -> Tensor:
    """A new `Q^T` less what rounding has turned of the fixed directions."""
    return without(new, fixed.long) if long else new - (new - old) @ fixed.short @ fixed.short.mT


def carried(m: Tensor, q: Tensor, x: Tensor, alpha: Tensor, *, long: bool) -> Tensor:
    """How a momentum `M`, `(..., k, l)`, changes that the rotation carries along: `alpha M A` on the long side, on the
    short one `alpha A^T M`; at first order, with products in the precision of `X`."""
    m, q, turn = m.to(x.dtype), q.to(x.dtype), (alpha * x).to(x.dtype)
    if not long:
        return product(turn.mT, product(q, m))
    seen = product(m, q.mT)
    back = product(m, turn.mT) + product(seen, product(turn, q.mT))
    return product(seen, turn).sub_(product(back, q))


def angles(q: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square and largest angle (radians) of the rotation by `alpha A`, each `(...)`, of `X = Q^T A`.

    The first is `||alpha A||_F / sqrt(n)`, over all directions of the side; the second is estimated from below, within
    a few percent.
    """
    x = x.to(q.dtype)
    squares = 2 * x.square().sum((-2, -1), keepdim=True) - (x @ q.mT).square().sum((-2, -1), keepdim=True)
    mean = (squares.clamp_min(0) / q.shape[-1]).sqrt()
    return tuple((size * alpha)[..., 0, 0] for size in (mean, spectral_norm(q, x)))


def spectral_norm(q: Tensor, x: Tensor) -> Tensor:
    """`||A||_2`, `(..., 1, 1)`, by power iteration from a fixed start: a lower bound, within a few percent."""
    n = q.shape[-1]
    # As good as random, and made where it is needed: what comes from the host is waited for.
    squares = torch.arange(1, n + 1, dtype=torch.float32, device=q.device).square()
    y = ((squares * GOLDEN_RATIO).remainder(1) - 0.5).to(q.dtype).expand(*q.shape[:-2], 1, n)
    norm, tiny = y.new_zeros(*y.shape[:-1], 1), torch.finfo(q.dtype).tiny
    for _ in range(2 * POWER_ITERATIONS):
        y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp_min(tiny)
        seen = y @ q.mT
        y = seen @ x - ((y - seen @ q) @ x.mT) @ q
        norm = torch.linalg.matrix_norm(y, keepdim=True)
    return norm


# -- the paper's ------------------------------------------------------------------------------------------------------


def taylor_change(w: Tensor, x: Tensor, degree: int) -> Tensor:
    """`W E - W` of the paper's retraction `E = sum_j x^j / j!`, `j <= degree`, for rows `w` and a generator `x`.

    For degree 2 `E^T E = I + x^4 / 4`: singular values grow by `theta^4 / 8` a step.
    """
    power, total = w, torch.zeros_like(w)
    for j in range(1, degree + 1):
        power = (power @ x) / j
        total += power
    return total
