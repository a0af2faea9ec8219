"""Write text, numbers and tables as GitHub's markdown."""

import math
from collections.abc import Sequence


def markdown_cell(text: str) -> str:
    """Return any text as one cell of a GitHub table, escaped and on one line, so that it reads as it was written."""
    text = text.strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = "".join(f"\\{character}" if character in "\\`*_[]~$|" else character for character in text)
    return "<br>".join(text.splitlines()) or "(empty)"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a markdown table; the columns `numbers` are aligned right."""
    rule = ["---:" if column in numbers else "---" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def number(value: float | None, form: str) -> str:
    """Return a number in the format `form`, or a dash if it is None or not finite."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def interval_in_words(interval: dict, form: str) -> str:
    """Return a mean and its interval in words, for a sentence."""
    mean, low, high = (format(interval[key], form) for key in ("mean", "low", "high"))
    return f"**{mean}** (95% interval {low} to {high})"


def with_interval(interval: dict, form: str) -> str:
    """Return a mean and its interval in brackets, for a table; the mean alone if the interval is not known (one seed)."""
    mean, low, high = (format(interval[key], form) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" if math.isfinite(interval["low"]) else mean
