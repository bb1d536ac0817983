"""Rows that nobody can be trained on are refused by column and row; others are not."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from pion_hf.cli.grpo import check_columns
from pion_hf.cli.rows import check_chats, check_examples

QUESTION, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHAT = [QUESTION, ANSWER]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
TOOL = {"type": "function", "function": {"name": "f", "description": "g"}}
ROWS = {
    "messages": {"messages": CHAT},
    "messages with parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    "a call of a tool": {"messages": [QUESTION, CALL], "tools": [TOOL]},
    "tools as JSON": {"messages": CHAT, "tools": json.dumps([TOOL])},
    "no tools": {"messages": CHAT, "tools": None},
    "options of the template": {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}},
    "conversations": {"conversations": [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "text after text": {"prompt": "a", "completion": ""},
    "messages after messages": {"prompt": [QUESTION], "completion": [ANSWER]},
    "text": {"text": "a"},
    "text in a column of another name": {"prompt": "a"},
    "tokens": {"input_ids": [1, 2], "labels": [-100, 2], "completion_mask": [0, 1]},
}
# Rows -> what is said of them, after a row that is as it should be.
NONE: dict[str, tuple[dict, str]] = {
    "no list": ({"messages": "a"}, "in row 1 of 'messages' there is 'a', which is no list of messages"),
    "one message": ({"messages": QUESTION}, "which is no list of messages"),
    "texts": ({"messages": ["a"]}, "in row 1 of 'messages' there is 'a' instead of a message"),
    "a message of nothing": ({"messages": [QUESTION, None]}, "there is None instead of a message"),
    "no messages": ({"messages": []}, "in row 1 of 'messages' there are no messages"),
    "a role": ({"messages": [{"role": 1, "content": "a"}]}, "the role of a message is 1, which is no text"),
    "content": ({"messages": [{"role": "user", "content": 3}]}, "the content of a message is 3, which is no text"),
    "value": ({"conversations": [{"from": "user", "value": 3}]}, "the value of a message is 3, which is no text"),
    "text": ({"text": 1}, "in row 1 of 'text' there is 1, which is no text"),
    "a list of text": ({"text": ["a"]}, "in row 1 of 'text' there is ['a'], which is no text"),
    "blank": ({"text": " "}, "no row holds any text in 'text'"),
    "no completion": ({"prompt": "a"}, "has the columns prompt: sft needs messages"),
    "null": ({"prompt": "a", "completion": None}, "1 rows hold nothing in the column 'completion'"),
    "a number": (
        {"prompt": 1, "completion": "a"},
        "in row 1 of 'prompt' there is 1, which is neither text",
    ),
    "an answer": ({"prompt": [QUESTION], "completion": "b"}, "in row 1 one of 'prompt' and 'completion' is text, the"),
    "tools": ({"messages": CHAT, "tools": 3}, "in row 1 of 'tools' there is 3, which is no list of tools"),
    "JSON": ({"messages": CHAT, "tools": "x"}, "in row 1 of 'tools' there is 'x', which is no JSON (Expecting value"),
    "options": ({"messages": CHAT, "chat_template_kwargs": "x"}, "there is 'x', which holds no keys and values"),
    "no options": ({"messages": CHAT, "chat_template_kwargs": None}, "1 rows hold nothing in the column 'chat_templ"),
    "labels": ({"input_ids": [1, 2], "labels": [1]}, "row 1 holds not as many 'labels' as 'input_ids'"),
    "a mask": ({"input_ids": [1, 2], "assistant_masks": None}, "row 1 holds not as many 'assistant_masks' as"),
}


@pytest.mark.parametrize("words", ROWS)
def test_rows_that_can_be_trained_on_are_not_refused(words):
    data = Dataset.from_list([ROWS[words]] * 2)
    column = "prompt" if words == "text in a column of another name" else "text"
    check_examples(data, "data", column)
    check_examples(data.to_iterable_dataset(), "data", column)


@pytest.mark.parametrize("words", NONE)
def test_rows_that_cannot_are_refused_by_column_and_row(words):
    row, said = NONE[words]
    with pytest.raises(ValueError, match=r"the data|'input_ids'") as raised:
        check_examples(Dataset.from_list([row]), "data", "text")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_another_domain_may_tell_its_template_nothing():
    check_chats(Dataset.from_list([{"messages": CHAT, "tools": None, "chat_template_kwargs": None}]), "other_dataset")


@pytest.mark.parametrize("prompt", [1, ["a"], [], None, [{"content": "a"}], [{"role": "user"}]])
def test_prompts_of_rewards_are_text_or_messages(prompt):
    with pytest.raises(ValueError, match="'prompt'"):
        check_columns(Dataset.from_list([{"prompt": prompt}]), [])
    for right in ("a", [QUESTION]):
        check_columns(Dataset.from_list([{"prompt": right}]), [])
