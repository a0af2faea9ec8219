"""Sample pairs of completions from one or two policies, and measure how far an ensemble disagrees about a pair."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from data.pairing import letters_of
from data.prompts import tokenize_prompts
from pipeline.backbone.rewards import learned_rewards
from pipeline.backbone.roles import Backbone
from pipeline.backbone.sampling import as_answers, sample
from pipeline.pages.label_pairs import Pair
from reward_models.ensembles import EnsembleReward, pair_disagreement
from reward_models.functions import RewardArguments


# Measures the disagreement about pairs, of their prompts and the tokens of each side.
Disputes = Callable[[list, list[list[int]], list[list[int]]], list[float]]


def disputes_of(reward_adapter: list[str], backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> Disputes:
    """Add reward adapters to a backbone, and return the function that measures their disagreement about pairs.

    Raises the errors of `learned_rewards`.
    """
    (ensemble,) = learned_rewards(RewardArguments(reward_adapter, reward_combination="mean"), backbone, tokenizer)
    assert isinstance(ensemble, EnsembleReward)

    @torch.no_grad()
    def disputes(prompts: list, first: list[list[int]], second: list[list[int]]) -> list[float]:
        return pair_disagreement(*(ensemble.member_scores(prompts, rows) for rows in (first, second))).tolist()

    return disputes


def disputed(pairs: list[Pair], disputes: Disputes, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """Return pairs of a file with the disagreement about each, as texts that have ended."""

    def tokens(side: Any) -> list[int]:
        text = side if isinstance(side, str) else side[-1]["content"]
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    sides = [[tokens(pair.completions[side]) for pair in pairs] for side in (0, 1)]
    found = disputes([pair.prompt for pair in pairs], sides[0], sides[1])
    return [Pair(one.prompt, one.completions, one.sources, far) for one, far in zip(pairs, found, strict=True)]


def sampled_pairs(
    backbone: Backbone,
    roles: tuple[str, str],
    sources: tuple[str, str],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list,
    *,
    max_completion_length: int,
    temperature: float,
    batch_size: int,
    seed: int,
    asked: Counter[str],
    disputes: Disputes | None = None,
    tell: Callable[[int], object] | None = None,
) -> Iterator[list[Pair]]:
    """Sample batches of pairs without end: a completion of each role to each prompt, in an order that the seed draws.

    After the last prompt comes the first one again, with other completions. A pair is left out if its completions are the
    same or one of them is empty.

    Args:
        roles, sources: the role that samples each completion, and its name in the answers.
        asked: how often each prompt (`data.pairing.letters_of`) was shown in an earlier run; these turns are not sampled.
        disputes: measures the disagreement about pairs.
        tell: called with 1 for each token that a batch draws.

    Raises the errors of `sample`, and:
        ValueError: no prompt has a pair that people can compare.
    """
    for turn in count():
        order = np.random.default_rng([seed, turn]).permutation(len(prompts)).tolist()
        order = [number for number in order if asked[letters_of(prompts[number])] <= turn]
        found = not order
        for start in range(0, len(order), batch_size):
            of_batch = [prompts[number] for number in order[start : start + batch_size]]
            rows = []
            for side, role in enumerate(roles):
                (batch,) = sample(
                    backbone,
                    role,
                    tokenize_prompts(of_batch, tokenizer),
                    tokenizer,
                    max_completion_length=max_completion_length,
                    temperature=temperature,
                    batch_size=len(of_batch),
                    share_seed=(seed, turn, start, side),
                    tell=tell,
                )
                rows.append(batch.rows())
            texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in rows]
            answers = [as_answers(of_side, of_batch) for of_side in texts]
            far = disputes(of_batch, rows[0], rows[1]) if disputes else [None] * len(of_batch)
            pairs = [
                Pair(prompt, (one, two), sources, disagreement)
                for prompt, one, two, disagreement in zip(of_batch, *answers, far, strict=True)
                if _comparable(one, two)
            ]
            found = found or bool(pairs)
            yield pairs
        if not found:
            raise ValueError(
                f"The policies write the same completion, or none, to each of the {len(order)} prompts, so there is nothing "
                f"to compare. Raise temperature or max_completion_length, or name another policy."
            )


def _comparable(one: Any, two: Any) -> bool:
    texts = [side if isinstance(side, str) else side[-1]["content"] for side in (one, two)]
    return all(text.strip() for text in texts) and texts[0].strip() != texts[1].strip()
