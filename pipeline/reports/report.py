"""What the evaluation stage and best-of-n report: figures, tables, and the text of report.md.

Figures go through matplotlib's object API (`Figure`, Agg), so nothing here touches pyplot's global state or a display.
They are about 900 px wide, the width of a README, with the type at its final size.
"""

import math
from collections.abc import Sequence
from os import PathLike

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter


# Everywhere: grey-blue is where we start or what we compare with (SFT, people), orange is what was trained (PPO, the
# reward model).
SFT, PPO = "#5b7a99", "#e0661c"
INK, GRID = "#2b3440", "#e3e7eb"
DASHES = (0, (4, 2))
STYLE = {
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

# Ticks at multiples of these times a power of ten: left to itself, matplotlib also takes 0.3, 0.4, 0.6 and 0.8.
TICK_STEPS = (1, 2, 2.5, 5, 10)

HUMAN_CEILING = "human ceiling: how often one rater agrees"

FIGURES = {
    "ppo_curves": "ppo_curves.png",
    "score_histograms": "score_histograms.png",
    "reliability": "reward_calibration.png",
    "by_gap": "accuracy_by_gap.png",
}

# Rows of the table of metrics: key in the report, name with its unit, format.
METRICS = (
    ("score", "reward model score", ".3f"),
    ("judge", "judge score", ".3f"),
    ("kl", "KL to the reference (nats a sequence)", ".2f"),
    ("distinct_1", "distinct-1", ".3f"),
    ("distinct_2", "distinct-2", ".3f"),
    ("perplexity", "perplexity", ".1f"),
    ("mean_length", "mean length (tokens)", ".1f"),
)


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """A figure of the given inches with a row of panels; to be made and saved under one `rc_context(STYLE)`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _series(history: list[dict], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the log rows that have both, with a finite value."""
    rows = [(row["step"], row[key]) for row in history if row.get(key) is not None and row.get("step") is not None]
    rows = [(step, value) for step, value in rows if math.isfinite(value)]
    return [step for step, _ in rows], [value for _, value in rows]


def draw_ppo_curves(history: list[dict], path: str | PathLike) -> None:
    """Mean score, KL to the reference (nats a sequence) and value loss against the update, as a PNG at `path`.

    `history` is the trainer's log: rows with `step` and some of `score`, `kl`, `loss/value`. A row is skipped in the
    panels whose key it lacks.
    """
    panels = (
        ("score", "Mean score\n(reward model units)"),
        ("kl", "KL to the reference\n(nats a sequence)"),
        ("loss/value", "Value loss\n(squared reward units)"),
    )
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.5, 2.7, len(panels))
        for axis, (key, title) in zip(axes, panels, strict=True):
            steps, values = _series(history, key)
            # A marker when the line would have a single point, and so be invisible.
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
    sft_scores: Sequence[float], ppo_scores: Sequence[float], path: str | PathLike, policy: str = "PPO"
) -> None:
    """Shares of SFT's and the policy's completions (completions,) by reward model score on common bins, means marked."""
    models = {"SFT": (np.asarray(sft_scores, dtype=float), SFT), policy: (np.asarray(ppo_scores, dtype=float), PPO)}
    edges = np.histogram_bin_edges(np.concatenate([scores for scores, _ in models.values()]), bins=36)
    means = {name: scores.mean() for name, (scores, _) in models.items()}
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _figure(7.5, 3.6)
        for name, (scores, color) in models.items():
            weights = np.full(len(scores), 1 / len(scores))
            axis.hist(scores, edges, weights=weights, histtype="stepfilled", color=color, alpha=0.35)
            axis.hist(scores, edges, weights=weights, histtype="step", color=color, linewidth=1.4)
            axis.axvline(means[name], color=color, linestyle=DASHES, linewidth=1.4)
        axis.set_ylim(top=axis.get_ylim()[1] * 1.12)
        for name, (_, color) in models.items():
            # The lower mean is labelled on its left and the higher one on its right, so that the labels never meet.
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
    """Reliability diagram: share of raters who agree against the confidence, with the diagonal of a calibrated model.

    `reliability` are rows of `reward_models.calibration.reliability_curve`; a marker's area is proportional to the
    count of its bin, down to the least that can be seen. `ece` is the expected calibration error, 0..1.
    """
    predicted = np.array([row["predicted"] for row in reliability])
    observed = np.array([row["observed"] for row in reliability])
    counts = np.array([row["count"] for row in reliability])
    low, high = min(row["low"] for row in reliability), max(row["high"] for row in reliability)
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _figure(7.5, 4.2)
        axis.plot([low, high], [low, high], color=SFT, linestyle=DASHES, label="calibrated: agreement = confidence")
        axis.vlines(predicted, predicted, observed, color=PPO, alpha=0.35, linewidth=1.2)
        axis.plot(predicted, observed, color=PPO, linewidth=1.2)
        areas = np.maximum(300 * counts / counts.max(), 14)
        axis.scatter(predicted, observed, areas, color=PPO, edgecolor="white", zorder=3)
        # One small proxy: with scatter's own entry the legend would show the size of the largest bin.
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
    """The reward model's accuracy and, where it is known, the human ceiling in each bin of rating gap, with the number of
    pairs.

    `by_gap` are rows of `reward_models.calibration.accuracy_by_gap`.
    """
    places = range(len(by_gap))
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _figure(7.5, 3.8)
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


