"""Draw the study of PPO's value: gains beside what the value explains, and what it explains as training goes on."""

import math
import statistics
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from pipeline.reports.plots import DASHES, INK, PPO, SFT, STYLE, row_of_panels
from pipeline.reports.value_study import NATS, quarter


COLOURS = (PPO, "#3a8f7b", "#8b5a9e", "#c2a12b")  # of the settings in one panel


def draw_value_study(rows: Sequence[Mapping[str, Any]], path: str | PathLike) -> None:
    """Draw each setting's difference in gain, and the explained variance early and late, as a PNG at `path`.

    `rows` are those of `pipeline.reports.value_study.value_rows`. Small dots are seeds; bars are 95% intervals.
    """
    places = np.arange(len(rows))[::-1]
    first = {run["seed"]: run["gain_at_nats"] for run in rows[0]["runs"]}
    with matplotlib.rc_context(STYLE):
        figure, (gains, explained) = row_of_panels(7.5, 1.2 + 0.27 * len(rows), 2)
        gains.axvline(0, color=SFT, linestyle=DASHES, linewidth=1)
        for row, place in zip(rows[1:], places[1:], strict=True):
            paired = [run["gain_at_nats"] - first[run["seed"]] for run in row["runs"] if run["seed"] in first]
            gains.plot(paired, [place] * len(paired), "o", color=PPO, markersize=3, alpha=0.35)
            if found := row["difference"]:
                gains.plot([found["low"], found["high"]], [place, place], color=PPO, linewidth=1.4)
                gains.plot(found["mean"], place, "o", color=PPO, markersize=6)
        for which, colour in (("first", SFT), ("last", PPO)):
            means = [
                statistics.fmean(quarter(run["explained_variance"], which) for run in row["runs"]) for row in rows
            ]
            explained.plot(means, places, "o", color=colour, label=f"{which} quarter")
        gains.set_title(f"Judge's gain at {NATS:g} nats,\nminus that of the first row")
        gains.set_xlabel("units of the judge, 95% interval")
        gains.set_yticks(places, [row["setting"] for row in rows])
        explained.set_title("Share of the returns' variance\nthat the value explains")
        explained.set_xlabel("explained variance")
        explained.set_yticks(places, [])
        explained.set_xlim(right=1)
        explained.legend(loc="upper right", ncols=2, fontsize=8)
        for axis in (gains, explained):
            axis.set_ylim(-0.7, len(rows) + 0.4)  # with room for the legend
        figure.savefig(path)


def draw_value_curves(rows: Sequence[Mapping[str, Any]], path: str | PathLike) -> None:
    """Draw the explained variance of each update, a panel for what the settings are about, as a PNG at `path`.

    `rows` are those of `pipeline.reports.value_study.value_rows`. A line is the mean over the seeds. The first row, the
    recipe, is in every panel.
    """
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows[1:]:
        panels.setdefault(row["group"], []).append(row)
    columns = min(3, max(1, len(panels)))
    lines = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        figure, axes = row_of_panels(7.5, 2.6 * max(1, lines), columns, lines=max(1, lines))
        for axis, (group, settings) in zip(axes, panels.items(), strict=False):
            _curve(axis, rows[0], SFT, "the recipe", linestyle=DASHES)
            for number, row in enumerate(settings):
                _curve(axis, row, COLOURS[number % len(COLOURS)], row["setting"])
            axis.set_title(group)
            axis.set_xlabel("update")
            axis.set_ylim(-1.2, 1)  # with room for the legend
            axis.legend(loc="lower right", fontsize=6.5)
        axes[0].set_ylabel("explained variance", color=INK)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        figure.savefig(path)


def _curve(axis: Axes, row: Mapping[str, Any], colour: str, label: str, **line: Any) -> None:
    shortest = min(len(run["explained_variance"]) for run in row["runs"])
    means = np.mean([run["explained_variance"][:shortest] for run in row["runs"]], axis=0)
    axis.plot(np.arange(1, shortest + 1), means, color=colour, label=label, **line)
