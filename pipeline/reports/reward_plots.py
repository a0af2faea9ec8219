"""Draw the plots of `pipeline.reward_eval`, in the style of `pipeline.reports.plots`."""

from os import PathLike

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pipeline.reports.plots import INK, PPO, SFT, STYLE


def draw_reliability(before: dict, after: dict, temperature: float, path: str | PathLike) -> None:
    """Draw the share of raters who agree against the confidence, before and after temperature scaling, as a PNG at `path`.

    Args:
        before, after: `reward_models.calibration.reward_model_report` of the same pairs with T = 1 and with temperatures.
        temperature: T, about which these temperatures are.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        axis.plot([0.5, 1], [0.5, 1], color=INK, linewidth=1, linestyle=(0, (1, 2)), label="calibrated")
        for report, color, name in ((before, SFT, "T = 1"), (after, PPO, f"T about {temperature:.2f}")):
            rows = report["reliability"]
            counts = np.array([row["count"] for row in rows])
            predicted, observed = ([row[key] for row in rows] for key in ("predicted", "observed"))
            axis.plot(predicted, observed, color=color, linewidth=1.2)
            axis.scatter(
                predicted, observed, np.maximum(300 * counts / counts.max(), 14), color=color, edgecolor="white"
            )
            axis.plot([], [], color=color, marker="o", label=f"{name}: ECE {report['ece']:.3f}")
        axis.set_title(
            f"Calibration of the reward model on {before['pairs']:,} pairs, none of which its T was fitted on"
        )
        axis.set_xlabel("confidence in the predicted winner, mean of the bin (area: pairs)")
        axis.set_ylabel("share of raters who agree")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.legend(loc="best")
        axis.margins(0.06)
        figure.savefig(path)


def draw_accuracies(groups: list[dict], title: str, path: str | PathLike) -> None:
    """Draw the accuracy of each group with its interval, one row each, as a PNG at `path`.

    Args:
        groups: rows of `reward_models.breakdowns.by_group`; those with `human_ceiling` get a second mark.
    """
    places = np.arange(len(groups))[::-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 1.4 + 0.34 * len(groups)), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        means, lows, highs = ([row["accuracy"][key] for row in groups] for key in ("mean", "low", "high"))
        axis.hlines(places, lows, highs, color=PPO, alpha=0.5, linewidth=2.4)
        axis.plot(means, places, color=PPO, marker="o", linestyle="", label="reward model, 95% interval")
        ceilings = [
            (row["human_ceiling"], at) for row, at in zip(groups, places, strict=True) if "human_ceiling" in row
        ]
        if ceilings:
            values, at = zip(*ceilings, strict=True)
            axis.plot(values, at, color=SFT, marker="D", markersize=4, linestyle="", label="one rater")
        axis.axvline(0.5, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="chance")
        axis.set_title(title)
        axis.set_yticks(places, [f"{row['group']} ({row['pairs']:,} pairs)" for row in groups])
        axis.set_xlabel("share of pairs that the reward model orders as people do")
        axis.set_ylim(-0.6, len(groups) - 0.4)
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.legend(loc="best", fontsize=8)
        figure.savefig(path)
