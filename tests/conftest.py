"""Shared fixtures: a toy Llama, its tokenizer and chat data, all made here, without a network."""

from __future__ import annotations

import atexit
import gc
import json
import operator
import os
import platform
import shutil
import string
import tempfile
from importlib.metadata import version
from pathlib import Path

# Before anything of Hugging Face is imported: no hub, no tracker, and caches that end with the session.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="pion_hf-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from pion_hf.linalg import rotation  # noqa: E402
from pion_hf.linalg.rotation import Factors, Fixed, product_of  # noqa: E402
from pion_hf.optim import blocks, sharding  # noqa: E402
from pion_hf.optim.base import MatrixOptimizer  # noqa: E402
from pion_hf.optim.masters import HALF, REST_DTYPES, join  # noqa: E402

# Those whose versions the end of a session tells.
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
SPECIAL_TOKENS = ["<pad>", "<end>", "<system>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collections that end every training need not look through it."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    """A test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)


def toy_llama(**options) -> LlamaForCausalLM:
    """2 layers of width 32 with tied embeddings; the same weights at every call."""
    config = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(string.printable),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def chat_rows(count: int, first: int = 0) -> list[dict]:
    """Additions below 20, as `prompt` and `completion` messages."""
    rows = []
    for i in range(first, first + count):
        a, b = i % 10, (7 * i + 3) % 10
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"{a}+{b}="}],
                "completion": [{"role": "assistant", "content": str(a + b)}],
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def model() -> LlamaForCausalLM:
    return toy_llama()


@pytest.fixture
def exact_rank(monkeypatch) -> None:
    """Only singular values that are zero to rounding count as zero, as in the literal references."""
    monkeypatch.setattr(rotation, "RANK_TOLERANCE", 0.0)


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character, and one per role."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *string.printable])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return toy_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    """The toy model and tokenizer as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    toy_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory) -> Path:
    """A folder that `load_dataset` reads: splits train and test."""
    folder = tmp_path_factory.mktemp("chat")
    write_jsonl(folder / "train.jsonl", chat_rows(16))
    write_jsonl(folder / "test.jsonl", chat_rows(4, first=100))
    return folder


@pytest.fixture
def token_rows() -> list[dict]:
    """Tokenised rows for a plain Trainer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 105, (16, 12), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def recipe(tmp_path, checkpoint, chat_data):
    """Writes a recipe for the toy model, with changes, and returns its path; None takes a key out."""

    def write(**changes) -> str:
        keys = {
            "model_name_or_path": str(checkpoint),
            "dataset_name": str(chat_data),
            "optim": "pion",
            "learning_rate": "1e-2",
            "optim_adamw_lr": 1e-3,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "bf16": False,
            "use_cpu": True,
            "eval_strategy": "epoch",
            "save_strategy": "no",
            "report_to": "none",
            "output_dir": str(tmp_path / "run"),
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a run of four steps, with its checkpoints 2 and 4, and what it was at its end in `end.pt`."""
    from tests.test_faults import everything, trainer_of

    folder = tmp_path_factory.mktemp("finished")
    trainer = trainer_of(folder, steps=4, logging_steps=1)
    trainer.train()
    torch.save(everything(trainer), folder / "end.pt")
    return folder


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def master(p: Tensor, optimizer: MatrixOptimizer) -> Tensor:
    """The float32 weight of which a half-precision parameter is the rounding, as its state has it; of others itself."""
    weight, state = sharding.whole(p.detach()), optimizer.state.get(p, {})
    if "rest" in state:
        return join(weight, sharding.whole(state["rest"]).view(REST_DTYPES[p.dtype]))
    if p.dtype not in HALF or "u.0" not in state:
        return weight
    layout = next(group["layout"] for group in optimizer.param_groups if any(q is p for q in group["params"]))
    found = weight.float()
    for i, view in enumerate(blocks.split(found, blocks.Layout.parse(layout))):
        own = {key.partition(".")[0]: sharding.whole(x) for key, x in state.items() if key.endswith(f".{i}")}
        tall, fixed = operator.gt(*blocks.merge_rows(view).shape[-2:]), None
        if "outputs" in own:
            sides = own["kept"], own["outputs"]
            fixed = Fixed(*(sides[::-1] if tall else sides), own["coupling"])
        w = product_of(Factors(own["u"], own["s"], own["v"]), fixed, transposed=tall)
        view.copy_(w.reshape(view.shape))
    return found


@pytest.fixture
def tried(record_property):
    """`tried(what, times, unit)`: a line for the table that ends the session, if the test comes to its end as well."""

    def note(what: str, times: int, unit: str) -> None:
        record_property("tried", (what, times, unit))

    return note


def pytest_collection_modifyitems(items) -> None:
    """The mark `tried` is the fixture for tests that cannot have one (hypothesis)."""
    for item in items:
        item.user_properties += [("tried", mark.args) for mark in item.iter_markers("tried")]


def pytest_terminal_summary(terminalreporter) -> None:
    """The versions that the tests ran with, which `-q` leaves out of a header, and the table of `tried`."""
    terminalreporter.section("versions")
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    terminalreporter.write_line(", ".join([f"Python {platform.python_version()}", *versions]))
    _summary_of_tried(terminalreporter)


def _summary_of_tried(terminalreporter) -> None:
    """What was tried, how often, and what was lost: what tests have noted with `tried`."""
    rows: dict[tuple[str, str], list[int]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in getattr(report, "user_properties", ()):
                if name == "tried" and report.when == "call" and not hasattr(report, "context"):
                    what, times, unit = value
                    row = rows.setdefault((what, unit), [0, 0])
                    row[0] += times
                    row[1] += times if outcome == "failed" else 0
    if rows:
        terminalreporter.section("what was tried, how often, what was lost")
        width = max(len(what) for what, _ in rows)
        for (what, unit), (times, lost) in sorted(rows.items()):
            terminalreporter.write_line(f"{what:{width}}  {times:>6,} {unit:<12}  {lost or 'nothing'} lost")
