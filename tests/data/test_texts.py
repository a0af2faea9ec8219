"""`data.texts`: each of TRL's formats for fine-tuning passes, and a row without text is named."""

import json

import datasets
import pytest
from datasets import Dataset

from data.texts import load_texts, tokenize_texts


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
NONE = MESSAGES[:1] + [{"role": "assistant", "content": ""}]
PAIR = {"prompt": "The film", "completion": " is good"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _save(tmp_path, *rows: dict) -> str:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "A film."},
        {"messages": MESSAGES},
        PAIR,
        {"prompt": "", "completion": "A film."},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    ],
)
def test_formats_keep_only_their_columns(tmp_path, row):
    path = _save(tmp_path, row | {"id": 1}, row | {"id": 2})
    assert list(load_texts(path, "train")) == [row, row]


def test_a_lone_prompt_column_is_dropped(tmp_path):
    assert load_texts(_save(tmp_path, {"prompt": "Hi", "messages": MESSAGES}), "train").column_names == ["messages"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "body": "b"}, r"the columns \['prompt', 'body'\] fit no format\."),
        ({"text": "a", "messages": MESSAGES}, r"the columns \['text', 'messages'\] fit several formats\."),
        ({"text": "a"} | PAIR, r"the columns \['text', 'prompt', 'completion'\] fit several formats\."),
    ],
)
def test_not_one_format(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"t\.jsonl: {message} Give exactly one of: text; messages; prompt and c"):
        load_texts(_save(tmp_path, row), "train")


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ({"text": "a"}, {"text": " "}, r"'text' must not be empty, but is ' '\."),
        ({"text": "a"}, {"text": None}, r"'text' must be text, or a list of messages .*, but is None\."),
        ({"text": "a"}, {"text": MESSAGES}, r"'text' must be a text \(texts and conversations do"),
        ({"messages": MESSAGES}, {"messages": NONE}, r"'messages' must not be empty, but is \[\{"),
        ({"messages": MESSAGES}, {"messages": "Hi"}, r"'messages' must be a conversation \(texts and conv"),
        (PAIR, PAIR | {"completion": "\n"}, r"'completion' must not be empty, but is '\\n'\."),
        (PAIR, PAIR | {"prompt": None}, r"'prompt' must be text, or a list of messages .*, but is None\."),
        (PAIR, PAIR | {"completion": MESSAGES}, r"'completion' must be a text \(texts and conversations do"),
    ],
)
def test_bad_row(tmp_path, good, bad, message):
    with pytest.raises(ValueError, match=rf"t\.jsonl row 2 \(counting from 1\): {message}"):
        load_texts(_save(tmp_path, good, bad), "train")


@pytest.mark.parametrize(("row", "kind"), [({"text": MESSAGES}, "text"), ({"messages": "Hi"}, "conversation")])
def test_column_of_the_other_kind(tmp_path, row, kind):
    with pytest.raises(ValueError, match=rf"t\.jsonl row 1 .* must be a {kind}"):
        load_texts(_save(tmp_path, row), "train")


def test_texts_end_in_the_end_of_text_once(tokenizer):
    end = tokenizer.eos_token_id
    texts = ["A film.", "A film." + tokenizer.eos_token]
    plain = tokenizer("A film.")["input_ids"]
    assert plain[-1] != end
    rows = Dataset.from_dict({"text": texts})
    assert tokenize_texts(rows, tokenizer, 100) == [[*plain, end], [*plain, end]]


def test_prompt_and_completion_are_one_text(tokenizer):
    rows = Dataset.from_dict({"prompt": ["The film", ""], "completion": [" is good", "A film."]})
    expected = tokenizer(["The film is good", "A film."])["input_ids"]
    assert tokenize_texts(rows, tokenizer, 100) == [[*ids, tokenizer.eos_token_id] for ids in expected]


@pytest.mark.parametrize(
    "columns", [{"messages": [MESSAGES]}, {"prompt": [MESSAGES[:1]], "completion": [MESSAGES[1:]]}]
)
def test_conversations_end_as_their_template_ends_them(tokenizer, columns):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    expected = tokenizer("user: Hi\nassistant: Hello.\n")["input_ids"]
    assert tokenize_texts(Dataset.from_dict(columns), tokenizer, 100) == [expected]


def test_texts_are_cut(tokenizer):
    rows = Dataset.from_dict({"text": ["One of the best, and the funniest, of the year", "A"]})
    long, short = tokenize_texts(rows, tokenizer, 4)
    assert long == tokenizer("One of the best, and the funniest, of the year")["input_ids"][:4]
    assert short == [*tokenizer("A")["input_ids"], tokenizer.eos_token_id]


def test_bad_texts_are_left_out(tmp_path):
    path = _save(tmp_path, {"messages": MESSAGES}, {"messages": NONE})
    assert list(load_texts(path, "train", drop=True)) == [{"messages": MESSAGES}]
