"""Write reward_eval.md, the report of `pipeline.reward_eval`."""

from data.quoting import escaped
from pipeline.reports.markdown import interval_in_words, markdown_cell, markdown_table, number, with_interval


FIGURES = {
    "reliability": "reward_eval_reliability.png",
    "gap": "reward_eval_gap.png",
    "length": "reward_eval_length.png",
    "domain": "reward_eval_domain.png",
}
SHOWN = 300  # characters of a text in the table of mistakes


def groups_of(report: dict) -> list[dict]:
    """Return the rows of the plot of domains: each dataset if there are several, and its domains if it has any."""
    sets = report["datasets"]
    rows = []
    for found in sets:
        if len(sets) > 1:
            ceiling = {"human_ceiling": found["human_ceiling"]} if "human_ceiling" in found else {}
            rows.append({"group": found["source"], "pairs": found["pairs"], "accuracy": found["accuracy"], **ceiling})
        rows += found.get("by_domain", [])
    return rows if len(rows) > 1 else []


def markdown_reward_report(report: dict, drawn: set[str]) -> str:
    """Return the text of reward_eval.md, which is written beside its plots.

    Args:
        report: what `pipeline.reward_eval` writes as reward_eval.json.
        drawn: names of the plots that were drawn, of `FIGURES`.
    """
    parts = ["# Reward model", _headline(report), _datasets(report)]
    if "domain" in drawn:
        parts.append(_figure("domain", "Accuracy by dataset and domain"))
    if report.get("rewards"):
        rows = [[f"`{name}`", with_interval(found, ".1%")] for name, found in report["rewards"].items()]
        parts += ["## Each reward by itself", markdown_table(["reward", "accuracy"], rows, numbers=(1,))]
    parts += ["## Calibration", _calibration(report)]
    if "reliability" in drawn:
        parts.append(_figure("reliability", "Share of raters who agree against the confidence"))
    for found in report["datasets"]:
        title = f"## {escaped(found['source'])}" if len(report["datasets"]) > 1 else "## In parts"
        parts += [title, *_parts(found, drawn if found is report["datasets"][0] else set())]
    if report["mistakes"]:
        parts += ["## Most certain mistakes", _mistakes(report)]
    parts += ["## Data", _rows_read(report), f"Seed {report['seed']}, {report['seconds']:,.1f} seconds."]
    return "\n\n".join(parts) + "\n"


def _figure(key: str, text: str) -> str:
    return f"![{text}]({FIGURES[key]})"


def _headline(report: dict) -> str:
    first = report["datasets"][0]
    text = (
        f"`{report['reward']}` scores the chosen side higher in {interval_in_words(first['accuracy'], '.1%')} of "
        f"{first['pairs']:,} pairs of {escaped(first['source'])}"
    )
    if first.get("human_ceiling") is not None:
        text += (
            f". One rater prefers it in **{first['human_ceiling']:.1%}** of the cases, and the reward model agrees with one "
            f"rater in **{first['agreement']:.1%}**"
        )
    return text + "."


def _datasets(report: dict) -> str:
    header = ["dataset", "pairs", "accuracy, 95% interval", "one rater", "ECE, T = 1"]
    calibration = report.get("calibration")
    if calibration:
        header.append(f"ECE, T = {calibration['temperature']:.2f}")
    rows = []
    for found in report["datasets"]:
        row = [
            markdown_cell(found["source"]),
            f"{found['pairs']:,}",
            with_interval(found["accuracy"], ".1%"),
            number(found.get("human_ceiling"), ".1%"),
            f"{found['ece_before']:.3f}",
        ]
        rows.append(row + ([f"{found['ece']:.3f}"] if calibration else []))
    if report.get("all"):
        found = report["all"]
        rows.append(["all", f"{found['pairs']:,}", with_interval(found["accuracy"], ".1%"), "–", "–"])
        rows[-1] += ["–"] if calibration else []
    return markdown_table(header, rows, numbers=range(1, len(header)))


def _calibration(report: dict) -> str:
    """Return what was found about the temperature, or why there is none."""
    found = report.get("calibration")
    if not found:
        return f"{report['no_temperature'][:1].upper()}{report['no_temperature'][1:]}."
    one, other = found["half_eces"]
    text = (
        f"The probability that people prefer the chosen side is read as sigmoid(margin / T). The temperature "
        f"**T = {found['temperature']:.3f}** fits the {found['pairs']:,} pairs of {escaped(found['source'])} best. What a "
        f"temperature does to other pairs was measured on {found['measured']:,} of them, in two halves that share no text, "
        f"each with the temperature of the other: the expected calibration error goes from **{found['ece_before']:.3f}** "
        f"(T = 1) to **{found['ece']:.3f}** (the halves by themselves: {one:.3f} and {other:.3f}), and the cross-entropy from "
        f"{found['nll_before']:.3f} to {found['nll']:.3f} nats. The accuracy is the same with any T."
    )
    if report.get("saved_temperature"):
        text += f" T is saved in `{report['saved_temperature']}`."
    return text


