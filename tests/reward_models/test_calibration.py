import math

import numpy as np
import pytest

from reward_models.calibration import (
    GAP_EDGES,
    accuracy,
    accuracy_by_gap,
    expected_calibration_error,
    gap_edges,
    reliability_curve,
    reward_model_report,
)


def test_accuracy_counts_ties_half():
    # Right, right, tie, wrong: (1 + 1 + 0.5 + 0) / 4.
    assert accuracy([2.0, 0.1, 0.0, -3.0]) == 2.5 / 4


def test_accuracy_of_swapped_pairs_is_the_complement():
    margins = np.random.default_rng(0).integers(-3, 4, size=99)
    assert accuracy(margins) + accuracy(-margins) == pytest.approx(1)


def test_accuracy_by_gap_by_hand():
    rows = accuracy_by_gap(
        margins=[1.0, -1.0, 0.0, 2.0, 3.0],
        gaps=[0.5, 0.9, 1.0, 4.0, 9.0],
        agreement=[0.6, 0.5, 0.7, 0.9, 1.0],
        edges=[0.5, 1, 2, 3, 4],
    )
    assert rows == [
        {"low": 0.5, "high": 1.0, "pairs": 2, "accuracy": 0.5, "human": 0.55},  # gaps 0.5, 0.9: right, wrong
        {"low": 1.0, "high": 2.0, "pairs": 1, "accuracy": 0.5, "human": 0.7},  # gap 1.0 opens its bin: a tie
        # 2..3 has no pair; gap 4.0 is the last upper edge, which belongs to its bin; gap 9.0 is outside
        {"low": 3.0, "high": 4.0, "pairs": 1, "accuracy": 1.0, "human": 0.9},
    ]


def test_accuracy_by_gap_leaves_out_pairs_below_the_edges():
    assert accuracy_by_gap([1.0], [0.4], [0.5, 1]) == []


def test_bins_fit_margins_of_any_scale():
    assert gap_edges([0.5, 2.2, 8.0]) == GAP_EDGES  # ratings like the embedded ones
    assert gap_edges(np.arange(7) / 100) == pytest.approx(np.arange(7) / 100)  # six equal shares
    assert gap_edges([0.0, 0.0, 0.0, 30.0])[0] == 0 and gap_edges([0.0, 0.0, 0.0, 30.0])[-1] == 30
    for gaps in ([0.2] * 5, [10.0, 20.0, 20.0, 90.0], [0.0, -1.0, 0.3, 0.3]):
        rows = accuracy_by_gap([1.0] * len(gaps), gaps, gap_edges(gaps))
        assert sum(row["pairs"] for row in rows) == len(gaps)


def test_a_report_without_agreement_states_no_human_figure():
    report = reward_model_report([2.0, -1.0, 0.5], gaps=[1.0, 2.0, 3.0])
    assert "human_ceiling" not in report and not any("human" in row for row in report["by_gap"])
    certain = reward_model_report([2.0, -1.0, 0.5], agreement=[1.0, 1.0, 1.0])
    assert "by_gap" not in certain and certain["human_ceiling"] == 1
    assert (report["ece"], report["reliability"]) == (certain["ece"], certain["reliability"])


@pytest.mark.parametrize("edges", [[1], [1, 1], [2, 1]])
def test_accuracy_by_gap_refuses_edges(edges):
    with pytest.raises(ValueError, match="edges"):
        accuracy_by_gap([1.0], [1.0], edges)


def test_reliability_curve_by_hand():
    rows = reliability_curve([0.1, 0.3, 0.5, 0.75, 1.0], [0, 1, 1, 0.5, 1], bins=2)
    # 0.5 opens the upper bin and 1.0 closes it. Lower: (0.1 + 0.3) / 2 and (0 + 1) / 2; upper: 2.25 / 3 and 2.5 / 3.
    assert [(row["low"], row["high"], row["count"]) for row in rows] == [(0.0, 0.5, 2), (0.5, 1.0, 3)]
    assert [row["predicted"] for row in rows] == pytest.approx([0.2, 0.75])
    assert [row["observed"] for row in rows] == pytest.approx([0.5, 2.5 / 3])


def test_reliability_curve_over_a_part_of_the_range():
    rows = reliability_curve([0.5, 0.52, 0.98], [0, 1, 1], bins=10, low=0.5, high=1.0)
    # Ten bins of 0.05; the eight in the middle are empty and left out.
    assert [(row["low"], row["high"], row["count"]) for row in rows] == [(0.5, 0.55, 2), (0.95, 1.0, 1)]


