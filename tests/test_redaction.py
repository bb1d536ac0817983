"""What counts as a secret, and that no file of a comparison holds one while its runs get them all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from pion_hf.cli import sft, study
from pion_hf.cli.comparison import make_record
from pion_hf.cli.grid import Trial
from pion_hf.cli.recipe import SECRETS, read_recipe
from pion_hf.redaction import is_secret, without_secrets

SECRET = (
    *("hub_token", "token", "use_auth_token", "push_to_hub_token", "HF_TOKEN", "WANDB_API_KEY", "api-key", "apiKey"),
    *("AWS_SECRET_ACCESS_KEY", "password", "PGPASSWORD", "db_passwd", "DB_PASS", "credentials", "Authorization"),
    *("key", "secret", "private_key", "GITHUB_PAT", "env", "proxy_auth", "accessTokens"),
)
HARMLESS = (
    *("eos_token", "pad_token", "image_token", "max_new_tokens", "max_tokens", "num_special_tokens", "tokenizer_name"),
    *("key_mapping", "passes", "compass", "keep", "optim_keep", "author", "pattern", "environment_name", "keys"),
)


def test_names_of_secrets():
    assert [name for name in SECRET if not is_secret(name, "x")] == []
    assert [name for name in HARMLESS if is_secret(name, "x")] == []
    assert not is_secret("use_auth_token", True), "yes is no secret"
    assert is_secret("password", 1234)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": [{"token": "t", "b": 1}], "c": "d"}, {"a": [{"b": 1}], "c": "d"}),
        ("https://user:p@ss@host/x.jsonl", "https://***@host/x.jsonl"),
        ("https://host/x?a=1&X-Amz-Signature=s&sig=s#f", "https://host/x?a=1&X-Amz-Signature=***&sig=***#f"),
        ('{"revision": "main", "token": "t"}', '{"revision": "main"}'),
        ("see https://host/a@b and me@host.org", "see https://host/a@b and me@host.org"),
        ({"proxies": {"https": "http://u:pw@proxy:80"}}, {"proxies": {"https": "http://***@proxy:80"}}),
        (None, None),
        (3e-4, 3e-4),
    ],
)
def test_secrets_are_left_out_at_any_depth(value, shown):
    assert without_secrets(value) == shown


RECIPE = {
    "optim": "pion",
    "hub_token": "SESAME-1",
    "env": {"MY_WORD": "SESAME-2"},
    "model_init_kwargs": {"token": "SESAME-3", "proxies": {"https": "http://me:SESAME-4@proxy"}, "dtype": "float32"},
    "dataset_name": "https://me:SESAME-5@host/rows.jsonl",
    "seed": 0,
}


def test_runs_get_the_secrets_that_no_file_of_a_comparison_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "CHILD", f"import os\nprint(os.environ['{SECRETS}'])\n")  # instead of a training
    output = tmp_path / "runs"
    trial = Trial("pion, password", 1e-3, 0, "sft", RECIPE)
    (_, ended) = study.run_all([trial], output, None, slots=1, keep_models=False)
    assert ended == ([], trial)
    folder = output / trial.folder
    given = (folder / "train.log").read_text(encoding="utf-8")
    assert {**read_recipe(folder / "recipe.yaml"), **yaml.safe_load(given)} == {**RECIPE, "output_dir": str(folder)}
    (folder / "train.log").write_text("ValueError: cannot read http://me:SESAME-6@host\n", encoding="utf-8")
    record = make_record(Path("r.yaml"), RECIPE, [trial], output, study.states([trial], output, None))
    assert record["runs"][0]["error"] == "ValueError: cannot read http://***@host"
    (output / "compare.json").write_text(json.dumps(record))
    for path in output.rglob("*"):
        if path.is_file() and path.name != "train.log":
            assert "SESAME" not in path.read_text(encoding="utf-8"), path
    assert (folder / "recipe.yaml").read_text().startswith("# Not written, since they are secrets or hold some: hub_to")
    assert "SESAME" not in str(os.listdir(output))


def test_a_run_adds_what_it_was_told_to_its_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "environ", {**os.environ, SECRETS: yaml.safe_dump({"hub_token": "SESAME", "env": {"A": "1"}})}
    )
    (tmp_path / "recipe.yaml").write_text(f"output_dir: {tmp_path}\nbf16: false\nreport_to: none\nrun_name: mine\n")
    _, args, *_ = sft.parser().parse_recipe(["--config", str(tmp_path / "recipe.yaml"), "--use_cpu"])
    assert (args.hub_token, args.run_name, os.environ["A"]) == ("SESAME", "mine", "1")
    assert SECRETS not in os.environ, "what this process starts would have it too"
