"""Decide a paper's claim from several runs: named statistics, their intervals over seeds and prompts, and a verdict.

A series is what the runs measured: for each seed the points x and y, with the standard error of y over prompts where it is
known. A criterion asks that a statistic of a series lie in a range. The claim is

- reproduced, if the 95% interval of each statistic lies within its range;
- not reproduced, if the interval of one lies outside of its range;
- inconclusive otherwise, and with fewer than three seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.reports.gold import fit, rms_error


Array = np.ndarray
FEWEST_SEEDS = 3
REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive"


@dataclass(frozen=True)
class Points:
    """One seed's points, each array (points,); `error` is the standard error of y over prompts or pairs, 0 if unknown."""

    seed: int
    x: Array
    y: Array
    error: Array


# ------------------------------------------------------------------------------------------ statistics
def slope(x: Array, y: Array) -> float:
    """Return the slope of the least-squares line through the points, in units of y for one unit of x."""
    return float(np.polyfit(x, y, 1)[0]) if len(np.unique(x)) > 1 else float("nan")


def r_squared(x: Array, y: Array) -> float:
    """Return the share of the variance of y that the least-squares line explains; NaN if x or y never differs."""
    if len(np.unique(x)) < 2 or y.var() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def sqrt_over_linear(x: Array, y: Array) -> float:
    """Return how much more of the variance of y a line in sqrt(x) explains than a line in x."""
    return r_squared(np.sqrt(np.maximum(x, 0)), y) - r_squared(x, y)


def _form_over_line(form: str, x: Array, y: Array) -> float:
    early = x <= x.max() * 2 / 3
    if early.sum() < 4 or early.all():
        return float("nan")
    line, bent = (rms_error(fit(one, x[early], y[early]), x[~early], y[~early]) for one in ("line", form))
    return line - bent


def gao_over_line(x: Array, y: Array) -> float:
    """Return by how much the RL form of Gao et al. 2022 predicts better than a line: the difference of their errors.

    Both are fitted to the points up to two thirds of the largest x, the square root of the KL. Their errors are those on the
    points beyond, in units of y. NaN with fewer than four points before, or none beyond.
    """
    return _form_over_line("rl", x, y)


def best_of_n_over_line(x: Array, y: Array) -> float:
    """Return the same as `gao_over_line`, of the best-of-n form."""
    return _form_over_line("best_of_n", x, y)


def best_of_n_beta(x: Array, y: Array) -> float:
    """Return beta of the best-of-n form, fitted to all points, in units of y a nat; above 0 the curve bends down."""
    return float(fit("best_of_n", x, y).coefficients[2])


def fall_after_peak(x: Array, y: Array) -> float:
    """Return how far the RL form, fitted to all points, falls from its peak to the largest x; 0 if it does not fall."""
    curve = fit("rl", x, y)
    return curve.peak(x.max())[1] - float(curve.at(x.max(keepdims=True))[0])


STATISTICS: Mapping[str, Callable[[Array, Array], float]] = {
    "mean": lambda x, y: float(y.mean()),
    "largest": lambda x, y: float(y.max()),
    "smallest": lambda x, y: float(y.min()),
    "slope": slope,
    "r_squared": r_squared,
    "sqrt_over_linear": sqrt_over_linear,
    "gao_over_line": gao_over_line,
    "best_of_n_over_line": best_of_n_over_line,
    "best_of_n_beta": best_of_n_beta,
    "fall_after_peak": fall_after_peak,
}
SCALES: Mapping[str, Callable[[Array], Array]] = {"linear": np.asarray, "log2": np.log2, "sqrt": np.sqrt}


# ------------------------------------------------------------------------------------------ series
def within(series: Sequence[Points], low: float, high: float) -> list[Points]:
    """Return the points with low <= x <= high."""
    kept = [(points, (points.x >= low) & (points.x <= high)) for points in series]
    return [Points(points.seed, points.x[at], points.y[at], points.error[at]) for points, at in kept]