def test_reliability_curve_puts_each_tenth_in_the_bin_it_opens():
    rows = reliability_curve([k / 10 for k in range(10)], [0.5] * 10)
    assert [row["count"] for row in rows] == [1] * 10
    assert [row["low"] for row in rows] == [k / 10 for k in range(10)]


@pytest.mark.parametrize(
    "probabilities, outcomes, match",
    [
        ([0.4], [1], "probabilities span"),
        ([1.1], [1], "probabilities span"),
        ([0.7], [1.2], "outcomes span"),
        ([0.7], [-0.1], "outcomes span"),
        ([math.nan], [1], "probabilities has 1 entries"),
        ([0.7, 0.8], [1], "one length"),
        ([], [], "at least 1"),
    ],
)
def test_reliability_curve_refuses(probabilities, outcomes, match):
    with pytest.raises(ValueError, match=match):
        reliability_curve(probabilities, outcomes, low=0.5)


def test_expected_calibration_error_by_hand():
    # Bins 0..0.5 (one value) and 0.5..1 (three): 1/4 |1 - 0.2| + 3/4 |(1 + 1 + 0)/3 - (0.6 + 0.7 + 0.8)/3|
    # = 0.2 + 3/4 |2/3 - 0.7| = 0.2 + 0.025.
    curve = reliability_curve([0.2, 0.6, 0.7, 0.8], [1, 1, 1, 0], bins=2)
    assert expected_calibration_error(curve) == pytest.approx(0.225)


def test_calibrated_predictions_have_no_error():
    # Of ten predictions of 0.7, seven come true; of ten of 0.2, two do.
    outcomes = [1] * 7 + [0] * 3 + [1] * 2 + [0] * 8
    curve = reliability_curve([0.7] * 10 + [0.2] * 10, outcomes)
    assert expected_calibration_error(curve) == pytest.approx(0, abs=1e-12)


def test_error_with_one_bin_is_that_of_the_means():
    generator = np.random.default_rng(1)
    probabilities, outcomes = generator.random((2, 50))
    error = expected_calibration_error(reliability_curve(probabilities, outcomes, bins=1))
    assert error == pytest.approx(abs(probabilities.mean() - outcomes.mean()))


def test_report_by_hand():
    # sigmoid(ln 4) = 0.8, sigmoid(ln 1.5) = 0.6.
    report = reward_model_report(
        margins=[math.log(4), -math.log(4), math.log(1.5), 0.0],
        agreement=[0.9, 0.7, 0.6, 1.0],
        gaps=[2.5, 1.2, 0.5, 8],
    )
    assert report["pairs"] == 4
    assert report["accuracy"] == 2.5 / 4
    assert report["human_ceiling"] == pytest.approx(0.8)  # (0.9 + 0.7 + 0.6 + 1.0) / 4
    # Confidence 0.8 twice: 0.9 agree with the first prediction and, as it is wrong, 1 - 0.7 with the second: 0.6. The
    # third, 0.6, is met exactly. The tie has confidence 0.5 and outcome 0.5. ECE = 2/4 |0.6 - 0.8| = 0.1.
    assert [row["count"] for row in report["reliability"]] == [1, 1, 2]
    assert [row["predicted"] for row in report["reliability"]] == pytest.approx([0.5, 0.6, 0.8])
    assert [row["observed"] for row in report["reliability"]] == pytest.approx([0.5, 0.6, 0.6])
    assert report["ece"] == pytest.approx(0.1)
    assert [(row["low"], row["high"], row["accuracy"]) for row in report["by_gap"]] == [
        (0.5, 1.0, 1.0),
        (1.0, 1.5, 0.0),
        (2.0, 3.0, 1.0),
        (4.0, 8.0, 0.5),
    ]


def test_report_of_a_bradley_terry_rater_is_calibrated():
    margins = np.linspace(-6, 6, 2001)
    report = reward_model_report(margins, 1 / (1 + np.exp(-margins)), np.ones_like(margins))
    assert report["ece"] == pytest.approx(0, abs=1e-12)
    doubled = reward_model_report(2 * margins, 1 / (1 + np.exp(-margins)), np.ones_like(margins))
    assert doubled["ece"] > 0.03


def test_report_takes_margins_of_any_size():
    report = reward_model_report([1e4, -1e4], [1.0, 0.0], [1.0, 1.0])
    assert report["reliability"] == [{"low": 0.95, "high": 1.0, "count": 2, "predicted": 1.0, "observed": 1.0}]
    assert report["ece"] == 0.0


@pytest.mark.parametrize("agreement", [[0.9], [0.9, 1.1], [0.9, math.nan]])
def test_report_refuses(agreement):
    with pytest.raises(ValueError):
        reward_model_report([1.0, 2.0], agreement, [1.0, 1.0])
