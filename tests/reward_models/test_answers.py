"""`reward_models.answers`: exact match and F1 by hand, as SQuAD's evaluation script gives them."""

import pytest
from datasets import Dataset

from data.files import load_rows
from reward_models.answers import exact_match, references, token_f1, words
from reward_models.functions import load_functions


def chat(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


# What the official script normalises: case, punctuation, articles, white space, in this order of its own.
WORDS = {
    "The Eiffel Tower!": ["eiffel", "tower"],
    "an  apple,\n a pear": ["apple", "pear"],
    "U.S.": ["us"],  # punctuation goes before words are told apart
    "well-known": ["wellknown"],
    "theatre, another": ["theatre", "another"],  # articles are whole words
    "the": [],
    "a.": [],
    "": [],
    "«Le» Havre’s": ["«le»", "havre’s"],  # punctuation of ASCII alone
    "The THE then": ["then"],
    "A-level": ["alevel"],  # no article is left once the hyphen is gone
}


@pytest.mark.parametrize("answer", WORDS)
def test_words_that_count(answer):
    assert words(answer) == WORDS[answer]


# completion, references, exact match, F1
SCORED = {
    "the same": (" The Ring", ["the ring."], 1, 1),
    "half of it": ("Mary", ["Mary Scott"], 0, 2 * 1 / (1 + 2)),
    "more than it": ("It was Mary Scott", ["Mary Scott"], 0, 2 * 2 / (4 + 2)),
    "the best of several": ("Scott", ["Mary Scott", "Scott"], 1, 1),
    "the best is partial": ("Anne Scott", ["Mary Scott", "Mary Anne Scott"], 0, 2 * 2 / (2 + 3)),
    "another order": ("Scott Mary", ["Mary Scott"], 0, 1),
    "a word twice": ("Mary Mary", ["Mary Scott"], 0, 2 * 1 / (2 + 2)),
    "a word twice on both sides": ("New York New York", ["New York, New York"], 1, 1),
    "nothing shared": ("Paris", ["London"], 0, 0),
    "nothing said": ("", ["London"], 0, 0),
    "only an article said": ("The", ["London"], 0, 0),
    "no answer, none given": (" ", [], 1, 1),
    "no answer, one given": ("London", [], 0, 0),
    "a reference without words is left out": ("", ["the", "London"], 0, 0),
    "only such references": ("a", ["the"], 1, 1),
}


@pytest.mark.parametrize("kind", [str, chat], ids=["text", "conversation"])
@pytest.mark.parametrize(("completion", "answers", "exact", "f1"), SCORED.values(), ids=SCORED)
def test_scores_by_hand(completion, answers, exact, f1, kind):
    given = {"prompts": ["?"], "completions": [kind(completion)], "completion_ids": [[1]], "answers": [answers]}
    assert exact_match(**given) == [exact]
    assert token_f1(**given) == [pytest.approx(f1)]


# cell, number of its references
FORMS = {
    "text": ("Mary Scott", 1),
    "list": (["Mary Scott", "Scott"], 2),
    "SQuAD's files": ([{"text": "Mary Scott", "answer_start": 4}, {"text": "Scott", "answer_start": 9}], 2),
    "SQuAD on the hub": ({"text": ["Mary Scott", "Scott"], "answer_start": [4, 9]}, 2),
    "one answer of it": ({"text": "Mary Scott", "answer_start": 4}, 1),
}


@pytest.mark.parametrize(("answers", "count"), FORMS.values(), ids=FORMS)
def test_forms_of_references(answers, count):
    assert references(answers) == [["mary", "scott"], ["scott"]][:count]


@pytest.mark.parametrize("answers", [None, 3, [3], {"answer": "x"}, {"text": None}, [["x"]], [{"text": ["x"]}]])
def test_what_is_no_reference(answers):
    with pytest.raises(
        ValueError, match=r"^'answers' must be a text, a list of texts, or SQuAD's .* Correct the row\. "
    ):
        exact_match(completions=["x"], answers=[answers])


@pytest.mark.parametrize("function", [exact_match, token_f1])
def test_references_for_each_completion(function):
    assert function(["a b", "c", "c"], answers=["a b", ["c"], "d"]) == [1, 1, 0]
    with pytest.raises(ValueError):
        function(["a", "b"], answers=["a"])


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_of_squad_as_a_file_has_them(tmp_path, suffix):
    """Both rows of a column are structs, one of them without an answer (SQuAD 2.0)."""
    rows = [
        {"prompt": "Who? ", "answers": {"text": ["Mary Scott", "Scott"], "answer_start": [4, 9]}},
        {"prompt": "Where? ", "answers": {"text": [], "answer_start": []}},
    ]
    path, data = str(tmp_path / f"squad.{suffix}"), Dataset.from_list(rows)
    data.to_json(path) if suffix == "jsonl" else data.to_parquet(path)
    read = load_rows(path, "train")
    (function,) = load_functions(["reward_models.answers.token_f1"], read, path)
    assert function(completions=["Mary", "Paris"], answers=read["answers"][:]) == [pytest.approx(2 / 3), 0]
    assert function(completions=["SCOTT.", ""], answers=read["answers"][:]) == [1, 1]
