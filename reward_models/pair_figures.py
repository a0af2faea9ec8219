"""Measure a reward model on the pairs of one dataset, from the margins that it gives them."""

from typing import Any

import numpy as np
from datasets import Dataset

from data.evaluation_pairs import SIDES
from reward_models.breakdowns import by_group, by_length, by_rater, quantile_edges, share_with_interval, shares_right
from reward_models.calibration import accuracy_by_gap, gap_edges, reward_model_report
from reward_models.reward_bench import section_scores
from reward_models.temperature import probabilities


def agreement_of(rows: Dataset) -> np.ndarray:
    """Return the share of raters who prefer the chosen side of each pair: the column `agreement`, or 1 without it."""
    return np.asarray(rows["agreement"][:] if "agreement" in rows.column_names else [1.0] * len(rows), dtype=float)


def pair_figures(margins: np.ndarray, texts: np.ndarray, rows: Dataset, domains: list[str] | None) -> dict[str, Any]:
    """Return the accuracy of a reward model on the pairs of one dataset, whole and in parts.

    Args:
        margins: score of chosen minus score of rejected, (pairs,).
        texts: numbers of the texts of chosen and rejected, (pairs, 2).
        rows: the pairs; the columns `margin`, `agreement` and `votes` are read if they are there.
        domains: the domain of each pair, if known.

    Returns:
        `pairs`, `ties`, `accuracy` (with interval), `mean_margin` (of absolute values), `ece_before` (with T = 1),
        `by_length`, `by_gap`, and in `gap` what that is about (`ratings` or `scores`). With agreement `human_ceiling` (how
        often one rater prefers the chosen side) and `agreement` (of the model with one rater). With domains `by_domain`, and
        of RewardBench's subsets `sections`. With votes `by_rater`.
    """
    found = set(rows.column_names)
    shares, right = agreement_of(rows), shares_right(margins)
    rated = shares if "agreement" in found else None
    result: dict[str, Any] = {
        "pairs": len(margins),
        "ties": int((margins == 0).sum()),
        "accuracy": share_with_interval(right, texts),
        "mean_margin": float(np.abs(margins).mean()),
        "ece_before": reward_model_report(margins, rated)["ece"],
    }
    if rated is not None:
        result["human_ceiling"] = float(shares.mean())
        result["agreement"] = float(np.mean(right * shares + (1 - right) * (1 - shares)))
    if domains is not None:
        result["by_domain"] = by_group(margins, texts, domains)
        for group in result["by_domain"] if rated is not None else ():
            group["human_ceiling"] = float(shares[np.asarray(domains) == group["group"]].mean())
        if sections := section_scores({one["group"]: one["accuracy"]["mean"] for one in result["by_domain"]}):
            result["sections"] = sections
    sizes = np.abs(margins)
    gaps = np.asarray(rows["margin"][:], dtype=float) if "margin" in found else sizes
    edges = gap_edges(gaps) if "margin" in found else quantile_edges(sizes)
    result["gap"] = "ratings" if "margin" in found else "scores"
    result["by_gap"] = accuracy_by_gap(margins, gaps, edges, rated)
    lengths = np.array([[len(as_text(row[side])) for side in ("chosen", "rejected")] for row in rows])
    result["by_length"] = by_length(margins, texts, lengths)
    if "votes" in found and (raters := by_rater(margins, texts, rows["votes"][:])):
        result["by_rater"] = raters
    return result


def mistakes(rows: Dataset, margins: np.ndarray, temperature: float, most: int) -> list[dict[str, str | float]]:
    """Return the sides, as texts, of the pairs that are scored wrongly by most, and P(rejected is preferred)."""
    worst = [int(i) for i in np.argsort(margins, kind="stable")[:most] if margins[i] < 0]
    certain = probabilities(-margins, temperature)
    return [{**{side: as_text(rows[i][side]) for side in SIDES}, "probability": float(certain[i])} for i in worst]


def as_text(cell: str | list[dict]) -> str:
    """Return a text as it is, a reply as its content, and a conversation as one line for each turn."""
    if isinstance(cell, str):
        return cell
    if len(cell) == 1 and cell[0]["role"] == "assistant":
        return cell[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in cell)
