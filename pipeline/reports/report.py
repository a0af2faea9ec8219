"""Write report.md and the table of best-of-n."""

from pathlib import Path

import numpy as np

from data.json_files import check_object, read_json
from data.saving import check_saved
from data.schemas import REPORT, Kind
from pipeline.reports.markdown import interval_in_words, markdown_cell, markdown_table, number, with_interval
from pipeline.runs.outputs import rows_table


FIGURES = {
    "ppo_curves": "ppo_curves.png",
    "score_histograms": "score_histograms.png",
    "reliability": "reward_calibration.png",
    "by_gap": "accuracy_by_gap.png",
}

# Rows of the table of metrics: key in the report, name with unit, format.
METRICS = (
    ("score", "reward model score", ".3f"),
    ("disagreement", "disagreement of the reward models", ".3f"),
    ("judge", "judge score", ".3f"),
    ("kl", "KL to the reference (nats a sequence)", ".2f"),
    ("distinct_1", "distinct-1", ".3f"),
    ("distinct_2", "distinct-2", ".3f"),
    ("perplexity", "perplexity", ".1f"),
    ("mean_length", "mean length (tokens)", ".1f"),
    ("text_loss", "language-model loss on texts (nats a token)", ".3f"),
)


def read_report(path: str | Path, schema: Kind = REPORT) -> dict:
    """Read the evaluation stage's report.json.

    Older reports have the policy under `ppo`, and its name under `policy`. They are returned with the keys of today.

    Raises the errors of `check_saved`, and:
        ValueError: the file does not fit the schema.
    """
    check_saved(Path(path).parent, Path(path).stem)
    report = read_json(path)
    if "ppo" in report:
        report |= {"policy": report.pop("ppo"), "policy_name": report.get("policy", "PPO")}
        seconds = report.get("seconds")
        if isinstance(seconds, dict) and "ppo" in seconds:
            seconds["policy"] = seconds.pop("ppo")
    check_object(report, str(path), schema, remedy="Run pipeline.evaluation again.")
    return report


def _headline(report: dict) -> str:
    """Return one sentence: what training changed, by how much, and at which KL to the reference."""
    sft, trained, policy = report["sft"], report["policy"], report.get("policy_name", "PPO")
    judged = sft.get("judge") is not None and trained.get("judge") is not None
    key, name = ("judge", "judge's") if judged else ("score", "reward model's")
    before, after = number(sft.get(key), ".3f"), number(trained.get(key), ".3f")
    clauses = [f"The {name} mean score goes from {before} (SFT) to {after} ({policy})"]
    if gain := report.get("judge_gain" if judged else "score_gain"):
        clauses[0] += f", a gain of {interval_in_words(gain, '+.3f')}"
    won = report.get("win_rate" if judged else "score_win_rate")
    if won:
        clauses.append(f"{policy} beats SFT on {interval_in_words(won, '.1%')} of the prompts, ties counting half")
    if report.get("pairwise"):
        found = report["pairwise"]
        clauses.append(
            f"the pairwise judge prefers {policy} on {interval_in_words(found['win_rate'], '.1%')} of the prompts, and says "
            f"the same in both orders on {found['consistent']:.0%} of them"
        )
    if trained.get("kl") is not None:
        clauses.append(f"the KL to the reference is {number(trained['kl'], '.2f')} nats a sequence")
    return "; ".join(clauses) + "."


def _facts(report: dict) -> str:
    """Return the number of prompts, the seed and the judges, if the report has them."""
    facts = [f"{report['prompts']:,} prompts"] if "prompts" in report else []
    facts += [f"seed {report['seed']}"] if "seed" in report else []
    facts += [f"judge `{report['judge']}`"] if "judge" in report else []
    facts += [f"pairwise judge `{report['pairwise']['judge']}`"] if "pairwise" in report else []
    text = ", ".join(facts)
    return text[:1].upper() + text[1:] + "." if facts else ""


def figures(report: dict) -> list[str]:
    """Return the paragraphs of a report's figures: what training changed, on what, and the table of metrics."""
    sft, trained = report["sft"], report["policy"]
    rows = [
        [name, number(sft.get(key), form), number(trained.get(key), form)]
        for key, name, form in METRICS
        if sft.get(key) is not None or trained.get(key) is not None
    ]
    header = ["metric", "SFT", report.get("policy_name", "PPO")]
    return [_headline(report), _facts(report), markdown_table(header, rows, numbers=(1, 2))]


def _figure_link(key: str, text: str) -> str:
    return f"![{text}]({FIGURES[key]})"


