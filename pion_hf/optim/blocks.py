"""A parameter seen as the matrices it really holds, each `(out, in)`.

A param group's `layout` says how; it is a string, so that it survives `torch.save` and
`weights_only` loading. Parts are joined by `;`:

- `""`: the tensor is one matrix `(out, in)`, or, with three dimensions, a stack of them `(E, out, in)`.
- `transposed`: stored `(in, out)`, as in GPT-2's `Conv1D` and some experts.
- `rows=a,b,c`: several matrices one below the other (fused QKV, gate-up), of `a`, `b`, `c` output rows.
- `interleaved=h,p`: `p` matrices whose output rows alternate head by head (`h` heads), as in GPT-NeoX.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import Tensor

FORMS = "'transposed', 'rows=a,b,...', 'interleaved=heads,parts' (joined by ';')"
NUMBERS = re.compile(r"[1-9][0-9]*(,[1-9][0-9]*)*")


class Layout(NamedTuple):
    """A parsed `layout` string."""

    transposed: bool = False
    rows: tuple[int, ...] = ()
    interleaved: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Raises ValueError with the right form for anything else than the module's grammar."""
        if not isinstance(text, str):
            raise ValueError(f"layout {text!r} is not a string: it is '' for one matrix, or any of {FORMS}")
        fields: dict = {}
        for part in text.split(";") if text else ():
            key, _, value = part.partition("=")
            numbers = tuple(int(v) for v in value.split(",")) if NUMBERS.fullmatch(value) else ()
            if part == "transposed":
                read: Any = True
            elif (key == "rows" and numbers) or (key == "interleaved" and len(numbers) == 2):
                read = numbers
            else:
                raise ValueError(f"layout {text!r}: {part!r} is none of {FORMS} (whole numbers of at least 1)")
            if key in fields:
                raise ValueError(f"layout {text!r} says {key!r} twice; its parts are {FORMS}, each at most once")
            fields[key] = read
        if "rows" in fields and "interleaved" in fields:
            raise ValueError(f"layout {text!r}: 'rows' and 'interleaved' exclude each other; its parts are {FORMS}")
        return cls(**fields)

    def __str__(self) -> str:
        parts = ["transposed"] if self.transposed else []
        if self.rows:
            parts.append("rows=" + ",".join(map(str, self.rows)))
        if self.interleaved:
            parts.append("interleaved={},{}".format(*self.interleaved))
        return ";".join(parts)

    @property
    def pieces(self) -> int:
        """How many kinds of matrix one tensor holds (a stack of experts counts once)."""
        return len(self.rows) or (self.interleaved[1] if self.interleaved else 1)


def split(tensor: Tensor, layout: Layout) -> list[Tensor]:
    """Views of the matrices in `tensor`, each `(E, h, d, in)`: `E` matrices of `h * d` output rows.

    They share memory with `tensor`: write to them with `copy_`. `merge_rows` makes `(E, out, in)` of one.

    Raises:
        ValueError: the tensor is not 2-D or 3-D, or its rows do not fit the layout.
    """
    if tensor.ndim not in (2, 3):
        raise ValueError(f"a matrix parameter has 2 dimensions (or 3, a stack), not the shape {tuple(tensor.shape)}")
    x = tensor if tensor.ndim == 3 else tensor.unsqueeze(0)
    if layout.transposed:
        x = x.mT
    out = x.shape[1]
    if layout.rows:
        if sum(layout.rows) != out:
            raise ValueError(f"layout rows {layout.rows} sum to {sum(layout.rows)}, the matrix has {out} rows")
        return [part.unsqueeze(1) for part in x.split(layout.rows, dim=1)]
    if layout.interleaved:
        heads, parts = layout.interleaved
        if out % (heads * parts):
            raise ValueError(f"{out} rows do not divide into {heads} heads of {parts} matrices")
        return list(x.unflatten(1, (heads, parts, -1)).unbind(2))
    return [x.unsqueeze(1)]


def name_of(parameter: str, index: int, count: int) -> str:
    """The name of one of `count` views of a parameter: its own, with the index where it holds several."""
    return parameter if count == 1 else f"{parameter}[{index}]"


def merge_rows(view: Tensor) -> Tensor:
    """`(E, h, d, in)` to `(E, h * d, in)`; a view where the memory allows it."""
    return view.flatten(1, 2)
