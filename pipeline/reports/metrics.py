"""Compute the statistics of the evaluation stage: intervals of means, best-of-n and wins."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike


# Rows that the bootstrap draws at once: 8 MiB of indices and 8 MiB of values, for any number of resamples.
CHUNK = 2**20


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Return the mean of `values` (rows,) and its percentile bootstrap interval (Efron 1979, Ann. Statist. 7:1).

    Rows are resampled with replacement, so give one value for each independent prompt. For a difference between two
    models, give the difference of each prompt, which keeps the pairing.

    Returns:
        `mean`, `low` and `high`, in the unit of the values. A share `level` of the resampled means lies in low..high.

    Raises:
        ValueError: values is not one column of two or more finite numbers, or level or resamples is out of range.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values has shape {values.shape}, but an interval needs one column of two or more values.")
    if not np.isfinite(values).all():
        raise ValueError(f"values has {np.count_nonzero(~np.isfinite(values))} entries that are not finite.")
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not between 0 and 1.")
    if resamples < 1:
        raise ValueError(f"resamples={resamples} is not a positive number.")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, CHUNK // len(values))
    for start in range(0, resamples, chunk):
        stop = min(start + chunk, resamples)
        rows = generator.integers(len(values), size=(stop - start, len(values)))
        means[start:stop] = values[rows].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def interval_over_seeds(values: ArrayLike) -> dict[str, float]:
    """Return the mean of `values` (seeds,) and its 95% interval by Student's t, which is for few values.

    The 97.5% quantile of t is that of a million draws, right to 1%. One seed has no interval: its ends are NaN.
    """
    values = np.asarray(values, dtype=float)
    count = len(values)
    half = float("nan")
    if count > 1:
        quantile = np.quantile(np.random.default_rng(0).standard_t(count - 1, 1_000_000), 0.975)
        half = float(quantile * values.std(ddof=1) / math.sqrt(count))
    mean = float(values.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half}


def best_of_n(scores: ArrayLike, values: ArrayLike, n: int) -> np.ndarray:
    """Return the expected value of the best of `n` completions drawn without replacement from each prompt's pool.

    Let the pool of size m be in order of score, r = 1..m. The r-th completion is the best of the draw if the other n - 1
    are among the r - 1 below it: with probability C(r - 1, n - 1) / C(m, n). No subset is drawn, so the estimate is
    unbiased and adds no noise of its own (Chen et al. 2021, arXiv 2107.03374, eq. 1, do the same for pass@k). Of equal
    scores, the later completion counts as the higher one.

    Args:
        scores: (prompts, m), scores that choose the best completion.
        values: (prompts, m), values to return the expectation of; they may be the scores.

    Returns:
        (prompts,), in the unit of the values.

    Raises:
        ValueError: the shapes differ, or n is not in 1..m.
    """
    scores, values = np.asarray(scores, dtype=float), np.asarray(values, dtype=float)
    if scores.ndim != 2 or scores.shape != values.shape:
        raise ValueError(
            f"scores has shape {scores.shape} and values {values.shape}, but both must be (prompts, pool)."
        )
    size = scores.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"n={n} is not between 1 and the pool's {size} completions.")
    weights = np.array([math.comb(rank, n - 1) for rank in range(size)], dtype=float) / math.comb(size, n)
    return np.take_along_axis(values, scores.argsort(axis=1, kind="stable"), axis=1) @ weights


def best_of_n_kl(n: int) -> float:
    """Return the KL between best-of-n and the policy it samples from, in nats a sequence: log n - (n - 1) / n.

    Source: Stiennon et al. 2020 (arXiv 2009.01325), appendix G.3. Gao et al. 2022 (arXiv 2210.10760) measure best-of-n
    with it. It is exact if no two completions share a score, and otherwise an upper bound (Beirami et al. 2024, arXiv
    2401.01879).
    """
    return math.log(n) - (n - 1) / n


def wins(ours: ArrayLike, theirs: ArrayLike) -> np.ndarray:
    """Return 1 where ours > theirs, 0.5 on ties, 0 otherwise, and NaN where either is NaN; the mean is the win rate.

    Both are (prompts,), the score of each model's completion of the same prompt.

    Raises:
        ValueError: the shapes differ.
    """
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if ours.shape != theirs.shape:
        raise ValueError(f"ours has shape {ours.shape} and theirs {theirs.shape}, but both must have the same rows.")
    won: np.ndarray = np.heaviside(ours - theirs, 0.5)
    return won


def check_both_scored(sft: Mapping[str, float], policy: Mapping[str, float]) -> None:
    """Check that each reward scored completions of both policies or of none: else their scores are sums of other rewards.

    Args:
        sft, policy: mean of each reward over completions of that policy, NaN if it scored none.

    Raises:
        ValueError: one scored those of one policy alone.
    """
    for name, mean in policy.items():
        if math.isnan(mean) != math.isnan(sft[name]):
            scored, other = ("SFT", "the policy") if math.isnan(mean) else ("the policy", "SFT")
            raise ValueError(
                f"reward function {name!r} scored completions of {scored} and none of {other}, so that their scores cannot be "
                f"compared. Let it score both, or leave it out."
            )
