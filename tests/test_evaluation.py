"""What the report measures, against direct computations."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from pathlib import Path

import evaluate
import pytest
import torch
import trl
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from pion_hf.cli import main
from pion_hf.cli.before_after import ReportMixin
from pion_hf.cli.training import ReportingSFTTrainer
from pion_hf.integrations.evaluation import (
    answer_tokens,
    around_answer,
    ends_of_answers,
    exact_match,
    generate_answers,
    perplexity,
    progress,
    prompts_and_answers,
    text_loss,
    token_loss,
)
from pion_hf.integrations.metrics import EXACT_MATCH
from pion_hf.integrations.model_card import table_rows
from tests.conftest import CHAT_TEMPLATE, chat_rows, toy_llama, write_jsonl
from tests.test_cli import fails

ROOT = Path(__file__).parents[1]


class Student(nn.Module):
    """Generates what `answers` says about a prompt, or nothing."""

    def __init__(self, tokenizer, answers: dict[str, str]) -> None:
        super().__init__()
        self.tokenizer, self.answers, self.seen, self.device = tokenizer, answers, [], torch.device("cpu")

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, pad_token_id, eos_token_id):
        assert not do_sample
        assert not self.training
        # Padding is on the left: what is generated follows the prompt.
        assert (attention_mask[:, -1] == 1).all()
        assert torch.equal(attention_mask == 0, input_ids == pad_token_id)
        added = torch.full((len(input_ids), max_new_tokens), eos_token_id)
        for row, ids in enumerate(input_ids):
            prompt = self.tokenizer.decode(ids[ids != pad_token_id])
            assert prompt.endswith("<assistant>")
            self.seen.append(prompt)
            answer = self.tokenizer(self.answers.get(prompt, ""), add_special_tokens=False)["input_ids"]
            added[row, : len(answer)] = torch.tensor(answer, dtype=torch.long)
        return torch.cat([input_ids, added], dim=1)


def test_exact_match_metric():
    metric = evaluate.load(EXACT_MATCH)
    assert metric.compute(predictions=["a", " b\n", "c", ""], references=["a", "b", "d", "e"]) == {"exact_match": 0.5}
    metric.add_batch(predictions=["x"], references=["x"])
    metric.add_batch(predictions=["y", "Z"], references=["y", "z"])
    assert metric.compute() == {"exact_match": pytest.approx(2 / 3)}


def test_exact_match_of_generated_answers(tokenizer):
    rows = chat_rows(10)
    rows[3]["prompt"] = [{"role": "user", "content": "what is 3 + 4, as a number?"}]  # lengths differ: padding
    texts = [tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True) for r in rows]
    answers = {t: r["completion"][0]["content"] for t, r in zip(texts, rows, strict=True)}
    answers[texts[0]] += "0"
    del answers[texts[3]]
    student = Student(tokenizer, answers).train()
    side = tokenizer.padding_side
    found = generate_answers(student, tokenizer, rows, batch_size=4, max_new_tokens=6)
    assert exact_match(found, rows) == pytest.approx(0.8)
    assert [answer == row["completion"][0]["content"] for answer, row in zip(found, rows, strict=True)] == [
        *(False, True, True, False),
        *[True] * 6,
    ]
    assert sorted(student.seen) == sorted(texts)
    assert student.training
    assert tokenizer.padding_side == side


def test_answers_of_a_model(model, tokenizer):
    answers = generate_answers(model, tokenizer, chat_rows(3), max_new_tokens=2)
    assert len(answers) == 3
    assert 0 <= exact_match(answers, chat_rows(3)) <= 1


class Endless(Student):
    """Ends its answers with one token, and goes on as a model does that nobody stops."""

    def __init__(self, tokenizer, answers, end: str, stops: list[int] | None = None) -> None:
        super().__init__(tokenizer, answers)
        self.end = tokenizer.convert_tokens_to_ids(end)
        self.generation_config = GenerationConfig(eos_token_id=stops)

    def generate(self, input_ids, eos_token_id, max_new_tokens, **options):
        ends = torch.tensor(eos_token_id).view(-1)
        produced = super().generate(input_ids, eos_token_id=self.end, max_new_tokens=max_new_tokens, **options)
        if self.end not in ends:
            produced[:, -1] = self.tokenizer.convert_tokens_to_ids("7")
        return produced


ENDS_IN_USER = CHAT_TEMPLATE.replace("<end>", "{{ '\\n<system>\\n' if message['role'] == 'assistant' else '<end>' }}")


@pytest.mark.parametrize(
    ("end", "template", "stops"),
    [
        ("<system>", ENDS_IN_USER, None),  # only the template says so: a base model's tokenizer with a chat template
        ("<system>", CHAT_TEMPLATE, ["<end>", "<system>"]),  # only the generation config does
        ("<end>", ENDS_IN_USER, ["<system>"]),  # only the tokenizer does
    ],
)
def test_an_answer_ends_with_any_token_that_model_tokenizer_or_template_ends_it_with(tokenizer, end, template, stops):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    rows = chat_rows(3)
    texts = [tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True) for r in rows]
    answers = {t: r["completion"][0]["content"] for t, r in zip(texts, rows, strict=True)}
    student = Endless(tokenizer, answers, end, stops and tokenizer.convert_tokens_to_ids(stops))
    assert exact_match(generate_answers(student, tokenizer, rows, max_new_tokens=6), rows) == 1


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("gemma3", "<end_of_turn>"),
        ("gptoss", "<|return|>"),
        ("llama3", "<|eot_id|>"),
        ("phi3", "<|end|>"),
        ("qwen3", "<|im_end|>"),
    ],
)
def test_the_templates_of_models_say_what_ends_an_answer(tokenizer, template, end):
    file = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    if not file.is_file():
        pytest.skip(f"TRL {trl.__version__} has no {file.name}")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    special = sorted(set(re.findall(r"<[|a-z/][^<>\s'\"{}]*>", tokenizer.chat_template)))
    tokenizer.add_special_tokens({"bos_token": "<begin>", "additional_special_tokens": special})
    _, after = around_answer(tokenizer, chat_rows(1)[0]["prompt"])
    ids = ends_of_answers(nn.Identity(), tokenizer, after)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<end>", end]


def test_what_the_template_writes_before_an_answer_is_no_part_of_it(tokenizer):
    """As Qwen3's, which writes an empty thought before the last answer, and so teaches it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{{ '<system>[]\\n' if loop.last and message['role'] == 'assistant' }}{{ message['content'] }}",
    )
    rows = chat_rows(3)
    texts = [tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True) for r in rows]
    written = ["<system>[]\n3", "1", "<system>[]\n["]  # as taught, without, and wrong
    student = Student(tokenizer, dict(zip(texts, written, strict=True)))
    assert generate_answers(student, tokenizer, rows, max_new_tokens=6) == ["3", "1", "["]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_options_of_the_template_reach_the_prompts_as_in_training(tokenizer, as_text):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ tools[0].function.name if tools }}{{ mode }}" + CHAT_TEMPLATE
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    plain, own = chat_rows(2)
    own |= {"tools": json.dumps(tools) if as_text else tools, "chat_template_kwargs": {"mode": "!"}}
    plain |= {"tools": None, "chat_template_kwargs": None}
    student = Student(tokenizer, {})
    generate_answers(student, tokenizer, [plain, own], max_new_tokens=2)
    assert sorted(student.seen) == sorted(["<user>0+3=<end><assistant>", "add!<user>1+0=<end><assistant>"])
    student.seen.clear()
    generate_answers(student, tokenizer, [plain], max_new_tokens=2, template_kwargs={"mode": "?"})
    assert student.seen == ["?<user>0+3=<end><assistant>"]
    assert [tokenizer.decode(ids) for ids, _ in answer_tokens(tokenizer, [plain, own])] == [
        "<user>0+3=<end><assistant>3<end>",
        "add!<user>1+0=<end><assistant>1<end>",
    ]


