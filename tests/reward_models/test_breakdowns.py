"""Accuracy in parts: intervals for pairs that share texts, lengths, raters, and halves without a common text."""

import numpy as np
import pytest

from reward_models.breakdowns import (
    RATIO_NAMES,
    by_group,
    by_length,
    by_rater,
    halves,
    quantile_edges,
    share_with_interval,
    shares_right,
)


def alone(pairs: int) -> np.ndarray:
    """Texts of pairs that share none."""
    return np.arange(2 * pairs).reshape(-1, 2)


def test_the_interval_of_pairs_that_share_no_text_is_wilsons():
    # Eight of ten: the textbook's 0.490 to 0.943.
    found = share_with_interval(np.array([1.0] * 8 + [0.0] * 2), alone(10))
    assert found == {"mean": 0.8, "low": pytest.approx(0.4902, abs=1e-4), "high": pytest.approx(0.9433, abs=1e-4)}
    # All right: 1 - z^2 / (n + z^2) to 1, not an interval without width.
    found = share_with_interval(np.ones(10), alone(10))
    assert found["low"] == pytest.approx(1 - 3.8415 / 13.8415, abs=1e-4) and found["high"] == 1


def test_pairs_that_share_a_text_count_less():
    # Two stars of three pairs: all of one are right, all of the other wrong. Sums of residuals: 1.5 and -1.5 at the centres,
    # 0.5 at six leaves: 2 * 2.25 + 6 * 0.25 - 6 * 0.25 = 4.5, three times 6 * 0.25. So they count as two pairs.
    texts = np.array([[0, 1], [0, 2], [3, 0], [4, 5], [6, 4], [4, 7]])
    found = share_with_interval(np.array([1.0, 1, 1, 0, 0, 0]), texts)
    assert found == {"mean": 0.5, "low": pytest.approx(0.0945, abs=1e-4), "high": pytest.approx(0.9055, abs=1e-4)}


def test_the_interval_covers_the_truth_where_texts_are_shared():
    """A model that misjudges texts, on 300 pairs of 60 texts: 95% intervals cover its accuracy, Wilson's alone do not."""
    draw = np.random.default_rng(0)
    quality, error = draw.normal(size=200_000), draw.normal(size=200_000)
    truth = np.mean((np.diff(quality) > 0) == (np.diff(quality + error) > 0))
    covered = {"shared": 0, "alone": 0}
    for _ in range(200):
        quality = draw.normal(size=60)
        scores = quality + draw.normal(size=60)
        texts = np.array([draw.choice(60, 2, replace=False) for _ in range(300)])
        right = (quality[texts[:, 0]] > quality[texts[:, 1]]) == (scores[texts[:, 0]] > scores[texts[:, 1]])
        for name, of in (("shared", texts), ("alone", alone(300))):
            found = share_with_interval(right.astype(float), of)
            covered[name] += found["low"] <= truth <= found["high"]
    assert covered["shared"] >= 180 > covered["alone"] + 10


def test_groups_are_in_order_of_size_or_as_given():
    margins, groups = np.array([1.0, -1.0, 0.0, 2.0]), ["a", "b", "b", "c"]
    found = by_group(margins, alone(4), groups)
    assert [(row["group"], row["pairs"], row["accuracy"]["mean"]) for row in found] == [
        ("b", 2, 0.25),
        ("a", 1, 1.0),
        ("c", 1, 1.0),
    ]
    assert [row["group"] for row in by_group(margins, alone(4), groups, ["c", "none", "a", "b"])] == ["c", "a", "b"]


