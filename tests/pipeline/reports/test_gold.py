"""`pipeline.reports.gold`: the forms of Gao et al. 2022 are found again, with their peaks where calculus has them."""

import math

import numpy as np
import pytest

from pipeline.reports.gold import fit, rms_error, terms


D = np.linspace(0, 8, 33)


def rl(d):
    return 0.2 + d * (1 - 0.5 * np.log(np.maximum(d, 1e-9)))


@pytest.mark.parametrize(
    ("form", "score", "coefficients"),
    [
        ("line", 0.2 + 3 * D, [0.2, 3]),
        ("best_of_n", 0.2 + D * (1 - 0.1 * D), [0.2, 1, 0.1]),
        ("rl", rl(D), [0.2, 1, 0.5]),
    ],
)
def test_a_form_is_found_again(form, score, coefficients):
    curve = fit(form, D, score)
    assert curve.coefficients == pytest.approx(coefficients, abs=1e-6)
    assert curve.at(D) == pytest.approx(score, abs=1e-6)
    assert rms_error(curve, D, score) == pytest.approx(0, abs=1e-6)
    assert rms_error(curve, D, score + np.where(D > 4, 2, 0)) == pytest.approx(2 * math.sqrt(16 / 33))


@pytest.mark.parametrize(
    ("form", "score", "peak"),
    [
        ("rl", rl(D), (math.e, 0.2 + math.e / 2)),  # alpha - beta (1 + ln d) = 0
        ("best_of_n", 0.2 + D * (1 - 0.1 * D), (5, 0.2 + 2.5)),  # alpha - 2 beta d = 0
        ("line", 0.2 + 3 * D, (8, 24.2)),
    ],
)
def test_a_peak_is_where_the_slope_is_0_or_at_the_end(form, score, peak):
    assert fit(form, D, score).peak(8) == pytest.approx(peak, abs=0.02)


def test_at_a_kl_of_0_only_the_start_counts():
    assert terms("rl", np.zeros(1))[0] == pytest.approx([1, 0, 0], abs=1e-6)