def combined(series: Sequence[Points], other: Sequence[Points], how: str) -> list[Points]:
    """Return series `minus` or `over` another, point by point of the same seed and x. Errors count as independent.

    Raises:
        ValueError: the two differ in seeds or in x.
    """
    found = []
    for a, b in zip(series, other, strict=True):
        if a.seed != b.seed or not np.array_equal(a.x, b.x):
            raise ValueError(f"the two series differ in seeds or x: {a.seed}, {a.x} and {b.seed}, {b.x}.")
        if how == "minus":
            y, error = a.y - b.y, np.hypot(a.error, b.error)
        else:
            y = a.y / b.y
            error = np.hypot(a.error, y * b.error) / np.abs(b.y)
        found.append(Points(a.seed, a.x, y, error))
    return found


def interval(
    series: Sequence[Points], statistic: str, *, scale: str = "linear", resamples: int = 2_000, seed: int = 0
) -> dict[str, float]:
    """Return a statistic of all seeds' points together, and its 95% bootstrap interval over seeds and prompts.

    Each draw takes as many seeds, with replacement, and moves each y by a normal number times its standard error. The seeds
    of a draw are moved by the same numbers, since they were measured on the same held-out prompts. With three seeds an
    interval reaches from the lowest seed to the highest, and so covers less than 95% of what more seeds would show.

    Returns:
        `value`, `low` and `high`; NaN where the statistic is not defined.

    Raises:
        ValueError: a seed has no points.
    """
    if empty := [points.seed for points in series if not len(points.x)]:
        raise ValueError(f"{statistic}: the series has no points of seed {empty[0]}. Correct its x, x_from and x_to.")
    measure, x_of = STATISTICS[statistic], SCALES[scale]
    placed = [Points(points.seed, x_of(points.x), points.y, points.error) for points in series]
    longest = max(len(points.x) for points in placed)
    known = any(points.error.any() for points in placed)

    def of(drawn: Sequence[Points], noise: Array) -> float:
        y = np.concatenate([points.y + points.error * noise[: len(points.y)] for points in drawn])
        return measure(np.concatenate([points.x for points in drawn]), y)

    generator = np.random.default_rng(seed)
    still, values = np.zeros(longest), np.empty(resamples)
    seen: dict[tuple[int, ...], float] = {}
    for number in range(resamples):
        chosen = tuple(sorted(generator.integers(len(placed), size=len(placed)).tolist()))
        drawn = [placed[at] for at in chosen]
        if known:
            values[number] = of(drawn, generator.standard_normal(longest))
        else:  # the same seeds give the same value
            if chosen not in seen:
                seen[chosen] = of(drawn, still)
            values[number] = seen[chosen]
    low, high = np.quantile(values, [0.025, 0.975])
    return {"value": of(placed, still), "low": float(low), "high": float(high)}


# ------------------------------------------------------------------------------------------ the verdict
def outcome(found: Mapping[str, float], at_least: float, at_most: float) -> str:
    """Return `met` if the interval lies within at_least..at_most, `missed` if it lies outside, and `open` otherwise."""
    low, high = found["low"], found["high"]
    if at_least <= low and high <= at_most:
        return "met"
    return "missed" if high < at_least or low > at_most else "open"


def verdict(outcomes: Sequence[str], seeds: int) -> str:
    """Return what the outcomes of all criteria say about the claim."""
    if seeds < FEWEST_SEEDS:
        return INCONCLUSIVE
    if "missed" in outcomes:
        return NOT_REPRODUCED
    return REPRODUCED if all(one == "met" for one in outcomes) else INCONCLUSIVE


def decide(criteria: Sequence[Mapping], series: Mapping[str, Sequence[Points]], seeds: int) -> tuple[list[dict], str]:
    """Return each criterion with the interval of its statistic and its outcome, and the verdict.

    Args:
        criteria: each with `statistic` and `series`, perhaps `minus` or `over` (another series), `x_from`, `x_to`,
            `x_scale`, `at_least` and `at_most`.

    Raises the errors of `combined` and `interval`.
    """
    decided = []
    for one in criteria:
        points: Sequence[Points] = series[one["series"]]
        for how in ("minus", "over"):
            if how in one:
                points = combined(points, series[one[how]], how)
        points = within(points, one.get("x_from", -np.inf), one.get("x_to", np.inf))
        found = interval(points, one["statistic"], scale=one.get("x_scale", "linear"))
        bounds = one.get("at_least", -np.inf), one.get("at_most", np.inf)
        decided.append({**one, **found, "outcome": outcome(found, *bounds)})
    return decided, verdict([one["outcome"] for one in decided], seeds)
