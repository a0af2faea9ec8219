"""Break the accuracy of a reward model down: by domain, by length, by rater. Each figure has a 95% interval.

A pair is right if its chosen side scores higher; a tie counts half. Margins are scores of chosen minus scores of rejected,
(pairs,). `texts` are the numbers of the two sides' texts, (pairs, 2): chosen, rejected.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.judgements import disagreement


Z = 1.959964  # of a normal distribution, 95% lies within this many deviations
LARGE = 0.02  # share of all pairs above which a component is divided
# Edges of the ratio of the lengths, chosen to rejected, and the words for what lies between.
RATIOS = (1 / 2, 4 / 5, 5 / 4, 2)
RATIO_NAMES = (
    "chosen is less than half as long",
    "chosen is shorter, by 20% to 50%",
    "lengths within 20%",
    "chosen is longer, by 25% to 100%",
    "chosen is more than twice as long",
)


def shares_right(margins: np.ndarray) -> np.ndarray:
    """Return 1 for a pair that is scored rightly, 0.5 for a tie, 0 for one that is scored wrongly."""
    return np.heaviside(np.asarray(margins, dtype=float), 0.5)


def share_with_interval(right: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """Return the mean of shares in 0..1, and its 95% interval, for pairs that may have texts in common.

    Pairs with a common text are not independent: a text that the model misjudges makes all of its pairs wrong. The variance
    of the mean is therefore that of dyadic data (Fafchamps & Gubert 2007, J. Dev. Econ. 83:326; here without covariates): the
    products of the residuals e are summed over all pairs p, q that share a text,

    V = 1/n^2 sum_(p, q share a text) e_p e_q

    V over its value for independent pairs is the design effect. The interval is Wilson's (1927, JASA 22:209) for n over the
    design effect pairs, which stays within 0..1 and is not empty where all pairs are right.

    Returns:
        `mean`, `low` and `high`, in 0..1.
    """
    n, mean = len(right), float(np.mean(right))
    errors = right - mean
    sums = np.bincount(texts.ravel(), np.repeat(errors, 2))
    alone = float((errors**2).sum())
    together = float((sums**2).sum()) - alone  # a pair shares both of its texts with itself, and counts once
    size = n / max(1.0, together / alone) if alone > 0 else n
    middle = (mean + Z**2 / (2 * size)) / (1 + Z**2 / size)
    reach = Z / (1 + Z**2 / size) * math.sqrt(mean * (1 - mean) / size + Z**2 / (4 * size**2))
    return {"mean": mean, "low": max(0.0, min(mean, middle - reach)), "high": min(1.0, max(mean, middle + reach))}


def by_group(
    margins: np.ndarray, texts: np.ndarray, groups: Sequence[str], order: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return number of pairs and accuracy of each group, as `{"group", "pairs", "accuracy"}`.

    Args:
        groups: name of each pair's group.
        order: order of the groups; unset: the largest comes first.
    """
    of = np.asarray(groups)
    names, counts = np.unique(of, return_counts=True)
    known = dict(zip(names.tolist(), counts.tolist(), strict=True))
    ordered = [name for name in order if name in known] or sorted(known, key=lambda name: (-known[name], name))
    right = shares_right(margins)
    return [
        {"group": name, "pairs": known[name], "accuracy": share_with_interval(right[of == name], texts[of == name])}
        for name in ordered
    ]