def _parts(found: dict, drawn: set[str]) -> list[str]:
    parts = []
    if found.get("by_domain"):
        parts.append(_groups(found["by_domain"], "domain"))
    if found.get("sections"):
        rows = [[name, f"{score:.1%}"] for name, score in found["sections"].items()]
        parts.append(markdown_table(["RewardBench", "score"], rows, numbers=(1,)))
    if found.get("by_gap"):
        of = "mean ratings" if found["gap"] == "ratings" else "scores"
        human = any("human" in row for row in found["by_gap"])
        rows = [
            [f"{row['low']:.3g} to {row['high']:.3g}", f"{row['pairs']:,}", f"{row['accuracy']:.1%}"]
            + ([number(row.get("human"), ".1%")] if human else [])
            for row in found["by_gap"]
        ]
        header = [f"difference of the {of}", "pairs", "accuracy", *(["one rater"] if human else [])]
        parts.append(markdown_table(header, rows, numbers=range(1, len(header))))
        if "gap" in drawn:
            parts.append(_figure("gap", "Accuracy by rating gap"))
    parts.append(_groups(found["by_length"]["groups"], "length of the completions"))
    if "length" in drawn:
        parts.append(_figure("length", "Accuracy by the lengths of the two sides"))
    parts.append(_length_bias(found["by_length"]))
    if found.get("by_rater"):
        parts.append(_raters(found["by_rater"]))
    return parts


def _groups(groups: list[dict], title: str) -> str:
    ceiling = any("human_ceiling" in row for row in groups)
    rows = [
        [markdown_cell(row["group"]), f"{row['pairs']:,}", with_interval(row["accuracy"], ".1%")]
        + ([number(row.get("human_ceiling"), ".1%")] if ceiling else [])
        for row in groups
    ]
    header = [title, "pairs", "accuracy, 95% interval", *(["one rater"] if ceiling else [])]
    return markdown_table(header, rows, numbers=range(1, len(header)))


def _length_bias(found: dict) -> str:
    if "model" not in found:
        return "The two sides of every pair have the same length."
    return (
        f"Of {found['pairs']:,} pairs that differ in length, the reward model prefers the longer side in "
        f"{interval_in_words(found['model'], '.1%')}, and people prefer it in {interval_in_words(found['people'], '.1%')}."
    )


def _raters(found: dict) -> str:
    rows = [
        [
            markdown_cell(row["rater"]),
            f"{row['pairs']:,}",
            with_interval(row["model"], ".1%"),
            with_interval(row["others"], ".1%") if "others" in row else "–",
        ]
        for row in found["raters"]
    ]
    header = ["rater", "pairs", "the reward model agrees", "the other raters agree (ceiling)"]
    text = markdown_table(header, rows, numbers=(1, 2, 3))
    if "kappa" in found:
        text += (
            f"\n\nTwo raters say the same in {found['two_agree']:.1%} of the cases (kappa {found['kappa']:.2f}). All of them "
            f"say the same in {found['unanimous']:.1%} of the pairs."
        )
    return text


def _mistakes(report: dict) -> str:
    """Return the table of the pairs whose rejected side scores highest above the chosen one."""
    rows = [[*(_shortened(row[side]) for side in ("prompt", "rejected", "chosen")), f"{row['probability']:.1%}"]
            for row in report["mistakes"]]  # fmt: skip
    return markdown_table(["prompt", "preferred by the model", "preferred by people", "P"], rows, numbers=(3,))


def _shortened(text: str) -> str:
    return markdown_cell(text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…")


def _rows_read(report: dict) -> str:
    rows = [
        [
            markdown_cell(found["source"]),
            *(f"{found[key]:,}" for key in ("rows", "bad", "long", "pairs")),
            "–" if found["longest"] is None else f"{found['longest']:,}",
        ]
        for found in report["datasets"]
    ]
    header = ["dataset", "rows", "cannot be used", "too long", "scored", "longest (tokens)"]
    return markdown_table(header, rows, numbers=range(1, len(header)))
