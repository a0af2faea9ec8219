"""Preference pairs for the reward model, checked row by row before any training.

TRL's formats are accepted: cells of text or conversations, and the prompt either in a column of its own or as the
common beginning of `chosen` and `rejected` (as in Anthropic's HH).
"""

import math

from datasets import Dataset

from data import human_ratings
from data.files import cell_error, check_cell, check_rows, load_rows, require_columns


COLUMNS = ("prompt", "chosen", "rejected", "margin", "agreement")


def load_preferences(name: str, split: str, *, drop: bool = False) -> Dataset:
    """Checked preference pairs of the embedded default (`human_ratings`), or of whatever `load_rows` can read; with
    `drop`, without the rows that cannot be used."""
    if name == "human_ratings":
        return human_ratings.ranked_pairs(split) if split == "train" else human_ratings.preference_pairs(split)
    return check_preferences(load_rows(name, split), name, drop=drop)


def check_preferences(rows: Dataset, name: str, *, drop: bool = False) -> Dataset:
    """The `rows` with only those of the columns prompt, chosen, rejected, margin and agreement that they have.

    Raises:
        ValueError: `chosen` or `rejected` is missing; or in some row a cell is neither text nor a conversation, or is
            not of the kind that the first row has; a completion is empty; both completions are the same; `margin` is
            not a finite number; or `agreement` is not a share from 0 to 1.
    """
    require_columns(rows, ("chosen", "rejected"), name)
    columns = [column for column in COLUMNS if column in rows.column_names]
    return check_rows(rows.select_columns(columns), columns, name, _check_row, drop=drop)


def _check_row(where: str, row: dict, kind: str | None) -> str:
    for field in ("prompt", "chosen", "rejected"):
        if field in row:
            kind = check_cell(where, field, row[field], kind, filled=field != "prompt")
    if row["chosen"] == row["rejected"]:
        raise cell_error(where, "rejected", row["rejected"], "must differ from 'chosen'")
    if "margin" in row and not _is_finite(row["margin"]):
        raise cell_error(where, "margin", row["margin"], "must be a finite number")
    if "agreement" in row and not (_is_finite(row["agreement"]) and 0 <= row["agreement"] <= 1):
        raise cell_error(where, "agreement", row["agreement"], "must be a share from 0 to 1")
    return kind


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
