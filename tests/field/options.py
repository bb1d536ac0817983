"""Strings of `optim_args`: what is no option or value is refused by name, what is one arrives as it was meant."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import peft

from pion_hf import param_groups
from pion_hf.integrations.arguments import OPTIMIZER_CLASSES, parse_optim_args, resolve_options
from tests.conftest import toy_llama
from tests.field.trial import Input
from tests.field.world import World

# Optimizer, text -> what a refusal names.
REFUSED: dict[tuple[str, str], tuple[str, ...]] = {
    **{
        ("pion", text): (text.split("=")[0].strip() or "=",)
        for text in (
            *("rms", "rms=", "=0.2", "rms 0.2", "rms:0.2", "rms==0.2", "rms=0.2=0.3", "rms=x", "rms=nan", "rms=inf"),
            *("rms=-1", "rms=0", "rms=[0.2]", "rms=(0.2, 0.3)", "rms={}", "rms=true", "rms=None", "rms=1e999"),
            *("side=left", "side=IN", "side=3", "side=true", "side=[in]", "side=none", "sid=in", "Side=in"),
            *("momentum=0.9", "momentum_frame=0.9", "direction=adamw", "metric=euclid", "scale=1", "hold=0", "hold=x"),
            *("polar_steps=0", "polar_steps=2.5", "polar_steps=x", "degree=0", "degree=1.5", "degree=100"),
            *("compile=maybe", "compile=3", "second_moment=maybe", "keep=-1", "keep=1.5", "keep=all", "keep=true"),
            *("batch_elements=0", "batch_elements=x", "preset=papers", "preset=3", "adamw_lr=-1", "adamw_lr=fast"),
            *("betas=0.9", "betas=(0.9,)", "betas=(0.9, 1.5)", "betas=(a, b)", "adamw_betas=0.9", "share_work=maybe"),
            *("lr=1e-3", "learning_rate=1", "weight_decay=0.1", "fused=true", "foreach=true", "optim_bits=8"),
            *("stack=2", "nesterov=true", "inputs=3", "params=3", "__class__=3", "self=3", "nothing=1"),
            *("targets=", "retraction=cayley", "generator_dtype=fp8", "rank_tolerance=0.02", "eps=-1", "eps=x"),
        )
    },
    ("pion", "rms=0.2, rms=0.3"): ("rms",),
    ("pion", "betas=(0.9, 0.95"): ("betas",),
    ("pion", "side='in"): ("side",),
    ("pion", "targets=[q_proj, k_proj"): ("targets",),
    ("pion", "rms=0.2; side=in"): ("rms", "side"),
    ("pion", "rms=0.2 side=in"): ("rms", "side"),
    ("pion", '{"rms": 0.2}'): ("rms",),
    ("pion", "--rms=0.2"): ("rms",),
    ("pion", "rms=__import__('os').system('touch planted')"): ("rms",),
    ("pion_ambient", "momentum_frame=lie"): ("momentum_frame",),
    ("pion_ambient", "side=both"): ("side",),
    ("pion_ambient", "rms=0.2"): ("rms",),
    ("pion_ambient", "preset=paper"): ("preset",),
    ("pion_ambient", "preset=ambient"): ("preset",),
    ("muon", "stack=2"): ("stack",),
    ("muon", "hold=0.1"): ("hold",),
    ("muon", "degree=2"): ("degree",),
    ("muon", "momentum_frame=lie"): ("momentum_frame",),
    ("muon", "momentum=2"): ("momentum",),
    ("teon", "stack=0"): ("stack",),
    ("teon", "stack=1.5"): ("stack",),
    ("teon", "stack=x"): ("stack",),
    ("teon", "side=in"): ("side",),
    ("adamw_routed", "rms=0.2"): ("rms",),
    ("pion_lora", "a=sideways"): ("a",),
    ("teon_lora", "side=in"): ("side",),
}
TAKEN: dict[tuple[str, str], dict[str, Any]] = {
    ("pion", ""): {},
    ("pion", " "): {},
    ("pion", ","): {},
    ("pion", "rms=0.2"): {"rms": 0.2},
    ("pion", "rms=2e-1,"): {"rms": 0.2},
    ("pion", " rms = 0.2 , side = in "): {"rms": 0.2, "side": "in"},
    ("pion", "rms='0.2'"): {"rms": 0.2},
    ("pion", "rms=1"): {"rms": 1.0},
    ("pion", "side='in'"): {"side": "in"},
    ("pion", 'side="out"'): {"side": "out"},
    ("pion", "betas=(0.9, 0.95)"): {"betas": (0.9, 0.95)},
    ("pion", "betas=[0.9,0.95], rms=0.1"): {"betas": (0.9, 0.95), "rms": 0.1},
    ("pion", "degree=3.0"): {"degree": 3},
    ("pion", "scale=none"): {"scale": "none"},
    ("pion", "scale=None"): {"scale": "none"},
    ("pion", "compile=TRUE"): {"compile": True},
    ("pion", "batch_elements=None"): {"batch_elements": None},
    ("pion", "eps=0"): {"eps": 0.0},
    ("pion", "preset=ambient"): {"preset": "ambient"},
    ("pion", "momentum_frame=lie"): {"momentum_frame": "lie"},
    ("pion", "side=both"): {"side": "both"},
    ("pion_ambient", "side=in"): {"preset": "ambient", "side": "in"},
    ("muon", "momentum=0.9, nesterov=false"): {"momentum": 0.9, "nesterov": False},
    ("pion", "targets=[q_proj, k_proj]"): {"targets": ["q_proj", "k_proj"]},
    ("pion", r"targets='.*\.q_proj'"): {"targets": [r".*\.q_proj"]},
}


def refused(optim: str, text: str, world: World, folder: Path) -> Any:
    """Options go where the Trainer puts them: into the groups of a model, and the optimizer of them."""
    own, of_groups = resolve_options(optim, {}, parse_optim_args(text))
    model = toy_llama()
    if "lora" in optim:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    return OPTIMIZER_CLASSES[optim](param_groups(model, optim, lr=1e-3, **of_groups), lr=1e-3, **own)


def arrives(optim: str, text: str, wanted: dict[str, Any], world: World, folder: Path) -> bool:
    own, of_groups = resolve_options(optim, {}, parse_optim_args(text))
    found = {**own, **of_groups}
    return all(found.get(key) == value and type(found.get(key)) is type(value) for key, value in wanted.items())


def yes(world: World, result: bool) -> bool:
    return result


KIND = "optim_args"
INPUTS = [
    *(
        Input(KIND, f"{optim}: {text}", partial(refused, optim, text), names, call=True, alone=True)
        for (optim, text), names in REFUSED.items()
    ),
    *(
        Input(KIND, f"{optim}: {text!r} is taken", partial(arrives, optim, text, wanted), (), yes, True, True)
        for (optim, text), wanted in TAKEN.items()
    ),
]
