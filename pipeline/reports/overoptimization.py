"""Say where a policy begins to please the reward model at the cost of what the reward model stands for, and draw it."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import matplotlib
import numpy as np

from pipeline.reports.gold import Array, fit, rms_error
from pipeline.reports.markdown import markdown_table, number
from pipeline.reports.plots import DASHES, INK, PPO, SFT, STYLE, row_of_panels


BEST_OF_N = "#3f8f5f"
NEAR = 0.9  # of the furthest d: a peak beyond is the end of the run, and not seen to turn
NOTE = (
    "KL is in nats a sequence, scores are means over a rollout. The gold score is fitted by start + d (alpha - beta ln d), "
    "with d the square root of the KL (Gao et al. 2022). The error is what a curve misses, as a root mean square."
)


@dataclass(frozen=True)
class Scores:
    """The points of a run of PPO, one for each rollout, or of best-of-n, one for each n.

    Attributes:
        kl: KL to the reference in nats a sequence, (points,).
        proxy, gold: scores of the reward that is maximised and of the one that is not, (points,).
        step: optimizer step of each point, (points,); of best-of-n it is n.
    """

    name: str
    kl: Array
    proxy: Array
    gold: Array
    step: Array

    @property
    def distance(self) -> Array:
        """The square root of the KL, (points,)."""
        return np.sqrt(np.maximum(self.kl, 0))


def turning_point(run: Scores) -> dict:
    """Return where the gold score of a run is highest by the fitted form, and what it loses after.

    Returns:
        `kl` and `gold` of the peak; `step`, the first whose KL reaches it; `end`, the fitted gold score at the largest KL;
        `turns`, whether the peak lies before the run's end; `proxy`, first and last score of the reward that is maximised;
        `error` and `error_of_line`, what the fitted form and a line miss.
    """
    d = run.distance
    curve, line = fit("rl", d, run.gold), fit("line", d, run.gold)
    at, gold = curve.peak(d.max())
    reached = run.step[d >= at]
    return {
        "kl": at**2,
        "gold": gold,
        "step": int(reached[0]) if len(reached) else int(run.step[-1]),
        "end": float(curve.at(d.max(keepdims=True))[0]),
        "turns": bool(at < NEAR * d.max()),
        "proxy": [float(run.proxy[0]), float(run.proxy[-1])],
        "error": rms_error(curve, d, run.gold),
        "error_of_line": rms_error(line, d, run.gold),
    }


def advice(points: Sequence[dict]) -> str:
    """Return one sentence that says where to stop, from the turning points of all runs."""
    turned = [point["kl"] for point in points if point["turns"]]
    if not turned:
        return "The gold score rises to the end: these runs do not over-optimise yet."
    of_runs = f"in {len(turned)} of {len(points)} runs" if len(points) > 1 else "in this run"
    span = f"{min(turned):.1f} to {max(turned):.1f} nats" if len(turned) > 1 else f"{turned[0]:.1f} nats"
    return (
        f"The gold score turns {of_runs}, at a KL of {span}. Hold the policy there with `kl_target: {min(turned):.2g}`, or "
        f"take the checkpoint before the step of the table."
    )


def overoptimization_text(runs: Sequence[Scores], points: Sequence[dict], gold: str) -> str:
    """Return the report in markdown."""
    header = ["run", "gold score is highest at KL", "step", "gold there", "gold at the end", "proxy, first → last"]
    header += ["error of the form", "of a line"]
    cells = [
        [
            f"`{run.name}`",
            number(point["kl"], ".1f") if point["turns"] else "the end",
            str(point["step"]),
            f"{point['gold']:+.2f}",
            f"{point['end']:+.2f}",
            " → ".join(f"{score:+.2f}" for score in point["proxy"]),
            f"{point['error']:.2f}",
            f"{point['error_of_line']:.2f}",
        ]
        for run, point in zip(runs, points, strict=True)
    ]
    parts = [
        "# Over-optimisation",
        advice(points),
        f"The gold score is that of `{gold}`, which had no part in the reward.",
        markdown_table(header, cells, numbers=range(1, len(header))),
        "![Proxy and gold score against the square root of the KL](overoptimization.png)",
        NOTE,
    ]
    return "\n\n".join(parts) + "\n"


def draw_overoptimization(
    runs: Sequence[Scores], points: Sequence[dict], best_of_n: Scores | None, path: str | PathLike
) -> None:
    """Draw proxy and gold scores against the square root of the KL as a PNG, with the fitted form and its peak."""
    with matplotlib.rc_context(STYLE):
        figure, axes = row_of_panels(7.5, 3.4, 2)
        for axis, which in zip(axes, ("proxy", "gold"), strict=True):
            for at, (run, point) in enumerate(zip(runs, points, strict=True)):
                scores = getattr(run, which)
                axis.plot(
                    run.distance,
                    scores,
                    ".",
                    markersize=4,
                    color=PPO,
                    alpha=0.6,
                    label=None if at else "PPO, a rollout",
                )
                if which == "gold":
                    d = np.linspace(0, run.distance.max(), 100)
                    curve = fit("rl", run.distance, scores)
                    axis.plot(d, curve.at(d), color=INK, linewidth=1.2, label=None if at else "fitted form")
                if point["turns"]:
                    axis.axvline(
                        point["kl"] ** 0.5, color=SFT, linestyle=DASHES, label=None if at else "gold is highest"
                    )
            if best_of_n is not None:
                axis.plot(
                    best_of_n.distance,
                    getattr(best_of_n, which),
                    "o-",
                    markersize=4,
                    color=BEST_OF_N,
                    label="best of n",
                )
            axis.set_title({"proxy": "Proxy: what PPO raises", "gold": "Gold: what it does not see"}[which])
            axis.set_xlabel("square root of the KL (nats a sequence)")
            axis.legend(loc="best", fontsize=8)
        figure.savefig(path)
