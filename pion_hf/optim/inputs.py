"""What layers take in: the directions that most of their inputs share, seen in passes before an optimizer's first step.

Most of what a layer's inputs have in common, whatever the text, lies in a few directions: their mean, the outliers of a
few channels, the first token. A step that changes what a layer makes of these changes everything the model does; with
`keep` it leaves it as it is.

To project steps away from inputs is Adam-NSCL's idea (arXiv 2103.07113) and that of gradient projection memory (arXiv
2103.09762), with inputs of earlier tasks; these are of the new one, and there is nothing to store, or of texts that are
shown (`Inputs.show`), such as the model's own answers. `keep_soft` is OWM's projector (arXiv 1810.01256), a ridge
`gamma (K + gamma I)^-1` of the inputs' second moment `K`.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pion_hf.errors import listing
from pion_hf.linalg.sketch import leading_directions, sketch_of, test_matrix
from pion_hf.optim import sharding
from pion_hf.optim.checks import check_range

# Labels of tokens that no loss is taken of, as in torch's cross entropy.
UNTRAINED = -100


class _Pass(NamedTuple):
    """A call that is going on: whether it trains, which tokens count, and of a decoder what it sees of an encoder."""

    counts: bool
    mask: Tensor | None
    states: Tensor | None = None
    states_mask: Tensor | None = None

    def mask_of(self, x: Tensor) -> Tensor | None:
        """That of an input of one of its layers."""
        states = self.states
        if states is None or x.shape != states.shape:
            return self.mask
        same = x is states or (not torch.compiler.is_compiling() and x.data_ptr() == states.data_ptr())
        return self.states_mask if same else self.mask


class _Running(threading.local):
    """The calls that are going on in a thread, the innermost last: `DataParallel` has one for every replica."""

    def __init__(self) -> None:
        self.passes: list[_Pass] = []


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
        self._unseen: list[str] = []
        self._running = _Running()
        self._seen_calls = self._shows = False
        self._targets: Tensor | None = None  # which of a decoder's tokens count, where the model's call says so
        self._handles: list[RemovableHandle] = []
        # The model holds hooks, which must not hold this in turn: it goes with its optimizer, and they with it.
        this = weakref.ref(self)
        weakref.finalize(self, _remove, self._handles)
        for module_name, module in model.named_modules():
            arguments = list(inspect.signature(module.forward).parameters)
            if module is model or "encoder_attention_mask" in arguments:
                self._handles += _on_call(module, this, arguments, outermost=module is model)
            own = [n for n, p in module.named_parameters(recurse=False) if p.ndim == 2 and p.requires_grad]
            if own and not isinstance(module, nn.Embedding):
                names = [".".join(filter(None, (module_name, name))) for name in own]
                self._handles.append(module.register_forward_pre_hook(_hook(this, names), with_kwargs=True))
                for name in own:  # not in the hook: a compiled model would stay cut there
                    p = getattr(module, name)
                    for n in () if p.is_meta else set(p.shape):
                        self._test(n, p.device)

    def show(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """See what the layers of `model` take in of these batches, and nothing of what trains.

        What the model makes of such texts is then what `keep` keeps: its own answers to general questions, say, or any
        text of what it must not forget.

        batches: keyword arguments of `model`, a call for each, in evaluation mode and without gradients.
        """
        training = [module for module in model.modules() if module.training]
        model.eval()
        self._shows = True
        try:
            with torch.no_grad():
                for batch in batches:
                    model(**batch)
        finally:
            self._shows = False
            for module in training:
                module.training = True
        _remove(self._handles)

    def _enter(self, given: dict[str, Any], *, outermost: bool, seq2seq: bool) -> None:
        """A call of the model begins, or of a part of it that has masks of its own."""
        if outermost:
            self._seen_calls = True
            self._running.passes.clear()  # of a call that was broken off
            labels = given.get("labels") if seq2seq else None
            targets = given.get("decoder_attention_mask")
            self._targets = labels != UNTRAINED if targets is None and isinstance(labels, Tensor) else targets
        running = self._running.passes
        around = running[-1] if running else _Pass(torch.is_grad_enabled() or self._shows, None)
        states, mask = given.get("encoder_hidden_states"), _flat(given.get("attention_mask"))
        states_mask = _flat(given.get("encoder_attention_mask"))
        begins = states is not None and around.states is None  # a decoder; the passes within are of its layers
        if mask is None:
            mask = self._targets if begins else around.mask
        running.append(_Pass(around.counts, mask, states, around.states_mask if states_mask is None else states_mask))

    def _leave(self) -> None:
        running = self._running.passes
        left = running.pop() if running else None
        if running and left.states is not None and running[-1].states is None:  # what follows a decoder sees its tokens
            running[-1] = running[-1]._replace(mask=left.mask)

    def _see(self, names: list[str], x: Tensor) -> None:
        """`x`, which the matrices `names` take in."""
        if not x.is_floating_point() or not self._counts():
            return
        mask = self._running.passes[-1].mask_of(x) if self._running.passes else None
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        # The model's parts may be on several devices (`device_map`), or all of it on each (`DataParallel`).
        if mask is not None and mask.shape == x.shape[:-1]:
            x = x * mask.to(x.device).unsqueeze(-1)
        rows = x.reshape(-1, x.shape[-1])
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            seen = sketch_of(rows, self._test(rows.shape[-1], x.device).to(rows.dtype))
            seen = torch.where(seen.isfinite().all(), seen, 0)  # of a pass whose step will be skipped
        for name in names:
            known = self._sketches[name].get(x.device)
            self._sketches[name][x.device] = seen if known is None else known + seen

    def _counts(self) -> bool:
        """Whether what is being computed trains: once, although activation checkpointing computes it again later."""
        if self._running.passes:
            return self._running.passes[-1].counts
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1  # within a backward pass
        return torch.is_grad_enabled() and not (again and self._seen_calls)

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
        _remove(self._handles)
        self._running.passes.clear()
        self._targets = None
        self._sketches.clear()
        self._tests.clear()


def _on_call(
    module: nn.Module, this: weakref.ref[Inputs], arguments: list[str], *, outermost: bool
) -> list[RemovableHandle]:
    """Tell `this` when a call of the module begins and ends."""
    seq2seq = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))

    def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if (inputs := this()) is not None:
            given = {**dict(zip(arguments, args, strict=False)), **kwargs}
            inputs._enter(given, outermost=outermost, seq2seq=seq2seq)

    def leave(*_: Any) -> None:
        if (inputs := this()) is not None:
            inputs._leave()

    return [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]


def _hook(this: weakref.ref[Inputs], names: list[str]) -> Callable:
    def see(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None and (inputs := this()) is not None:
            inputs._see(names, x)

    return see


def _flat(mask: Any) -> Tensor | None:
    """A mask of tokens, `(batch, length)`; those of pairs of tokens say nothing of one."""
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
