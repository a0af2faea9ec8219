"""Report on the rounds of the loop: labels, what the policy gained for them, and what the reward model knew before.

The reward model of the round before has not seen a round's pairs, and PPO trained the policy that wrote them against it. Its
accuracy on them says whether it still knows what people want where the policy has gone (Gao et al. 2022, arXiv 2210.10760,
call what is lost there overoptimization).
"""

import statistics
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from data.judgements import disagreement
from pipeline.reports.markdown import markdown_table, number, with_interval
from pipeline.reports.metrics import interval_over_seeds
from pipeline.reports.plots import PPO, SFT, STYLE, row_of_panels
from reward_models.breakdowns import share_with_interval, shares_right


ROUNDS_NOTE = (
    "The gain is the judge's mean score of the policy minus that of SFT on the same prompts. The gain for 100 labels is what "
    "the round added to it, for each 100 pairs that were labelled in the round. The reward model of the round before is "
    "measured on this round's pairs of the newest policy, which it has not seen. People prefer the newest policy's completion "
    "to that of the policy before, in pairs with one of each, ties counting half. Intervals are of 95%."
)
STUDY_NOTE = (
    "Mean over the seeds, with the lowest and the highest in brackets; all rows have the same labels in the end, and the same "
    "updates of PPO in their last round. The difference is taken seed by seed, with the 95% interval of Student's t."
)
COLOURS = (SFT, PPO, "#3a8f7b", "#8b5a9e")  # of the rows of a study


def _share(values: Sequence[float]) -> dict[str, float] | None:
    """Return the mean of shares of pairs that have no text in common, with its 95% interval; None without pairs."""
    texts = np.arange(2 * len(values)).reshape(-1, 2)
    return share_with_interval(np.asarray(values, dtype=float), texts) if values else None