def test_chat_rows_of_both_forms():
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [{"messages": [question, answer]}, {"prompt": [question], "completion": [answer]}]
    assert prompts_and_answers(rows) == [([question], "a")] * 2
    longer = [question, answer, question]
    assert prompts_and_answers([{"prompt": [question], "completion": [*longer[1:], answer]}]) == [(longer, "a")]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "plain"},
        {"messages": []},
        {"messages": [{"role": "user", "content": "q"}]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": []},
        {"prompt": [{"role": "user", "content": "q"}]},
        {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
    ],
)
def test_rows_that_are_no_chat(row):
    with pytest.raises(ValueError, match="these are no chats with an answer") as raised:
        prompts_and_answers([row])
    assert str(sorted(row)) in str(raised.value)


@torch.no_grad()
def test_text_loss_is_the_mean_next_token_loss(model, tokenizer):
    text = "the quick brown fox jumps over the lazy dog; " * 4
    ids = torch.tensor(tokenizer(text)["input_ids"])
    window = 16
    stretches = ids[: len(ids) // window * window].view(-1, window)
    assert len(stretches) == 11
    logits = model.eval()(stretches).logits[:, :-1]
    direct = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), stretches[:, 1:].reshape(-1)).item()
    model.train()
    # Batches of 4, 4 and 3: a short batch counts by its length.
    assert text_loss(model, tokenizer, text, window=window, batch_size=4) == pytest.approx(direct, rel=1e-5)
    assert model.training


