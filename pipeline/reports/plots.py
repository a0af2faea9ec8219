"""Draw the plots of the reports.

They use matplotlib's object API (`Figure`, Agg), so nothing here touches pyplot's global state or a display. A plot is about
900 px wide, the width of a README, and its text has the final size.
"""

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike


# In all plots, grey-blue is the start or the comparison (SFT, people), and orange is what was trained (PPO, the reward model).
SFT, PPO = "#5b7a99", "#e0661c"
INK, GRID = "#2b3440", "#e3e7eb"
DASHES = (0, (4, 2))
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#aab3bd",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#aab3bd",
    "ytick.color": "#aab3bd",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "lines.linewidth": 1.6,
    "savefig.dpi": 120,
}
# Ticks at multiples of these times a power of ten. By default matplotlib also uses 0.3, 0.4, 0.6 and 0.8.
TICK_STEPS = (1, 2, 2.5, 5, 10)
HUMAN_CEILING = "human ceiling: how often one rater agrees"


def row_of_panels(width: float, height: float, panels: int = 1, *, lines: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure of the given inches with `panels` in each line; make and save it in one `rc_context(STYLE)`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(lines, panels, squeeze=False).ravel())


def _series(history: list[dict], key: str) -> tuple[list[float], list[float]]:
    """Return the steps and values of the log rows that have both, and a finite value."""
    rows = [(row["step"], row[key]) for row in history if row.get(key) is not None and row.get("step") is not None]
    rows = [(step, value) for step, value in rows if math.isfinite(value)]
    return [step for step, _ in rows], [value for _, value in rows]


def draw_ppo_curves(history: list[dict], path: str | PathLike) -> None:
    """Draw mean score, KL to the reference (nats a sequence) and value loss against the step, as a PNG at `path`.

    `history` is the trainer's log: rows with `step` and some of `score`, `kl`, `loss/value`. A panel skips the rows that
    lack its key.
    """
    panels = (
        ("score", "Mean score\n(reward model units)"),
        ("kl", "KL to the reference\n(nats a sequence)"),
        ("loss/value", "Value loss\n(squared reward units)"),
    )
    with matplotlib.rc_context(STYLE):
        figure, axes = row_of_panels(7.5, 2.7, len(panels))
        for axis, (key, title) in zip(axes, panels, strict=True):
            steps, values = _series(history, key)
            # A line of one point would be invisible, so it gets a marker.
            axis.plot(steps, values, color=PPO, marker="o" if len(values) == 1 else None)
            axis.set_title(title)
            axis.set_xlabel("optimizer step")
            axis.xaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS, integer=True, min_n_ticks=1))
            axis.yaxis.set_major_locator(MaxNLocator(6, steps=TICK_STEPS))
            if not values:
                axis.set(xticks=[], yticks=[])
                axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", va="center")
        figure.savefig(path)


