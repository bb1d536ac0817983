"""The flags of the commands that take a recipe: dataclasses, and the parsers made of them.

Apart from the commands themselves, whose imports take seconds, so that `--help` need not wait for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import trl
from transformers.hf_argparser import HfArg
from trl.scripts.grpo import GRPOScriptArguments

from pion_hf.cli.recipe import RecipeParser
from pion_hf.integrations.trl_config import PionGRPOConfig, PionSFTConfig

# `pissa_niter_N` with any number N.
INITIALISATIONS = ("default", "gaussian", "pissa", "pissa_niter_N", "olora", "orthogonal", "eva")
STREAM_BUFFER = 1_000  # documents, as in `IterableDataset.shuffle`
STREAM_HELD_OUT = 1_000  # documents of a stream that are evaluated: more would mean to read on for every evaluation
# What `reward_funcs` knows by name: the function's import path, and the package that some need.
OWN = {name: f"pion_hf.cli.rewards.{name}" for name in ("reasoning_gym_reward", "answer_similarity_reward")}
OF_TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
REWARDS = {**OWN, **{name: f"trl.rewards.{name}" for name in OF_TRL}}


@dataclass
class ModelArguments(trl.ModelConfig):
    """TRL's, and what its parser lacks."""

    init_lora_weights: str | None = HfArg(
        default=None,
        help=f"How a LoRA adapter starts, one of peft's ways: {', '.join(INITIALISATIONS)}. Those that change "
        "the base model (pissa, olora) are converted when training ends, to load onto the unchanged one.",
    )


@dataclass
class ReportArguments:
    """What is measured before and after training, besides the evaluation loss."""

    exact_match_samples: int = HfArg(
        default=0, help="Generate answers to this many evaluation examples, before and after (0: none)."
    )
    max_new_tokens: int = HfArg(default=32, help="Longest generated answer, in tokens.")
    other_text_file: str | None = HfArg(
        default=None, help="Text of another domain: its loss before and after shows what was forgotten."
    )
    other_dataset: str | None = HfArg(
        default=None,
        help="Chat data of another domain, a folder or a name at the hub: the loss of its answers before and "
        "after, and with exact_match_samples the share that is still right.",
    )
    other_dataset_split: str = HfArg(default="test", help="Which split of other_dataset.")
    blend: float = HfArg(
        default=1.0,
        help="The share of what training changed that the final model keeps: its weights become start + blend * "
        "(trained - start). Around 0.8 it forgets much less and has learnt nearly as much.",
    )
    blend_shares: list[float] | None = HfArg(
        default=None, help="Shares to measure too, in eval.json and a table: 0.4 0.6 0.8, say."
    )
    lm_eval_tasks: list[str] | None = HfArg(
        default=None,
        help="Tasks of lm-evaluation-harness to measure too, before and after: names of its tasks or groups, or "
        "patterns, as in ifeval,arc_easy,mmlu_*. Needs pip install 'pion_hf[eval]'.",
    )
    lm_eval_limit: int | None = HfArg(default=None, help="Only the first so many questions of each of lm_eval_tasks.")
    lm_eval_include_path: str | None = HfArg(
        default=None, help="A folder with task files of your own, whose names lm_eval_tasks then knows."
    )
    lm_eval_num_fewshot: int | None = HfArg(
        default=None, help="Worked examples before each question of lm_eval_tasks (default: as each task says)."
    )
    lm_eval_apply_chat_template: bool = HfArg(
        default=False, help="Ask lm_eval_tasks in the model's chat template, not as plain text."
    )


@dataclass
class ScratchArguments:
    """Training from scratch."""

    from_config: bool = HfArg(
        default=False, help="Start from the config in model_name_or_path with fresh weights, drawn from seed."
    )
    spectral_init: float | None = HfArg(
        default=None, help="With from_config: rescale hidden matrices to a spectral norm of this times sqrt(out/in)."
    )


