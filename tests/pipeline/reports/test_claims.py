"""`pipeline.reports.claims`: statistics by hand, what an interval is over, and when a claim is reproduced."""

import math

import numpy as np
import pytest

from pipeline.reports.claims import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    STATISTICS,
    Points,
    combined,
    decide,
    interval,
    outcome,
    verdict,
    within,
)


def points(seed, x, y, error=None):
    return Points(seed, *(np.array(values, dtype=float) for values in (x, y, error or [0] * len(x))))


LINE = [points(seed, [1, 2, 4, 8], [seed + 0.1 * k for k in range(4)]) for seed in range(3)]


@pytest.mark.parametrize(
    ("statistic", "x", "y", "expected"),
    [
        ("mean", [0, 1], [1, 4], 2.5),
        ("largest", [0, 1], [1, 4], 4),
        ("smallest", [0, 1], [1, 4], 1),
        ("slope", [0, 1, 2], [1, 3, 5], 2),
        ("slope", [1, 1], [1, 2], math.nan),
        ("r_squared", [0, 1, 2, 3], [0, 2, 4, 6], 1),
        ("r_squared", [0, 1, 2], [0, 1, 0], 0),
        ("r_squared", [0, 1, 2], [3, 3, 3], math.nan),
        # y is the root of x: 1 against sqrt(x). Against x the sums of products are 15, 49 and 5: 15^2 / (49 * 5).
        ("sqrt_over_linear", [0, 1, 4, 9], [0, 1, 2, 3], 1 - 15**2 / (5 * 49)),
    ],
)
def test_statistics_by_hand(statistic, x, y, expected):
    found = STATISTICS[statistic](np.array(x, dtype=float), np.array(y, dtype=float))
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def gao(x, alpha, beta):
    """Gao et al. 2022: the gold score of RL at d = sqrt(KL), from a score of 0.2."""
    return 0.2 + x * (alpha - beta * np.log(np.maximum(x, 1e-9)))


def test_gaos_form_predicts_what_follows_it_and_a_line_what_follows_a_line():
    x = np.linspace(0, 9, 28)
    early, y = x <= 6, gao(x, 1, 0.5)
    line = np.polyval(np.polyfit(x[early], y[early], 1), x[~early])
    assert STATISTICS["gao_over_line"](x, y) == pytest.approx(np.sqrt(np.mean((y[~early] - line) ** 2)))
    noise = np.random.default_rng(0).normal(size=(100, 28)) * 0.1
    assert np.mean([STATISTICS["gao_over_line"](x, 0.5 * x + one) for one in noise]) < -0.01
    assert math.isnan(STATISTICS["gao_over_line"](x[:4], y[:4]))


def test_the_fall_after_the_peak_of_gaos_form():
    """The peak is where alpha - beta (1 + ln d) is 0: at e, with e / 2 above the start."""
    x = np.linspace(0, 8, 33)
    fall = math.e / 2 - 8 * (1 - 0.5 * math.log(8))
    assert STATISTICS["fall_after_peak"](x, gao(x, 1, 0.5)) == pytest.approx(fall, abs=1e-3)
    assert STATISTICS["fall_after_peak"](x, gao(x, 1, 0.2)) == 0


def test_the_best_of_n_form_bends_by_beta():
    x = np.linspace(0, 1.6, 10)
    y = 0.2 + x * (1 - 0.3 * x)
    early = x <= 1.6 * 2 / 3
    line = np.polyval(np.polyfit(x[early], y[early], 1), x[~early])
    assert STATISTICS["best_of_n_beta"](x, y) == pytest.approx(0.3)
    assert STATISTICS["best_of_n_beta"](x, 0.2 + x * (1 + 0.3 * x)) == pytest.approx(-0.3)
    assert STATISTICS["best_of_n_over_line"](x, y) == pytest.approx(np.sqrt(np.mean((y[~early] - line) ** 2)))


