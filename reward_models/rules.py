"""Rewards that are written, not learned: functions of TRL's reward protocol.

TRL calls a reward function with `prompts`, `completions` (texts, or lists of messages), `completion_ids` (the sampled
tokens, with the end-of-text token where the completion ended by itself) and every column of the dataset, each a list
with one entry a row (B,), and takes one number a row. What is named `get_...` makes such a function from its options.
`trl.rewards` has more: format, accuracy, punishment of overlong completions.
"""

import re
from collections.abc import Callable
from difflib import SequenceMatcher
from functools import cache

from transformers import AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from data.embedded import find_embedded


def _texts(completions: list) -> list[str]:
    return [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]


def contains(completions: list, contains: list[str], **kwargs) -> list[float]:
    """1 when the completion contains the text in the row's `contains` column, else 0."""
    return [1.0 if needle in text else 0.0 for text, needle in zip(_texts(completions), contains, strict=True)]


def get_regex(pattern: str) -> Callable:
    """A function that gives 1 when Python's regular expression `pattern` is found in the completion, else 0.

    It is searched anywhere: anchor it with `^` and `$`, ignore case with `(?i)`.

    Raises:
        ValueError: not a regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is not a regular expression: {error}.") from error

    def regex(completions: list, **kwargs) -> list[float]:
        return [1.0 if compiled.search(text) else 0.0 for text in _texts(completions)]

    return regex


def get_length(target: int) -> Callable:
    """A function that gives 1 to a completion of `target` tokens, its end-of-text token among them, and less in
    proportion to the distance from it: 0 to an empty completion and to one of twice the target or more.

    Raises:
        ValueError: target is below 1.
    """
    if target < 1:
        raise ValueError(f"target={target} is not a positive number of tokens.")

    def length(completion_ids: list[list[int]], **kwargs) -> list[float]:
        return [max(0.0, 1 - abs(len(ids) - target) / target) for ids in completion_ids]

    return length


def get_repetition(n: int) -> Callable:
    """A function that gives minus the share of a completion's word n-grams that repeat an earlier one, in -1..0.

    One less distinct-n of the completion (`pipeline.reports.metrics.distinct_n`, Li et al. 2016), so that it holds down what
    the report measures. `trl.rewards.get_repetition_penalty_reward` does the same to tokens.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n={n} is not a positive number of words.")

    def repetition(completions: list, **kwargs) -> list[float]:
        return [distinct_n([text], n) - 1 if len(text.split()) >= n else 0.0 for text in _texts(completions)]

    return repetition


def get_token_similarity(tokenizer: str) -> Callable:
    """A function that compares a completion, token by token, with the text in the row's `reference` column, in 0..1:

        R = 1/K * sum over k of similarity(y_k, z_k),   y_k the k-th reference token, z_k the k-th completion token

    The formula leaves K and the similarity open. We read K as the length of the longer one and give 0 where only one
    has a token, so that neither stopping early nor running on pays. Two tokens are as similar as their spellings, a
    leading space counted as a letter (Ratcliff and Obershelp's 2M/T: twice the matching characters over all
    characters): 1 for the same token, and more than 0 for one that comes near, so that there is a way to climb.

    Special tokens, such as end-of-text, count on neither side. A reference is written as a completion is: with the
    space it starts with.

    Args:
        tokenizer: hub id or folder of the model's tokenizer.
    """
    loaded = AutoTokenizer.from_pretrained(find_embedded(tokenizer), trust_remote_code=False)
    special = set(loaded.all_special_ids)

    def spellings(ids: list[int]) -> list[str]:
        # A model may have more rows than the tokenizer has tokens, and sample one of them: it is like no other.
        return [token or "" for token in loaded.convert_ids_to_tokens([i for i in ids if i not in special])]

    def token_similarity(completion_ids: list[list[int]], reference: list[str], **kwargs) -> list[float]:
        scores = []
        for ids, text in zip(completion_ids, reference, strict=True):
            ours, theirs = spellings(ids), spellings(loaded(text, add_special_tokens=False)["input_ids"])
            alike = [SequenceMatcher(None, y, z).ratio() for y, z in zip(theirs, ours, strict=False)]
            scores.append(sum(alike) / max(len(ours), len(theirs), 1))
        return scores

    return token_similarity


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def sentiment(prompts: list, completions: list, **kwargs) -> list[float]:
    """VADER's compound sentiment (Hutto & Gilbert 2014) of prompt and completion together, or of the reply alone in a
    conversation, in -1..1. It is what evaluation judges by: reward it, and the judge is no longer independent."""
    texts = zip(prompts, _texts(completions), strict=True)
    return [
        _vader().polarity_scores(prompt + text if isinstance(prompt, str) else text)["compound"]
        for prompt, text in texts
    ]


def distinct_n(texts: list[str], n: int) -> float:
    """Distinct n-grams of white-space words over all n-grams of all texts, in 0..1; 0.0 if there are none.

    After Li et al. (2016, arXiv 1510.03055), who divide by the number of words; we divide by the number of n-grams,
    so that 1.0 means that no n-gram occurs twice whatever n is. N-grams do not cross texts. The value falls as texts
    are added: compare sets of about the same number of words.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n={n} is not a positive number of words.")
    sentences = [text.split() for text in texts]
    ngrams = [tuple(words[i : i + n]) for words in sentences for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0
