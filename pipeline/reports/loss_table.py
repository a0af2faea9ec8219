"""Compare reward models that were trained with several losses, each under several seeds."""

import statistics
from typing import Any

from pipeline.reports.markdown import markdown_table


LOSSES_NOTE = (
    "Mean over the seeds, and the lowest and highest in brackets, on held-out pairs. Accuracy is against the mean rating; "
    "agreement is how often one rater agrees with the model; ECE is the calibration error of sigmoid(score of chosen - "
    "score of rejected)."
)
COLUMNS = {"accuracy": ("accuracy", ".1%"), "agreement": ("agreement", ".1%"), "ece": ("ECE", ".3f")}


def loss_row(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the figures of one reward model, from its metrics file.

    `agreement` is the mean over the pairs of the share of raters who agree with the model: the ceiling of `accuracy` against
    one rater.
    """
    curve = metrics["reliability"]
    agreed = sum(row["count"] * row["observed"] for row in curve) / sum(row["count"] for row in curve)
    return {"accuracy": metrics["accuracy"], "agreement": agreed, "ece": metrics["ece"]}


def losses_table(runs: dict[str, list[dict[str, float]]]) -> str:
    """Return a markdown table that compares losses, each with one row of `loss_row` a seed."""

    def cell(rows: list[dict[str, float]], key: str, form: str) -> str:
        values = [row[key] for row in rows]
        return f"{statistics.fmean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"

    header = ["loss", "seeds", *(name for name, _ in COLUMNS.values())]
    cells = [
        [f"`{loss}`", str(len(rows)), *(cell(rows, key, form) for key, (_, form) in COLUMNS.items())]
        for loss, rows in runs.items()
    ]
    return markdown_table(header, cells, numbers=range(1, len(header)))
