"""Rankings and rated texts as the trainer of reward models reads them: tokens, batches, losses, and who is to win.

A batch has all texts of its rows in one list (N, S), and each text is scored once. `sizes` (B,) says how many texts each
ranking has, the best first; `ratings` (N,) are those of rated texts, of mean 0 and deviation 1.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import pad

from data import rankings, ratings
from reward_models.losses import centering_loss, plackett_luce_loss, regression_loss


IDS = {"ranking": "ranking_ids", "rating": "text_ids"}  # the column of tokens, by the column that tells the rows
PAIRS = 100_000  # pairs of held-out rated texts that are compared; of more, as many are drawn


def kind_of_rows(dataset: Dataset) -> str | None:
    """Return `ranking` or `rating`, the column that tells what the rows are; None for pairs."""
    names = set(dataset.column_names)
    if names & {"chosen", "chosen_ids"}:
        return None
    return next((kind for kind, ids in IDS.items() if names & {kind, ids}), None)  # Trainer takes unread columns away


# ------------------------------------------------------------------------------------ tokens
def tokenize_once(texts: list, prepare: Callable[[Dataset], Dataset]) -> list[list[int]]:
    """Return the tokens of texts or conversations; each distinct one is tokenized once.

    Args:
        prepare: adds the columns `chosen_ids` and `rejected_ids` to pairs, and leaves out none.
    """
    keys = [text if isinstance(text, str) else json.dumps(text) for text in texts]
    once = dict(zip(keys, texts, strict=True))
    distinct = list(once.values())
    halves = {"chosen": distinct[::2], "rejected": distinct[1::2] + distinct[: len(distinct) % 2]}
    found = prepare(Dataset.from_dict(halves))
    ids: dict[str, list[int]] = {}
    for side, of_side in (("chosen", list(once)[::2]), ("rejected", list(once)[1::2])):
        ids |= zip(of_side, found[f"{side}_ids"][: len(of_side)], strict=True)
    return [ids[key] for key in keys]


def with_tokens(dataset: Dataset, tokenize: Callable[[list], list[list[int]]], max_length: int | None) -> Dataset:
    """Return rankings or rated texts with a column of tokens, without the rows that have a text of more than `max_length`."""
    kind = kind_of_rows(dataset)
    assert kind is not None  # pairs are tokenized by TRL
    if IDS[kind] in dataset.column_names:
        return dataset
    rows = rankings.whole_texts(dataset) if kind == "ranking" else [[text] for text in ratings.whole_texts(dataset)]
    found = iter(tokenize([text for row in rows for text in row]))
    ids = [[next(found) for _ in row] for row in rows]
    dataset = dataset.add_column(IDS[kind], ids if kind == "ranking" else [only for (only,) in ids])
    most = [max(map(len, row)) for row in ids]
    return dataset.select([number for number, length in enumerate(most) if max_length is None or length <= max_length])


def longest(rows: Dataset) -> list[int]:
    """Return the tokens of the longest text of each row: of a pair, a ranking or a rated text."""
    kind = kind_of_rows(rows)
    if kind == "ranking":
        return [max(map(len, ids)) for ids in rows["ranking_ids"]]
    if kind == "rating":
        return [len(ids) for ids in rows["text_ids"]]
    return [max(map(len, ids)) for ids in zip(rows["chosen_ids"][:], rows["rejected_ids"][:], strict=True)]


# ------------------------------------------------------------------------------------ batches
@dataclass(frozen=True)
class RatingScale:
    """Mean and standard deviation of the ratings that a reward model learned from: rating = mean + std * score."""

    mean: float
    std: float

    @classmethod
    def of(cls, ratings: list[float]) -> "RatingScale":
        """Measure the scale of ratings.

        Raises:
            ValueError: all ratings are equal.
        """
        mean, std = float(np.mean(ratings)), float(np.std(ratings))
        if not std > 1e-12 * max(1.0, abs(mean)):
            raise ValueError(
                f"rating: all {len(ratings):,} ratings are {mean:g}, so there is nothing to learn from them."
            )
        return cls(mean, std)


@dataclass
class CollateTexts:
    """Put rankings or rated texts into a batch; pairs go to the collator of pairs.

    Args:
        pairs: the collator of pairs, which knows the padding.
        scale: the scale of the ratings, if the trainer learns ratings.
    """

    pairs: Any
    scale: RatingScale | None = None

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        if "chosen_ids" in rows[0]:
            return self.pairs(rows)
        ranked = "ranking_ids" in rows[0]
        texts = [torch.tensor(ids) for row in rows for ids in (row["ranking_ids"] if ranked else [row["text_ids"]])]
        multiple = self.pairs.pad_to_multiple_of
        batch = {
            "input_ids": pad(texts, padding_value=self.pairs.pad_token_id, pad_to_multiple_of=multiple),
            "attention_mask": pad(
                [torch.ones_like(ids) for ids in texts], padding_value=0, pad_to_multiple_of=multiple
            ),
        }
        if ranked:
            return batch | {"sizes": torch.tensor([len(row["ranking_ids"]) for row in rows])}
        assert self.scale is not None  # a trainer of ratings has one
        of_rows = [(row["rating"] - self.scale.mean) / self.scale.std for row in rows]
        return batch | {"ratings": torch.tensor(of_rows, dtype=torch.float32)}


# ------------------------------------------------------------------------------------ loss
def by_ranking(
    scores: Float[Tensor, " N"], sizes: Int[Tensor, " B"]
) -> tuple[Float[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """Return the scores of rankings that follow each other as rows, with 0 after the shorter ones, and their mask."""
    rows = scores.split(sizes.tolist())
    mask = torch.arange(int(sizes.max()), device=scores.device) < sizes.unsqueeze(1)
    return pad_sequence(list(rows), batch_first=True), mask


class Outcome(NamedTuple):
    """Loss of a batch, and the gaps of score of its comparisons: of the better text minus the worse one, (comparisons,)."""

    loss: Float[Tensor, ""]
    gaps: Float[Tensor, " N"]


def outcome(
    scores: Float[Tensor, " N"],
    sizes: Int[Tensor, " B"] | None,
    ratings: Float[Tensor, " N"] | None,
    centering: float | None = None,
) -> Outcome:
    """Return the loss of the texts of a batch, which are of rankings or rated, and how far apart their scores are.

    The comparisons are all pairs of a ranking, or all pairs of texts that are rated differently.

    Args:
        centering: weight of the square of twice a ranking's mean score. Of a pair it is TRL's `center_rewards_coefficient`.
    """
    if sizes is None:
        assert ratings is not None  # a batch has one of the two
        gaps = scores.detach().unsqueeze(1) - scores.detach().unsqueeze(0)
        return Outcome(regression_loss(scores, ratings), gaps[ratings.unsqueeze(1) > ratings.unsqueeze(0)])
    of_rankings, mask = by_ranking(scores, sizes)
    loss = plackett_luce_loss(of_rankings, mask)
    if centering is not None:
        mean = of_rankings.sum(dim=1) / sizes
        loss = loss + centering * centering_loss(mean, mean)
    gaps = (of_rankings.unsqueeze(2) - of_rankings.unsqueeze(1)).detach()
    return Outcome(loss, gaps[(mask.unsqueeze(2) & mask.unsqueeze(1)).triu(diagonal=1)])


# ------------------------------------------------------------------------------------ held-out rows
class Comparisons(NamedTuple):
    """Pairs of token rows that people put in this order, and, where they are known, their agreement and the rating gaps."""

    chosen: list[tuple[int, ...]]
    rejected: list[tuple[int, ...]]
    agreement: list[float] | None
    gaps: list[float] | None


def comparisons(rows: Dataset) -> Comparisons:
    """Return the comparisons of tokenized held-out rows.

    They are the pairs; all pairs of each ranking; or pairs of texts that are rated differently, `PAIRS` at most, drawn with
    a fixed seed.
    """
    kind = kind_of_rows(rows)
    if kind == "rating":
        of, texts = np.asarray(rows["rating"][:]), list(map(tuple, rows["text_ids"]))
        two = _two_of(len(of))
        two = two[of[two[:, 0]] != of[two[:, 1]]]
        high = np.where(of[two[:, 0]] > of[two[:, 1]], two[:, 0], two[:, 1])
        low = two.sum(axis=1) - high
        return Comparisons([texts[i] for i in high], [texts[i] for i in low], None, (of[high] - of[low]).tolist())
    if kind == "ranking":
        pairs = [pair for ids in rows["ranking_ids"] for pair in itertools.combinations(map(tuple, ids), 2)]
    else:
        pairs = [(tuple(a), tuple(b)) for a, b in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
    agreement, gaps = (rows[name][:] if name in rows.column_names else None for name in ("agreement", "margin"))
    return Comparisons([chosen for chosen, _ in pairs], [rejected for _, rejected in pairs], agreement, gaps)


def _two_of(number: int) -> np.ndarray:
    """Return all pairs of different numbers below `number`, (pairs, 2); of more than `PAIRS`, as many drawn."""
    if number * (number - 1) // 2 <= PAIRS:
        return np.stack(np.triu_indices(number, 1), axis=1)
    drawn = np.random.default_rng(0).integers(number, size=(PAIRS, 2))
    return np.unique(np.sort(drawn[drawn[:, 0] != drawn[:, 1]], axis=1), axis=0)
