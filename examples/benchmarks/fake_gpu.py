"""A GPU that there need not be, in two ways.

`fake_gpu`: steps on fake CUDA tensors, which know shape, dtype and device and hold no numbers. Every operation takes
the way that it takes on an NVIDIA GPU from Hopper on; mixing devices is an error as there. What runs is counted: flops
of products by precision, bytes that kernels read and write, kernels, values that the host waits for, and copies between
devices.

`like_a_gpu`: the processor takes the ways of a GPU, with real numbers: float32 products are cut in halves of bfloat16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pion_hf.linalg import products

CAPABILITY = (9, 0)
ALL = 2**62
# Dispatched, and no kernels.
FREE = {"_unsafe_view", "empty", "empty_like", "new_empty", "device", "scalar_tensor", "detach"}


class Kernel(NamedTuple):
    """One that ran. bytes: read and written. flops, dtype: of a product."""

    name: str
    bytes: int
    flops: int = 0
    dtype: str = ""


class Counts(TorchDispatchMode):
    """What ran since `reset`. host: what a value is, for which the host waits, given the tensor it is read from."""

    def __init__(self, host: Callable[[Tensor], float | bool]) -> None:
        super().__init__()
        self._host = host
        self.reset()

    def reset(self) -> None:
        self.kernels: list[Kernel] = []
        self.waits = 0
        self.copies: list[str] = []

    def flops(self, dtype: str) -> int:
        return sum(kernel.flops for kernel in self.kernels if kernel.dtype == dtype)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.waits += 1
            return self._host(args[0])
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs, written = ([x for x in tree_leaves(xs) if isinstance(x, Tensor)] for xs in (args, out))
        if name == "_to_copy" and out.device != inputs[0].device:
            self.copies.append(f"{inputs[0].device} to {out.device}: {tuple(out.shape)}")
        if name in FREE or func.is_view:
            return out
        if name.endswith("_") and not written:  # lists, changed in place
            written = [x for x in tree_leaves(args[0]) if isinstance(x, Tensor)]
        moved = sum(x.numel() * x.element_size() for x in inputs + written)
        formula = flop_registry.get(func.overloadpacket)
        if formula is None:
            self.kernels.append(Kernel(name, moved))
        else:
            factors = [x for x in args if isinstance(x, Tensor)]
            dtype = str(factors[-1].dtype).removeprefix("torch.")
            self.kernels.append(Kernel(name, moved, formula(*factors, out_val=out), dtype))
        return out


class _WithoutGuards(TorchFunctionMode):
    """Indexing and copying by other operations: a torch without CUDA has no device guards, which these ask for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__:
            return _at(*args)
        if func is Tensor.__setitem__:
            place, value = _at(*args[:2]), args[2]
            return torch.mul(value, 1, out=place) if isinstance(value, Tensor) else place.fill_(value)
        if func is Tensor.copy_:
            return torch.mul(args[1], 1, out=args[0])
        return func(*args, **(kwargs or {}))


def _at(x: Tensor, index: object) -> Tensor:
    index = index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis for i in index):
        place = next(k for k, i in enumerate(index) if i is Ellipsis)
        missing = x.ndim - sum(i is not None for i in index) + 1
        index = (*index[:place], *[slice(None)] * missing, *index[place + 1 :])
    dim = 0
    for i in index:
        if isinstance(i, int):
            x = torch.ops.aten.select.int(x, dim, i)
            continue
        if i is None:
            x = x.unsqueeze(dim)
        elif i != slice(None):
            x = torch.ops.aten.slice.Tensor(x, dim, i.start or 0, ALL if i.stop is None else i.stop, i.step or 1)
        dim += 1
    return x


@contextlib.contextmanager
def fake_gpu(host: Callable[[Tensor], float | bool] = lambda x: True) -> Iterator[Counts]:
    """Tensors made under it with `device="cuda"` are fake; gives what ran. host: see `Counts`."""
    products._sums_in_float32.cache_clear()
    try:
        with (
            mock.patch.object(torch.cuda, "get_device_capability", return_value=CAPABILITY),
            FakeTensorMode(),
            Counts(host) as counts,
            torch.no_grad(),
            _WithoutGuards(),
        ):
            yield counts
    finally:
        products._sums_in_float32.cache_clear()


@contextlib.contextmanager
def like_a_gpu() -> Iterator[None]:
    bmm = torch.bmm

    def summed(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """A processor's products have the dtype of their factors."""
        return bmm(a, b) if out_dtype is None else bmm(a.to(out_dtype), b.to(out_dtype))

    with (
        mock.patch.object(products, "splitting_pays", return_value=True),
        mock.patch.object(torch, "bmm", summed),
    ):
        yield
