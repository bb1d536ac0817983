"""One way of saying that a name is wrong: name it, name the nearest right one, list the rest; and of long lists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

LONGEST_LIST = 30
LISTED = 5


def listing(names: Sequence[str]) -> str:
    """`a, b, c, d, e and 3 more`."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def first_line(error: BaseException) -> str:
    """Of what it says, or its name if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def unknown(what: str, name: object, known: Iterable[str]) -> ValueError:
    """A `ValueError` for `name`, with the nearest of `known` and, if it is short, the whole list."""
    known = [str(k) for k in known]
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listing = f" Known: {', '.join(known)}." if len(known) <= LONGEST_LIST or not near else ""
    return ValueError(f"{name!r} is not a known {what}.{hint}{listing}")
