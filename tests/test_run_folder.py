"""What a run's record says of its arguments and its data."""

from __future__ import annotations

import json

import datasets
import torch
from accelerate.data_loader import IterableDatasetShard

from pion_hf.integrations import run_writer
from pion_hf.integrations.trl import PionSFTConfig


def test_secrets_are_left_out_and_tokens_of_the_text_are_not():
    args = PionSFTConfig(
        output_dir="out",
        eos_token="<end>",
        hub_token="secret",
        model_init_kwargs={"token": "secret", "revision": "main"},
        report_to="none",
        use_cpu=True,
    )
    said = run_writer.describe_arguments(args)
    assert said["eos_token"] == "<end>"
    assert said["model_init_kwargs"] == {"revision": "main"}
    assert "secret" not in json.dumps(said)


def test_the_rows_of_a_stream_are_not_counted():
    stream = datasets.Dataset.from_list([{"a": 1}]).to_iterable_dataset()
    for dataset in (stream, IterableDatasetShard(stream, num_processes=2)):
        said = run_writer.describe_data(torch.utils.data.DataLoader(dataset))
        assert said == "IterableDataset"
