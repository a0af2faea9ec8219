"""Fit the forms of Gao et al. 2022 to gold scores, and find where the gold score of a run turns.

With d the square root of the KL to the reference, the gold score is (arXiv 2210.10760, equations 1 and 2)

    best-of-n   d (alpha - beta d)
    RL          d (alpha - beta ln d)

A gold score here is in the unit of its own reward, so the score at d = 0 is fitted too.
"""

from dataclasses import dataclass

import numpy as np


Array = np.ndarray
GRID = 400  # points of d at which a peak is looked for


def terms(form: str, d: Array) -> Array:
    """Return the terms of a form, (points, 2 or 3), which are linear in its coefficients: `line`, `best_of_n` or `rl`."""
    one = np.ones_like(d)
    if form == "line":
        return np.stack([one, d], axis=1)
    bend = d**2 if form == "best_of_n" else d * np.log(np.maximum(d, 1e-9))
    return np.stack([one, d, -bend], axis=1)


@dataclass(frozen=True)
class Curve:
    """A fitted form: `coefficients` are the score at d = 0, alpha and beta; a line has no beta."""

    form: str
    coefficients: Array

    def at(self, d: Array) -> Array:
        """Return the score at each d, (points,)."""
        return terms(self.form, d) @ self.coefficients

    def peak(self, furthest: float) -> tuple[float, float]:
        """Return the d up to `furthest` at which the score is highest, and the score there."""
        d = np.linspace(0, furthest, GRID)
        score = self.at(d)
        return float(d[score.argmax()]), float(score.max())


def fit(form: str, d: Array, score: Array) -> Curve:
    """Fit a form to points by least squares.

    Args:
        d: square root of the KL in nats a sequence, (points,).
        score: (points,).
    """
    return Curve(form, np.linalg.lstsq(terms(form, d), score, rcond=None)[0])


def rms_error(curve: Curve, d: Array, score: Array) -> float:
    """Return the root mean square of what a curve misses, in the unit of the score."""
    return float(np.sqrt(np.mean((score - curve.at(d)) ** 2)))
