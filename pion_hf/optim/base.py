"""The one `step()` of this package: checks, bucketing by shape, AdamW for everything that is not a matrix."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pion_hf.errors import listing, unknown
from pion_hf.linalg.products import full_float32, product_dtype
from pion_hf.linalg.rotation import along, angles
from pion_hf.optim import blocks, elementwise, gradients, groups, masters, sharding
from pion_hf.optim.batches import KEPT, REST, Batch, Plan, Step, is_apart
from pion_hf.optim.checks import check_finite, check_parameter, check_switches, check_values
from pion_hf.optim.dividing import DividedState
from pion_hf.optim.fingerprints import FINGERPRINT_BYTES
from pion_hf.optim.inputs import Inputs
from pion_hf.optim.observing import Observer, SelfCheck, Update
from pion_hf.optim.options import Common
from pion_hf.optim.rewritten import StateOfWeights, no_rest, working_dtype
from pion_hf.optim.saved import ADAMW_OPTIONS, SavedState, options_of_state

PATIENCE = 5.0  # seconds of a step, after which it shows how far it is


class MatrixOptimizer(SavedState, DividedState, StateOfWeights, torch.optim.Optimizer):
    """Updates matrices by a rule of its own and everything else by torch's AdamW.

    A subclass names its `options` and `matrix_rules`, refuses options that do not combine in `check_options`, and
    overrides `update`, unless its rules are among `elementwise_rules`: what torch's AdamW steps.

    A group's `rule` chooses: one of `matrix_rules`, or `"adamw"`. Groups without a rule, `(name, tensor)`
    pairs and bare tensors are divided: 2-D tensors are matrices, the rest goes to AdamW, without weight decay where it
    is 1-D (biases, norms) unless the group has one of its own.
    Every hyperparameter lives in the groups; state is created at a parameter's first step, so that a wrapper
    may replace parameters between construction and training. Parameters may be sharded (see `DividedState`).

    A step whose gradients are not all finite is skipped before any state is touched; `skipped_steps` counts.
    After its first step it checks that every matrix was moved; `observers` see what a step does (see `observing`).

    Weights may be written by others between steps: state that describes one (`of_weights`) is then made anew from it as
    it is, and averages of gradients stay (see `fingerprints`).
    """

    options: type = Common
    matrix_rules: tuple[str, ...] = ()
    elementwise_rules: tuple[str, ...] = ("adamw",)
    per_block_state: frozenset[str] = frozenset()
    """State whose shape may happen to equal the weight's, and is kept by block all the same."""
    keeps_by_itself = False
    """Whether `update` does what `keep` asks for; else its change is projected afterwards."""

    def __init__(self, params: Iterable, defaults: dict[str, Any], *, inputs: Inputs | None = None) -> None:
        """inputs: of the model's layers, for groups that `keep` some of their directions."""
        if not (inputs is None or isinstance(inputs, Inputs)):
            raise ValueError(f"inputs must be a pion_hf.Inputs of the model, got {inputs!r}")
        self.skipped_steps = self.skipped_in_a_row = 0
        self.inputs = inputs
        self.observers: list[Observer] = [SelfCheck()]
        self._clipped: dict[torch.device, Tensor] = {}  # how many so far
        self._start_anew()
        super().__init__(groups.as_groups(params, owner=type(self).__name__), defaults)
        if not any(group["rule"] in self.matrix_rules for group in self.param_groups):
            raise ValueError(
                f"{type(self).__name__} was given no matrix to update: pass at least one 2-D parameter, or a group "
                f"with rule={self.matrix_rules[0]!r}; for a model, use pion_hf.param_groups(model)."
            )

    def _start_anew(self) -> None:
        """What is no state, but found of parameters and groups as they are: of a new optimizer, and of a loaded one."""
        self._plans, self._divisions, self._consolidated = {}, {}, None  # see `dividing`
        self._rewritten, self._formed = Counter(), {}  # see `rewritten`
        self._forms: dict[tuple[int, torch.Size, torch.dtype], dict[str, Tensor]] = {}
        self._options: dict[int, dict[str, Any]] = {}  # by the group's index, those that its state is of
        self._rotations: dict[str, tuple[Tensor, Tensor]] | None = None  # of the observed batch

    # -- groups ---------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        """Raises ValueError for unknown keys, bad values, and parameters this optimizer cannot take.

        A group without a rule becomes several where it holds matrices and others.
        """
        before = len(self.param_groups)
        try:
            for part in [param_group] if "rule" in param_group else groups.divide(param_group, self.matrix_rules[0]):
                self._add_group(part)
        except Exception:
            del self.param_groups[before:]
            raise

    def _add_group(self, param_group: dict) -> None:
        options = dict.fromkeys((*self._options_of_groups(), *groups.SWITCHES))
        for key in param_group:
            if key not in groups.STRUCTURAL_KEYS | groups.SCHEDULERS_KEYS | options.keys():
                raise unknown(f"option of {type(self).__name__}", key, options)
        param_group.setdefault("layout", "")
        super().add_param_group(param_group)
        self._check_group(self.param_groups[-1])
        self._options[len(self.param_groups) - 1] = options_of_state(self.param_groups[-1])

    def _check_group(self, group: dict) -> None:
        rule, layout = group["rule"], blocks.Layout.parse(group["layout"])
        rules = (*self.matrix_rules, "adamw")
        if rule not in rules:
            raise unknown(f"rule of {type(self).__name__}", rule, rules)
        check_switches(group)
        check_values(group, self.options)
        for name, p in groups.named_parameters(group):
            check_parameter(name, p)
            if rule != "adamw":
                try:
                    if not p.numel():
                        raise ValueError(f"it is empty ({' x '.join(map(str, p.shape))}): leave it out.")
                    for view in blocks.split(sharding.stand_in(p), layout):
                        self._check_keep(*blocks.merge_rows(view).shape[-2:], group)
                except ValueError as error:
                    raise ValueError(f"parameter {name}, rule {rule!r}: {error}") from None
        self.check_options(group)
        halves = [name for name, p in groups.named_parameters(group) if p.dtype == torch.float16]
        if halves and rule in self.elementwise_rules:
            warnings.warn(
                f"AdamW updates parameters in float16, in which eps={group['eps']:g} and small squares are "
                f"zero, so that steps can grow without bound: {listing(halves)}. Load the model in float32 (and train "
                "it with fp16=True), or in bfloat16.",
                stacklevel=2,
            )

    def _options_of_groups(self) -> dict[str, None]:
        """Their names, in order; of some a subclass may set no default (see `Teon`)."""
        return dict.fromkeys((*self.defaults, *ADAMW_OPTIONS))

    def check_options(self, group: dict) -> None:
        """Raise ValueError for options of this algorithm that do not combine."""

    # -- the step -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step over all groups. Parameters without a gradient are left alone.

        Raises:
            ValueError: a matrix that its rule cannot take (zero, not finite), inputs that nobody watched (`keep`), a
                sparse gradient, or one on some of several processes only.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_asked_for_state():
            self._lay_out_state()
            return loss
        finite, rewritten = self._look()
        if not finite:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            if self.skipped_steps == 1:
                warnings.warn(
                    "A gradient is not finite: this step is skipped, weights and optimizer state are untouched. "
                    "Further skipped steps are counted in optimizer.skipped_steps without a warning.",
                    stacklevel=2,
                )
            return loss
        self.skipped_in_a_row, self._consolidated = 0, None
        with full_float32():
            self._check_changes()
            self._make_plans()
            self._follow(rewritten)
            for index in range(len(self.param_groups)):  # what is wrong with one is said before any has moved
                self._prepare(index)
            for index, group in enumerate(self.param_groups):
                if group["rule"] in self.elementwise_rules:
                    self._elementwise_step(group)
                else:
                    self._matrix_step(index)
            self._take_fingerprints()
        self.observers = [observer for observer in self.observers if observer.step_done()]
        if self.inputs is not None:
            self.inputs.close()
        return loss

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], *, group: dict, step: Step) -> Tensor:
        """The rule: the new weights of a batch of matrices of one shape, in working precision.

        `weight` and `grad` are `(b, m, n)`, or `(b, K, m, n)` for stacks of `K` (see `stacks_of`); both may be the
        parameter's own memory: the rule may change `weight` in place, `grad` it leaves as it is. `state` is empty at a
        matrix's first step and afterwards holds what the rule put there, each entry with the dimensions of the batch
        first; the rule replaces, adds or changes entries.
        """
        raise NotImplementedError

    def turn_of(self, group: dict, number: int) -> Hashable:
        """What the number of a step decides of how it is made, besides its being the first and what averages weigh.

        Matrices of one turn are updated together.
        """
        return None

    def stacks_of(self, group: dict) -> list[list[str]]:
        """Names (`blocks.name_of`) of matrices that are updated as one; what no list names is updated alone."""
        return []

    def state_bytes(self) -> int:
        """Bytes of optimizer state once every parameter has taken a step; takes none, allocates nothing."""
        total = 0
        for group in self.param_groups:
            shapes = Counter((p.shape, p.dtype) for p in group["params"])
            for (shape, dtype), count in shapes.items():
                forms = self._state_forms(shape, dtype, group)
                held = sum(form.numel() * form.element_size() for form in forms.values())
                total += count * (held + FINGERPRINT_BYTES * self._describes(forms))
        return total

    def _state_forms(self, shape: torch.Size, dtype: torch.dtype, group: dict) -> dict[str, Tensor]:
        """What the state of a parameter holds after its first step besides `step`, as tensors without memory."""
        p, forms = torch.empty(shape, dtype=dtype, device="meta"), {}
        if group["rule"] in self.elementwise_rules:
            return dict.fromkeys(elementwise.AVERAGES, p)
        if dtype in masters.HALF and not self.is_master(group):
            forms[REST] = torch.empty_like(p, dtype=masters.REST_DTYPES[dtype])
        for index, view in enumerate(blocks.split(p, blocks.Layout.parse(group["layout"]))):
            weight = blocks.merge_rows(view).to(working_dtype(dtype))
            state = self.initial_state(0, weight, group)
            if self.keep_of(group):
                state[KEPT] = weight.new_empty(len(weight), weight.shape[-1], groups.kept_columns(group))
            first = Step((1,), self.turn_of(group, 1))
            self.update(weight, torch.empty_like(weight), state, group=group, step=first)
            for name, value in state.items():
                apart = is_apart(name, value, weight.shape[-2:], self.per_block_state)
                forms[f"{name}.{index}" if apart else name] = value if apart else torch.empty_like(p, dtype=value.dtype)
        return forms

    def initial_state(self, position: int, matrices: Tensor, group: dict) -> dict[str, Tensor]:
        """What the state of `matrices`, `(E, m, n)` of a group's parameter at `position`, holds at first."""
        return {}

    def is_master(self, group: dict) -> bool:
        """Whether state gives the group's weights in float32, so that half-precision ones need no masters."""
        return False

    def masters(self, weights: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The weights of a batch as state gives them, where the rule `is_master`."""
        return weights

    def keeps_spectrum(self, group: dict) -> bool:
        """Whether the group's matrices keep their singular values."""
        return False

    def check_matrix(self, name: str, matrix: Tensor, group: dict) -> None:
        """Called once per matrix, `(E, m, n)`, before its first step; raises ValueError if the rule cannot take it."""
        check_finite(name, matrix)

    def _look(self) -> tuple[bool, list[Tensor]]:
        """Whether the gradients are finite, and the parameters that others have written: a GPU is waited for once.

        Raises:
            ValueError: a sparse gradient, one on some of several processes only, or weights that are not finite.
        """
        named = [pair for group in self.param_groups for pair in groups.named_parameters(group)]
        for name, p in named:
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError(f"the gradient of {name} is sparse: use nn.Embedding(sparse=False).")
        params = [p for _, p in named]
        usual, (known, same) = gradients.are_usual(params), self._with_fingerprints()
        answers = torch.cat((usual[None], same.to(usual.device)))
        usual, *same = sharding.agree(answers, params, shared=self._is_divided())
        finite = usual or gradients.bring_down(named, shared=self._is_divided())
        if not finite:
            gradients.refuse_weights(named, shared=self._is_divided())
        return finite, [p for p, is_same in zip(known, same, strict=True) if not is_same]

    def _check_changes(self) -> None:
        """Of options between steps: what is wrong is an error, and plans and state go by what is right."""
        for index, group in enumerate(self.param_groups):
            options = options_of_state(group)
            if self._options.get(index, options) != options:
                self._check_group(group)
                self._plans.pop(index, None)
                self._formed = {}
                self._forms = {kind: forms for kind, forms in self._forms.items() if kind[0] != index}
            self._options[index] = options

    def _prepare(self, index: int) -> None:
        """All that can go wrong with a group's step, before it."""
        group = self.param_groups[index]
        if group["rule"] in self.elementwise_rules:
            return
        plan = self._plans[index]
        self._begin(index, plan)
        steps = {p: self.state[p]["step"] + 1 for p in group["params"] if p.grad is not None}
        kinds = {number: (number == 1, self.turn_of(group, number)) for number in set(steps.values())}
        plan.arrange({p: kinds[number] for p, number in steps.items()}, self.state)
        plan.ready.update(plan.params)

    def _matrix_step(self, index: int) -> None:
        group, plan = self.param_groups[index], self._plans[index]
        for p in plan.params:
            self.state[p]["step"] += 1
        first = self.is_master(group) and any(self.state[p]["step"] == 1 for p in plan.params)
        bar = {"desc": "First step: factors of matrices", "delay": PATIENCE, "leave": False, "disable": not first}
        for batches, states in plan.rounds(self.state):
            for batch in tqdm(batches, **bar):
                self._update_batch(batch, states, group)

    def _update_batch(self, batch: Batch, states: dict, group: dict) -> None:
        state = batch.load(states)
        numbers = batch.numbers(states)
        step = Step(numbers, self.turn_of(group, numbers[0]))
        observers, grad = [observer for observer in self.observers if observer.wants(group)], batch.gradients()
        grad = -grad if group.get("maximize") else grad
        weights = batch.weights(states)
        rounded = not step.first and self.is_master(group) and batch.first.view.dtype in masters.HALF
        exact = self.masters(weights, state) if observers and rounded else weights
        watching = [(observer, observer.before(exact)) for observer in observers]
        self._rotations = {} if watching else None
        directions = None if self.keeps_by_itself else state.get(KEPT)
        before = None if directions is None else weights.clone()
        new = self.update(weights, grad, state, group=group, step=step)
        if directions is not None:
            new.add_(along(before.sub_(new), directions, self.dtype_of_keep(group, before)))
        for observer, old in watching:
            observer.see(Update(batch.names, group, old, new, grad, self._rotations))
        self._rotations = None
        batch.store(state, states, by_block=self.per_block_state)
        batch.write(new, states)

    def note_rotation(self, side: str, q: Tensor, x: Tensor, alpha: Tensor) -> None:
        """For rules: tell observers, if there are any, how far a batch turns on `side`, in or out; see `angles`."""
        if self._rotations is not None:
            self._rotations[side] = angles(q, x, alpha)

    def note_clipped(self, clipped: Tensor) -> None:
        """For rules: which matrices of a batch would have turned by more than a step may."""
        if not clipped.is_meta:
            count = clipped.sum()
            self._clipped[count.device] = self._clipped.get(count.device, 0) + count

    @property
    def clipped_steps(self) -> int:
        """How many steps of single matrices were clipped so far, by this process; reading it waits for the device.

        Saved with `state_dict`; sharded checkpoints hold none, and the count begins anew.
        """
        return sum(int(count) for count in self._clipped.values())

    def _begin(self, index: int, plan: Plan) -> None:
        """State for the parameters with a gradient that have none, or none that fits them; their owners see to that."""
        group = self.param_groups[index]
        named = [(i, name, p) for i, (name, p) in enumerate(groups.named_parameters(group)) if p.grad is not None]
        due = [(i, name, p) for i, name, p in named if not (p in plan.ready and p in self.state)]
        if not due:
            return
        layout, division = blocks.Layout.parse(group["layout"]), self._division_of(group["params"][0])

        def without_state() -> list[int]:
            found = []
            for position, name, p in due:
                if division.owns(p) and not self._fits(index, name, p):
                    found.append(position)
                    for view in blocks.split(division.home(p).detach(), layout):
                        self.check_matrix(name, blocks.merge_rows(view), group)
            return found

        fresh = {position for found in division.together(without_state) for position in found}
        for position, name, p in due:
            if position in fresh:
                self._begin_matrix(position, name, p, group, division.home(p) if division.owns(p) else None)

    def _begin_matrix(self, position: int, name: str, p: Tensor, group: dict, home: Tensor | None) -> None:
        """The state of a group's parameter at `position` before its first step, and what others than its owner know."""
        state, owned = self.state[p], home is not None
        views = blocks.split(home if owned else sharding.stand_in(p), blocks.Layout.parse(group["layout"]))
        state.clear()
        for i, view in enumerate(views):
            matrices = blocks.merge_rows(view)
            entries = self.initial_state(position, matrices, group)
            if self.keep_of(group):
                entries[KEPT] = self.kept_inputs(name, matrices, group).repeat(len(view), 1, 1)
            state.update({f"{key}.{i}": value for key, value in entries.items() if owned})
        if p.dtype in masters.HALF and not self.is_master(group) and owned:
            state[REST] = no_rest(home)
        state["step"] = 0
        self._formed[p] = p.shape, p.dtype, p.device

    def keep_of(self, group: dict) -> int:
        """How many directions of the inputs of a group's matrices are kept."""
        return group["keep"]

    def dtype_of_keep(self, group: dict, weight: Tensor) -> torch.dtype:
        """Of the products that take kept directions out of a step: shares of them may be rounded, all of them not."""
        return product_dtype(weight, "auto" if group.get("keep_soft") else "float32")

    def most_kept(self, m: int, n: int) -> int:
        """As many directions of the inputs of `(m, n)` matrices as can be kept while they train in the others."""
        return n - 1

    def _check_keep(self, m: int, n: int, group: dict) -> None:
        keep, most = self.keep_of(group), self.most_kept(m, n)
        if keep > max(most, 0):
            way_out = f"set keep={most} at most, or " if most > 0 else ""
            raise ValueError(
                f"keep={keep} leaves a matrix of {m} x {n} nothing to train: {way_out}exclude it from the matrices."
            )

    def kept_inputs(self, name: str, matrix: Tensor, group: dict) -> Tensor:
        """The directions of the inputs of `matrix`, `(..., m, n)`, whose outputs stay as they are: `(n, keep)`.

        With `keep_soft` more of them, each as long as the root of how much of it is kept. A collective, where there are
        several processes.
        """
        columns = groups.kept_columns(group)
        if self.inputs is None or self.inputs.most < columns:
            raise ValueError(
                f"keep={group['keep']} needs the inputs of {name}, which nobody watched: give the optimizer "
                f"inputs=pion_hf.Inputs(model, {columns}) before the first forward pass; a Trainer does."
            )
        half = group["keep"] if group.get("keep_soft") else None
        directions = self.inputs.directions(name, matrix.shape[-1], columns, matrix.device, half=half)
        return directions.to(working_dtype(matrix.dtype))

    def _elementwise_step(self, group: dict) -> None:
        elementwise.step(group, self.state)


def buffer(state: dict[str, Tensor], key: str, like: Tensor) -> Tensor:
    """`state[key]`, zero at first, of the shape and dtype of `like`."""
    if key not in state:
        state[key] = torch.zeros_like(like)
    return state[key]


def average(state: dict[str, Tensor], key: str, value: Tensor, beta: float) -> Tensor:
    """`average <- beta average + (1 - beta) value`, starting from zero; kept in `state[key]`."""
    return buffer(state, key, value).lerp_(value, 1 - beta)
