"""`pion-hf cpt`: continued pretraining on plain text, or from scratch; `flags` says how text is read and cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import transformers
import trl
from transformers.utils import logging

from pion_hf.cli import flags, training
from pion_hf.cli.corpus import check_corpus, load_corpus, located, rows_to_train, set_budget
from pion_hf.cli.recipe import RecipeParser
from pion_hf.cli.training import ReportingSFTTrainer, model_from_config, substituted, train
from pion_hf.errors import first_line
from pion_hf.integrations.initialization import spectral_init_
from pion_hf.integrations.trl_config import PionSFTConfig

logger = logging.get_logger(__name__)


def parser() -> RecipeParser:
    """Every flag of `pion-hf sft`, where to start from, and what to read."""
    return flags.parser("cpt")


def main(argv: list[str]) -> None:
    """Train; ends with a table and `eval.json` in the output folder."""
    parsed = parser().parse_recipe(argv)
    check(parsed)
    *common, scratch_args, corpus_args = parsed
    script_args, training_args, _, dataset_args, _ = common
    set_budget(training_args, corpus_args)
    _warn_of_cuts(training_args)

    # TRL's script loads data by one of these, once.
    loader = (trl, "get_dataset") if dataset_args.datasets else (datasets, "load_dataset")
    original = getattr(*loader)

    def corpus(*_: Any, **__: Any) -> dict[str, Any]:
        setattr(*loader, original)  # lm_eval loads its own
        return load_corpus(script_args, training_args, dataset_args, corpus_args)

    def make_trainer(*, model: str, args: PionSFTConfig, train_dataset: Any, **kwargs: Any) -> ReportingSFTTrainer:
        tokenizer = _tokenizer(model, args)
        train_dataset = rows_to_train(train_dataset, tokenizer, args)
        if scratch_args.from_config:
            model = fresh_model(model, args, scratch_args.spectral_init)
        return ReportingSFTTrainer(
            model=model, args=args, train_dataset=train_dataset, processing_class=tokenizer, **kwargs
        )

    with located(script_args, training_args), substituted(*loader, corpus):
        train(*common, make_trainer=make_trainer)


def fresh_model(name: str, args: PionSFTConfig, spectral_scale: float | None) -> transformers.PreTrainedModel:
    """A model of the config in `name`: `args.seed` draws its weights, `args.model_init_kwargs` are its options."""
    options, args.model_init_kwargs = args.model_init_kwargs, None  # TRL has nothing left to load
    transformers.set_seed(args.seed)
    model = model_from_config(name, **options)
    if spectral_scale is not None:
        spectral_init_(model, spectral_scale)
    return model


def _tokenizer(name: str, args: PionSFTConfig) -> transformers.PreTrainedTokenizerBase:
    options = {key: args.model_init_kwargs.get(key) for key in ("revision", "trust_remote_code")}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    except OSError as error:
        raise ValueError(f"no tokenizer at {name!r}: {first_line(error)}") from None
    if tokenizer.eos_token is None and args.eos_token is None:
        raise ValueError(f"the tokenizer of {name!r} has no end-of-text token to part documents by: set eos_token")
    # Documents longer than the model's context are cut later: nothing to warn of.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def check(parsed: Sequence[Any]) -> None:
    """Raise ValueError or FileNotFoundError for what can be told of the arguments before anything is loaded."""
    script_args, args, model_args, dataset_args, report_args, scratch_args, corpus_args = parsed
    if report_args.exact_match_samples:
        raise ValueError("exact_match_samples does not apply to plain text, which has no answers: leave it out")
    if scratch_args.spectral_init is not None and not scratch_args.from_config:
        raise ValueError(
            "spectral_init is for fresh weights, pretrained ones have their size: leave it out, or set from_config"
        )
    if scratch_args.from_config and (model_args.load_in_8bit or model_args.load_in_4bit):
        raise ValueError("from_config draws fresh weights, there are none to quantize: leave out load_in_8bit/4bit")
    check_corpus(script_args, args, dataset_args, corpus_args)
    training.check(parsed, reads_files=True)


def _warn_of_cuts(args: PionSFTConfig) -> None:
    """Of text that the options leave out."""
    cut = not args.packing or args.packing_strategy == "bfd" or (args.eval_packing is False)
    if cut and args.max_length is not None:
        logger.warning(
            f"What a document holds beyond max_length={args.max_length} tokens is left out where packing is off or its "
            "strategy is bfd. To use all text: packing: true, packing_strategy: wrapped, no eval_packing."
        )