def markdown_cell(text: str) -> str:
    """`text` as it should be read in one cell of a GitHub table, whatever it holds: no markup, one line."""
    text = text.strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = "".join(f"\\{character}" if character in "\\`*_[]~$|" else character for character in text)
    return "<br>".join(text.splitlines()) or "(empty)"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A markdown table; the columns `numbers` are aligned right."""
    rule = ["---:" if column in numbers else "---" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def _interval(interval: dict, form: str) -> str:
    mean, low, high = (format(interval[key], form) for key in ("mean", "low", "high"))
    return f"**{mean}** (95% interval {low} to {high})"


def with_interval(interval: dict, form: str) -> str:
    mean, low, high = (format(interval[key], form) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _headline(report: dict) -> str:
    """One sentence: what PPO changed, by how much and at what distance from the reference."""
    sft, ppo, policy = report["sft"], report["ppo"], report.get("policy", "PPO")
    judged = sft.get("judge") is not None and ppo.get("judge") is not None
    key, name = ("judge", "judge's") if judged else ("score", "reward model's")
    before, after = number(sft.get(key), ".3f"), number(ppo.get(key), ".3f")
    clauses = [f"The {name} mean score goes from {before} (SFT) to {after} ({policy})"]
    if judged and report.get("judge_gain"):
        clauses[0] += f", a gain of {_interval(report['judge_gain'], '+.3f')}"
    if report.get("win_rate"):
        wins = _interval(report["win_rate"], ".1%")
        clauses.append(f"{policy} beats SFT on {wins} of the prompts, ties counting half")
    if ppo.get("kl") is not None:
        clauses.append(f"the KL to the reference is {number(ppo['kl'], '.2f')} nats a sequence")
    return "; ".join(clauses) + "."


def _facts(report: dict) -> str:
    """The circumstances, as far as the report has them."""
    facts = [f"{report['prompts']:,} prompts"] if "prompts" in report else []
    facts += [f"seed {report['seed']}"] if "seed" in report else []
    facts += (
        [f"copies of the backbone in memory: {report['backbone_copies']}"] if report.get("backbone_copies") else []
    )
    text = ", ".join(facts)
    return text[:1].upper() + text[1:] + "." if facts else ""


def _figure_link(key: str, text: str) -> str:
    return f"![{text}]({FIGURES[key]})"


def _reward_model(section: dict) -> list[str]:
    """The reward model's section.

    Its accuracy is against the mean rating and may exceed the ceiling, which is about one rater; so its agreement with
    one rater is stated too, where the reliability curve gives it.
    """
    parts = [
        f"On {section['pairs']:,} held-out pairs the reward model prefers the chosen text in "
        f"**{section['accuracy']:.1%}** (accuracy)."
    ]
    curve, by_gap = section.get("reliability"), section.get("by_gap")
    if "human_ceiling" in section:
        parts[0] += f" Human ceiling: one rater agrees with the mean rating in **{section['human_ceiling']:.1%}**."
    if curve and "human_ceiling" in section:
        agreement = np.average([row["observed"] for row in curve], weights=[row["count"] for row in curve])
        parts[0] += f" Measured that way, against one rater, the reward model reaches {agreement:.1%}."
    parts[0] += f" Expected calibration error (ECE): **{section['ece']:.3f}**."
    if curve:
        parts.append(_figure_link("reliability", "Share of raters who agree against the reward model's confidence"))
    if by_gap:
        parts.append(_figure_link("by_gap", "Reward model accuracy by rating gap"))
    return parts


def _samples(samples: list[dict], policy: str) -> str:
    judged = any(sample.get(f"{model}_judge") is not None for sample in samples for model in ("sft", "ppo"))

    def scores(sample: dict, model: str) -> str:
        keys = ("score", "judge") if judged else ("score",)
        return ", ".join(number(sample.get(f"{model}_{key}"), ".2f") for key in keys)

    rows = [
        [
            markdown_cell(sample["prompt"]),
            markdown_cell(sample["sft"]),
            scores(sample, "sft"),
            markdown_cell(sample["ppo"]),
            scores(sample, "ppo"),
        ]
        for sample in samples
    ]
    title = "score, judge" if judged else "score"
    return markdown_table(["prompt", "SFT", title, policy, title], rows, numbers=(2, 4))


def _checks(checks: list[dict]) -> str:
    """The preflight's table: what was looked at before PPO began, and why."""
    rows = [
        [
            check["name"],
            number(check["measured"], ".3g"),
            check["bound"],
            check["result"],
            markdown_cell(check["why"]),
        ]
        for check in checks
    ]
    return markdown_table(["check", "measured", "bound", "result", "why"], rows, numbers=(1,))


