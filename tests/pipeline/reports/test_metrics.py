import math
from itertools import combinations

import numpy as np
import pytest

from pipeline.reports.metrics import CHUNK, best_of_n, best_of_n_kl, bootstrap_interval, wins
from reward_models.rules import distinct_n


def test_distinct_n_by_hand():
    texts = ["a b a b", "b a"]
    # Unigrams a b a b b a: 2 distinct of 6. Bigrams ab ba ab | ba: 2 of 4. Trigrams aba bab: 2 of 2.
    assert distinct_n(texts, 1) == 2 / 6
    assert distinct_n(texts, 2) == 2 / 4
    assert distinct_n(texts, 3) == 1.0


def test_distinct_n_does_not_cross_texts():
    # Were the texts joined, "a b c d" would have the bigrams ab bc cd, 3 of 3; apart they have ab, cd and, again, ab.
    assert distinct_n(["a b", "c d", "a b"], 2) == 2 / 3


def test_distinct_n_splits_on_any_white_space():
    assert distinct_n([" the\nfilm  the\tfilm "], 1) == 2 / 4


@pytest.mark.parametrize("texts", [[], [""], ["one", "two"]])
def test_distinct_n_without_bigrams_is_zero(texts):
    assert distinct_n(texts, 2) == 0.0


def test_distinct_n_needs_a_positive_n():
    with pytest.raises(ValueError, match="n=0"):
        distinct_n(["a b"], 0)


def test_bootstrap_of_two_values_by_hand():
    # Resamples of (0, 1): mean 0 with probability 1/4, 0.5 with 1/2, 1 with 1/4. So the 2.5% and 97.5% quantiles are
    # 0 and 1, and those at 30% and 70% (level 0.4) are both 0.5.
    assert bootstrap_interval([0, 1]) == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert bootstrap_interval([0, 1], level=0.4) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_bootstrap_agrees_with_the_normal_interval():
    # 200 zeros and 200 ones: standard error of the mean sqrt(0.25 / 400) = 0.025, so 0.5 -+ 1.96 * 0.025 =
    # 0.451..0.549. The resampled means are multiples of 1/400, so their quantiles may be 0.0025 off, and with 10,000
    # resamples the noise of a 2.5% quantile is sqrt(0.025 * 0.975 / 10_000) / 0.0584 * 0.025 = 0.0007.
    interval = bootstrap_interval([0] * 200 + [1] * 200)
    assert interval["mean"] == 0.5
    assert interval["low"] == pytest.approx(0.451, abs=0.004)
    assert interval["high"] == pytest.approx(0.549, abs=0.004)


def test_bootstrap_narrows_with_a_lower_level():
    values = np.arange(50.0)
    wide, narrow = bootstrap_interval(values, level=0.99), bootstrap_interval(values, level=0.5)
    assert wide["low"] < narrow["low"] < wide["mean"] < narrow["high"] < wide["high"]


def test_bootstrap_follows_shift_and_scale():
    values = np.random.default_rng(3).exponential(size=40)
    base, moved = bootstrap_interval(values), bootstrap_interval(10 + 3 * values)
    for key in ("mean", "low", "high"):
        assert moved[key] == pytest.approx(10 + 3 * base[key])


def test_bootstrap_is_fixed_by_its_seed():
    values = np.random.default_rng(4).normal(size=30)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_bootstrap_does_not_depend_on_the_chunks(monkeypatch):
    values = np.random.default_rng(5).normal(size=30)
    assert 200 * len(values) < CHUNK
    whole = bootstrap_interval(values, resamples=200)
    monkeypatch.setattr("pipeline.reports.metrics.CHUNK", 7 * 30)  # 28 chunks of 7 resamples and one of 4
    assert bootstrap_interval(values, resamples=200) == whole


@pytest.mark.parametrize("values", [[], [1.0], [[1.0, 2.0]], [1.0, math.nan], [1.0, math.inf]])
def test_bootstrap_refuses(values):
    with pytest.raises(ValueError, match="values has"):
        bootstrap_interval(values)


@pytest.mark.parametrize("setting", [{"level": 0.0}, {"level": 1.0}, {"level": 95}, {"resamples": 0}])
def test_bootstrap_refuses_settings(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        bootstrap_interval([0, 1], **setting)


def test_wins_by_hand():
    assert wins([2.0, 1.0, 0.0], [1.0, 1.0, 1.0]).tolist() == [1.0, 0.5, 0.0]


def test_wins_of_both_sides_add_up_to_one():
    ours, theirs = np.random.default_rng(6).integers(0, 4, size=(2, 100))
    assert (wins(ours, theirs) + wins(theirs, ours) == 1).all()


def test_wins_keeps_nan_and_refuses_other_shapes():
    assert math.isnan(wins([math.nan], [0.0])[0])
    with pytest.raises(ValueError, match="must have the same rows"):
        wins([1.0, 2.0], [1.0])


def test_best_of_n_by_hand():
    # By score: 5, 7, 6. One of three at random: (5 + 7 + 6) / 3. Best of two: of {5, 7} 7, of {5, 6} 6, of {7, 6} 6.
    scores, values = [[0.0, 2.0, 1.0]], [[5.0, 6.0, 7.0]]
    assert best_of_n(scores, values, 1) == pytest.approx([18 / 3])
    assert best_of_n(scores, values, 2) == pytest.approx([(7 + 6 + 6) / 3])
    assert best_of_n(scores, values, 3) == [6]


@pytest.mark.parametrize("n", range(1, 8))
def test_best_of_n_is_the_mean_over_all_subsets(n):
    generator = np.random.default_rng(n)
    scores, values = generator.normal(size=(3, 7)), generator.normal(size=(3, 7))
    means = [
        np.mean([pool[max(subset, key=by.__getitem__)] for subset in combinations(range(7), n)])
        for by, pool in zip(scores, values, strict=True)
    ]
    np.testing.assert_allclose(best_of_n(scores, values, n), means, rtol=1e-12)


def test_best_of_n_of_equal_values_is_that_value():
    # The weights sum to 1, whatever ties the scores have.
    assert best_of_n(np.zeros((2, 16)), np.full((2, 16), 0.5), 8) == pytest.approx([0.5, 0.5])


def test_best_of_n_refuses():
    with pytest.raises(ValueError, match="n=4 is not between 1 and the pool's 3"):
        best_of_n(np.zeros((2, 3)), np.zeros((2, 3)), 4)
    with pytest.raises(ValueError, match=r"scores has shape \(3,\)"):
        best_of_n([1, 2, 3], [1, 2, 3], 1)


def test_kl_of_best_of_n():
    # log 4 = 1.386294, less 3/4.
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(0.636294, abs=1e-6)


def test_kl_of_best_of_n_is_that_of_the_density_of_a_maximum():
    # In quantiles u of the score, one sample has density 1 and the best of n has n u^(n-1).
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    density = 8 * u**7
    assert best_of_n_kl(8) == pytest.approx(np.mean(density * np.log(density)), abs=1e-6)
