"""Measure how far a reward model can be trusted: its accuracy on human preferences and its calibration.

Scores are read as Bradley-Terry strengths: P(chosen is preferred) = sigmoid(margin), where margin is the score of the
chosen text minus that of the rejected one. All arrays are (pairs,).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


GAP_EDGES = (0.5, 1, 1.5, 2, 3, 4, 8)  # rating points of the embedded ratings


def _columns(**arrays: ArrayLike | None) -> dict[str, np.ndarray]:
    """Return the named arrays as float columns of one length, without those that are None.

    Raises:
        ValueError: an array is not one column, is empty, has another length, or is not finite.
    """
    columns = {name: np.asarray(values, dtype=float) for name, values in arrays.items() if values is not None}
    shapes = {name: column.shape for name, column in columns.items()}
    if any(len(shape) != 1 or shape[0] == 0 for shape in shapes.values()) or len(set(shapes.values())) != 1:
        raise ValueError(f"The columns must have one length, at least 1, but their shapes are {shapes}.")
    for name, column in columns.items():
        if not np.isfinite(column).all():
            raise ValueError(f"{name} has {np.count_nonzero(~np.isfinite(column))} entries that are not finite.")
    return columns


def _bin(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the index of each value's bin: edges[i] <= value < edges[i + 1].

    The last bin holds its upper edge too. Values outside the edges get -1 or len(edges) - 1, which are not bins.
    """
    index = np.searchsorted(edges, values, side="right") - 1
    index[values == edges[-1]] = len(edges) - 2
    return index


def accuracy(margins: ArrayLike) -> float:
    """Return the share of pairs whose chosen text scores higher, in 0..1; ties count half.

    Raises:
        ValueError: margins is empty, not one column or not finite.
    """
    return float(np.heaviside(_columns(margins=margins)["margins"], 0.5).mean())


def gap_edges(gaps: ArrayLike) -> Sequence[float]:
    """Return bin edges for gaps (pairs,): `GAP_EDGES` if all gaps lie within them, else the sextiles of the gaps.

    A user's own margins can have any scale.
    """
    points = _columns(gaps=gaps)["gaps"]
    if GAP_EDGES[0] <= points.min() and points.max() <= GAP_EDGES[-1]:
        return GAP_EDGES
    edges = np.unique(np.quantile(points, np.linspace(0, 1, len(GAP_EDGES))))
    return edges.tolist() if len(edges) > 1 else [edges[0], np.nextafter(edges[0], np.inf)]


def accuracy_by_gap(
    margins: ArrayLike, gaps: ArrayLike, edges: Sequence[float], agreement: ArrayLike | None = None
) -> list[dict[str, float]]:
    """Return accuracy and human agreement by the difference of the mean human ratings.

    Args:
        margins: score of chosen minus score of rejected.
        gaps: mean rating of chosen minus that of rejected, in rating points.
        edges: increasing bin edges in rating points. A bin holds its lower edge, the last bin its upper edge too.
        agreement: share of raters who prefer the chosen one, if it is known.

    Returns:
        One `{"low", "high", "pairs", "accuracy", "human"}` a bin, in order. `human` is the mean agreement in the bin:
        how often one rater agrees with the mean rating. Bins without pairs, and pairs outside the edges, are left out.
        `human` is left out if no agreement is known.

    Raises:
        ValueError: the columns differ in length or are not finite, or the edges do not increase.
    """
    columns = _columns(margins=margins, gaps=gaps, agreement=agreement)
    limits = np.asarray(edges, dtype=float)
    if len(limits) < 2 or not (np.diff(limits) > 0).all():
        raise ValueError(f"edges={limits.tolist()} are not two or more increasing numbers. Correct them.")
    index = _bin(columns["gaps"], limits)
    return [
        {
            "low": float(limits[i]),
            "high": float(limits[i + 1]),
            "pairs": int(inside.sum()),
            "accuracy": accuracy(columns["margins"][inside]),
            **({"human": float(columns["agreement"][inside].mean())} if "agreement" in columns else {}),
        }
        for i in range(len(limits) - 1)
        if (inside := index == i).any()
    ]


