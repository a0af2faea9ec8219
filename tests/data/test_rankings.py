"""`data.rankings`: rankings are checked row by row, pairs are rankings of two, and lengths are those of the longest text."""

import json

import pytest
from datasets import Dataset

from data.cells import CellError
from data.rankings import check_ranking, check_rankings, load_rankings, prepare_rankings, whole_texts, with_prompts
from data.rows import Rows


def say(*words: str) -> list[dict]:
    roles = ("user", "assistant") * len(words)
    return [{"role": role, "content": text} for role, text in zip(roles, words, strict=False)]


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


TOOL = {"role": "tool", "content": "3"}
GOOD = {
    "texts": {"prompt": "The film", "ranking": [" is fine.", " is so so.", " is bad."]},
    "whole texts": {"ranking": ["The film is fine.", "The film is bad."]},
    "answers": {"prompt": say("How?"), "ranking": [answer("a"), answer("b")]},
    "dialogues": {"ranking": [say("How?", "a"), say("How?", "b"), say("How?", "c")]},
    "texts in one": {"ranking": ["\n\nHuman: How?\n\nAssistant: a", "\n\nHuman: How?\n\nAssistant: b"]},
}


@pytest.mark.parametrize("row", GOOD.values(), ids=GOOD)
def test_rankings_are_kept_as_they_are(row):
    rows = check_rankings(Dataset.from_list([row | {"id": 7}]), "data")
    assert rows.to_list() == [row]
    prompt = row.get("prompt", "" if isinstance(row["ranking"][0], str) else [])
    assert whole_texts(rows) == [[prompt + entry for entry in row["ranking"]]]


