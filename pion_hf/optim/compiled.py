"""Elementwise parts of a step through `torch.compile`, for groups with `compile`; as they are where it fails."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_failed: set[Callable] = set()


def run(kernel: Callable[..., Tensor], *args: Any, compiled: bool) -> Tensor:
    """`kernel(*args)`, a module's function of tensors and numbers, compiled for all shapes and numbers at once.

    A kernel that cannot be compiled (no C++ compiler, say) runs as it is from then on, with one warning. Compilation
    comes before anything is computed, so that what a kernel changes in place is changed once.
    """
    if not compiled or kernel in _failed or any(isinstance(a, Tensor) and a.is_meta for a in args):
        return kernel(*args)
    try:
        return _compiled(kernel)(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler's many kinds
        _failed.add(kernel)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            f"compile=True: {kernel.__name__.strip('_')} could not be compiled and runs as it is ({reason[0]}).",
            stacklevel=2,
        )
        return kernel(*args)


@functools.cache
def _compiled(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(kernel, fullgraph=True, dynamic=True)
