"""The options of every optimizer, each said once: its name, type, default, what it may be, and a line of help.

What needs to know them reads them here: the constructors' defaults (a test holds their signatures, which are written
out for editors, equal to these), the checks of param groups, the fields of `TrainingArguments`, `--help`, `optim_args`
and the table of docs/options.md.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pion_hf.errors import unknown
from pion_hf.linalg.polar import MOST_STEPS

Direction = Literal["gradient", "adam", "natural", "polar", "msign"]
Polar = Literal["express", "quintic", "svd", "gram"]
Precision = Literal["auto", "float32", "bfloat16"]
# What a LoRA factor does.
FactorMethod = Literal["rotate", "orthogonal", "adamw"]
# Between which the best learning rates lay in our runs on SmolLM2-135M (examples/benchmarks/compare.py and rates.py).
# Those of `pion_ambient` and of adapters (ranks 64 to 4) are AdamW's.
USUAL_RATES = {
    "pion": (1e-4, 3e-4),
    "pion_ambient": (2e-4, 4e-4),
    "teon": (1e-3, 2e-3),
    "muon": (1e-3, 2e-3),
    "adamw_routed": (2e-4, 4e-4),
    "pion_lora": (1e-3, 8e-3),
    "teon_lora": (1e-3, 8e-3),
}
# Of `PionOptions`. `paper`: all choices of arXiv 2605.12492. `ambient`: our own rule, with an RMS under which the best
# learning rate is AdamW's, within a factor of two (examples/benchmarks/compare.py, of 12 and 48 steps).
PRESETS = {
    "paper": {
        "momentum_frame": "lie",
        "direction": "gradient",
        "metric": "lie",
        "scale": "rms",
        "side": "alternate",
        "retraction": "taylor",
        "degree": 2,
    },
    "ambient": {
        "momentum_frame": "transported",
        "direction": "natural",
        "metric": "ambient",
        "scale": "rms",
        "rms": 2.0,
    },
}


def usual_rates(optim: str) -> str:
    """Those of an optimizer, in words."""
    return " to ".join(f"{rate:g}" for rate in USUAL_RATES[optim])


class Range(NamedTuple):
    """Whether a number, or each of several, is right, and how to say so."""

    holds: Callable[[float], bool]
    words: str


NOT_NEGATIVE = Range(lambda v: v >= 0, "at least 0")
POSITIVE = Range(lambda v: v > 0, "above 0")
DECAY = Range(lambda v: 0 <= v < 1, "in [0, 1)")
DECAYS = Range(DECAY.holds, "two numbers in [0, 1)")
COUNT = Range(lambda v: v >= 1, "a whole number of at least 1")
DIRECTIONS = Range(lambda v: v >= 0, "a whole number of directions, 0 or more")
LAYERS = Range(lambda v: v >= 1, "a whole number of layers, 1 (Muon) or more")
ITERATIONS = Range(lambda v: 1 <= v <= MOST_STEPS, f"in 1..{MOST_STEPS}")
TERMS = Range(lambda v: 1 <= v <= 20, "in 1..20")


def option(default: Any, help: str, allowed: Range | None = None) -> Any:
    """A field of the dataclasses below."""
    return dataclasses.field(default=default, metadata={"help": help, "allowed": allowed})


# -- what several have ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Common:
    """Of every optimizer."""

    lr: float = option(2e-4, "Learning rate of the matrices or factors.", NOT_NEGATIVE)
    weight_decay: float = option(0.0, "Decoupled weight decay; a matrix that rotates has none.", NOT_NEGATIVE)
    keep: int = option(
        0, "So many leading directions of every layer's inputs keep their outputs, against forgetting.", DIRECTIONS
    )


@dataclass(frozen=True)
class Routed:
    """Of the groups that `pion_hf.param_groups` makes for every optimizer, and of no constructor."""

    targets: list[str] | None = option(
        None, "Regular expressions of the matrices that the rule takes. (default: all of hidden layers)"
    )
    exclude: list[str] | None = option(
        None, "Regular expressions of parameters that AdamW takes instead of the matrix rule. (default: none)"
    )
    adamw_lr: float | None = option(
        None, "Learning rate of AdamW's groups: embeddings, heads, norms. (default: learning_rate)", NOT_NEGATIVE
    )
    adamw_betas: tuple[float, float] | None = option(
        None, "Betas of AdamW's groups (adamw_routed: of all). (default: adam_beta1 and adam_beta2)", DECAYS
    )
    adamw_eps: float | None = option(
        None, "Epsilon of AdamW's groups (adamw_routed: of all). (default: adam_epsilon)", NOT_NEGATIVE
    )


@dataclass(frozen=True)
class Shown:
    """Of Trainers and factories, which show it to the optimizer's `Inputs`."""

    keep_data: str | None = option(
        None,
        "What keep is about: a file of chats or texts (.jsonl), or one text, such as the model's own answers, which "
        "pion-hf answers writes. (default: the first batch trained on)",
    )


