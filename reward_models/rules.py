"""Define reward functions of TRL's protocol that are written by hand, not learned.

TRL calls a reward function with `prompts`, `completions` (texts, or lists of messages), `completion_ids` (the sampled
tokens, with the end-of-text token if the completion ended by itself) and every column of the dataset. Each is a list with
one entry a row (B,). The function returns one number a row. A function named `get_...` makes a reward function from its
options. `trl.rewards` has more: format, accuracy, a penalty for overlong completions.
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
    """Return 1 if the completion contains the text in the row's `contains` column, else 0."""
    return [1.0 if needle in text else 0.0 for text, needle in zip(_texts(completions), contains, strict=True)]


def get_regex(pattern: str) -> Callable:
    """Make a function that returns 1 if Python's regular expression `pattern` is found in the completion, else 0.

    The pattern may match anywhere. Anchor it with `^` and `$`, and ignore case with `(?i)`.

    Raises:
        ValueError: `pattern` is not a regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is not a regular expression: {error}. Correct it.") from error

    def regex(completions: list, **kwargs) -> list[float]:
        return [1.0 if compiled.search(text) else 0.0 for text in _texts(completions)]

    return regex


def get_length(target: int) -> Callable:
    """Make a function that rewards completions of `target` tokens, counting the end-of-text token.

    A completion of `target` tokens gets 1. The reward falls in proportion to the distance from the target: it is 0 for an
    empty completion, and for one of twice the target or more.

    Raises:
        ValueError: target is below 1.
    """
    if target < 1:
        raise ValueError(f"target={target} is not a positive number of tokens.")

    def length(completion_ids: list[list[int]], **kwargs) -> list[float]:
        return [max(0.0, 1 - abs(len(ids) - target) / target) for ids in completion_ids]

    return length


def get_repetition(n: int) -> Callable:
    """Make a function that returns minus the share of a completion's word n-grams that repeat an earlier one, in -1..0.

    It is the completion's `distinct_n` minus 1 (Li et al. 2016), so it limits the repetition that the report measures.
    `trl.rewards.get_repetition_penalty_reward` does the same with tokens.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n={n} is not a positive number of words.")

    def repetition(completions: list, **kwargs) -> list[float]:
        return [distinct_n([text], n) - 1 if len(text.split()) >= n else 0.0 for text in _texts(completions)]

    return repetition


def get_token_similarity(tokenizer: str) -> Callable:
    """Make a function that compares a completion, token by token, with the text in the row's `reference` column, in 0..1.

        R = 1/K * sum over k of similarity(y_k, z_k),   y_k the k-th reference token, z_k the k-th completion token

    The formula leaves K and the similarity open. We take K as the length of the longer one, and a similarity of 0 where
    only one has a token. So neither stopping early nor running on pays. The similarity of two tokens is that of their
    spellings, with a leading space counted as a letter (Ratcliff and Obershelp's 2M/T: twice the matching characters over
    all characters). It is 1 for the same token and above 0 for a similar one, so that the reward can rise step by step.

    Special tokens, such as end-of-text, do not count on either side. Write a reference as a completion is written: with the
    space that it starts with.

    Args:
        tokenizer: hub id or folder of the model's tokenizer.
    """
    loaded = AutoTokenizer.from_pretrained(find_embedded(tokenizer), trust_remote_code=False)
    special = set(loaded.all_special_ids)

    def spellings(ids: list[int]) -> list[str]:
        # A model may have more rows than the tokenizer has tokens, and may sample such a row. It is similar to no token.
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
    """Return VADER's compound sentiment (Hutto & Gilbert 2014) of prompt and completion together, in -1..1.

    In a conversation it is the sentiment of the reply alone. The demo's reports are judged by it, so a policy that is
    rewarded by it needs another judge.
    """
    texts = zip(prompts, _texts(completions), strict=True)
    return [
        _vader().polarity_scores(prompt + text if isinstance(prompt, str) else text)["compound"]
        for prompt, text in texts
    ]


def distinct_n(texts: list[str], n: int) -> float:
    """Return the share of distinct n-grams of white-space words among all n-grams of all texts, in 0..1; 0.0 without any.

    Li et al. (2016, arXiv 1510.03055) divide by the number of words. We divide by the number of n-grams, so that 1.0 means
    for every n that no n-gram occurs twice. N-grams do not cross texts. The value falls as texts are added, so compare
    only sets of about the same number of words.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n={n} is not a positive number of words.")
    sentences = [text.split() for text in texts]
    ngrams = [tuple(words[i : i + n]) for words in sentences for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0
