"""What layers take in: the directions that most of their inputs share, seen in passes before an optimizer's first step.

Most of what a layer's inputs have in common, whatever the text, lies in a few directions: their mean, the outliers of a
few channels, the first token. A step that changes what a layer makes of these changes everything the model does; with
`keep` it leaves it as it is. (To project steps away from inputs is gradient projection memory, arXiv 2103.09762, which
stores the inputs of earlier tasks; these are of the new one, and there is nothing to store.)
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pion_hf.errors import listing
from pion_hf.linalg.sketch import leading_directions, sketch_of, test_matrix
from pion_hf.optim import sharding
from pion_hf.optim.checks import check_range


class Inputs:
    """Sketches of the inputs of a model's layers, from its forward passes until `close`.

    For an optimizer with `keep`, which closes it after its first step: all passes of that step's gradients count, those
    without gradients (evaluation, generation) do not, nor do tokens that the model's `attention_mask` leaves out.
    Layers are modules with a trainable matrix of their own whose input is a tensor: `Linear`, `Conv1D`, LoRA's A.
    """

    def __init__(self, model: nn.Module, directions: int) -> None:
        """directions: the most that an optimizer's `keep` will ask for, of every layer.

        Raises:
            ValueError: a number below 1.
        """
        check_range("directions", directions, lambda v: v >= 1, "a whole number of at least 1", whole=True)
        self.most = directions
        self._sketches: dict[str, dict[torch.device, Tensor]] = defaultdict(dict)
        self._tests: dict[tuple[int, torch.device], Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._unseen: list[str] = []
        self._masks: dict[torch.device, Tensor] = {}  # of the model's latest call, on every device of several
        self._handles.append(model.register_forward_pre_hook(self._see_mask, with_kwargs=True))
        for module_name, module in model.named_modules():
            own = [n for n, p in module.named_parameters(recurse=False) if p.ndim == 2 and p.requires_grad]
            if own and not isinstance(module, nn.Embedding):
                names = [".".join(filter(None, (module_name, name))) for name in own]
                hook = module.register_forward_pre_hook(self._hook(names), with_kwargs=True)
                self._handles.append(hook)
                for name in own:  # not in the hook: a compiled model would stay cut there
                    p = getattr(module, name)
                    for n in () if p.is_meta else set(p.shape):
                        self._test(n, p.device)

    def _see_mask(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._masks[mask.device] = mask
        else:
            self._masks.clear()

    def _hook(self, names: list[str]) -> Any:
        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if not torch.is_grad_enabled() or x is None or not x.is_floating_point():
                return
            x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
            # The model's parts may be on several devices (`device_map`), or all of it on each (`DataParallel`).
            mask = self._masks.get(x.device, next(iter(self._masks.values()), None))
            if mask is not None and mask.shape == x.shape[:-1]:
                x = x * mask.to(x.device).unsqueeze(-1)
            rows = x.reshape(-1, x.shape[-1])
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                seen = sketch_of(rows, self._test(rows.shape[-1], x.device).to(rows.dtype))
                seen = torch.where(seen.isfinite().all(), seen, 0)  # of a pass whose step will be skipped
            for name in names:
                known = self._sketches[name].get(x.device)
                self._sketches[name][x.device] = seen if known is None else known + seen

        return see

    def _test(self, n: int, device: torch.device) -> Tensor:
        if (n, device) not in self._tests:
            self._tests[n, device] = test_matrix(n, self.most, device)
        return self._tests[n, device]

    def directions(self, name: str, n: int, count: int, device: torch.device, *, half: int | None = None) -> Tensor:
        """The `count` leading directions of the inputs of the matrix `name`, orthonormal columns `(n, count)`.

        Of all processes' inputs together; 0 where none were seen. half: see `leading_directions`.
        """
        test = self._test(n, device)
        sketch = torch.zeros_like(test)
        for seen in self._sketches.get(name, {}).values():
            sketch = sketch + seen.to(device) if seen.shape == test.shape else sketch
        found = leading_directions(sharding.summed(sketch), test, count, half=half)
        if name not in self._unseen and not found.any():  # a fused one is asked for once for each of its matrices
            self._unseen.append(name)
        return found

    @property
    def open(self) -> bool:
        """Whether it still sees."""
        return bool(self._handles)

    def close(self) -> None:
        """See nothing more, and forget what was seen; warn of matrices that were asked for in vain."""
        if self._unseen:
            warnings.warn(
                f"keep: no inputs of {listing(self._unseen)} were seen in a forward pass that trains; "
                "what has none moves freely.",
                stacklevel=2,
            )
            self._unseen.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._masks.clear()
        self._sketches.clear()
        self._tests.clear()
