"""What the report measures, against direct computations."""

from __future__ import annotations

import evaluate
import pytest
import torch
from torch import nn

from pion_hf.evaluation import exact_match, prompts_and_answers, text_loss
from pion_hf.metrics import EXACT_MATCH
from tests.conftest import chat_rows


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
    assert exact_match(student, tokenizer, rows, batch_size=4, max_new_tokens=6) == pytest.approx(0.8)
    assert sorted(student.seen) == sorted(texts)
    assert student.training
    assert tokenizer.padding_side == side


def test_exact_match_runs_on_a_model(model, tokenizer):
    assert 0 <= exact_match(model, tokenizer, chat_rows(3), max_new_tokens=2) <= 1


def test_chat_rows_of_both_forms():
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert prompts_and_answers([{"messages": [question, answer]}, {"prompt": [question], "completion": [answer]}]) == [
        ([question], "a"),
        ([question], "a"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "plain"},
        {"messages": []},
        {"messages": [{"role": "user", "content": "q"}]},
        {"prompt": "q", "completion": "a"},
    ],
)
def test_rows_that_are_no_chat(row):
    with pytest.raises(ValueError, match=r"exact match needs chat data") as raised:
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