def round_row(
    number_of: int, pairs: Sequence[Mapping[str, Any]], votes: Sequence[Sequence[float]], report: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a round measured.

    Args:
        number_of: number of the round, from 1.
        pairs: rows of pairs.jsonl.
        votes: of each pair, one vote for each annotator who answered it: 1 prefers the first completion, 0 the second, 0.5
            is a tie.
        report: report.json of the round's evaluation.
    """
    means = [statistics.fmean(found) if found else None for found in votes]
    right, won = [], []
    for pair, mean in zip(pairs, means, strict=True):
        if mean is None:
            continue
        newest = len(set(pair["policies"])) == 1
        if not newest:
            won.append(mean)  # the first completion is the newest policy's
        elif "scores" in pair and mean != 0.5:
            margin = (pair["scores"][0] - pair["scores"][1]) * (1 if mean > 0.5 else -1)
            right.append(float(shares_right(np.array(margin))))
    agreed = disagreement([list(found) for found in votes])
    policy = report["policy"]
    return {
        "round": number_of,
        "pairs": len(pairs),
        "labels": sum(mean is not None for mean in means),
        "ties": sum(mean == 0.5 for mean in means),
        "annotators_agree": agreed and dict(zip(("unanimous", "two_agree", "kappa"), agreed, strict=True)),
        "earlier_reward_model": _share(right),
        "prefer_newest": _share(won),
        **{name: report.get(name) for name in ("judge", "judge_gain", "win_rate")},
        **{name: policy.get(name) for name in ("kl", "distinct_2", "mean_length")},
    }


def per_100_labels(rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return what each round added to the judge's gain, for each 100 pairs that were labelled in it; None without a judge."""
    found: list[float | None] = []
    before = 0.0
    for row in rows:
        gain = row["judge_gain"]["mean"] if row["judge_gain"] else None
        found.append(None if gain is None or not row["labels"] else 100 * (gain - before) / row["labels"])
        before = before if gain is None else gain
    return found


def rounds_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the markdown table of the rounds, from rows of `round_row`."""
    header = ["round", "labels so far", "judge gain", "gain for 100 labels", "beats SFT", "KL, nats", "distinct-2"]
    header += ["earlier reward model is right", "prefer the newest policy", "annotators agree (kappa)"]
    cells, total = [], 0
    for row, gained in zip(rows, per_100_labels(rows), strict=True):
        total += row["labels"]
        agreed = row["annotators_agree"]

        def share(interval: Mapping[str, float] | None, form: str) -> str:
            return with_interval(dict(interval), form) if interval else "–"

        cells.append(
            [
                str(row["round"]),
                f"{total:,}",
                share(row["judge_gain"], "+.3f"),
                number(gained, "+.3f"),
                share(row["win_rate"], ".1%"),
                number(row["kl"], ".1f"),
                number(row["distinct_2"], ".2f"),
                share(row["earlier_reward_model"], ".1%"),
                share(row["prefer_newest"], ".1%"),
                f"{agreed['two_agree']:.1%} ({agreed['kappa']:.2f})" if agreed else "–",
            ]
        )
    return markdown_table(header, cells, numbers=range(len(header)))


def rounds_report(found: Mapping[str, Any]) -> str:
    """Return report.md of the loop, from its report.json."""
    rows = found["rounds"]
    judge = next((row["judge"] for row in rows if row["judge"]), None)
    labeller = found["labeller"]
    facts = [f"Labels by {labeller if labeller == 'people' else f'`{labeller}`'}", f"seed {found['seed']}"]
    facts += [f"judge `{judge}`"] if judge else ["no judge, so no gain is measured"]
    links = [f"[round {row['round']}](round_{row['round']}/report.md)" for row in rows]
    parts = [
        f"# {len(rows)} round{'s' if len(rows) > 1 else ''} of labels, reward model and PPO",
        f"{', '.join(facts)}. {', '.join(links)}.",
        rounds_table(rows),
        "![Judge's gain against the labels so far, and accuracy of the earlier reward model by round](rounds.png)",
        ROUNDS_NOTE,
    ]
    return "\n\n".join(parts) + "\n"


def draw_rounds(rows: Sequence[Mapping[str, Any]], path: str | PathLike) -> None:
    """Draw the judge's gain against the labels so far, and the accuracy of the earlier reward model by round, as a PNG."""
    labels = np.cumsum([row["labels"] for row in rows]).tolist()
    panels = (
        ("judge_gain", labels, "Judge's gain over SFT", "labels so far"),
        (
            "earlier_reward_model",
            [row["round"] for row in rows],
            "Earlier reward model is right\non this round's pairs",
            "round",
        ),
    )
    with matplotlib.rc_context(STYLE):
        figure, axes = row_of_panels(7.5, 3.2, len(panels))
        for axis, (key, places, title, words) in zip(axes, panels, strict=True):
            points = [(place, row[key]) for place, row in zip(places, rows, strict=True) if row[key]]
            axis.set_title(title)
            axis.set_xlabel(words)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
            if not points:
                axis.set(xticks=[], yticks=[])
                axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center")
                continue
            x, means = [place for place, _ in points], [one["mean"] for _, one in points]
            low, high = ([one[side] for _, one in points] for side in ("low", "high"))
            spread = np.abs(np.array([low, high]) - np.array(means))
            axis.errorbar(x, means, yerr=spread, color=PPO, marker="o", markersize=4, capsize=2)
        axes[0].axhline(0, color=SFT, linewidth=1)
        if any(row["earlier_reward_model"] for row in rows):
            axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        figure.savefig(path)


# ----------------------------------------------------------------------------------------------- several loops
def study_rows(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each arm of a study: its last round's figures, by seed, and the gain after each round.

    Args:
        found: of each arm, report.json of the loop of each seed.
    """
    rows = []
    for arm, loops in found.items():
        runs = []
        for seed, loop in sorted(loops.items()):
            last = loop["rounds"][-1]
            runs.append(
                {
                    "seed": seed,
                    "labels": sum(row["labels"] for row in loop["rounds"]),
                    **{name: last[name]["mean"] for name in ("judge_gain", "win_rate")},
                    **{name: last[name] for name in ("kl", "distinct_2")},
                    "earlier_reward_model": (last["earlier_reward_model"] or {}).get("mean"),
                    "labels_so_far": np.cumsum([row["labels"] for row in loop["rounds"]]).tolist(),
                    "gains": [row["judge_gain"]["mean"] for row in loop["rounds"]],
                }
            )
        rows.append({"arm": arm, "rounds": len(next(iter(loops.values()))["rounds"]), "runs": runs})
    return rows


def study_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the markdown table of a study, from `study_rows`, with the difference of each later arm to the first."""

    def cell(values: Sequence[float | None], form: str) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return "–"
        return with_interval({"mean": statistics.fmean(known), "low": min(known), "high": max(known)}, form)

    columns = {"judge_gain": "+.3f", "win_rate": ".1%", "kl": ".1f", "distinct_2": ".2f"}
    columns["earlier_reward_model"] = ".1%"
    header = [
        "rounds",
        "seeds",
        "labels",
        "judge gain",
        "beats SFT",
        "KL, nats",
        "distinct-2",
        "earlier reward model is right",
    ]
    header.append("gain minus that of the first row")
    first = {run["seed"]: run["judge_gain"] for run in rows[0]["runs"]}
    cells = []
    for row in rows:
        runs = row["runs"]
        minus = [run["judge_gain"] - first[run["seed"]] for run in runs if run["seed"] in first]
        figures = [cell([run[name] for run in runs], form) for name, form in columns.items()]
        labels = f"{statistics.fmean(run['labels'] for run in runs):,.0f}"
        rest = "–" if row is rows[0] or not minus else with_interval(interval_over_seeds(minus), "+.3f")
        cells.append([str(row["rounds"]), str(len(runs)), labels, *figures, rest])
    return markdown_table(header, cells, numbers=range(len(header)))


def draw_study(rows: Sequence[Mapping[str, Any]], path: str | PathLike) -> None:
    """Draw the judge's gain against the labels so far, a thick line for the mean of each arm, as a PNG at `path`.

    `rows` are those of `study_rows`. A thin line is one seed.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = row_of_panels(7.5, 3.6)
        for row, colour in zip(rows, COLOURS, strict=False):
            runs = row["runs"]
            for run in runs:
                axis.plot(
                    run["labels_so_far"], run["gains"], color=colour, alpha=0.35, linewidth=1, marker="o", markersize=3
                )
            labels, gains = (np.mean([run[key] for run in runs], axis=0) for key in ("labels_so_far", "gains"))
            label = f"{row['rounds']} round{'s' if row['rounds'] > 1 else ''}, mean of {len(runs)} seeds"
            axis.plot(labels, gains, color=colour, linewidth=2.2, marker="o", markersize=7, label=label)
        axis.set_title("Judge's gain over SFT, in the judge's units")
        axis.set_xlabel("labels so far")
        axis.set_ylim(bottom=0)
        axis.margins(x=0.06)
        axis.legend(loc="lower right")
        figure.savefig(path)