def by_length(margins: np.ndarray, texts: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """Return the accuracy by the ratio of the two sides' lengths, and how often model and people prefer the longer side.

    A model with a length bias is right where the longer side is chosen and wrong where it is rejected, and prefers the
    longer side more often than people do (Singhal et al. 2023, arXiv 2310.03716).

    Args:
        lengths: lengths of the chosen and the rejected completion, each 1 or more, in any unit.

    Returns:
        `groups` (see `by_group`, in the order of `RATIO_NAMES`). And, if some pairs differ in length, `pairs`, their number,
        and the shares of them in which the longer side is preferred, with intervals: `model` and `people`.
    """
    index = np.searchsorted(RATIOS, lengths[:, 0] / lengths[:, 1], side="right")
    groups = by_group(margins, texts, [RATIO_NAMES[i] for i in index], RATIO_NAMES)
    differ = lengths[:, 0] != lengths[:, 1]
    if not differ.any():
        return {"groups": groups}
    longer = (lengths[:, 0] > lengths[:, 1])[differ]  # the chosen side is the longer one
    right = shares_right(margins)[differ]
    return {
        "groups": groups,
        "pairs": int(differ.sum()),
        "model": share_with_interval(np.where(longer, right, 1 - right), texts[differ]),
        "people": share_with_interval(longer.astype(float), texts[differ]),
    }


def by_rater(
    margins: np.ndarray, texts: np.ndarray, votes: Sequence[dict[str, float | None] | None]
) -> dict[str, Any] | None:
    """Return how often the model agrees with each rater, and the ceiling: how often the raters agree with each other.

    Args:
        votes: for each pair the share that each rater gives to the chosen side (1, 0 or 0.5, None if missing); None for a
            pair whose raters are not known.

    Returns:
        None without votes. Else `raters`, each `{"rater", "pairs", "model"}`: the pairs on which the rater decides, and the
        model's agreement with the rater there. With several raters also `others`, how often the majority of the other
        raters agrees with this one, a tie counting half: what a model that knew the others' opinion would reach. And of all
        pairs with several votes: `unanimous`, `two_agree` (share of pairs of raters who say the same) and `kappa`.
    """
    names = list(dict.fromkeys(rater for row in votes if row for rater in row))
    right = shares_right(margins)
    raters = []
    for name in names:
        said = [(i, row, row[name]) for i, row in enumerate(votes) if row and row.get(name) not in (None, 0.5)]
        if not said:
            continue
        where = np.array([i for i, _, _ in said])
        prefers = np.array([vote for _, _, vote in said], dtype=float) > 0.5
        found = {"rater": name, "pairs": len(said)}
        found["model"] = share_with_interval(np.where(prefers, right[where], 1 - right[where]), texts[where])
        others = [[vote for rater, vote in row.items() if rater != name and vote is not None] for _, row, _ in said]
        of_others = np.array([bool(found) for found in others])
        if of_others.any():
            sums = np.array([statistics.fmean(found) - 0.5 if found else 0.0 for found in others])
            agrees = np.heaviside(np.where(prefers, sums, -sums), 0.5)
            found["others"] = share_with_interval(agrees[of_others], texts[where[of_others]])
        raters.append(found)
    if not raters:
        return None
    kept = [[vote for vote in row.values() if vote is not None] for row in votes if row]
    # Both ways round: votes are turned so that the majority prefers `chosen`, and chance must not know that.
    agreed = disagreement([*kept, *([1 - vote for vote in row] for row in kept)])
    together = {} if agreed is None else dict(zip(("unanimous", "two_agree", "kappa"), agreed, strict=True))
    return {"raters": raters, **together}


def quantile_edges(values: np.ndarray, bins: int = 6) -> list[float]:
    """Return increasing edges of bins that hold about the same number of values."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1))).tolist()
    return edges if len(edges) > 1 else [edges[0], math.nextafter(edges[0], math.inf)]


def components(texts: np.ndarray) -> np.ndarray:
    """Return for each pair the number of its component: pairs that share a text, also by way of others, are in one."""
    parent = list(range(int(texts.max()) + 1))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    for one, other in texts.tolist():
        parent[root(one)] = root(other)
    return np.unique([root(one) for one, _ in texts.tolist()], return_inverse=True)[1]


def halves(texts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide pairs at random into two halves that share no text, as two masks, each (pairs,).

    Components go to the half that has fewer pairs. Of a component with more than `LARGE` of all pairs each text is drawn to a
    half by itself, because such components differ from each other. Its pairs of one text from each half are in neither.
    """
    draw = np.random.default_rng(seed)
    of = components(texts)
    sizes = np.bincount(of)
    large = (sizes > max(1, LARGE * len(texts)))[of]
    side = draw.integers(0, 2, size=int(texts.max()) + 1)[texts]
    of_pair = np.where(side[:, 0] == side[:, 1], side[:, 0], -1)
    counts = [int((large & (of_pair == half)).sum()) for half in (0, 1)]
    of_component = np.zeros(len(sizes), dtype=int)
    for number in draw.permutation(np.unique(of[~large])).tolist():
        of_component[number] = int(counts[0] > counts[1])
        counts[of_component[number]] += int(sizes[number])
    of_pair = np.where(large, of_pair, of_component[of])
    return of_pair == 0, of_pair == 1