def markdown_report(report: dict, samples: list[dict], curves: bool = True) -> str:
    """The text of report.md, which lies beside the four figures.

    Args:
        report: `sft` and `ppo` (dicts with the keys of `METRICS`), and as far as there are any: `judge_gain` and
            `win_rate` (see `pipeline.reports.metrics.bootstrap_interval`, at its level of 95%), `reward_model` (see
            `reward_models.calibration.reward_model_report`), `seconds` (stage -> seconds), `prompts`, `seed`,
            `backbone_copies`, `preflight` (see `pipeline.rl.preflight.Check`), `policy` (the name of `ppo`, if not PPO).
            What is missing is left out; a metric that only one model has shows as a dash.
        samples: dicts with `prompt`, `sft`, `ppo` (strings) and `sft_score`, `sft_judge`, `ppo_score`, `ppo_judge`.
        curves: whether PPO's curves were drawn.
    """
    sft, ppo, policy = report["sft"], report["ppo"], report.get("policy", "PPO")
    rows = [
        [name, number(sft.get(key), form), number(ppo.get(key), form)]
        for key, name, form in METRICS
        if sft.get(key) is not None or ppo.get(key) is not None
    ]
    parts = ["# Evaluation", _headline(report), _facts(report)]
    parts.append(markdown_table(["metric", "SFT", policy], rows, numbers=(1, 2)))
    parts.append(_figure_link("score_histograms", f"Reward model scores of SFT's and {policy}'s completions"))
    if curves:
        parts.append(_figure_link("ppo_curves", "Mean score, KL to the reference and value loss during PPO"))
    if report.get("reward_model"):
        parts += ["## Reward model", *_reward_model(report["reward_model"])]
    if report.get("preflight"):
        parts += ["## Before training", _checks(report["preflight"])]
    if samples:
        parts += ["## Samples", _samples(samples, policy)]
    if report.get("seconds"):
        seconds = [[markdown_cell(stage), f"{value:,.1f}"] for stage, value in report["seconds"].items()]
        parts += ["## Time", markdown_table(["stage", "seconds"], seconds, numbers=(1,))]
    return "\n\n".join(part for part in parts if part) + "\n"


# ----------------------------------------------------------------------------------------------- best of n
def draw_best_of_n(rows: list[dict], path: str | PathLike, compared: dict | None = None) -> None:
    """Judge and score of best-of-n against the square root of its KL, as a PNG at `path`.

    Gao et al. 2022 (arXiv 2210.10760) plot both methods so: reward is about linear in sqrt(KL) at first.

    Args:
        rows: of best_of_n.json, each with `n`, `kl` (nats a sequence), `judge` and `score`.
        compared: a report of the evaluation stage, whose policy is marked; its scores are of the same reward.
    """
    panels = (("judge", "Judge score (-1 to 1)"), ("score", "Reward model score"))
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.5, 3.4, len(panels))
        for axis, (key, title) in zip(axes, panels, strict=True):
            places, values = [math.sqrt(row["kl"]) for row in rows], [row[key] for row in rows]
            axis.plot(places, values, color=SFT, marker="o", label="best of n, SFT")
            for row, place, value in zip(rows, places, values, strict=True):
                axis.annotate(str(row["n"]), (place, value), xytext=(-5, 4), textcoords="offset points", ha="right")
            if compared:
                ppo = compared["ppo"]
                place = math.sqrt(max(ppo["kl"], 0))
                axis.plot(place, ppo[key], color=PPO, marker="o", linestyle="", label=compared.get("policy", "PPO"))
            axis.set_title(title)
            axis.set_xlabel("square root of the KL to SFT (nats a sequence)")
            axis.margins(0.1)
            axis.legend(loc="best")
        figure.savefig(path)


def best_of_n_table(rows: list[dict]) -> str:
    """The rows of best_of_n.json as a markdown table; intervals are of 95%."""
    header = ["n", "score", "judge", "gain, 95% interval", "beats one sample", "KL, nats", "distinct-2", "mean length"]
    cells = [
        [
            str(row["n"]),
            f"{row['score']:+.2f}",
            f"{row['judge']:+.3f}",
            with_interval(row["judge_gain"], "+.3f"),
            with_interval(row["win_rate"], ".1%"),
            f"{row['kl']:.2f}",
            f"{row['distinct_2']:.3f}",
            f"{row['mean_length']:.1f}",
        ]
        for row in rows
    ]
    return markdown_table(header, cells, numbers=range(len(header)))
