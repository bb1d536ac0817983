"""The ambient metric: the rotation whose effect on a matrix is nearest to a direction.

It solves `C A + A C = -skew(W^T D)` with `C = W^T W`. In the basis of singular vectors, `W = U diag(s) V^T`, that is
`A_ij = -(s_i D_ij - s_j D_ji) / (s_i^2 + s_j^2)` with `D_ij = u_i^T D v_j`, and 0 where both singular values are; the
part of `D` outside `W`'s row space passes unchanged.

On the short side `A` is a matrix (`ambient_generator`). On the long one nothing of its size is needed (`Tangent`): the
matrices `W E` with orthogonal `E` are those `X` with `X X^T = W W^T`, and a step on them is a tangent and a way back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pion_hf.linalg.reading import READER, Reader, reading_waits
from pion_hf.linalg.rotation import MISSING_TERM, ROUNDED_TERM, Generator, generator, skew
from pion_hf.linalg.spectrum import Basis, numerical_zero

# From this ratio of the sides on, a tangent takes fewer products than a generator.
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
    inverse_low = inverse.to(low)
    ut = basis.rows.to(low)
    stretched = _lead(ut, w.to(low), tall)
    vt = _scaled(inverse_low, stretched, tall)
    # Rows of `U^T D` that may move.
    seen_rows = _scaled((inverse_low > 0).to(low), _lead(ut, direction.to(low), tall), tall)
    if held:
        leading = vt.narrow(-1 if tall else -2, 0, held)
        seen_rows -= _lead(_inner(seen_rows, leading, tall), leading, tall)
        seen_rows.narrow(-1 if tall else -2, 0, held).zero_()
    seen = _inner(seen_rows, vt, tall).to(w.dtype)
    inside = _inside(seen, values, held)
    # Inside the row space `A` is `inside`, outside it what is left of `-D`.
    coefficients = inside + inverse.unsqueeze(-1) * seen
    turn = _lead(coefficients.to(low), vt, tall) - _scaled(inverse_low, seen_rows, tall)
    # Directions that count as zero do not drive the rotation, but it carries them along.
    carried = _inner(stretched, turn, tall).masked_fill_((inverse > 0).unsqueeze(-1), 0)
    return Tangent(basis, vt, turn, inside, carried, tall)


class Tangent(NamedTuple):
    """A rotation of the long side of `W`, `(..., k, n)`, by its effect `W A`; `A` itself is `(n, n)` and never formed.

    With `tall` all that is `(k, n)` here is stored, taken and given as `(n, k)`: no memory is reordered.

    basis: of the short side, `U^T` and `s`. vt: `V^T`, of directions that count as zero 0. turn: `V^T A` of the others.
    inside: `V^T A V`. carried: `diag(s) V^T A V`, minus, of directions that count as zero.
    """

    basis: Basis
    vt: Tensor
    turn: Tensor
    inside: Tensor
    carried: Tensor
    tall: bool

    def change(self) -> Tensor:
        """`W A`, in working precision, though its products are rounded: tangent only nearly."""
        stretch = self.basis.values.unsqueeze(-1)
        u = self.basis.rows.mT
        change = _lead((u * stretch.mT).to(self.turn.dtype), self.turn, self.tall)
        return (change - _lead(u.to(self.turn.dtype) @ self.carried, self.vt, self.tall)).to(u.dtype)

    def retract(self, w: Tensor, change: Tensor, alpha: Tensor | float, *, reader: Reader = READER) -> Tensor | None:
        """What leads from `W` to a matrix near `W + alpha change` that has `W`'s Gram matrix.

        `W + alpha change = U diag(s) Y` has `Y Y^T = I + K`; the aim is `U diag(s) (I + K)^(-1/2) Y`, the polar
        retraction of `V^T`. The first order of `K` cancels but for what rounding has made of the tangent: so it comes
        from products in working precision, as does all that large singular directions could leak through into others.
        None if the series does not converge, for one of a batch: then all of it needs another way.
        """
        step = change * alpha
        middle = torch.add(w, step, alpha=0.5)
        error = _inner(step, middle, self.tall)
        values, rows = self.basis.values.unsqueeze(-1), self.basis.rows
        # Of a matrix less what it keeps, some are zero to rounding, and so is `K` there.
        inverse = torch.where(values > SMALLEST * values[..., :1, :], values.reciprocal(), 0)
        gram = rows @ (error + error.mT) @ rows.mT * (inverse * inverse.mT)
        series, size = _inverse_root(gram, values, low=self.turn.dtype, reader=reader)
        if series is None:
            return None
        low = self.turn.dtype if size <= ROUNDED_TERM else w.dtype
        back = rows.mT.to(low) @ (values * series * inverse.mT @ rows).to(low)
        moved = middle.add_(step, alpha=0.5).to(low)
        return step.add_(_lead(back, moved, self.tall))

    def carry(self, x: Tensor, alpha: Tensor | float) -> Tensor:
        """`alpha x A`, what carries a momentum along at first order, with rounded products."""
        low = x.to(self.vt.dtype)
        along = _inner(low, self.vt, self.tall)
        across = _inner(low, self.turn, self.tall) + along @ self.inside.to(along.dtype)
        return (_lead(along, self.turn, self.tall) - _lead(across, self.vt, self.tall)) * alpha

    def generator(self, *, rows: int = 0, fixed: Tensor | None = None) -> Generator:
        """`A` itself."""
        half = (self.inside / 2).to(self.vt.dtype)
        factor = _lead(half, self.vt, self.tall) - self.turn
        left, right = (self.vt.mT, factor.mT) if self.tall else (self.vt, factor)
        return generator(left, right, rows=rows, dtype=self.inside.dtype, fixed=fixed)


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
        power = rounded if low == gram.dtype or abs(coefficient) * seen <= ROUNDED_TERM else power @ gram
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


def _lead(small: Tensor, x: Tensor, tall: bool) -> Tensor:
    """`small x`, of an `x` that is stored transposed if `tall`."""
    return x @ small.mT if tall else small @ x


def _inner(x: Tensor, y: Tensor, tall: bool) -> Tensor:
    """`x y^T`, `(..., k, k)`."""
    return x.mT @ y if tall else x @ y.mT


def _scaled(factors: Tensor, x: Tensor, tall: bool) -> Tensor:
    """`diag(factors) x`."""
    return x * factors.unsqueeze(-2 if tall else -1)
