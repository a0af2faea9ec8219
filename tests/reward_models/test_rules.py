"""`reward_models.rules`: written rewards, by hand."""

import pytest

from reward_models.rules import contains


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
