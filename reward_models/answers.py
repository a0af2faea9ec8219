"""Score short answers as SQuAD's evaluation script does: exact match and F1 of words, each with the best of the references.

The functions have TRL's protocol (see `reward_models.rules`) and read the dataset's column `answers`. They serve as rewards
and as judges. Source: Rajpurkar et al. (2016, arXiv 1606.05250, section 6.1) and (2018, arXiv 1806.03822) for questions
without an answer.
"""

import re
import string
from collections import Counter
from typing import Any


PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def words(answer: str) -> list[str]:
    """Return the words of an answer that count: in lower case, without ASCII punctuation and the articles a, an and the.

    Punctuation is removed before words are told apart, so "U.S." is the one word "us".
    """
    return ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split()


def references(answers: Any) -> list[list[str]]:
    """Return the words of each reference in a cell of the column `answers`.

    A cell is a text, a list of texts, a list of `{"text": ...}` (SQuAD's own files) or `{"text": [...]}` (SQuAD on the hub).
    Other keys are not read. References without a word that counts are left out. If none is left, the question has no
    answer, and the only reference is the empty one.

    Raises:
        ValueError: the cell is something else.
    """
    cell = answers.get("text") if isinstance(answers, dict) else answers
    entries = [cell] if isinstance(cell, str) else cell
    if isinstance(entries, list):
        texts: list[Any] = [entry.get("text") if isinstance(entry, dict) else entry for entry in entries]
        if all(isinstance(text, str) for text in texts):
            return [found for text in texts if (found := words(text))] or [[]]
    raise ValueError(
        f"'answers' must be a text, a list of texts, or SQuAD's {{'text': [...]}}, but is {str(answers)[:100]!r}. Correct the "
        f"row. A question without an answer has an empty list."
    )


def exact_match(completions: list, answers: list, **kwargs) -> list[float]:
    """Return 1 if the words of the completion are those of a reference, in their order, else 0."""
    return [
        float(words(_text(completion)) in references(cell))
        for completion, cell in zip(completions, answers, strict=True)
    ]


def token_f1(completions: list, answers: list, **kwargs) -> list[float]:
    """Return the F1 of the completion's words with the words of the best reference, in 0..1.

        F1 = 2 shared / (words of the completion + words of the reference)

    A word that stands twice on one side is shared as often as it stands on the other. If a side has no words, F1 is 1 if the
    other has none either, else 0.
    """
    return [
        max(_f1(words(_text(completion)), reference) for reference in references(cell))
        for completion, cell in zip(completions, answers, strict=True)
    ]


def _f1(ours: list[str], theirs: list[str]) -> float:
    shared = sum((Counter(ours) & Counter(theirs)).values())
    total = len(ours) + len(theirs)
    return 2 * shared / total if total else 1.0


def _text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]
