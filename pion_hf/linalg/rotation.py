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

from pion_hf.linalg.precision import split_product, splitting_pays
from pion_hf.linalg.reading import READER, Reader, reading_waits

RETRACTIONS = ("root", "cayley", "taylor")
GOLDEN_RATIO = (5**0.5 - 1) / 2

# Angles (radians) up to which so many terms of the root series are orthogonal to float32 rounding: with odd terms up to
# x^(2j - 1), E^T E - I is 2 |c| theta^(2j + 2), c the next coefficient; with two terms it is theta^4 / 4.
SERIES_ANGLES = ((0.006, 2), (0.05, 3), (0.1, 5), (0.2, 7), (0.35, 9), (0.5, 11))
# Coefficients of x^2, x^3, ... in E(x) - I (those of even powers above 2 are 0): x^2/2 + x (1 + x^2/4)^(1/2).
ROOT_SERIES = {2: 1 / 2, 3: 1 / 8, 5: -1 / 128, 7: 1 / 1024, 9: -5 / 32768, 11: 7 / 262144}
# Up to this angle what `split_product` rounds, 2^-17 of the first power, is below float32's own rounding of the result.
SPLIT_ANGLE = 2**-7
# A term of the series may be rounded to 8 bits where its norm, relative to what is rotated, is at most this. Real
# gradients can put the whole error, 2^-9 of it, on one singular value: 4e-8 of the largest a step, up or down.
ROUNDED_TERM = 2**-18
# A power is at most the last one times the angle, and often so many times smaller: then low precision is tried first.
LIKELY = 4
# Terms of a norm below this are left out: even if always of one direction, their drift stays below 1e-6 in 1,000 steps.
MISSING_TERM = 2**-32
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


def root(x: Tensor, *, angle: float | Tensor, largest: float | None = None) -> Tensor:
    """`E(x) - I` of `E(x) = I + x^2/2 + x (I + x^2/4)^(1/2)`, orthogonal for skew `x` up to angles of 2 rad.

    The even part is exact, so a short series of the odd part leaves it orthogonal to rounding: two to five products
    instead of a decomposition. Angles above 0.5 are halved first, the rotation squared: `(I + F)^2 - I = 2F + F^2`.

    angle: an upper estimate of the largest rotation angle, `||x||_2`, which chooses how many terms are needed; of every
    matrix, `(..., 1, 1)`, in a batch: how often one is halved, which shows in the result, is no other's affair.
    largest: of these, if it is known already.
    """
    angle = torch.as_tensor(angle, dtype=x.dtype, device=x.device)
    largest = angle.max().item() if largest is None else largest
    limit = SERIES_ANGLES[-1][0]
    most = math.ceil(math.log2(largest / limit)) if limit < largest < math.inf else 0
    if most:
        halvings = (angle / limit).log2().ceil().nan_to_num(0).clamp(0, most)
        x = x / 2**halvings
    square = x @ x
    terms = max(3, root_terms(largest, x.dtype))
    increment = square / 2 + x + x @ _odd_series(square, terms)
    for done in range(most):
        doubled = 2 * increment + increment @ increment
        increment = torch.where(halvings > done, doubled, increment)
    return increment


def _odd_series(square: Tensor, terms: int) -> Tensor:
    """`(I + z/4)^(1/2) - I` of `z = square`, as many coefficients as `terms` of `ROOT_SERIES` have, Horner in `z^2`."""
    coefficients = [0.0, *(ROOT_SERIES[k] for k in range(3, terms + 1, 2))]
    coefficients += [0.0] * (len(coefficients) % 2)
    pairs = list(zip(coefficients[::2], coefficients[1::2], strict=True))
    total = _linear(square, *pairs[-1])
    if len(pairs) > 1:
        fourth = square @ square
        for pair in reversed(pairs[:-1]):
            total = _linear(square, *pair) + fourth @ total
    return total


def _linear(z: Tensor, constant: float, slope: float) -> Tensor:
    """`constant I + slope z`."""
    out = z * slope
    if constant:
        out.diagonal(dim1=-2, dim2=-1).add_(constant)
    return out


def root_terms(angle: float, dtype: torch.dtype = torch.float32) -> int:
    """Terms of the root series that leave it orthogonal to float32 rounding at `angle`; all of them in float64."""
    enough = (terms for limit, terms in SERIES_ANGLES if angle <= limit and dtype != torch.float64)
    return next(enough, SERIES_ANGLES[-1][1])


def passing_terms(angle: float) -> int:
    """Terms of the root series that change a momentum by a hundredth or more."""
    return max((k for k, c in ROOT_SERIES.items() if abs(c) * angle**k > 2**-7), default=1)