def reliability_curve(
    probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10, low: float = 0.0, high: float = 1.0
) -> list[dict[str, float]]:
    """Return the mean outcome and the mean predicted probability in each of `bins` equal bins of low..high.

    Args:
        probabilities: predicted probabilities, all in low..high.
        outcomes: observed outcomes in 0..1: 0 or 1, or a share of raters.

    Returns:
        One `{"low", "high", "count", "predicted", "observed"}` a bin, in order. Empty bins are left out. A bin holds its
        lower edge, the last bin its upper edge too.

    Raises:
        ValueError: the columns differ in length, a probability is outside low..high or an outcome outside 0..1.
    """
    predicted, observed = _columns(probabilities=probabilities, outcomes=outcomes).values()
    if bins < 1 or not low < high:
        raise ValueError(f"bins={bins}, low={low}, high={high} do not make a range of one or more bins.")
    if predicted.min() < low or predicted.max() > high:
        raise ValueError(f"probabilities span {predicted.min()}..{predicted.max()}, outside {low}..{high}.")
    if observed.min() < 0 or observed.max() > 1:
        raise ValueError(f"outcomes span {observed.min()}..{observed.max()}, outside 0..1.")
    # Not linspace: its edge 3 * 0.1 is above 0.3 and would put 0.3 one bin too low.
    edges = low + (high - low) * np.arange(bins + 1) / bins
    edges[-1] = high
    index = _bin(predicted, edges)
    return [
        {
            "low": float(edges[i]),
            "high": float(edges[i + 1]),
            "count": int(inside.sum()),
            "predicted": float(predicted[inside].mean()),
            "observed": float(observed[inside].mean()),
        }
        for i in range(bins)
        if (inside := index == i).any()
    ]


def expected_calibration_error(curve: list[dict[str, float]]) -> float:
    """Return the count-weighted mean of |observed - predicted| over the bins of a `reliability_curve`, in 0..1.

    Guo et al. (2017, arXiv 1706.04599), equation 3.
    """
    gaps = [abs(row["observed"] - row["predicted"]) for row in curve]
    return float(np.average(gaps, weights=[row["count"] for row in curve]))


def reward_model_report(
    margins: ArrayLike, agreement: ArrayLike | None = None, gaps: ArrayLike | None = None
) -> dict[str, Any]:
    """Return accuracy, human ceiling and calibration of a reward model on pairs that people have rated.

    The confidence of a pair is that in the predicted winner: sigmoid(|margin|), in 0.5..1. Its outcome is the share of
    raters who agree with that winner. If no agreement is known, all raters count as preferring the chosen text. A tie
    (margin 0) predicts no winner, so its outcome is a half.

    `accuracy` is measured against the mean rating. `human_ceiling` is how often one rater agrees with the mean rating. So
    the ceiling bounds agreement with one rater (the count-weighted mean of `observed`), and a model that knows the mean
    rating can have an accuracy above the ceiling.

    Args:
        margins: score of chosen minus score of rejected.
        agreement: share of raters who prefer the chosen one, in 0..1, if it is known.
        gaps: mean rating of chosen minus that of rejected, in rating points, if it is known.

    Returns:
        `pairs` (count), `accuracy`, `human_ceiling` (with agreement), `ece` (all 0..1), `by_gap` (with gaps; see
        `accuracy_by_gap`) and `reliability` (see `reliability_curve`; 10 bins over 0.5..1).

    Raises:
        ValueError: the columns differ in length, are empty or not finite, or an agreement is outside 0..1.
    """
    columns = _columns(margins=margins, agreement=agreement, gaps=gaps)
    margin = columns["margins"]
    agree = columns.get("agreement", np.ones(len(margin)))
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    outcomes = np.select([margin > 0, margin < 0], [agree, 1 - agree], default=0.5)
    reliability = reliability_curve(confidence, outcomes, bins=10, low=0.5, high=1.0)
    return {
        "pairs": len(margin),
        "accuracy": accuracy(margin),
        **({} if agreement is None else {"human_ceiling": float(agree.mean())}),
        "ece": expected_calibration_error(reliability),
        **({} if gaps is None else {"by_gap": accuracy_by_gap(margin, gaps, gap_edges(gaps), agreement)}),
        "reliability": reliability,
    }
