"""Regular expressions over parameter names, for overrides, and what is said about those that match nothing."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from pion_hf.errors import unknown


class Patterns:
    """Regular expressions, remembered by what they matched."""

    def __init__(self, option: str, patterns: str | Iterable[str] | None) -> None:
        self.option = option
        patterns = [patterns] if isinstance(patterns, str) else list(patterns or ())
        self.compiled = []
        for pattern in patterns:
            try:
                self.compiled.append(re.compile(pattern))
            except re.error as error:
                raise ValueError(f"{option}: {pattern!r} is not a regular expression: {error}") from None
        self.unused = {c.pattern for c in self.compiled}

    def __bool__(self) -> bool:
        return bool(self.compiled)

    def match(self, spellings: list[str]) -> bool:
        hits = [c.pattern for c in self.compiled if any(map(c.search, spellings))]
        self.unused.difference_update(hits)
        return bool(hits)

    def require_all_used(self, names: list[str]) -> None:
        unused = sorted(self.unused)
        for pattern in unused:
            if not any(re.search(pattern, n) for n in names):
                what = f"parameter name ({self.option} matches no trainable parameter)"
                raise unknown(what, pattern, candidates(pattern, names))
        if unused and len(unused) < len(self.compiled):  # if none has an effect, the caller raises
            warnings.warn(
                f"{self.option}: {', '.join(map(repr, unused))} match embeddings, heads, norms or biases only, "
                "which AdamW updates in any case.",
                stacklevel=3,
            )


def spellings_of(model: nn.Module) -> dict[int, list[str]]:
    """By parameter: all its names (a tied one has several), and the module's name beside each `.weight`."""
    spellings: dict[int, list[str]] = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        spellings[id(p)] += [name, name.removesuffix(".weight")] if name.endswith(".weight") else [name]
    return spellings


def candidates(pattern: str, names: list[str]) -> list[str]:
    """What `pattern` may have meant: ends of names with as many dots as it has, or else their last parts.

    Of LoRA's `q_proj.lora_A.default` these are `q_proj` and `lora_A`: every name ends in the adapter's.
    """
    stems = [n.removesuffix(".weight") for n in names]
    stems = [s for n in stems for s in ((n.partition(".lora_")[0], n.rpartition(".")[0]) if ".lora_" in n else (n,))]
    for depth in (pattern.count(".") + 1, 1):
        ends = list(dict.fromkeys(".".join(s.split(".")[-depth:]) for s in stems))
        if difflib.get_close_matches(pattern, ends, n=1, cutoff=0.5):
            break
    return ends
