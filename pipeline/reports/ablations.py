"""Compare runs of PPO in which one setting was changed, each under several seeds."""

import statistics

from pipeline.reports.markdown import markdown_table, with_interval


ABLATIONS_NOTE = (
    "Mean over the seeds, and the lowest and highest in brackets. The first row changes nothing. Value "
    "loss and approxkl are means over the first quarter of the updates. The judge is in -1 to 1."
)
ABLATION_COLUMNS = {
    "judge_gain": ("judge gain", "+.2f"),
    "win_rate": ("beats SFT", ".0%"),
    "kl": ("KL, nats", ".1f"),
    "distinct_2": ("distinct-2", ".2f"),
    "value_loss": ("value loss", ".2f"),
    "approxkl": ("approxkl", ".4f"),
}


def ablation_row(report: dict, history: list[dict]) -> dict:
    """Return the results of one run, and its statistics in the first quarter of its updates.

    `history` comes from the metrics file of PPO.
    """
    updates = [row for row in history if "loss/value" in row]
    early = updates[: -(-len(updates) // 4)]
    return {
        "judge_gain": report["judge_gain"]["mean"],
        "win_rate": report["win_rate"]["mean"],
        "kl": report["policy"]["kl"],
        "distinct_2": report["policy"]["distinct_2"],
        "value_loss": statistics.fmean(row["loss/value"] for row in early),
        "approxkl": statistics.fmean(row["approxkl"] for row in early),
    }


def ablations_table(runs: dict[str, list[dict]]) -> str:
    """Return a markdown table that compares settings (`key=value`), each with one row of `ablation_row` a seed."""

    def cell(rows: list[dict], key: str, form: str) -> str:
        values = [row[key] for row in rows]
        return with_interval({"mean": statistics.fmean(values), "low": min(values), "high": max(values)}, form)

    header = ["setting", "seeds", *(name for name, _ in ABLATION_COLUMNS.values())]
    cells = [
        [f"`{setting}`", str(len(rows)), *(cell(rows, key, form) for key, (_, form) in ABLATION_COLUMNS.items())]
        for setting, rows in runs.items()
    ]
    return markdown_table(header, cells, numbers=range(1, len(header)))