def draw_score_histograms(
    sft_scores: ArrayLike, ppo_scores: ArrayLike, path: str | PathLike, policy: str = "PPO"
) -> None:
    """Draw histograms of reward model scores of SFT and of the policy, each (completions,), as a PNG at `path`.

    Both use the same bins, show shares of completions, and mark their means.
    """
    models = {"SFT": (np.asarray(sft_scores, dtype=float), SFT), policy: (np.asarray(ppo_scores, dtype=float), PPO)}
    edges = np.histogram_bin_edges(np.concatenate([scores for scores, _ in models.values()]), bins=36).tolist()
    means = {name: scores.mean() for name, (scores, _) in models.items()}
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = row_of_panels(7.5, 3.6)
        for name, (scores, color) in models.items():
            weights = np.full(len(scores), 1 / len(scores))
            axis.hist(scores, edges, weights=weights, histtype="stepfilled", color=color, alpha=0.35)
            axis.hist(scores, edges, weights=weights, histtype="step", color=color, linewidth=1.4)
            axis.axvline(means[name], color=color, linestyle=DASHES, linewidth=1.4)
        axis.set_ylim(top=axis.get_ylim()[1] * 1.12)
        for name, (_, color) in models.items():
            # The label is left of the lower mean and right of the higher mean, so that the labels never overlap.
            left = (name == "SFT") == (means["SFT"] <= means[policy])
            axis.annotate(
                f"{name} mean {means[name]:.2f}",
                (means[name], 0.97),
                xycoords=axis.get_xaxis_transform(),
                xytext=(-5 if left else 5, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="top",
                color=color,
                weight="bold",
            )
        counts = " and ".join(f"{len(scores):,} {name}" for name, (scores, _) in models.items())
        axis.set_title(f"Reward model score of {counts} completions")
        axis.set_xlabel("reward model score")
        axis.set_ylabel("share of completions")
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        figure.savefig(path)


def draw_calibration(reliability: list[dict], ece: float, path: str | PathLike) -> None:
    """Draw the share of raters who agree against the confidence (a reliability diagram), as a PNG at `path`.

    The diagonal is a calibrated model. `reliability` has rows of `reward_models.calibration.reliability_curve`. The area
    of a marker is proportional to the count of its bin, down to a visible minimum. `ece` is the expected calibration
    error, in 0..1.
    """
    predicted = np.array([row["predicted"] for row in reliability])
    observed = np.array([row["observed"] for row in reliability])
    counts = np.array([row["count"] for row in reliability])
    low, high = min(row["low"] for row in reliability), max(row["high"] for row in reliability)
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = row_of_panels(7.5, 4.2)
        axis.plot([low, high], [low, high], color=SFT, linestyle=DASHES, label="calibrated: agreement = confidence")
        axis.vlines(predicted, predicted, observed, color=PPO, alpha=0.35, linewidth=1.2)
        axis.plot(predicted, observed, color=PPO, linewidth=1.2)
        areas = np.maximum(300 * counts / counts.max(), 14)
        axis.scatter(predicted, observed, areas, color=PPO, edgecolor="white", zorder=3)
        # An empty line for the legend: the entry of `scatter` would have the size of the largest bin.
        axis.plot([], [], color=PPO, marker="o", label="reward model (area: pairs in the bin)")
        axis.set_title(f"Reward model calibration: ECE {ece:.3f} over {counts.sum():,} pairs")
        axis.set_xlabel("confidence in the predicted winner, mean of the bin")
        axis.set_ylabel("share of raters who agree")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.legend(loc="best")
        axis.margins(0.06)
        figure.savefig(path)


def draw_accuracy_by_gap(by_gap: list[dict], path: str | PathLike) -> None:
    """Draw the reward model's accuracy in each bin of rating gap, as a PNG at `path`.

    The human ceiling is drawn too if it is known. Each bin names its number of pairs. `by_gap` has rows of
    `reward_models.calibration.accuracy_by_gap`.
    """
    places = range(len(by_gap))
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = row_of_panels(7.5, 3.8)
        accuracies, humans = ([row[key] for row in by_gap if key in row] for key in ("accuracy", "human"))
        axis.plot(places, accuracies, color=PPO, marker="o", label="reward model", zorder=3)
        if humans:
            axis.plot(places, humans, color=SFT, linestyle=DASHES, marker="o", markersize=4, label=HUMAN_CEILING)
        axis.axhline(0.5, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="chance")
        axis.set_title("How often the reward model prefers the text that people rated higher")
        axis.set_xticks(places, [f"{row['low']:g} to {row['high']:g}\n{row['pairs']:,} pairs" for row in by_gap])
        axis.set_xlabel("difference of the mean ratings (points)")
        axis.set_ylabel("accuracy")
        axis.set_ylim(min(0.45, *(value - 0.03 for value in accuracies + humans)), 1.02)
        axis.margins(x=0.06)
        axis.grid(axis="x", visible=False)
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.legend(loc="best")
        figure.savefig(path)


def draw_best_of_n(rows: list[dict], path: str | PathLike, compared: dict | None = None) -> None:
    """Draw score and judge, if there is one, of best-of-n against the square root of its KL, as a PNG at `path`.

    Gao et al. 2022 (arXiv 2210.10760) use the same axes: at first, reward is about linear in sqrt(KL).

    Args:
        rows: rows of best_of_n.json, each with `n`, `kl` (nats a sequence), `score` and, with a judge, `judge`.
        compared: a report of the evaluation stage on the same reward; its policy is marked in the plot.
    """
    panels = [("judge", "Judge score")] if all("judge" in row for row in rows) else []
    panels.append(("score", "Reward model score"))
    with matplotlib.rc_context(STYLE):
        figure, axes = row_of_panels(7.5, 3.4, len(panels))
        for axis, (key, title) in zip(axes, panels, strict=True):
            places, values = [math.sqrt(row["kl"]) for row in rows], [row[key] for row in rows]
            axis.plot(places, values, color=SFT, marker="o", label="best of n, SFT")
            for row, place, value in zip(rows, places, values, strict=True):
                axis.annotate(str(row["n"]), (place, value), xytext=(-5, 4), textcoords="offset points", ha="right")
            if compared and key in compared["policy"]:
                trained = compared["policy"]
                place = math.sqrt(max(trained["kl"], 0))
                axis.plot(
                    place, trained[key], color=PPO, marker="o", linestyle="", label=compared.get("policy_name", "PPO")
                )
            axis.set_title(title)
            axis.set_xlabel("square root of the KL to SFT (nats a sequence)")
            axis.margins(0.1)
            axis.legend(loc="best")
        figure.savefig(path)


def draw_trade_off(rows: list[dict], path: str | PathLike) -> None:
    """Draw the judge's gain and the score against the language-model loss on held-out texts, as a PNG at `path`.

    `rows` are those of `pipeline.reports.lambda_sweep.sweep_row`. Each is a point, with its lambda and the 95% intervals of
    the changes; the start is SFT.
    """
    panels = (("gain", "Judge: gain over SFT"), ("score", "Reward model score"))
    with matplotlib.rc_context(STYLE):
        figure, axes = row_of_panels(7.5, 3.4, len(panels))
        for axis, (key, title) in zip(axes, panels, strict=True):
            places = [row["text_loss"] for row in rows]
            values = [row["judge_gain"]["mean"] if key == "gain" else row["score"] for row in rows]
            axis.plot(places, values, color=PPO, marker="o", label="L + λR")
            changes = [row["text_loss_change"] for row in rows]
            axis.errorbar(places, values, xerr=_distances(changes), fmt="none", ecolor=PPO, alpha=0.5)
            if key == "gain":
                gains = [row["judge_gain"] for row in rows]
                axis.errorbar(places, values, yerr=_distances(gains), fmt="none", ecolor=PPO, alpha=0.5)
            for row, place, value in zip(rows, places, values, strict=True):
                text = "∞" if row["lambda"] is None else f"{row['lambda']:.2g}"
                axis.annotate(text, (place, value), xytext=(5, -10), textcoords="offset points")
            start = rows[0]["start"]
            axis.plot(
                start["text_loss"],
                0 if key == "gain" else start["score"],
                color=SFT,
                marker="o",
                linestyle="",
                label="SFT",
            )
            axis.set_title(title)
            axis.set_xlabel("loss on held-out texts (nats a token)")
            axis.margins(0.12)
            axis.legend(loc="best")
        figure.savefig(path)


def _distances(intervals: list[dict]) -> list[list[float]]:
    """Return the distances of the means of intervals from their lower and upper ends, for error bars."""
    return [[one["mean"] - one["low"] for one in intervals], [one["high"] - one["mean"] for one in intervals]]