def _reward_model(section: dict, calibration: dict | None) -> list[str]:
    """Return the paragraphs about the reward model, and what its temperature (`calibration.json`) does, if it has one.

    Its accuracy is measured against the mean rating. It may exceed the human ceiling, which is about one rater. So its
    agreement with one rater is stated too, if the reliability curve gives it.
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
    if calibration:
        parts[0] += (
            f" With the temperature T = {calibration['temperature']:.2f} of calibration.json the probability that people "
            f"prefer a side is sigmoid(difference of the scores / T); on pairs that T was not fitted on its ECE is "
            f"**{calibration['ece']:.3f}**."
        )
    if curve:
        parts.append(_figure_link("reliability", "Share of raters who agree against the reward model's confidence"))
    if by_gap:
        parts.append(_figure_link("by_gap", "Reward model accuracy by rating gap"))
    return parts


def _samples(samples: list[dict], policy: str) -> str:
    judged = any(sample.get(f"{model}_judge") is not None for sample in samples for model in ("sft", "policy"))

    def scores(sample: dict, model: str) -> str:
        keys = ("score", "judge") if judged else ("score",)
        return ", ".join(number(sample.get(f"{model}_{key}"), ".2f") for key in keys)

    rows = [
        [
            markdown_cell(sample["prompt"]),
            markdown_cell(sample["sft"]),
            scores(sample, "sft"),
            markdown_cell(sample["policy"]),
            scores(sample, "policy"),
        ]
        for sample in samples
    ]
    title = "score, judge" if judged else "score"
    return markdown_table(["prompt", "SFT", title, policy, title], rows, numbers=(2, 4))


def _checks(checks: list[dict]) -> str:
    """Return the table of the preflight: each check before PPO, its result and its reason."""
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
    """Return the text of report.md, which is written beside the four figures.

    Args:
        report: `sft` and `policy` (dicts with the keys of `METRICS`), and optionally `judge_gain` and `win_rate` (see
            `pipeline.reports.metrics.bootstrap_interval`, at its level of 95%), `score_gain`, `score_win_rate`, `judge` (name
            of the judge), `pairwise` (see `pipeline.evaluation.pairwise_judgement`), `reward_model` (see
            `reward_models.calibration.reward_model_report`), `calibration` (see `reward_models.temperature.Calibration`),
            `seconds` (stage -> seconds), `prompts`, `seed`,
            `preflight` (see `pipeline.rl.preflight.Check`), `policy_name` (if not PPO).
            Missing parts are left out. A metric that only one model has shows a dash for the other.
        samples: dicts with `prompt`, `sft`, `policy` (strings) and `sft_score`, `sft_judge`, `policy_score`, `policy_judge`.
        curves: True if the curves of PPO were drawn.
    """
    policy = report.get("policy_name", "PPO")
    parts = ["# Evaluation", *figures(report)]
    parts.append(_figure_link("score_histograms", f"Reward model scores of SFT's and {policy}'s completions"))
    if curves:
        parts.append(_figure_link("ppo_curves", "Mean score, KL to the reference and value loss during PPO"))
    if report.get("reward_model"):
        parts += ["## Reward model", *_reward_model(report["reward_model"], report.get("calibration"))]
    if report.get("preflight"):
        parts += ["## Before training", _checks(report["preflight"])]
    if samples:
        parts += ["## Samples", _samples(samples, policy)]
    if report.get("rows"):
        parts += ["## Data", rows_table(report["rows"])]
    if report.get("seconds"):
        names = {"policy": policy}
        seconds = [[markdown_cell(names.get(s, s)), f"{value:,.1f}"] for s, value in report["seconds"].items()]
        parts += ["## Time", markdown_table(["stage", "seconds"], seconds, numbers=(1,))]
    return "\n\n".join(part for part in parts if part) + "\n"


def best_of_n_table(rows: list[dict]) -> str:
    """Return the rows of best_of_n.json as a markdown table, with 95% intervals."""
    judged = all("judge" in row for row in rows)
    of_judge = ["judge", "gain, 95% interval", "beats one sample"] if judged else []
    header = ["n", "score", *of_judge, "KL, nats", "distinct-2", "mean length"]
    cells = [
        [
            str(row["n"]),
            f"{row['score']:+.2f}",
            *(
                [
                    f"{row['judge']:+.3f}",
                    with_interval(row["judge_gain"], "+.3f"),
                    with_interval(row["win_rate"], ".1%"),
                ]
                if judged
                else []
            ),
            f"{row['kl']:.2f}",
            f"{row['distinct_2']:.3f}",
            f"{row['mean_length']:.1f}",
        ]
        for row in rows
    ]
    return markdown_table(header, cells, numbers=range(len(header)))
