"""State that describes a weight, for as long as the weight is the one that it describes.

Masters' low bits, factors and such are of the weight that the last step has left. Others write weights too:
pruning masks, averages, restarts, `load_state_dict`, a merge. What they have written is told by its fingerprint, which
is kept and saved with the state.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from pion_hf.errors import listing
from pion_hf.optim import blocks, groups, masters, sharding
from pion_hf.optim.batches import KEPT, REST
from pion_hf.optim.checks import check_finite
from pion_hf.optim.fingerprints import FINGERPRINT

# A matrix that others have written so often is named: something writes at every step.
OFTEN = 3


class StateOfWeights:
    """Mixed into `MatrixOptimizer`: a matrix that others have written gets its state made anew from what it is now.

    Averages of gradients stay. Of a matrix that is divided (see `DividedState`) it is its owner's.
    """

    of_weights: frozenset[str] = frozenset()
    """Entries that `described` gives. What half precision drops (`REST`) is of the weight under every rule."""

    _rewritten: Counter[Tensor]
    """How often others have written a parameter."""
    _formed: dict[Tensor, tuple]
    """Shape, dtype and device that the state of a parameter is of, under the options of its group."""

    def described(self, weights: Tensor, kept: Tensor | None, group: dict) -> dict[str, Tensor]:
        """What state says of `weights`, `(b, m, n)` in working precision, until others than the rule write them.

        kept: the directions of their inputs that stay, if there are any.
        """
        return {}

    def _describes(self, entries: Iterable[str]) -> bool:
        """Whether some of these entries of state describe a weight."""
        return any(key == REST or key.partition(".")[0] in self.of_weights for key in entries)

    def _take_fingerprints(self) -> None:
        """Of all weights that state describes or an owner has a copy of, as the step has left them."""
        followed = self._is_followed
        params = [p for i, group in enumerate(self.param_groups) for p in group["params"] if followed(i, p)]
        for p, value in zip(params, sharding.fingerprints_of(params) if params else (), strict=True):
            self.state[p][FINGERPRINT] = value.to(p.device)

    def _is_followed(self, index: int, p: Tensor) -> bool:
        """Whether it matters what others write into a parameter of a group: on all processes alike."""
        state = self.state.get(p, {})
        if self.param_groups[index]["rule"] in self.elementwise_rules or not state.get("step"):
            return False
        divided = p in self._division_of(p).owner
        return sharding.is_sharded(p) or self._describes(self._forms_of(index, p) if divided else state)

    def _with_fingerprints(self) -> tuple[list[Tensor], Tensor]:
        """The parameters whose fingerprint is known, and whether each still has it."""
        params = [p for group in self.param_groups for p in group["params"] if FINGERPRINT in self.state.get(p, ())]
        if not params:
            return [], torch.empty(0, dtype=torch.bool, device=self.param_groups[0]["params"][0].device)
        found = sharding.fingerprints_of(params)
        return params, found == torch.stack([self.state[p][FINGERPRINT].to(found.device) for p in params])

    def _follow(self, rewritten: list[Tensor]) -> None:
        """After others have written these parameters."""
        places = {p: (name, group) for group in self.param_groups for name, p in groups.named_parameters(group)}
        for division in dict.fromkeys(map(self._division_of, rewritten)):
            written = [p for p in rewritten if self._division_of(p) is division]
            division.fetch(written)
            own = [p for p in written if division.owns(p)]
            division.together(lambda own=own: [self._rebuild(*places[p], p) for p in own])
        self._rewritten.update(rewritten)
        often = [places[p][0] for p in rewritten if self._rewritten[p] == OFTEN]
        if often:
            warnings.warn(
                f"Something else than the optimizer writes {listing(often)} between steps, and has done so {OFTEN} "
                "times: each time what is kept beside the weights (the bits below their precision, singular "
                "directions) is made anew from them, which costs accuracy and time. This is said once.",
                stacklevel=4,
            )

    def _rebuild(self, name: str, group: dict, p: Tensor) -> None:
        """State of a parameter that describes its weight, from the weight as it is.

        Raises:
            ValueError: the weight is not finite.
        """
        if REST in self.state[p] and p.dtype in masters.HALF:
            self.state[p][REST] = no_rest(self._division_of(p).home(p))
        self._describe(name, group, p)

    def _describe(self, name: str, group: dict, p: Tensor) -> None:
        """The entries that `described` gives, of all matrices of a parameter."""
        state = self.state[p]
        home = self._division_of(p).home(p).detach()
        for i, view in enumerate(blocks.split(home, blocks.Layout.parse(group["layout"]))):
            matrices = blocks.merge_rows(view).to(working_dtype(p.dtype))
            check_finite(name, matrices)
            found = self.described(matrices, state.get(f"{KEPT}.{i}"), group)
            state.update({f"{key}.{i}": value for key, value in found.items()})

    def _fits(self, index: int, name: str, p: Tensor) -> bool:
        """Whether the state of a parameter has begun and is of the form and the options that it has now.

        It is made to, where these were changed since; only averages that are not there make it begin anew.
        """
        state, form = self.state[p], (p.shape, p.dtype, p.device)
        if not state.get("step"):
            return False
        if self._formed.get(p) == form:
            return True
        home = self._division_of(p).home(p)
        forms = self._forms_of(index, home)
        held = {key: value for key, value in state.items() if isinstance(value, Tensor) and key != "step"}
        averages = {key: form for key, form in forms.items() if not self._describes([key])}
        if any(key not in held or held[key].shape != form.shape for key, form in averages.items()):
            warnings.warn(
                f"The optimizer state of {name} is not of the options and the shape that it has now: it begins anew.",
                stacklevel=5,
            )
            return False
        for key, value in held.items():
            if key in averages:
                state[key] = value.to(p.device, averages[key].dtype)
            elif key not in forms and not (key == FINGERPRINT and (sharding.is_sharded(p) or self._describes(forms))):
                del state[key]
        if REST in forms:
            if REST not in state or state[REST].dtype != forms[REST].dtype:
                state[REST] = no_rest(home)
            elif FINGERPRINT not in state:  # saved before there were any: it may be of another weight
                masters.drop_impossible_(home, state[REST])
        if any(key not in state or state[key].dtype != form.dtype for key, form in forms.items() if key != REST):
            self._describe(name, self.param_groups[index], p)
        self._formed[p] = form
        return True


def no_rest(p: Tensor) -> Tensor:
    """What a half-precision weight drops that is its own master: nothing."""
    return torch.zeros(p.shape, dtype=masters.REST_DTYPES[p.dtype], device=p.device)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Rotations are formed in float32 at least, whatever the weight is stored in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