class Increment(NamedTuple):
    """`E - I` of one rotation, `(..., n, n)`: `right` itself, or `right^T core right` with `right` `(..., r, n)`.

    With `terms` the matrix is never formed: `right` is a generator, and so many terms of the root series of
    `alpha right` act on the rows one after another. The first power is exact, as are all that `angle` (of the rotation,
    at most) lets a float32 result notice; the others are multiplied in `tail`, `alpha right` in lower precision. `low`
    is as in `Generator`.
    """

    right: Tensor
    core: Tensor | None = None
    terms: int = 0
    alpha: Tensor | float = 1.0
    angle: float = 0.0
    tail: Tensor | None = None
    low: Tensor | None = None

    def change(
        self,
        x: Tensor,
        *,
        side: str = "in",
        low: bool = False,
        first: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """`x (E - I)` for `x` of shape `(..., p, n)`, or for `side="out"` `(E - I)^T x`, `(..., n, p)`.

        low: in the precision of `tail`, if there is one, for what is rounded anyway (a momentum). first: the change of
        `x` at first order and `alpha = 1`, if known (`Generator.moved`; series only); seen: `x right^T`, if known
        (low-rank rotations from the right only).
        """
        if self.terms:
            return self._low_series(x, side) if low and self.tail is not None else self._series(x, side, first)
        power = x
        if self.core is not None:
            power = _product(x, self.right.mT, side) if seen is None else seen
            power = _product(power, self.core, side)
        right = self.right if not low or self.tail is None else self.tail
        return _product(power, right, side)

    def _low_series(self, x: Tensor, side: str) -> Tensor:
        """With products in the precision of `tail`; `x` itself is not rounded."""
        power = _skew_product(x.to(self.tail.dtype), self.tail, side)
        total = power.to(x.dtype)
        for term in range(2, passing_terms(self.angle) + 1):
            power = _skew_product(power, self.tail, side)
            if term in ROOT_SERIES:
                total.add_(power, alpha=ROOT_SERIES[term])
        return total

    def _series(self, x: Tensor, side: str, first: Tensor | None) -> Tensor:
        # What `moved` has split may be used for as long as that does not show.
        exact = self.low if self.angle <= SPLIT_ANGLE else None
        if first is None or (exact is None and _is_split(x, self.low)):
            first = _skew_product(x, self.right, side, low=exact)
        # Each power takes its share of alpha at once: the generator itself may be of any size.
        total = power = first * self.alpha
        # On a GPU no norm is read: powers are taken to be as large as their angle allows.
        reading = self.tail is not None and not reading_waits(x)
        size = torch.linalg.matrix_norm(x).clamp_min(torch.finfo(x.dtype).tiny) if reading else None
        norm = _relative_norm(power, size) if reading else self.angle
        small_enough = LIKELY * ROUNDED_TERM if reading else ROUNDED_TERM
        for term in range(2, self.terms + 1):
            rounded, lower, norm = power.dtype != x.dtype, None, norm * self.angle
            if self.tail is not None and (rounded or _weight(term) * norm <= small_enough):
                lower = _skew_product(power.to(self.tail.dtype), self.tail, side)
                norm = _relative_norm(lower, size) if reading else norm
            if lower is not None and (rounded or _weight(term) * norm <= ROUNDED_TERM):
                power = lower
            else:
                power = _skew_product(power, self.right, side, low=exact).mul_(self.alpha)
                norm = _relative_norm(power, size) if reading else norm
            if term in ROOT_SERIES:
                total.add_(power, alpha=ROOT_SERIES[term])
                if reading and self._is_done(term, norm):
                    break
        return total

    def _is_done(self, term: int, norm: float) -> bool:
        """Whether `E^T E` is `I` to rounding without further terms, where the last power has this norm.

        The next odd term, `c x^j`, makes up for `2 c x^(j + 1)` there.
        """
        odd = term + 2 - (term % 2 == 0)
        return odd not in ROOT_SERIES or 2 * _weight(odd) * norm * self.angle ** (odd + 1 - term) <= MISSING_TERM


def _weight(term: int) -> float:
    return abs(ROOT_SERIES.get(term, ROOT_SERIES[3]))


def _relative_norm(x: Tensor, size: Tensor) -> float:
    """The largest of a batch."""
    return (torch.linalg.matrix_norm(x) / size).amax().item()


def _product(x: Tensor, factor: Tensor, side: str) -> Tensor:
    """`x factor`, or `factor^T x` for `side="out"`: multiplied in the precision of `factor`, given back in `x`'s."""
    low = x.to(factor.dtype)
    return (low @ factor if side == "in" else factor.mT @ low).to(x.dtype)


def _skew_product(x: Tensor, a: Tensor, side: str, *, low: Tensor | None = None) -> Tensor:
    """`x A`, or `A^T x = -A x` for `side="out"`: products without transposes, which are slow in low precision.

    low: `A` in bfloat16, if that is the same and `split_product` will do.
    """
    if _is_split(x, low):
        product = split_product(x, low, left=side == "out")
        return product if side == "in" else product.neg_()
    return x @ a if side == "in" else (a @ x).neg_()


def _is_split(x: Tensor, low: Tensor | None) -> bool:
    """Whether `x` times a matrix that is `low`, in bfloat16, goes through `split_product`."""
    return low is not None and x.dtype == torch.float32 and x.ndim == 3 and splitting_pays(x.device)


class Generator(NamedTuple):
    """A skew matrix `A`, `(..., n, n)`: `core` itself, or `factor^T core factor`.

    core: `(..., n, n)` or `(..., r, r)`, skew. factor: `(..., r, n)`. gram: `factor factor^T`. low: a dense core in
    the lower precision it was formed in.
    """

    core: Tensor
    factor: Tensor | None = None
    gram: Tensor | None = None
    low: Tensor | None = None

    def moved(self, x: Tensor, *, side: str = "in") -> Tensor | None:
        """`x A`, or `A^T x` for `side="out"`, at first order what a rotation changes; None in the factored form."""
        return None if self.factor is not None else _skew_product(x, self.core, side, low=self.low)

    def act(self, x: Tensor) -> Tensor:
        """`x A` for rows `x` of shape `(..., p, n)`."""
        if self.factor is None:
            return x @ self.core
        return x @ self.factor.mT @ self.core @ self.factor

    def act_norm(self, x: Tensor, *, seen: Tensor | None = None) -> Tensor:
        """`||x A||_F`, shape `(..., 1, 1)`; in the factored form from `x factor^T`, which may be given as `seen`."""
        if self.factor is None:
            return torch.linalg.matrix_norm(x @ self.core, keepdim=True)
        coefficients = (x @ self.factor.mT if seen is None else seen) @ self.core
        return ((coefficients @ self.gram) * coefficients).sum((-2, -1), keepdim=True).clamp_min(0).sqrt()

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
    ) -> Increment:
        """`E(alpha A) - I`, with `alpha` of shape `(..., 1, 1)` or a number.

        rows: how many rows it will act on in full precision, if that is known to be few.
        """
        if retraction == "root" and self.factor is None:
            return self._root_increment(alpha, rows, reader)
        x = self.core * alpha
        if retraction == "taylor":
            core = taylor(x, self.gram, degree=degree)
        elif retraction in ("cayley", "root"):
            # The root's series wants powers of A itself; a low-rank core is small enough to decompose.
            core = cayley(x, self.gram)
        else:
            raise ValueError(f"retraction must be one of {RETRACTIONS}, got {retraction!r}")
        return Increment(core) if self.factor is None else Increment(self.factor, core)

    def _root_increment(self, alpha: Tensor | float, rows: int | None, reader: Reader) -> Increment:
        # Power iteration is a lower bound.
        angles = 1.5 * self.spectral_norm(iterations=4) * alpha
        # Meta tensors (a plan without weights) have shapes and no angle.
        angle = 0.0 if angles.is_meta else reader.read("angle", angles.max())
        tail = None if self.low is None else self.low * _like(alpha, self.low)
        few_rows = tail is not None or (rows is not None and rows < self.core.shape[-1])
        if few_rows and angle <= SERIES_ANGLES[-1][0]:
            terms = root_terms(angle, self.core.dtype)
            return Increment(self.core, terms=terms, alpha=alpha, angle=angle, tail=tail, low=self.low)
        increment = root(self.core * alpha, angle=angles, largest=angle)
        return Increment(increment, tail=None if tail is None else increment.to(tail.dtype))


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
    if dense is None:
        dense = dense_flops(k, n, rows) <= factored_flops(k, n, rows)
    dtype = dtype or left.dtype
    if dense:
        core = skew(right.mT @ left)
        return Generator(core.to(dtype), low=core if core.dtype != dtype else None)
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

    norm: `||dW||_F` at `alpha = 1`, `(..., 1, 1)`, as the result; numel: `m n`.
    0 where the norm is: a matrix without a gradient (an expert that saw no token) stays as it is to the bit.
    """
    return torch.where(norm > 0, lr * rms * math.sqrt(numel) / (norm + 1e-12), 0)
