"""Compare ways for PPO's value to learn: what the policy gains at equal KL, and how much of the returns the value explains."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.reports.markdown import markdown_table, number, with_interval
from pipeline.reports.metrics import interval_over_seeds


NATS = 9.0  # the KL at which gains are compared: the target of the demo's recipe
VALUE_NOTE = (
    f"Means over the seeds. The gain at {NATS:g} nats is the judge's gain times sqrt({NATS:g} / KL). Its difference is to the "
    "first row, seed by seed, with the 95% interval of Student's t. Explained variance is the share of the variance of the "
    "returns that the value explains before it learns from them, in the first and the last quarter of the updates. With a "
    "lower lambda the returns lean more on the values themselves, so rows of different lambda do not compare in it."
)
# What a setting is about, and the options that are so.
GROUPS = {
    "start": ("value_init", "critic"),
    "learning rate": ("value_learning_rate", "vf_coef"),
    "warm-up, updates": ("critic_warmup_updates",),
    "lambda": ("lam", "value_lam"),
    "clip range": ("value_clip",),
}


def gain_at(gain: float, kl: float, nats: float = NATS) -> float:
    """Return a gain at `nats`, where it grows with the square root of the KL (Bai et al. 2022, section 4.3).

    NaN for a KL that is not positive.
    """
    return gain * math.sqrt(nats / kl) if kl > 0 else float("nan")


def run_figures(report: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of one run, from its report and from PPO's log.

    Returns:
        `judge_gain` and `gain_at_nats` in units of the judge, `kl` on held-out prompts (nats a sequence), and two lists with
        an entry for each update: `explained_variance` and `value_loss`.
    """
    updates = [row for row in history if row.get("explained_variance") is not None]
    gain, kl = report["judge_gain"]["mean"], report["policy"]["kl"]
    if not updates:
        raise KeyError("explained_variance")
    return {
        "judge_gain": gain,
        "kl": kl,
        "gain_at_nats": gain_at(gain, kl),
        "distinct_2": report["policy"]["distinct_2"],
        "explained_variance": [row["explained_variance"] for row in updates],
        "value_loss": [row["loss/value"] for row in updates],
    }


def quarter(values: Sequence[float], which: str) -> float:
    """Return the mean of the `first` or the `last` quarter of the values."""
    count = -(-len(values) // 4)
    return statistics.fmean(values[:count] if which == "first" else values[-count:])


def group_of(setting: str) -> str:
    """Return what a setting (`key=value`, several with `+` between) is about; `several` of settings of two groups."""
    keys = {part.partition("=")[0] for part in setting.split("+")}
    return next((group for group, options in GROUPS.items() if keys <= set(options)), "several")


def value_rows(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each setting, with the difference of its gain at equal KL to that of the first.

    Args:
        runs: of each setting, the figures of each seed: `seed` and those of `run_figures`.
    """
    first = {run["seed"]: run["gain_at_nats"] for run in next(iter(runs.values()))}
    rows: list[dict[str, Any]] = []
    for setting, of_seeds in runs.items():
        paired = [run["gain_at_nats"] - first[run["seed"]] for run in of_seeds if run["seed"] in first]
        difference = interval_over_seeds(paired) if rows and paired else None
        rows.append({"setting": setting, "group": group_of(setting), "runs": list(of_seeds), "difference": difference})
    return rows


def value_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the markdown table of the study, from `value_rows`."""
    header = [
        "setting",
        "seeds",
        "judge gain",
        "KL, nats",
        "distinct-2",
        f"gain at {NATS:g} nats",
        "minus the first row",
    ]
    header += ["explained variance, first quarter", "last quarter", "value loss, last quarter"]
    cells = []
    for row in rows:
        runs = row["runs"]
        means = {
            key: statistics.fmean(run[key] for run in runs)
            for key in ("judge_gain", "kl", "distinct_2", "gain_at_nats")
        }
        explained = {
            which: statistics.fmean(quarter(run["explained_variance"], which) for run in runs)
            for which in ("first", "last")
        }
        cells.append(
            [
                f"`{row['setting']}`",
                str(len(runs)),
                f"{means['judge_gain']:+.2f}",
                f"{means['kl']:.1f}",
                f"{means['distinct_2']:.2f}",
                number(means["gain_at_nats"], "+.2f"),
                with_interval(row["difference"], "+.2f") if row["difference"] else "–",
                f"{explained['first']:.2f}",
                f"{explained['last']:.2f}",
                f"{statistics.fmean(quarter(run['value_loss'], 'last') for run in runs):.2f}",
            ]
        )
    return markdown_table(header, cells, numbers=range(1, len(header)))
