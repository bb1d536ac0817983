"""How LoRA adapters start (`--init_lora_weights`), and that what is saved fits the model as it was downloaded."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from peft import EvaConfig, PeftConfig, get_peft_model_state_dict
from peft.tuners.lora.eva import initialize_lora_eva_weights, prepare_model_inputs_fn_language_modeling

from pion_hf.cli.flags import INITIALISATIONS, ModelArguments
from pion_hf.errors import unknown
from pion_hf.integrations.arguments import OptimizerFields, option_types, parse_optim_args, resolve_options
from pion_hf.integrations.trl import PionSFTTrainer


def initialisation(word: str | bool) -> str | bool:
    """`init_lora_weights` as peft takes it."""
    word = str(word).lower()
    if word in ("default", "true"):
        return True
    if word not in INITIALISATIONS and not re.fullmatch(r"pissa_niter_[1-9]\d*", word):
        raise unknown("value of init_lora_weights", word, INITIALISATIONS)
    return word


def changes_base(init: str | bool) -> bool:
    """Whether peft takes the adapter's start out of the base weights."""
    return isinstance(init, str) and (init == "olora" or init.startswith("pissa"))


def check_adapter(model_args: ModelArguments) -> None:
    """Raise ValueError, before anything is loaded, for an `init_lora_weights` that nothing could follow."""
    if model_args.init_lora_weights is None:
        return
    initialisation(model_args.init_lora_weights)
    if not model_args.use_peft:
        raise ValueError("init_lora_weights is for LoRA adapters: set use_peft too, or leave it out")


def check_start(args: OptimizerFields, model_args: ModelArguments) -> None:
    """Raise ValueError, before anything is loaded, for adapters that rotations of this package could not train."""
    if "lora_a" not in option_types(args.optim.value) or model_args.init_lora_weights is None:
        return
    _, methods = resolve_options(args.optim.value, args.given_options(), parse_optim_args(args.optim_args))
    rotates = {"lora_a": "rotate"} | methods
    if initialisation(model_args.init_lora_weights) == "orthogonal" and "rotate" in rotates.values():
        factor = next(name for name, method in rotates.items() if method == "rotate")
        raise ValueError(
            "init_lora_weights='orthogonal' gives factors of half their rank, and a rotation can never fill the rest: "
            f"start otherwise ('gaussian', say), or let the factor grow (optim_{factor}: orthogonal)"
        )


def set_initialisation(config: PeftConfig, word: str | bool) -> None:
    """Write it into the config from which TRL's trainer makes the adapter."""
    config.init_lora_weights = initialisation(word)
    if config.init_lora_weights == "eva":
        config.eva_config = EvaConfig()


class AdapterSFTTrainer(PionSFTTrainer):
    """Finishes what peft's initialisations leave to the caller, at the beginning of training and at its end.

    `eva` needs data: batches of training data go through the model. `pissa` and `olora` leave a base model without the
    adapter's start: the adapter in `output_dir` is converted (to twice the rank), so that it loads onto the original
    model. Checkpoints within it stay as they are trained, for training to resume from them.
    """

    def __init__(self, *args: Any, peft_config: PeftConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, peft_config=peft_config, **kwargs)
        self._initial: tempfile.TemporaryDirectory | None = None
        init = getattr(peft_config, "init_lora_weights", True)
        if init == "eva":
            self._initialise_from_data()
        if changes_base(init):
            self._keep_initial(init)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        output_dir = output_dir or self.args.output_dir
        if self._initial is not None and self.args.should_save and Path(output_dir) == Path(self.args.output_dir):
            self.model.save_pretrained(output_dir, path_initial_model_for_weight_conversion=self._initial_adapter)

    @property
    def _initial_adapter(self) -> str:
        return str(Path(self._initial.name) / "initial_adapter")  # peft names an adapter after the folder

    def _keep_initial(self, init: str) -> None:
        others = [n for n in get_peft_model_state_dict(self.model) if not re.search(r"\.lora_[AB]\.", n)]
        if others:  # peft's conversion drops them without a word
            raise ValueError(
                f"init_lora_weights={init!r} changes the base model, and an adapter that also trains {others[0]} "
                "cannot be converted back: leave out lora_modules_to_save, use_dora and embeddings, or start otherwise"
            )
        self._initial = tempfile.TemporaryDirectory(prefix="pion_hf-")
        self.model.save_pretrained(self._initial_adapter)

    def _initialise_from_data(self) -> None:
        if not hasattr(self.train_dataset, "__len__"):
            raise ValueError("init_lora_weights='eva' reads the data more than once: leave out dataset_streaming")
        loader = self.get_train_dataloader()
        config = self.model.peft_config["default"]
        # peft skips a batch of fewer tokens than directions it looks for: without end, if all are.
        wanted, batch = round(config.r * config.eva_config.rho), next(iter(loader))
        for config.eva_config.use_label_mask in (True, False):  # the answers' tokens alone, or the prompts' too
            if len(prepare_model_inputs_fn_language_modeling(batch, config)) >= wanted:
                break
        else:
            raise ValueError(
                f"init_lora_weights='eva' needs batches of {wanted} tokens or more ({config.eva_config.rho:g} lora_r): "
                "raise per_device_train_batch_size"
            )
        with self.accelerator.autocast():
            initialize_lora_eva_weights(self.model, loader, show_progress_bar=not self.args.disable_tqdm)