def test_a_scale_changes_x_alone():
    found = interval(LINE, "slope", scale="log2")
    assert found["value"] == pytest.approx(0.1) and found["low"] == pytest.approx(0.1) == found["high"]


def test_an_interval_over_seeds_reaches_from_the_lowest_to_the_highest():
    found = interval([points(seed, [0], [seed]) for seed in (1, 2, 6)], "mean")
    assert found == {"value": 3, "low": 1, "high": 6}


def test_an_interval_over_prompts_has_the_width_of_the_standard_error():
    """All seeds have the same prompts, so that three of them do not make the error smaller."""
    same = [points(seed, [0], [1.0], [0.1]) for seed in range(3)]
    found = interval(same, "mean", resamples=20_000)
    assert found["value"] == 1
    assert found["low"] == pytest.approx(1 - 0.196, abs=0.01) and found["high"] == pytest.approx(1.196, abs=0.01)


def test_an_interval_is_the_same_each_time():
    noisy = [points(seed, [1, 2], [0, seed], [0.1, 0.2]) for seed in range(3)]
    assert interval(noisy, "slope") == interval(noisy, "slope")


def test_points_are_kept_by_x():
    (kept,) = within([points(0, [1, 2, 3], [4, 5, 6])], 2, 3)
    assert kept.x.tolist() == [2, 3] and kept.y.tolist() == [5, 6]
    with pytest.raises(ValueError, match="no points"):
        interval(within(LINE, 100, 200), "mean")


def test_series_are_combined_point_by_point():
    a, b = [points(0, [1], [6], [0.3])], [points(0, [1], [2], [0.4])]
    (minus,), (over,) = combined(a, b, "minus"), combined(a, b, "over")
    assert (minus.y[0], minus.error[0]) == (4, 0.5)
    # d(a / b) = (da^2 + (a/b)^2 db^2)^(1/2) / b
    assert over.y[0] == 3 and over.error[0] == pytest.approx(math.hypot(0.3, 3 * 0.4) / 2)
    with pytest.raises(ValueError, match="differ in seeds or x"):
        combined(a, [points(0, [2], [2])], "minus")


@pytest.mark.parametrize(
    ("low", "high", "at_least", "at_most", "expected"),
    [
        (0.2, 0.3, 0.1, 0.4, "met"),
        (0.1, 0.4, 0.1, 0.4, "met"),
        (0.0, 0.3, 0.1, 0.4, "open"),
        (0.5, 0.6, 0.1, 0.4, "missed"),
        (0.0, 0.05, 0.1, math.inf, "missed"),
        (0.0, 0.0, -math.inf, 0, "met"),
        (math.nan, math.nan, 0.1, 0.4, "open"),
    ],
)
def test_outcomes(low, high, at_least, at_most, expected):
    assert outcome({"low": low, "high": high}, at_least, at_most) == expected


@pytest.mark.parametrize(
    ("outcomes", "seeds", "expected"),
    [
        (["met", "met"], 3, REPRODUCED),
        (["met", "open"], 3, INCONCLUSIVE),
        (["open", "missed"], 3, NOT_REPRODUCED),
        (["met", "met"], 2, INCONCLUSIVE),
        (["missed"], 1, INCONCLUSIVE),
    ],
)
def test_verdicts(outcomes, seeds, expected):
    assert verdict(outcomes, seeds) == expected


def test_a_claim_from_end_to_end():
    criteria = [
        {"means": "grows", "series": "line", "statistic": "slope", "x_scale": "log2", "at_least": 0.05},
        {"means": "differs", "series": "line", "minus": "line", "statistic": "largest", "at_most": 0},
    ]
    decided, found = decide(criteria, {"line": LINE}, 3)
    assert found == REPRODUCED and [one["outcome"] for one in decided] == ["met", "met"]
    assert decide([{**criteria[0], "at_least": 0.11}], {"line": LINE}, 3)[1] == NOT_REPRODUCED
    assert decide([{**criteria[0], "x_to": 4}], {"line": LINE}, 3)[0][0]["value"] == pytest.approx(0.1)
