"""`data.prompts`: prompts pass with all their columns, and a prompt that cannot be used is named."""

import json

import datasets
import pytest
from datasets import Dataset

from data.prompts import check_prompt_lengths, check_prompts, load_prompts


CHAT = [{"role": "user", "content": "one two"}]


class WordTokenizer:
    """One token per word; a chat adds one for each message's role and one for the answer's."""

    chat_template = "any"

    def __call__(self, texts):
        return {"input_ids": [text.split() for text in texts]}

    def apply_chat_template(self, chats, *, add_generation_prompt, tokenize, return_dict):
        assert add_generation_prompt and tokenize and return_dict
        words = [[word for m in chat for word in ["role", *m["content"].split()]] for chat in chats]
        return {"input_ids": [chat + ["role"] for chat in words]}


@pytest.mark.parametrize("prompt", ["The film", CHAT])
def test_all_columns_are_kept(prompt):
    rows = [{"prompt": prompt, "answer": 4}, {"prompt": prompt, "answer": 5}]
    assert list(check_prompts(Dataset.from_list(rows), "p")) == rows


def test_missing_column():
    with pytest.raises(ValueError, match=r"^p: no column 'prompt'; .*found: \['prompts'\]\. Did you mean 'prompts'\?"):
        check_prompts(Dataset.from_dict({"prompts": ["a"]}), "p")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", None], r"'prompt' must be text, or a list of messages .*, but is None\."),
        (["a", ""], r"'prompt' must not be empty, but is ''\."),
        (["a", "\t"], r"'prompt' must not be empty, but is '\\t'\."),
        ([CHAT, []], r"'prompt' must be text, or a list of messages .*, but is \[\]\."),
        ([CHAT, [{"role": "user", "content": " "}]], r"'prompt' must not be empty, but is \[\{"),
    ],
)
def test_bad_prompt(prompts, message):
    with pytest.raises(ValueError, match=rf"^p row 2 \(counting from 1\): {message}"):
        check_prompts(Dataset.from_dict({"prompt": prompts}), "p")


def test_load_prompts_reads_and_checks(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "The film"}) + "\n")
    assert list(load_prompts(str(path), "train")) == [{"prompt": "The film"}]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(json.dumps({"prompt": CHAT}) + "\n" + json.dumps({"prompt": "The film"}) + "\n")
    with pytest.raises(ValueError, match=r"mixed\.jsonl row 2 .*'prompt' must be a conversation \(texts and conver"):
        load_prompts(str(mixed), "train")


@pytest.mark.parametrize(("prompt", "tokens"), [("one two three", 3), (CHAT, 4)])
def test_prompt_lengths(prompt, tokens):
    rows = Dataset.from_list([{"prompt": prompt}])
    check_prompt_lengths(rows, WordTokenizer(), tokens + 10, 10, "p")
    message = rf"^p row 1 \(counting from 1\): 'prompt' .* has {tokens} tokens\. With max_completion_length=10"
    with pytest.raises(
        ValueError, match=message + rf" it exceeds the model's context of {tokens + 9} tokens\. Shorten"
    ):
        check_prompt_lengths(rows, WordTokenizer(), tokens + 9, 10, "p")


def test_the_first_too_long_prompt_is_named():
    rows = Dataset.from_dict({"prompt": ["a", "a b", "a b c", "a b c d"]})
    with pytest.raises(ValueError, match=r"^p row 3 \(counting from 1\): 'prompt' 'a b c' has 3 tokens"):
        check_prompt_lengths(rows, WordTokenizer(), 12, 10, "p")


def test_conversation_needs_a_chat_template(monkeypatch):
    monkeypatch.setattr(WordTokenizer, "chat_template", None)
    check_prompt_lengths(Dataset.from_dict({"prompt": ["a"]}), WordTokenizer(), 12, 10, "p")
    with pytest.raises(ValueError, match=r"^p row 1 .*'prompt' is a conversation .* tokenizer has no chat template"):
        check_prompt_lengths(Dataset.from_dict({"prompt": [CHAT]}), WordTokenizer(), 99, 10, "p")


def test_bad_prompts_are_left_out_with_all_their_columns(caplog):
    rows = Dataset.from_list([{"prompt": text, "answer": number} for number, text in enumerate(["a", " ", "b"])])
    assert check_prompts(rows, "p", drop=True)["answer"][:] == [0, 2]
    assert "1 of 3 rows are left out: 1 because 'prompt' must not be empty (first: row 2)" in caplog.text
