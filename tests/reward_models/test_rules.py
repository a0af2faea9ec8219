"""`reward_models.rules`: written rewards, by hand."""

import pytest

from reward_models.rules import (
    contains,
    get_length,
    get_regex,
    get_repetition,
    get_token_similarity,
    sentiment,
)


def chat(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


TEXTS = [" world", "the underworld!", " World", "", "w orld"]


@pytest.mark.parametrize("completions", [TEXTS, [chat(text) for text in TEXTS]], ids=["text", "conversation"])
def test_contains(completions):
    # The needle itself; inside a word; another case; nothing; with a gap.
    assert contains(completions, contains=["world"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_each_row_has_its_own_needle():
    assert contains(["a b", "a b", "a b"], contains=["b", "c", ""]) == [1.0, 0.0, 1.0]


def test_a_needle_for_each_completion():
    with pytest.raises(ValueError):
        contains(["a", "b"], contains=["a"])


def test_other_columns_are_taken():
    # TRL calls with these by keyword, and with every other column.
    found = contains(prompts=["p"], completions=["a"], completion_ids=[[1]], contains=["a"], trainer_state=None)
    assert found == [1.0]


@pytest.mark.parametrize("kind", [str, chat], ids=["text", "conversation"])
def test_regex(kind):
    completions = [kind(text) for text in ["It is 42.", "IT IS 7", "it is no number", ""]]
    assert get_regex(r"(?i)^it is \d+")(completions=completions, prompts=["p"] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert get_regex(r"\d+$")(completions) == [0.0, 1.0, 0.0, 0.0]


def test_what_is_no_regex():
    with pytest.raises(ValueError, match=r"^pattern='\(a' is not a regular expression: missing \), unterminated"):
        get_regex("(a")


def test_length():
    # Of 4 tokens: the target itself, one off (1 - 1/4) on either side, none, twice as many, more than that.
    ids = [[7] * n for n in (4, 3, 5, 0, 8, 20)]
    assert get_length(4)(completion_ids=ids, completions=[""] * 6) == [1.0, 0.75, 0.75, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", [str, chat], ids=["text", "conversation"])
def test_repetition(kind):
    completions = [kind(text) for text in ["a b a b", "a b c", "so so so so so", "a", ""]]
    # Of (a b)(b a)(a b) one repeats; none; of four times (so so) three repeat; no two words.
    assert get_repetition(2)(completions) == pytest.approx([-1 / 3, 0.0, -3 / 4, 0.0, 0.0])
    # Two of four words repeat; none; four of five; none.
    assert get_repetition(1)(completions) == pytest.approx([-2 / 4, 0.0, -4 / 5, 0.0, 0.0])


@pytest.mark.parametrize(("make", "name"), [(get_length, "target"), (get_repetition, "n")])
def test_options_out_of_range(make, name):
    with pytest.raises(ValueError, match=f"^{name}=0 is not a positive number of "):
        make(0)


def test_token_similarity(tiny, tokenizer):
    similarity = get_token_similarity(tiny)
    reference = " a film of wit"
    pieces = ["Ġa", "Ġfilm", "Ġof", "Ġwit"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(reference)["input_ids"]) == pieces
    completions = {
        " a film of wit": 4 / 4,
        " a film": 2 / 4,  # two of the reference's four
        " a film of wit!": 4 / 5,  # the fifth has no partner
        " a films of wit": (3 + 2 * 5 / (5 + 6)) / 4,  # "Ġfilm" is 5 characters of "Ġfilms"
        " film a of wit": (2 * 1 / 7 + 2 * 1 / 7 + 2) / 4,  # of "Ġa" and "Ġfilm" only the space matches
        "": 0.0,
    }
    ids = [tokenizer(text)["input_ids"] for text in completions]
    given = {"reference": [reference] * 6, "completions": list(completions)}
    assert similarity(completion_ids=ids, **given) == pytest.approx(list(completions.values()))
    ended = [row + [tokenizer.eos_token_id] for row in ids]  # the end of the text counts on neither side
    assert similarity(completion_ids=ended, **given) == pytest.approx(list(completions.values()))
    assert similarity(completion_ids=[[], []], reference=["", " a"]) == [0.0, 0.0]


def test_a_reference_for_each_completion(tiny):
    with pytest.raises(ValueError):
        get_token_similarity(tiny)(completion_ids=[[5], [6]], reference=["a"])


def test_a_token_that_the_tokenizer_has_not_is_like_none(tiny, tokenizer):
    known = tokenizer(" a film", add_special_tokens=False)["input_ids"]
    for beyond in (len(tokenizer), len(tokenizer) + 1000):
        found = get_token_similarity(tiny)(
            completion_ids=[known, [beyond, *known[1:]], [beyond]], reference=[" a film"] * 3
        )
        assert found == [1.0, pytest.approx(1 - 1 / len(known)), 0.0]


def test_sentiment_of_prompt_and_completion():
    # VADER's lexicon has "good" at +1.9 and negation times -0.74: x / sqrt(x^2 + 15) of 1.9 and of -1.406.
    prompts, completions = ["The film", "The film", "Good"], [" is good.", " is not good.", ""]
    assert sentiment(prompts=prompts, completions=completions) == [0.4404, -0.3412, 0.4404]
    # Of a conversation only the reply counts.
    asked = [[{"role": "user", "content": "Good?"}]] * 2
    assert sentiment(prompts=asked, completions=[chat("Good."), chat("The film.")]) == [0.4404, 0.0]
