"""Temperature scaling: the temperature that data was made with is found, and what it does is measured on other pairs."""

import json

import numpy as np
import pytest

from reward_models.calibration import accuracy
from reward_models.reward_bench import SECTIONS, TOTAL, section_scores
from reward_models.temperature import (
    FILE,
    LEAST,
    Calibration,
    calibrate,
    cross_entropy,
    fit_temperature,
    probabilities,
    read_calibration,
)


MARGINS = np.random.default_rng(0).normal(scale=4, size=4000)


def test_probabilities_by_hand_and_without_overflow():
    assert probabilities([np.log(3), 0, -np.log(3)]) == pytest.approx([0.75, 0.5, 0.25])
    assert probabilities([2 * np.log(3)], 2) == pytest.approx([0.75])
    with np.errstate(over="raise", invalid="raise"):
        assert probabilities([1e4, -1e2], 0.5).tolist() == [1.0, pytest.approx(np.exp(-200))]


def test_cross_entropy_by_hand():
    # -0.7 log 0.75 - 0.3 log 0.25
    assert cross_entropy(np.array([np.log(3)]), np.array([0.7])) == pytest.approx(0.6173, abs=1e-4)
    assert cross_entropy(np.array([2 * np.log(3)]), np.array([0.7]), 2) == pytest.approx(0.6173, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.02, 0.5, 1.0, 3.0, 250.0])
def test_the_temperature_that_the_shares_were_made_with_is_found(temperature):
    shares = probabilities(MARGINS, temperature)
    assert fit_temperature(MARGINS, shares) == pytest.approx(temperature, rel=1e-6)


def test_no_other_temperature_has_a_lower_cross_entropy():
    labels = (np.random.default_rng(1).random(len(MARGINS)) < probabilities(MARGINS, 2.5)).astype(float)
    found = fit_temperature(MARGINS, labels)
    assert found == pytest.approx(2.5, rel=0.1)  # of 4,000 drawn labels
    least = cross_entropy(MARGINS, labels, found)
    assert all(least < cross_entropy(MARGINS, labels, found * factor) for factor in (0.1, 0.99, 1.01, 10))


def test_where_no_temperature_fits():
    with pytest.raises(ValueError, match="no temperature fits 3 pairs: the model orders all of them rightly"):
        fit_temperature(np.array([1.0, 2.0, 0.5]), np.ones(3))
    with pytest.raises(ValueError, match="no better than chance"):
        fit_temperature(np.array([-1.0, -2.0, 0.5]), np.ones(3))
    with pytest.raises(ValueError, match="no better than chance"):
        fit_temperature(np.zeros(3), np.ones(3))


def test_each_half_is_measured_with_the_temperature_of_the_other(tmp_path):
    first = np.arange(len(MARGINS)) < 2500
    shares = np.where(first, probabilities(MARGINS, 4), probabilities(MARGINS, 2))
    found, before, after = calibrate(MARGINS, shares, (first, ~first), "pairs.jsonl")
    assert found.half_temperatures == (pytest.approx(4, rel=1e-6), pytest.approx(2, rel=1e-6))
    assert found.temperature == fit_temperature(MARGINS, shares) and 2 < found.temperature < 4 and found.pairs == 4000
    # The share of raters who agree is sigmoid(|d| / T) with the T of the half; the ECE is the mean distance from it, since
    # all distances of a half have one sign.
    sizes = np.abs(MARGINS)
    distance = {T: np.mean(probabilities(sizes[half], T) - probabilities(sizes[half], 6 - T))
                for half, T in ((first, 2), (~first, 4))}  # fmt: skip
    assert found.half_eces == (pytest.approx(distance[2], abs=1e-6), pytest.approx(-distance[4], abs=1e-6))
    agreeing = np.where(first, probabilities(sizes, 4), probabilities(sizes, 2))
    assert found.ece_before == pytest.approx(np.mean(probabilities(sizes) - agreeing), abs=1e-9)
    scaled = MARGINS / np.where(first, found.half_temperatures[1], found.half_temperatures[0])
    assert found.nll == pytest.approx(cross_entropy(scaled, shares))
    assert after["accuracy"] == before["accuracy"] == accuracy(MARGINS)
    found.save(tmp_path)
    assert read_calibration(tmp_path) == found and read_calibration(tmp_path / "none") is None
    (tmp_path / FILE).write_text(json.dumps(json.loads((tmp_path / FILE).read_text()) | {"temperature": -4}))
    with pytest.raises(
        ValueError, match=r"calibration.json: 'temperature' is -4, .* must be a number above 0. Measure it"
    ):
        read_calibration(tmp_path)


def test_pairs_of_neither_half_are_fitted_and_not_measured():
    shares, third = probabilities(MARGINS, 3), np.arange(len(MARGINS)) % 3
    found, before, _ = calibrate(MARGINS, shares, (third == 0, third == 1), "pairs.jsonl")
    assert found.pairs == 4000 and found.measured == before["pairs"] == 2667
    assert found.ece == pytest.approx(0, abs=1e-6) and found.nll == pytest.approx(
        cross_entropy(MARGINS[third < 2], shares[third < 2], 3)
    )


def test_halves_that_are_too_small_give_no_temperature():
    few = np.arange(len(MARGINS)) < LEAST - 1
    with pytest.raises(
        ValueError, match="the two halves of 4,000 pairs that share no text have 49 and 3,951, and each needs 50"
    ):
        calibrate(MARGINS, np.ones(len(MARGINS)), (few, ~few), "pairs.jsonl")


def test_the_file_of_another_release_may_hold_more(tmp_path):
    good = Calibration(2.0, 130, 120, 0.1, 0.02, 0.7, 0.6, (2.1, 1.9), (0.03, 0.02), "a")
    good.save(tmp_path)
    text = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(text.replace("{", '{"method": "temperature",', 1))
    assert read_calibration(tmp_path) == good


# ------------------------------------------------------------------------------------------ RewardBench
def test_sections_have_the_published_weights():
    """Their numbers of prompts are 358, 456, 740 and 1,431 (Lambert et al. 2024, table 1), with 447 of math-prm."""
    sizes = {section: sum(weights.values()) for section, weights in SECTIONS.items()}
    assert sizes == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1431 - 447 + 984}
    assert sum(map(len, SECTIONS.values())) == 23


def test_section_scores_by_hand():
    assert section_scores({"alpacaeval-easy": 1.0, "film": 0.5}) == {}  # a section needs all of its subsets
    chat = dict.fromkeys(SECTIONS["Chat"], 0.0) | {"alpacaeval-easy": 1.0, "mt-bench-easy": 0.5}
    assert section_scores(chat) == {"Chat": pytest.approx((100 + 14) / 358)}
    everything = {subset: 1.0 for weights in SECTIONS.values() for subset in weights} | {"math-prm": 0.0}
    found = section_scores(everything)
    assert found["Reasoning"] == pytest.approx(0.5) and found[TOTAL] == pytest.approx(3.5 / 4)
