"""Whether training runs under bfloat16 autocast, where nobody said it should: what the hardware is faster in."""

from __future__ import annotations

import logging

import pytest
import torch

from pion_hf import PionTrainingArguments
from pion_hf.cli import sft
from pion_hf.integrations import arguments
from pion_hf.integrations.trl import (
    PionDPOConfig,
    PionGRPOConfig,
    PionKTOConfig,
    PionRewardConfig,
    PionSFTConfig,
)


@pytest.fixture
def cpu(monkeypatch, caplog):
    """A machine without a GPU whose processor multiplies bfloat16 so many times faster; what was said."""

    def make(speedup):
        monkeypatch.setattr(arguments, "bfloat16_speedup", lambda: speedup)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        arguments.logger.warning_once.cache_clear()
        return caplog

    yield make
    arguments.logger.warning_once.cache_clear()


TYPED = (PionTrainingArguments, PionSFTConfig, PionDPOConfig, PionKTOConfig, PionRewardConfig, PionGRPOConfig)


@pytest.mark.parametrize("config", TYPED)
@pytest.mark.parametrize(
    ("speedup", "said"),
    [
        (2.2, "bfloat16: this CPU multiplies bfloat16 2.2 times faster"),
        (0.043, "float32: this CPU multiplies bfloat16 23 times more slowly"),
    ],
)
def test_precision_that_is_left_open_is_what_the_processor_is_faster_in(config, speedup, said, cpu, tmp_path):
    caplog = cpu(speedup)
    for value in ("auto", None):
        args = config(output_dir=str(tmp_path), report_to="none", bf16=value)
        assert args.bf16 is (speedup > 1)
        assert args.device.type == "cpu"
        assert args.mixed_precision == ("bf16" if speedup > 1 else "no")
    assert caplog.text.count(said) == 1  # for a process


@pytest.mark.parametrize("config", TYPED[1:])
def test_a_bare_config_works_without_a_gpu(config, cpu, tmp_path):
    cpu(0.05)
    assert config(output_dir=str(tmp_path), report_to="none").bf16 is False
    assert config(output_dir=str(tmp_path), report_to="none", fp16=True).bf16 is False


def test_an_explicit_wish_is_followed_with_a_warning(cpu, tmp_path):
    caplog = cpu(0.25)
    args = PionSFTConfig(output_dir=str(tmp_path), report_to="none", bf16=True)
    assert args.bf16 is True
    assert not caplog.text  # nothing runs yet: `plan` reads recipes for other machines
    arguments.warn_of_slow_bfloat16(args)
    assert "bf16=True, but this CPU multiplies bfloat16 4.0 times more slowly than float32" in caplog.text
    caplog.clear()
    cpu(2.0)
    arguments.warn_of_slow_bfloat16(args)
    arguments.warn_of_slow_bfloat16(PionSFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False))
    assert not caplog.text


@pytest.mark.parametrize("ampere", [True, False])
def test_a_gpu_is_asked_and_not_measured(ampere, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(arguments, "is_torch_bf16_gpu_available", lambda: ampere)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: ampere)
    monkeypatch.setattr(arguments, "bfloat16_speedup", lambda: pytest.fail("measured"))
    assert PionSFTConfig(output_dir=str(tmp_path), report_to="none").bf16 is ampere


@pytest.mark.parametrize("words", [[], ["--bf16", "auto"], ["--bf16=auto"], ["--config", "{recipe}"]])
def test_the_commands_know_auto(words, cpu, tmp_path, recipe):
    cpu(0.1)
    words = [word.format(recipe=recipe(bf16="auto")) for word in words]
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path)]
    assert sft.parser().parse_recipe([*flags, *words])[1].bf16 is False
    cpu(2.0)
    assert sft.parser().parse_recipe([*flags, *words])[1].bf16 is True
    assert sft.parser().parse_recipe([*flags, *words, "--bf16", "false"])[1].bf16 is False


def test_a_word_that_is_no_precision_is_refused(tmp_path, recipe):
    for words in (["--bf16", "fast"], ["--config", recipe(bf16="fast")]):
        with pytest.raises(ValueError, match="bf16"):
            sft.parser().parse_recipe(words)