BAD = {
    "one": ({"ranking": ["a"]}, "'ranking' must be a list of two or more completions, the best first, but is ['a']"),
    "a text": ({"ranking": "a"}, "must be a list of two or more"),
    "a missing cell": ({"ranking": None}, "must be a list of two or more"),
    "a dialogue": ({"ranking": say("a", "b")}, "must be a list of two or more"),
    "numbers": ({"ranking": [2, 1]}, "'ranking' must be text, or a list of messages"),
    "an empty one": ({"ranking": ["a", " "]}, "'ranking' must not be empty"),
    "twice": ({"prompt": "x", "ranking": [" a", " b", " a"]}, "'ranking' must not hold a completion twice"),
    "a mixture": ({"ranking": ["a", say("a", "b")]}, "'ranking' must be a text (texts and conversations do not mix)"),
    "no prompt in it": ({"prompt": 3, "ranking": ["a", "b"]}, "'prompt' must be text"),
    "a text for a dialogue": ({"prompt": "How?", "ranking": [answer("a"), answer("b")]}, "'prompt' must be a conversation"),
    "unanswered": ({"ranking": [say("a", "b"), say("a")]}, "'ranking' must end in an assistant turn"),
    "the prompt again": (
        {"prompt": say("How?"), "ranking": [say("How?", "a"), say("How?", "b")]},
        "'ranking' must begin with the answer, since the turns before it stand in 'prompt'",
    ),
    "the words again": (
        {"prompt": "The film", "ranking": ["The film is a.", "The film is b.", "The film is c."]},
        "'prompt' must not be repeated at the beginning of the completions",
    ),
    "two prompts": ({"ranking": [say("How?", "a"), say("How?", "b"), say("Why?", "c")]}, "must answer the same prompt as"),
    "another turn": (
        {"ranking": [say("How?", "a", "So?", "b"), say("How?", "a", "So?", "c"), say("How?", "d")]},
        "'ranking' must",
    ),
    "a tool's turn in two of three": (
        {"ranking": [*([*say("How?", "Look."), TOOL, *answer(text)] for text in "ab"), say("How?", "c")]},
        "'ranking' must hold answers to one prompt (the same turns before it)",
    ),
    "an open prompt": ({"prompt": say("How?", "So"), "ranking": [answer("a"), answer("b")]}, "'prompt' must end in a turn"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "problem"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_named(row, problem):
    with pytest.raises(CellError) as caught:
        check_ranking("data row 3", row, None)
    assert str(caught.value).startswith("data row 3: ") and problem in str(caught.value)
    assert "'chosen'" not in str(caught.value) and "'rejected'" not in str(caught.value)


def test_bad_rows_are_left_out_if_asked(tmp_path, caplog):
    file = tmp_path / "rankings.jsonl"
    rows = [GOOD["texts"], {"prompt": "x", "ranking": ["a"]}, GOOD["texts"] | {"prompt": "A film"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"rankings.jsonl row 2 \(counting from 1\): 'ranking' must be a list of two"):
        load_rankings(str(file), "train")
    kept = load_rankings(str(file), "train", drop=True)
    assert kept.to_list() == [rows[0], rows[2]] and kept.left_out == 1
    assert "1 of 3 rows are left out" in caplog.text


def test_other_columns_and_other_formats(tmp_path):
    with pytest.raises(ValueError, match="data: no column 'ranking'; needed: .*Did you mean 'rankings'. Rename it."):
        check_rankings(Dataset.from_list([{"rankings": ["a", "b"]}]), "data")
    rated = [{"prompt": "x", "responses": ["a", "b"], "ratings": [2, 1]}]
    with pytest.raises(
        ValueError, match="no column 'ranking'. The columns are ratings of texts .*leave loss_type unset"
    ):
        check_rankings(Dataset.from_list(rated), "data")
    file = tmp_path / "pairs.jsonl"
    pair = {"prompt": "x", "chosen": " a", "rejected": " b", "agreement": 0.75, "margin": 2.0}
    file.write_text(json.dumps(pair) + "\n")
    (found,) = load_rankings(str(file), "train").to_list()
    assert found == {"prompt": "x", "ranking": [" a", " b"], "agreement": 0.75, "margin": 2.0}
    file.write_text(json.dumps(pair | {"chosen": " b"}) + "\n")
    with pytest.raises(ValueError, match="'rejected' must differ from 'chosen'"):
        load_rankings(str(file), "train")


def test_prompts_are_split_from_rankings():
    def split(row: dict) -> dict:
        (found,) = with_prompts(check_rankings(Dataset.from_list([row]), "data"), "data").to_list()
        return found

    texts = ["The film is so bad.", "The film is fine.", "The film was ok."]
    assert split({"ranking": texts}) == {"prompt": "The film", "ranking": [text[8:] for text in texts]}
    assert split(GOOD["texts in one"]) == {"prompt": "\n\nHuman: How?\n\nAssistant:", "ranking": [" a", " b"]}
    assert split(GOOD["dialogues"]) == {"prompt": say("How?"), "ranking": [answer("a"), answer("b"), answer("c")]}
    assert split(GOOD["answers"]) == GOOD["answers"]
    rows = Rows.of_file(Dataset.from_list([GOOD["whole texts"], {"ranking": ["One film", "Two films"]}]), "data")
    with pytest.raises(ValueError, match=r"data row 2 .*'ranking' must hold texts that begin with the same words"):
        with_prompts(rows, "data")
    assert with_prompts(rows, "data", drop=True).to_list() == [split(GOOD["whole texts"])]
    with pytest.raises(ValueError, match="'prompt' must not be empty"):
        with_prompts(Dataset.from_list([{"prompt": " ", "ranking": ["a", "b"]}]), "data")


def test_lengths_in_tokens(tokenizer):
    rows = [
        {"prompt": "It was", "ranking": [" a", " a very long and dull film"]},
        {"prompt": "A", "ranking": [" b", " c"]},
    ]
    found, lengths = prepare_rankings(Dataset.from_list(rows), tokenizer, "data")
    assert found.to_list() == rows
    assert lengths.rows == [
        len(tokenizer(text)["input_ids"]) + 1 for text in ("It was a very long and dull film", "A b")
    ]
    assert lengths.prompts == [len(tokenizer(text)["input_ids"]) for text in ("It was", "A")]
    counts = lengths.counts(max_length=lengths.rows[1], drops=True)
    assert (counts.rows, counts.kept, counts.dropped) == (2, 1, 1)


def test_a_ranking_goes_with_the_conversation_that_the_template_refuses(tokenizer):
    tokenizer.chat_template = (
        "{% for turn in messages %}{% if turn['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "{{ turn['content'] }}{% endfor %}"
    )
    rows = [
        {"prompt": say("How?"), "ranking": [answer(text) for text in texts]}
        for texts in (("a", "b"), ("c", "bad", "d"), ("e", "f", "g"))
    ]
    rows = Rows.of_file(Dataset.from_list(rows), "data")
    with pytest.raises(
        ValueError, match=r"data row 2 \(counting from 1\): 'completion' is refused by the chat template"
    ):
        prepare_rankings(rows, tokenizer, "data")
    found, lengths = prepare_rankings(rows, tokenizer, "data", drop=True)
    assert found.numbers.tolist() == [1, 3] and len(lengths.rows) == 2
    assert found["ranking"][:] == [rows[0]["ranking"], rows[2]["ranking"]]
    assert lengths.counts(99).dropped == 1 and found.left_out == 1