@dataclass
class CorpusArguments:
    """Documents, and how much of them."""

    sample_by: Literal["document", "paragraph", "line"] = HfArg(
        default="document",
        help="What is one document in local .txt files: the whole file (document), or each of its paragraphs "
        "or lines. In .jsonl and .parquet files it is a row.",
    )
    validation_fraction: float | None = HfArg(
        default=None,
        help="Where the data have no dataset_test_split: hold out this share of the documents for evaluation. A "
        "hash of its text decides on a document, whatever the seed: all copies of it are on one side. Of a stream, "
        f"the first {STREAM_HELD_OUT:,} that are found in its files are evaluated.",
    )
    max_tokens: int | None = HfArg(
        default=None,
        help="Train on this many tokens: sets max_steps, rounded down, by the tokens of a step (max_length x "
        "per_device_train_batch_size x gradient_accumulation_steps x processes).",
    )
    shuffle_buffer: int | None = HfArg(
        default=None,
        help="Streaming: shuffle the files, and draw documents at random from a buffer of this many (default "
        f"{STREAM_BUFFER:,}; 0: in the order of the files).",
    )


@dataclass
class RewardArguments(GRPOScriptArguments):
    """TRL's, with one more reward."""

    reward_funcs: list[str] | None = HfArg(
        default=None, help=f"Rewards, which are added up: {', '.join(REWARDS)}, or import paths of functions."
    )


@dataclass
class PlanArguments:
    """What `pion-hf plan` writes besides the tables."""

    routing_file: str | None = HfArg(default=None, help="Also write the routing as JSON to this file.")
    plot: str | None = HfArg(
        default=None, help="Also draw the learning rates of all groups over max_steps to this picture, as in rates.png."
    )


# The dataclasses of every command, in the order in which its parser returns them.
FLAGS: dict[str, tuple[type, ...]] = {
    "sft": (trl.ScriptArguments, PionSFTConfig, ModelArguments, trl.DatasetMixtureConfig, ReportArguments),
    "grpo": (RewardArguments, PionGRPOConfig, ModelArguments, trl.DatasetMixtureConfig, ReportArguments),
}
FLAGS["cpt"] = (*FLAGS["sft"], ScratchArguments, CorpusArguments)
FLAGS["plan"] = (*FLAGS["cpt"], PlanArguments)

# Other defaults than TRL's.
DEFAULTS = {"cpt": {"packing": True, "packing_strategy": "wrapped"}}

DESCRIPTIONS = {
    "sft": """\
`pion-hf sft`: TRL's supervised fine-tuning script with this package's optimizer, and a report at the end.
""",
    "cpt": """\
`pion-hf cpt`: continued pretraining on plain text, packed, with this package's optimizer and a report at the end.

`dataset_name` is a folder of .txt, .jsonl or .parquet files, one such file, a folder that `save_to_disk` wrote, or a
name at the hub. A row is a document, its text in the column `dataset_text_field` (default `text`); so is a .txt file
(see `sample_by`). `dataset_streaming` reads while training, over and over, for `max_steps` or `max_tokens`; a run that
is resumed reads again what it has trained on, without training, and goes on at the same row.

Every flag of `trl sft` works, with two other defaults: `packing` is on, and `packing_strategy` is `wrapped`, which
joins all documents, an end-of-text token after each, and cuts rows of `max_length`. So no text is lost, in training or
evaluation, and the rows are equally long (the last of every 1,000 documents may be shorter), which makes losses
comparable. A row may begin with the end of another document, which attention sees. TRL's `bfd_split` keeps documents
apart, but only through position ids: without flash attention that takes one dense mask over the whole batch (nearly
twice the time of a step on a CPU), and models whose masks ignore position ids (OPT, MPT, Mamba) see other documents all
the same. TRL's own default, `bfd`, drops what is longer than `max_length`.
""",
    "grpo": """\
`pion-hf grpo`: TRL's GRPO script with this package's optimizer, rewards by rule, and a report at the end.

Data are rows with a column `prompt`. The model's own answers are scored by `reward_funcs`: our own (on data of
examples/prepare_reasoning.py), TRL's, or any function by its import path; by `reward_model_name_or_path`;
or by both. With `eval_strategy` the mean rewards on the evaluation data are measured before training and after it.
""",
    "plan": """\
`pion-hf plan`: routing table, learning rates, memory of a step and bytes of optimizer state, without weights.
""",
}


def parser(command: str, arguments: tuple[type, ...] | None = None) -> RecipeParser:
    """The parser of `pion-hf <command>`. arguments: other dataclasses than those in `FLAGS`."""
    made = RecipeParser(arguments or FLAGS[command], prog=f"pion-hf {command}", description=DESCRIPTIONS[command])
    made.set_defaults(**DEFAULTS.get(command, {}))
    return made