@dataclass(frozen=True)
class Stacked:
    """Of the groups of optimizers that stack layers."""

    stack: int = option(2, "Consecutive layers whose matrices are orthogonalised together.", LAYERS)
    stack_targets: list[str] | None = option(
        None,
        "Which matrices are stacked: q, k, v, or regular expressions over parameter names. (default: q, k and v; of "
        "adapters all)",
    )


@dataclass(frozen=True)
class Factors:
    """Of the groups of optimizers that treat the two factors of an adapter apart."""

    lora_a: FactorMethod = option("rotate", "What the factor A does (of embeddings: B).")
    lora_b: FactorMethod = option("orthogonal", "What the factor B does (of embeddings: A).")


@dataclass(frozen=True)
class AdamWDefaults:
    """Of optimizers whose `betas` are not AdamW's."""

    adamw_betas: tuple[float, float] = option((0.9, 0.95), "Betas of AdamW's groups.", DECAYS)
    adamw_eps: float = option(1e-8, "Epsilon of AdamW's groups.", NOT_NEGATIVE)


@dataclass(frozen=True)
class Orthogonalised:
    """Of optimizers that find polar factors."""

    polar: Polar = option(
        "express", "How a polar factor is found; gram: pion-hf[gram] and an NVIDIA GPU from Hopper on."
    )
    polar_steps: int = option(5, "Iterations of express and quintic.", ITERATIONS)


@dataclass(frozen=True)
class Executed:
    """How a step is carried out."""

    batch_elements: int | None = option(
        None,
        "Elements of the equal matrices that are updated at once: bounds the extra memory of a step. (default: what is "
        "fastest on the device)",
        COUNT,
    )


@dataclass(frozen=True)
class Momentum:
    """Of Muon and its relatives."""

    momentum: float = option(0.95, "Decay of the momentum.", DECAY)
    nesterov: bool = option(True, "Look ahead by a step of momentum.")


DIRECTION = (
    "The step without the constraint: the momentum (gradient), AdamW's (adam), over the second moment (natural), "
    "orthogonalised (polar; msign: the generators)."
)
METRIC = "Which rotation stands for the direction: the steepest one (the paper's) or the nearest one."

# -- the optimizers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PionOptions(Executed, Orthogonalised, Common):
    """Of `Pion`."""

    betas: tuple[float, float] = option((0.9, 0.95), "Decay of the momentum and of the second moment.", DECAYS)
    eps: float = option(1e-8, "Added to the root of the second moment.", NOT_NEGATIVE)
    rms: float = option(0.2, "RMS of a matrix's update at learning rate 1 (scale=rms).", POSITIVE)
    side: Literal["alternate", "in", "out", "both"] = option("alternate", "The side or sides rotated in a step.")
    momentum_frame: Literal["ambient", "transported", "lie"] = option(
        "ambient", "Where the momentum lives: left where it is, carried along by the rotations, in the generators."
    )
    second_moment: bool = option(False, "Divide the gradient by the root of a second moment, as the paper's variant.")
    direction: Direction = option("gradient", DIRECTION)
    metric: Literal["lie", "ambient"] = option("lie", METRIC)
    scale: Literal["rms", "none", "spectral"] = option(
        "rms", "What lr sets: the RMS of an update, lr * rms; its largest angle; with none the direction's own size."
    )
    retraction: Literal["polar", "taylor"] = option("polar", "How a generator becomes a rotation: exact, the paper's.")
    degree: int = option(2, "Degree of retraction=taylor.", TERMS)
    generator_dtype: Precision = option("auto", "Precision of the products that form a generator.")
    state_dtype: Literal["float32", "bfloat16"] = option("float32", "Precision of the averages of gradients.")
    compile: bool = option(False, "A step's elementwise passes fused by torch.compile.")
    preset: Literal["paper", "ambient"] | None = option(
        None, "'paper' sets the options of arXiv 2605.12492, 'ambient' our own rule. (default: none)"
    )


