"""Parts of a step through `torch.compile`, which fuses elementwise passes, for groups with `compile`; as they are
where it fails."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pion_hf.linalg import products

# Of shapes and sides: those of one matrix and of square ones are kinds of their own to a compiler.
MOST_KINDS = 64
_refused: list[str] = []


def run(kernel: Callable, *args: Any, compiled: bool, **choices: Any) -> Any:
    """`kernel(*args, **choices)`, a module's function of tensors and numbers, compiled for all of them at once.

    Where one cannot be compiled (no C++ compiler, say) all run as they are from then on, with one warning. Compilation
    comes before anything is computed, so that what a kernel changes in place is changed once.
    """
    if not compiled or _refused or any(isinstance(a, Tensor) and a.is_meta for a in args):
        return kernel(*args, **choices)
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_KINDS):
            return _compiled(kernel)(*args, **choices)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler's many kinds
        _refused.append(kernel.__name__.strip("_"))
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            f"compile=True: {_refused[0]} could not be compiled, and steps run as they are ({reason[0]}).",
            stacklevel=2,
        )
        return kernel(*args, **choices)


@functools.cache
def _compiled(kernel: Callable) -> Callable:
    for answer in (products.splitting_pays, products.multiplies_bfloat16):  # they measure, and their answers stay
        torch.compiler.assume_constant_result(answer)
    return torch.compile(kernel, fullgraph=True, dynamic=True)
