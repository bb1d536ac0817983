"""The root series of a rotation, term by term on the rows it rotates: the rotation itself is never formed.

`E(x) - I = x + x^2/2 + x ((I + x^2/4)^(1/2) - I)`: the even part is exact, so a short series of the odd part leaves it
orthogonal to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pion_hf.linalg.reading import READER, Reader, reading_waits

if TYPE_CHECKING:
    from pion_hf.linalg.rotation import Generator

# Angles (radians) up to which so many terms of the root series are orthogonal to float32 rounding: with odd terms up to
# x^(2j - 1), E^T E - I is 2 |c| theta^(2j + 2), c the next coefficient; with two terms it is theta^4 / 4.
SERIES_ANGLES = ((0.006, 2), (0.05, 3), (0.1, 5), (0.2, 7), (0.35, 9), (0.5, 11))
# Coefficients of x^2, x^3, ... in E(x) - I (those of even powers above 2 are 0): x^2/2 + x (1 + x^2/4)^(1/2).
ROOT_SERIES = {2: 1 / 2, 3: 1 / 8, 5: -1 / 128, 7: 1 / 1024, 9: -5 / 32768, 11: 7 / 262144}
# A term of the series may be rounded to 8 bits where its norm, relative to what is rotated, is at most this. Real
# gradients can put the whole error, 2^-9 of it, on one singular value: 4e-8 of the largest a step, up or down.
ROUNDED_TERM = 2**-18
# A power is at most the last one times the angle, and often so many times smaller: then low precision is tried first.
LIKELY = 4
# The size of a step relative to its rate, a mean over all angles, changes less from one to the next than the largest.
NORM_GROWTH = 1.25
# Terms of a norm below this are left out: even if always of one direction, their drift stays below 1e-6 in 1,000 steps.
MISSING_TERM = 2**-32


def root_terms(angle: float, dtype: torch.dtype = torch.float32) -> int:
    """Terms of the root series that leave it orthogonal to float32 rounding at `angle`; all of them in float64."""
    enough = (terms for limit, terms in SERIES_ANGLES if angle <= limit and dtype != torch.float64)
    return next(enough, SERIES_ANGLES[-1][1])


def passing_terms(angle: float) -> int:
    """Terms of the root series that change a momentum by a hundredth or more."""
    return max((k for k, c in ROOT_SERIES.items() if abs(c) * angle**k > 2**-7), default=1)


class Series(NamedTuple):
    """`E(alpha A) - I` of a generator `A`, `(..., n, n)`, as the first `terms` of its root series.

    The first power is `generator`'s own, as are all that a float32 result notices; the others are multiplied with
    `tail`, `alpha A` in lower precision, if there is one. angle: of the rotation, at most.
    """

    generator: Generator
    terms: int
    alpha: Tensor | float = 1.0
    angle: float = 0.0
    tail: Generator | None = None
    reader: Reader = READER

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
        """As `Increment.change`. first: `generator.times(x)`, the change at first order and `alpha = 1`, if known.

        name: tells norms that are read late from those of other `x`.
        """
        if low and self.tail is not None:
            return self._low_powers(x, side)
        return self._powers(x, side, self.generator.times(x, side=side) if first is None else first, name)

    def _low_powers(self, x: Tensor, side: str) -> Tensor:
        """With products in the precision of `tail`; `x` itself is not rounded."""
        power = self.tail.times(x.to(self.tail.dtype), side=side)
        total = power.to(x.dtype)
        for term in range(2, passing_terms(self.angle) + 1):
            power = self.tail.times(power, side=side)
            if term in ROOT_SERIES:
                total.add_(power, alpha=ROOT_SERIES[term])
        return total

    def _powers(self, x: Tensor, side: str, first: Tensor, name: str) -> Tensor:
        # Each power takes its share of alpha at once: the generator itself may be of any size.
        total = power = first * self.alpha
        if self.tail is None:
            size, norm, reading = None, self.angle, False
        else:
            size = torch.linalg.matrix_norm(x).clamp_min(torch.finfo(x.dtype).tiny)
            norm = self.reader.read(f"moved {name}", _relative_norm(power, size), growth=NORM_GROWTH)
            # Where reading waits, the other powers are taken to be as large as the angle allows.
            reading = not reading_waits(x)
        small_enough = LIKELY * ROUNDED_TERM if reading else ROUNDED_TERM
        for term in range(2, self.terms + 1):
            rounded, lower, norm = power.dtype != x.dtype, None, norm * self.angle
            weight = self._weight(term)
            if self.tail is not None and (rounded or weight * norm <= small_enough):
                lower = self.tail.times(power.to(self.tail.dtype), side=side)
                norm = _relative_norm(lower, size).item() if reading else norm
            if lower is not None and (rounded or weight * norm <= ROUNDED_TERM):
                power = lower
            else:
                power = self.generator.times(power, side=side).mul_(self.alpha)
                norm = _relative_norm(power, size).item() if reading else norm
            if term in ROOT_SERIES:
                total.add_(power, alpha=ROOT_SERIES[term])
                if self.tail is not None and self._is_done(term, norm):
                    break
        return total

    def _is_done(self, term: int, norm: float) -> bool:
        """Whether `E^T E` is `I` to rounding without further terms, where the last power has this norm.

        The next odd term, `c x^j`, makes up for `2 c x^(j + 1)` there.
        """
        odd = term + 2 - (term % 2 == 0)
        return odd not in ROOT_SERIES or 2 * self._weight(odd) * norm * self.angle ** (odd + 1 - term) <= MISSING_TERM

    def _weight(self, term: int) -> float:
        """What a power counts: as a term, or, where it is none, as the next one."""
        return abs(ROOT_SERIES[term]) if term in ROOT_SERIES else abs(ROOT_SERIES[term + 1]) * self.angle


def _relative_norm(x: Tensor, size: Tensor) -> Tensor:
    """The largest of a batch."""
    return (torch.linalg.matrix_norm(x) / size).amax()