def test_a_model_that_prefers_length_is_seen():
    lengths = np.array([[10, 5], [5, 10], [30, 10], [10, 30], [10, 10]])
    found = by_length(np.array([5.0, -5.0, 20.0, -20.0, 1.0]), alone(5), lengths)  # the score is the length
    assert found["pairs"] == 4 and found["model"]["mean"] == 1.0 and found["people"]["mean"] == 0.5
    assert [(row["group"], row["pairs"], row["accuracy"]["mean"]) for row in found["groups"]] == [
        (RATIO_NAMES[0], 1, 0.0),  # 1/3
        (RATIO_NAMES[1], 1, 0.0),  # 1/2 opens its bin
        (RATIO_NAMES[2], 1, 1.0),
        (RATIO_NAMES[4], 2, 1.0),  # 2 opens its bin, and 3
    ]
    assert "model" not in by_length(np.ones(2), alone(2), np.full((2, 2), 7))


def test_raters_by_hand():
    votes = [
        {"a": 1.0, "b": 1.0, "c": 0.0},
        {"a": 1.0, "b": 0.0, "c": 1.0},
        {"a": 0.5, "b": 1.0, "c": None},
        None,
        {"a": 1.0, "b": 1.0, "c": 1.0},
    ]
    found = by_rater(np.array([1.0, -1.0, 2.0, 3.0, 0.0]), alone(5), votes)
    rows = {row["rater"]: (row["pairs"], row["model"]["mean"], row["others"]["mean"]) for row in found["raters"]}
    # Rater a decides on three pairs: the model agrees, does not, ties. The others there: 1 to 1, 1 to 1, 2 to 0.
    assert rows["a"] == (3, 0.5, pytest.approx(2 / 3))
    # Rater b on four: agrees, agrees (b prefers the rejected side), agrees, ties. The others: 1 to 1, 0 of 2, a tie, 2 of 2.
    assert rows["b"] == (4, pytest.approx(3.5 / 4), pytest.approx((0.5 + 0 + 0.5 + 1) / 4))
    # Rater c on three: does not, does not, ties. The others: 0 of 2, 1 to 1, 2 of 2.
    assert rows["c"] == (3, pytest.approx(0.5 / 3), pytest.approx((0 + 0.5 + 1) / 3))
    # Two raters agree on 1 of 3, 1 of 3, 0 of 1 and 3 of 3. Both ways round, both answers are as frequent.
    same = (1 / 3 + 1 / 3 + 0 + 1) / 4
    assert found["two_agree"] == pytest.approx(same) and found["unanimous"] == 0.25
    chance = 2 * (10 / 22) ** 2 + (2 / 22) ** 2
    assert found["kappa"] == pytest.approx((same - chance) / (1 - chance))
    assert by_rater(np.ones(1), alone(1), [{"a": None}]) is None
    assert "others" not in by_rater(np.ones(1), alone(1), [{"a": 1.0}])["raters"][0]


def test_halves_share_no_text():
    draw = np.random.default_rng(1)
    groups = 8 * draw.integers(0, 60, size=(900, 1))  # sixty groups of eight texts, and one of forty
    texts = draw.integers(0, 8, size=(900, 2)) + groups
    texts[:300] = 480 + draw.integers(0, 40, size=(300, 2))
    first, second = halves(texts, seed=3)
    assert not (first & second).any() and set(texts[first].ravel()).isdisjoint(texts[second].ravel())
    assert (first | second)[300:].all()  # small groups are whole
    assert 100 < (first | second)[:300].sum() < 200 and min(first[:300].sum(), second[:300].sum()) > 40
    assert abs(first.sum() - second.sum()) < 20
    assert (halves(texts, seed=3)[0] == first).all() and not (halves(texts, seed=4)[0] == first).all()


def test_pairs_that_share_no_text_are_all_in_a_half():
    first, second = halves(alone(90), seed=0)
    assert first.sum() == second.sum() == 45 and (first ^ second).all()


def test_small_things():
    assert shares_right(np.array([2.0, 0.0, -1.0])).tolist() == [1, 0.5, 0]
    assert quantile_edges(np.arange(7.0)) == [0, 1, 2, 3, 4, 5, 6]
    edges = quantile_edges(np.full(5, 2.0))
    assert edges[0] == 2 and edges[0] < edges[1]