@dataclass(frozen=True)
class MuonOptions(AdamWDefaults, Executed, Orthogonalised, Momentum, Common):
    """Of `Muon`."""

    lr: float = option(1e-3, "Learning rate of the matrices or factors.", NOT_NEGATIVE)
    polar_dtype: Precision = option("auto", "Precision of the orthogonalisation.")
    scale: Literal["rms", "paper", "original"] = option(
        "rms",
        "What lr sets: the RMS of an update, lr * rms; or its singular values, the paper's way or torch's Muon's.",
    )
    rms: float = option(0.2, "RMS of a matrix's update at learning rate 1 (scale=rms).", POSITIVE)
    keep_soft: bool = option(False, "Keep four times as many directions: strong ones nearly whole, weak ones in part.")
    compile: bool = option(False, "A step's elementwise passes fused by torch.compile.")


@dataclass(frozen=True)
class TeonOptions(MuonOptions):
    """Of `Teon`."""

    stack: int = option(2, "Consecutive layers whose matrices are orthogonalised together.", LAYERS)


@dataclass(frozen=True)
class PionLoraOptions(Executed, Orthogonalised, Common):
    """Of `PionLora`."""

    lr: float = option(1e-3, "Learning rate of the matrices or factors.", NOT_NEGATIVE)
    betas: tuple[float, float] = option((0.9, 0.95), "Decay of the momentum and of the second moment.", DECAYS)
    eps: float = option(1e-8, "Added to the root of the second moment.", NOT_NEGATIVE)
    direction: Literal["gradient", "adam", "natural", "polar"] = option("natural", DIRECTION)
    metric: Literal["lie", "ambient"] = option("lie", METRIC)
    momentum_frame: Literal["transported", "ambient"] = option(
        "transported", "Where the momentum lives: left where it is, carried along by the rotations, in the generators."
    )


@dataclass(frozen=True)
class TeonLoraOptions(AdamWDefaults, Executed, Orthogonalised, Momentum, Common):
    """Of `TeonLora`."""

    lr: float = option(1e-3, "Learning rate of the matrices or factors.", NOT_NEGATIVE)
    stack: int = option(2, "Consecutive layers whose factors are orthogonalised together.", LAYERS)


@dataclass(frozen=True)
class RoutedAdamWOptions(Common):
    """Of `RoutedAdamW`."""

    keep_soft: bool = option(False, "Keep four times as many directions: strong ones nearly whole, weak ones in part.")
    adamw_betas: tuple[float, float] = option((0.9, 0.999), "Betas of all groups.", DECAYS)
    adamw_eps: float = option(1e-8, "Epsilon of all groups.", NOT_NEGATIVE)


# -- reading them -----------------------------------------------------------------------------------------------------


@functools.cache
def types_of(options: type) -> dict[str, Any]:
    """Every option of one of these dataclasses and its type."""
    hints = typing.get_type_hints(options)
    return {field.name: hints[field.name] for field in dataclasses.fields(options)}


def ranges_of(options: type) -> dict[str, Range]:
    """What numbers may be, of those options that are some."""
    return {f.name: f.metadata["allowed"] for f in dataclasses.fields(options) if f.metadata["allowed"]}


def given(options: type, arguments: Mapping[str, Any], *, without: Iterable[str] = ()) -> dict[str, Any]:
    """Those of a constructor's `arguments` that are options, without some: what its groups begin with."""
    return {name: arguments[name] for name in types_of(options) if name not in without}


def preset_options(preset: str, options: dict) -> dict:
    """The options of `preset`; a ValueError where another value than the default was given for one of them."""
    usual = PionOptions()
    check_preset(preset, {name: value for name, value in options.items() if value != getattr(usual, name)})
    return PRESETS[preset]


def check_preset(preset: str, given: dict) -> None:
    """Raises ValueError for a preset that does not exist, or that sets one of the options `given` to another value."""
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    for option, value in PRESETS[preset].items():
        if given.get(option, value) != value:
            raise ValueError(
                f"preset={preset!r} sets {option}={value!r}, but {option}={given[option]!r} was given: "
                "leave out one of the two."
            )
