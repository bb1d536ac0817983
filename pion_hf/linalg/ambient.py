"""The ambient metric: the rotation whose effect on a matrix is nearest to a direction.

It solves `C A + A C = -skew(W^T D)` with `C = W^T W`. In the basis of singular vectors, `W = U diag(s) V^T`, that is
`A_ij = -(s_i D_ij - s_j D_ji) / (s_i^2 + s_j^2)` with `D_ij = u_i^T D v_j`, and 0 where both singular values are; the
part of `D` outside `W`'s row space passes unchanged.

On the short side `A` is a matrix (`ambient_generator`). On the long one nothing of its size is needed (`Tangent`): the
matrices `W E` with orthogonal `E` are those `X` with `X X^T = W W^T`, and a step on them is a tangent and a way back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pion_hf.linalg.precision import halves_product, split_product, splitting_pays
from pion_hf.linalg.reading import READER, Reader, reading_waits
from pion_hf.linalg.rotation import Generator, generator, skew
from pion_hf.linalg.series import MISSING_TERM, ROUNDED_TERM
from pion_hf.linalg.spectrum import Basis, numerical_zero

# From this ratio of the sides on nothing of the long side's size is formed; from about 1.8 on that takes less time too.
LONG = 1.5
# Below this fraction of the largest singular value, what rounds a tangent is more than the singular direction itself.
SMALLEST = 1e-4
# Powers in the series of `(I + K)^(-1/2)`, which converges where `||K|| < 1`: up to angles of about 0.8 rad.
MOST_POWERS = 64
# Up to this Frobenius norm of `K` its powers are not read where that waits: a dozen of them at most.
LARGEST_UNREAD = 0.25


def ambient_generator(
    w: Tensor,
    direction: Tensor,
    basis: Basis,
    *,
    right: bool,
    hold: float = 0.0,
    tolerance: float = 0.0,
    rows: int = 0,
    dtype: torch.dtype | None = None,
    fixed: Tensor | None = None,
) -> Generator:
    """The skew `A`, `(..., n, n)`, whose `W A` is nearest to `-D` in the Frobenius norm.

    With `hold = h` the `int(h k)` leading singular directions are left alone.

    w, direction: `(..., m, n)`; basis: of `w`'s smaller side (see `singular_basis`); right: whether its
    rows are right singular vectors of `w` (needs `m >= n`) or left ones (`m <= n`); tolerance: see `numerical_zero`;
    rows: how many rows will be rotated (see `generator`); dtype: of the products that form `A`, which is skewed
    exactly afterwards, so that neither their rounding nor the basis's touches the spectrum; fixed: see `generator`.
    """
    if not right:
        tangent = ambient_tangent(w, direction, basis, tall=False, hold=hold, tolerance=tolerance, dtype=dtype)
        return tangent.generator(rows=rows, fixed=fixed)
    values, inverse = _kept_values(basis, tolerance)
    low = dtype or w.dtype
    vt = basis.rows.to(low)
    ut = ((w.to(low) @ vt.mT) * inverse.to(low).unsqueeze(-2)).mT
    seen = ut @ direction.to(low) @ vt.mT
    inside = _inside(seen.to(w.dtype), values, int(hold * w.shape[-1]))
    return generator(vt, (inside / -2).to(low) @ vt, rows=rows, dtype=w.dtype, fixed=fixed)


def ambient_tangent(
    w: Tensor,
    direction: Tensor,
    basis: Basis,
    *,
    tall: bool,
    hold: float = 0.0,
    tolerance: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tangent:
    """As `ambient_generator`, of the rotation of the longer side, `m` if `tall`, else `n`, without forming it.

    w, direction: `(..., m, n)`; basis: of the shorter side. The rest as there.
    """
    values, inverse = _kept_values(basis, tolerance)
    held = int(hold * values.shape[-1])
    low = dtype or w.dtype
    ut, d = basis.rows.to(low), direction.to(low)
    stretched = _lead(ut, w.to(low), tall)
    vt = _scaled(inverse.to(low), stretched, tall)
    seen = (ut @ _inner(d, stretched, tall)).to(w.dtype)  # U^T D V diag(s)
    free = inverse.clone()
    free[..., :held] = 0
    inside = _inside(seen * inverse.unsqueeze(-2), values, held)
    return Tangent(basis, vt, d, seen, inside, inverse, free, tall)


class Tangent(NamedTuple):
    """A rotation of the long side of `W`, `(..., k, n)`, by its effect `W A`; `A` itself is `(n, n)` and never formed.

    Inside the row space `V^T A V` is `inside`, and outside it `V^T A` is what is left of `-diag(1/s) U^T D`. So rows of
    `A` are combinations of those of `V^T` and `D`, and products of that length are few: `V^T A = C V^T - F D`, with
    `C = inside + diag(f) U^T D V` and `F = diag(f) U^T`.

    With `tall` all that is `(k, n)` here is stored, taken and given as `(n, k)`: no memory is reordered.

    basis: of the short side, `U^T` and `s`. vt: `V^T`, of directions that count as zero 0. d: `D`. seen: `U^T D W^T U`.
    inside: `V^T A V`. inverse: `1/s`, of directions that count as zero 0. free: `f`, as `inverse`, and 0 where held.
    """

    basis: Basis
    vt: Tensor
    d: Tensor
    seen: Tensor
    inside: Tensor
    inverse: Tensor
    free: Tensor
    tall: bool

    def change(self, *, reader: Reader = READER) -> Tensor:
        """`W A`, in working precision, though its products are rounded: tangent only nearly."""
        low, u, values = self.d.dtype, self.basis.rows.mT, self.basis.values
        along = values.unsqueeze(-1) * self._along()
        # Directions that count as zero do not drive the rotation, but it carries them along.
        along += torch.where(self.inverse.unsqueeze(-1) > 0, 0, self.seen.mT * self.free.unsqueeze(-2))
        change = _lead(u.to(low) @ along.to(low), self.vt, self.tall).to(u.dtype)
        outside = self.d
        if not reader.read("free", self.free.all(), order=0):  # else all of `D` moves
            moving = (values * self.free).unsqueeze(-2)
            outside = _lead(halves_product(u * moving, u.mT).to(low), self.d, self.tall)
        return change.sub_(outside.to(u.dtype))

    def retract(self, w: Tensor, change: Tensor, alpha: Tensor | float, *, reader: Reader = READER) -> Tensor | None:
        """What leads from `W` to a matrix near `W + alpha change` that has `W`'s Gram matrix.

        `W + alpha change = U diag(s) Y` has `Y Y^T = I + K`; the aim is `U diag(s) (I + K)^(-1/2) Y`, the polar
        retraction of `V^T`. The first order of `K` cancels but for what rounding has made of the tangent: so it comes
        from products in working precision, as does all that large singular directions could leak through into others.
        None if the series does not converge, for one of a batch: then all of it needs another way.
        """
        step = change * alpha
        split = w.dtype == torch.float32 and splitting_pays(w.device)
        if split:  # with a step of bfloat16, which is as good, one product in halves is exact enough
            step = step.to(torch.bfloat16).to(w.dtype)
        middle = torch.add(w, step, alpha=0.5)
        error = (_split_inner if split else _inner)(step, middle, self.tall)
        values, rows = self.basis.values.unsqueeze(-1), self.basis.rows
        # Of a matrix less what it keeps, some are zero to rounding, and so is `K` there.
        inverse = torch.where(values > SMALLEST * values[..., :1, :], values.reciprocal(), 0)
        gram = halves_product(halves_product(rows, error + error.mT), rows.mT) * (inverse * inverse.mT)
        series, size = _inverse_root(gram, values, low=self.d.dtype, reader=reader)
        if series is None:
            return None
        low = self.d.dtype if size <= ROUNDED_TERM else w.dtype
        back = halves_product(rows.mT.to(low), halves_product(values * series * inverse.mT, rows).to(low))
        moved = middle.add_(step, alpha=0.5).to(low)
        return step.add_(_lead(back, moved, self.tall, product=halves_product))

    def carry(self, x: Tensor, alpha: Tensor | float) -> Tensor:
        """`alpha x A`, what carries a momentum along at first order, with rounded products."""
        low, along, across = x.to(self.d.dtype), self._along(), self._across()
        seen, seen_of_d = (_inner(low, y, self.tall) for y in (self.vt, self.d))
        turned = seen @ (along - along.mT - self.inside).to(low.dtype) + seen_of_d @ across.mT
        return (_lead(turned, self.vt, self.tall) - _lead(seen @ across, self.d, self.tall)) * alpha

    def generator(self, *, rows: int = 0, fixed: Tensor | None = None) -> Generator:
        """`A` itself."""
        half = (self.inside / 2 - self._along()).to(self.d.dtype)
        factor = _lead(half, self.vt, self.tall) + _lead(self._across(), self.d, self.tall)
        left, right = (self.vt.mT, factor.mT) if self.tall else (self.vt, factor)
        return generator(left, right, rows=rows, dtype=self.inside.dtype, fixed=fixed)

    def _along(self) -> Tensor:
        """`C`."""
        return self.inside + self.free.unsqueeze(-1) * self.seen * self.inverse.unsqueeze(-2)

    def _across(self) -> Tensor:
        """`F`."""
        return (self.free.unsqueeze(-1) * self.basis.rows).to(self.d.dtype)


def has_long_side(shape: torch.Size, side: str) -> bool:
    """Whether `side` of `(..., m, n)` is long enough for a `Tangent`."""
    m, n = shape[-2:]
    return (m if side == "out" else n) >= LONG * min(m, n)


def is_well_conditioned(basis: Basis, *, zeros: int = 0, reader: Reader = READER) -> bool:
    """Whether every singular direction, but for so many that are zero, is large enough for a `Tangent`."""
    values = basis.values
    smallest = values[..., -1 - zeros] / values[..., 0].clamp_min(torch.finfo(values.dtype).tiny)
    return reader.read("smallest", smallest.amin(), order=0) > SMALLEST


def _inverse_root(gram: Tensor, values: Tensor, *, low: torch.dtype, reader: Reader) -> tuple[Tensor | None, float]:
    """`(I + K)^(-1/2) - I` of symmetric `K`, `(..., k, k)`, and the norm of its effect on `diag(values)`, relative.

    The binomial series, for as long as its terms show in that effect; None if it does not converge.
    """
    size = torch.linalg.matrix_norm(values).clamp_min(torch.finfo(values.dtype).tiny)

    def effect(power: Tensor) -> Tensor:
        return (torch.linalg.matrix_norm(values * power) / size).amax()

    enough = MISSING_TERM if gram.dtype == torch.float32 else torch.finfo(gram.dtype).eps
    coefficient, power = -0.5, gram
    # `||K^j||_F^(1/j)` bounds the spectral norm of `K` from above, ever more closely.
    bound = reader.read("gram", torch.linalg.matrix_norm(gram).amax(), order=2)
    total, seen = gram * coefficient, reader.read("effect", effect(gram), order=2)
    first, factor = seen / 2, gram.to(low)
    # Where reading waits, powers are taken to be as large as their bound allows, for as long as that converges.
    reading = not reading_waits(gram) or bound > LARGEST_UNREAD
    for j in range(2, MOST_POWERS):
        coefficient *= (1 - 2 * j) / (2 * j)
        if bound < 1 and abs(coefficient) * seen * bound / (1 - bound) <= enough:
            return total, first
        rounded = (power.to(low) @ factor).to(gram.dtype)
        seen = effect(rounded).item() if reading else seen * bound
        exact = low != gram.dtype and abs(coefficient) * seen > ROUNDED_TERM
        power = halves_product(power, gram) if exact else rounded
        if reading:
            bound = min(bound, torch.linalg.matrix_norm(power).amax().item() ** (1 / j))
        total = total.add_(power, alpha=coefficient)
    return None, first


def _kept_values(basis: Basis, tolerance: float) -> tuple[Tensor, Tensor]:
    """Singular values and their inverses, both 0 for those that count as zero."""
    zero = numerical_zero(basis.values, tolerance=tolerance)
    return basis.values.masked_fill(zero, 0), torch.where(zero, 0, basis.values.reciprocal())


def _inside(seen: Tensor, values: Tensor, held: int) -> Tensor:
    """`V^T A V`, `(..., k, k)`, from `seen = U^T D V`; 0 where both singular values are or a direction is held."""
    squared = values.square()
    sums = squared.unsqueeze(-1) + squared.unsqueeze(-2)
    # Where both are zero, so is what is divided.
    inside = skew(values.unsqueeze(-1) * seen).neg_().div_(sums.clamp_min_(torch.finfo(sums.dtype).tiny))
    if held:
        inside[..., :held, :] = 0
        inside[..., :, :held] = 0
    return inside


def _lead(small: Tensor, x: Tensor, tall: bool, *, product: Callable[..., Tensor] = torch.matmul) -> Tensor:
    """`small x`, of an `x` that is stored transposed if `tall`."""
    return product(x, small.mT) if tall else product(small, x)


def _inner(x: Tensor, y: Tensor, tall: bool) -> Tensor:
    """`x y^T`, `(..., k, k)`."""
    return x.mT @ y if tall else x @ y.mT


def _split_inner(x: Tensor, y: Tensor, tall: bool) -> Tensor:
    """`_inner(x, y)` of an `x` that bfloat16 holds, by `split_product`."""
    low = x.to(torch.bfloat16)
    return split_product(y, low.mT, left=True) if tall else split_product(y.mT, low, left=True)


def _scaled(factors: Tensor, x: Tensor, tall: bool) -> Tensor:
    """`diag(factors) x`."""
    return x * factors.unsqueeze(-2 if tall else -1)