@torch.no_grad()
def test_text_loss_takes_evenly_spaced_windows(model, tokenizer):
    text = "".join(chr(33 + i % 90) for i in range(80))
    ids = torch.tensor(tokenizer(text)["input_ids"]).view(10, 8)
    stretches = ids[[0, 3, 6]]
    direct = model.eval()(stretches, labels=stretches).loss.item()
    assert text_loss(model, tokenizer, text, window=8, windows=3) == pytest.approx(direct, rel=1e-5)


def test_text_shorter_than_a_window(model, tokenizer):
    with pytest.raises(ValueError, match="5 tokens, fewer than one window of 256"):
        text_loss(model, tokenizer, "short")


# -- loss of answers --------------------------------------------------------------------------------


def test_only_the_last_answer_is_labelled(tokenizer):
    question, answer = {"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}
    first = {"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}
    for row in ({"messages": [*first, question, answer]}, {"prompt": [*first, question], "completion": [answer]}):
        ((ids, labels),) = answer_tokens(tokenizer, [row])
        assert tokenizer.decode(ids) == "<user>2+2=<end><assistant>4<end><user>1+2=<end><assistant>3<end>"
        assert tokenizer.decode(labels[labels != -100]) == "3<end>"
        assert torch.equal(labels[labels != -100], ids[-2:])


def test_rows_that_are_too_long_are_left_out(tokenizer):
    rows = chat_rows(4)
    rows[1]["prompt"] = [{"role": "user", "content": "9" * 50}]
    assert len(answer_tokens(tokenizer, rows, max_length=20)) == 3
    with pytest.raises(ValueError, match="no row of the chat data has an answer within 5 tokens"):
        answer_tokens(tokenizer, rows, max_length=5)


@torch.no_grad()
def test_token_loss_weighs_every_labelled_token_alike(model, tokenizer):
    rows = chat_rows(5)
    rows[2]["completion"] = [{"role": "assistant", "content": "a long answer to a short question"}]
    rows = answer_tokens(tokenizer, rows)
    losses = []
    model.eval()
    for ids, labels in rows:
        logits = model(ids[None]).logits[0, :-1]
        losses += nn.functional.cross_entropy(logits, labels[1:], reduction="none")[labels[1:] != -100].tolist()
    model.train()
    for batch_size in (1, 2, 8, None):
        assert token_loss(model, rows, batch_size=batch_size) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert model.training


def test_batches_of_long_rows_are_small(tokenizer):
    class Counting(nn.Module):
        def forward(self, input_ids, attention_mask, labels, use_cache):
            sizes.append(tuple(input_ids.shape))
            return type("Output", (), {"loss": torch.tensor(1.0)})

    model = Counting()
    model.device = torch.device("cpu")
    for length, wanted in ((256, [8, 2]), (1000, [2] * 5), (4000, [1] * 10)):
        sizes = []
        rows = [(ids, ids) for ids in torch.ones(10, length, dtype=torch.long)]
        assert token_loss(model, rows) == 1.0
        assert sizes == [(size, length) for size in wanted]


# -- what is made of the measures -------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "wanted"), [(0.0, 1.0), (2.5, math.exp(2.5)), (1e4, math.inf)])
def test_perplexity(loss, wanted):
    assert perplexity(loss) == pytest.approx(wanted)
    assert math.isnan(perplexity(math.nan))


def test_progress_is_a_lower_loss_or_a_higher_reward():
    assert progress({"loss": 3.0, "exact_match": 0.5}, {"loss": 2.5, "exact_match": 0.0}) == 0.5
    assert progress({"reward": 0.25}, {"reward": 1.0}) == 0.75
    assert progress({"exact_match": 0.25}, {"exact_match": 1.0}) is None


def test_rows_of_the_table():
    before = {"task": {"reward": 0.5}, "other_text": {"loss": 2.0, "perplexity": 7.389, "exact_match": 0.125}}
    after = {"task": {"reward": 1.0}, "other_text": {"loss": 2.25, "perplexity": 9.488, "exact_match": 0.0}}
    assert [tuple(row.values()) for row in table_rows(before, after)] == [
        ("task", "reward", "0.5000", "1.0000"),
        ("other text", "loss", "2.0000", "2.2500"),
        ("other text", "perplexity", "7.39", "9.49"),
        ("other text", "exact match", "12.5%", "0.0%"),
    ]


def test_a_standard_error_stands_behind_its_figure():
    before = {"lm_eval/arc_easy": {"acc_norm": 0.25, "acc_norm_stderr": 0.0125}}
    after = {
        "lm_eval/arc_easy": {"acc_norm": 0.5, "acc_norm_stderr": 0.025},
        "lm_eval/gsm8k": {"exact_match,strict-match": 0.125, "exact_match_stderr,strict-match": 0.01, "f1,other": 0.5},
    }
    assert [tuple(row.values()) for row in table_rows(before, after)] == [
        ("lm_eval/arc_easy", "acc norm", "0.2500 ± 0.0125", "0.5000 ± 0.0250"),
        ("lm_eval/gsm8k", "exact match, strict-match", "", "12.5% ± 1.0%"),
        ("lm_eval/gsm8k", "f1, other", "", "0.5000"),
    ]


# -- the report of a training -----------------------------------------------------------------------


def strict(path: Path) -> dict:
    """JSON without the NaN and Infinity that Python adds to it."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.fixture
def other_data(tmp_path) -> Path:
    folder = tmp_path / "other"
    folder.mkdir()
    rows = [{"messages": [*r["prompt"], {"role": "assistant", "content": "No."}]} for r in chat_rows(6)]
    write_jsonl(folder / "test.jsonl", rows)
    write_jsonl(folder / "train.jsonl", rows[:2])
    return folder


def test_chats_of_another_domain_are_measured(recipe, other_data, tmp_path, tokenizer, capsys, monkeypatch):
    answered = []

    def half(model, tokenizer, rows, max_new_tokens, template_kwargs):
        answered.append((rows, max_new_tokens))
        return [answer if i % 2 else "" for i, (_, answer) in enumerate(prompts_and_answers(rows))]

    monkeypatch.setattr("pion_hf.cli.before_after.generate_answers", half)
    changes = {"other_dataset": str(other_data), "exact_match_samples": 2, "max_new_tokens": 3, "max_steps": 4}
    main(["sft", "--config", recipe(**changes)])
    record = strict(tmp_path / "run" / "eval.json")
    rows = [json.loads(line) for line in (other_data / "test.jsonl").read_text().splitlines()]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for moment, model in (("before", toy_llama()), ("after", trained)):
        assert list(record[moment]) == ["task", "other_dataset"]
        measures = record[moment]["other_dataset"]
        assert measures["loss"] == pytest.approx(token_loss(model, answer_tokens(tokenizer, rows)), rel=1e-5)
        assert measures["perplexity"] == pytest.approx(math.exp(measures["loss"]))
        assert measures["exact_match"] == 0.5
    assert answered == [(chat_rows(2, first=100), 3), (rows[:2], 3)] * 2
    lost = record["after"]["other_dataset"]["loss"] - record["before"]["other_dataset"]["loss"]
    assert record["forgotten"] == {"other_dataset": lost}
    assert "other dataset: exact match" in capsys.readouterr().out


def test_without_evaluation_data_the_other_domain_still_counts(recipe, other_data, tmp_path):
    path = recipe(eval_strategy="no", other_dataset=str(other_data), exact_match_samples=2, max_new_tokens=3)
    main(["sft", "--config", path, "--other_dataset_split", "train"])
    record = strict(tmp_path / "run" / "eval.json")
    assert list(record["after"]) == ["other_dataset"]
    assert "learnt" not in record


def test_a_task_can_bring_measures_of_its_own(recipe, tmp_path, monkeypatch):
    rewards = iter([0.25, 0.75])
    monkeypatch.setattr(ReportMixin, "measure_task", lambda self: {"reward": next(rewards)})
    main(["sft", "--config", recipe()])
    record = strict(tmp_path / "run" / "eval.json")
    assert (record["before"], record["after"]) == ({"task": {"reward": 0.25}}, {"task": {"reward": 0.75}})
    assert record["learnt"] == 0.5


def test_a_number_that_is_none_is_null(recipe, tmp_path, monkeypatch, capsys):
    losses = iter([800.0, math.nan])
    monkeypatch.setattr(ReportMixin, "evaluation", lambda self: {"eval_loss": next(losses)})
    main(["sft", "--config", recipe()])
    record = strict(tmp_path / "run" / "eval.json")
    assert record["before"]["task"] == {"loss": 800.0, "perplexity": None}
    assert record["after"]["task"] == {"loss": None, "perplexity": None}
    assert "nan" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_leaves_neither_half_of_it_nor_that_of_the_run_before(
    recipe, tmp_path, monkeypatch, capsys
):
    main(["sft", "--config", recipe()])
    path, weights = tmp_path / "run" / "eval.json", tmp_path / "run" / "model.safetensors"
    before = weights.read_bytes()
    assert path.is_file()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    main(["sft", "--config", recipe(learning_rate=3e-2)])
    assert not path.exists()
    assert weights.read_bytes() != before  # the record never costs the weights
    assert "pion, 2 steps" in capsys.readouterr().out


@pytest.fixture
def loads_nothing(monkeypatch):
    """No model may be loaded."""

    def load(*args, **kwargs):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", load)


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"other_dataset": "{tmp}/nowhere"}, "other_dataset: there is no file or folder '{tmp}/nowhere'"),
        (
            {"other_dataset": "{tmp}/other", "other_dataset_split": "tset"},
            "other_dataset_split: 'tset' is not a known split of '{tmp}/other'. Did you mean 'test'",
        ),
        ({"other_dataset": "{tmp}/broken"}, "other_dataset: cannot load '{tmp}/broken': "),
        ({"other_dataset": "{tmp}/plain"}, "other_dataset='{tmp}/plain': these are no chats with an answer"),
        ({"other_text_file": "{tmp}/bytes"}, "other_text_file: cannot read '{tmp}/bytes' as UTF-8 text: "),
        (
            {"dataset_name": "{tmp}/plain", "exact_match_samples": 1},
            "exact_match_samples: these are no chats with an answer",
        ),
        ({"output_dir": "{tmp}/bytes"}, "output_dir='{tmp}/bytes': '{tmp}/bytes' is no folder; choose another"),
        ({"output_dir": "{tmp}/bytes/run"}, "output_dir='{tmp}/bytes/run': '{tmp}/bytes' is no folder"),
        ({"output_dir": "{tmp}/locked/a/b"}, "'{tmp}/locked' cannot be written to"),
    ],
)
def test_reports_that_cannot_be_made_stop_before_a_model_is_loaded(
    changes, message, recipe, other_data, tmp_path, monkeypatch
):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\xd8")
    for name in ("locked", "plain", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "test.jsonl").write_text('{"messages": [')
    write_jsonl(tmp_path / "plain" / "train.jsonl", [{"text": "plain"}] * 4)
    write_jsonl(tmp_path / "plain" / "test.jsonl", [{"text": "plain"}] * 4)
    access = os.access  # root may write to any folder
    monkeypatch.setattr(
        os, "access", lambda path, mode: (path, mode & os.W_OK) != (tmp_path / "locked", os.W_OK) and access(path, mode)
    )
    before = sorted(tmp_path.rglob("*"))
    said = fails("sft", "--config", recipe(**{k: str(v).format(tmp=tmp_path) for k, v in changes.items()}))
    assert message.format(tmp=tmp_path) in said
    assert "\n" not in said
    assert sorted(p for p in tmp_path.rglob("*") if p.name != "recipe.yaml") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"other_text_file": "{tmp}/short"}, "other_text_file='{tmp}/short': the text has 5 tokens, fewer than one"),
        ({"other_dataset": "{tmp}/long"}, "other_dataset='{tmp}/long': no row of the chat data has an answer within"),
    ],
)
def test_what_only_the_tokenizer_can_tell_stops_before_training(changes, message, recipe, tmp_path, monkeypatch):
    (tmp_path / "short").write_text("short")
    (tmp_path / "long").mkdir()
    row = {"prompt": [{"role": "user", "content": "9" * 2000}], "completion": [{"role": "assistant", "content": "1"}]}
    write_jsonl(tmp_path / "long" / "test.jsonl", [row])
    monkeypatch.setattr(ReportingSFTTrainer, "train", lambda self, **kwargs: pytest.fail("it trained"))
    said = fails("sft", "--config", recipe(**{k: v.format(tmp=tmp_path) for k, v in changes.items()}))
    assert message.format(tmp=tmp_path) in said
    assert "\n" not in said
    assert not list((tmp_path / "run").glob("*"))


# -- recipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*/*/*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_measures_its_task_and_what_is_forgotten(path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert recipe["eval_strategy"] != "no"
    assert recipe.get("other_text_file") or recipe.get("other_dataset")
    if path.parent.name == "sft" and recipe["dataset_name"] == "data/reasoning":  # its answers are short
        assert recipe["exact_match_samples"] > 0
