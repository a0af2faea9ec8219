"""Load preference pairs for the reward model, and check each row before any training.

TRL's formats are accepted. A cell is a text or a conversation. The prompt is a column of its own, or the common beginning of
`chosen` and `rejected` (as in Anthropic's HH), or both (as in UltraFeedback).
"""

import logging
import math

import torch
from datasets import Dataset

from data import human_ratings
from data.cells import cell_error, check_cell, check_no_tools, check_rows, require_columns
from data.files import load_rows
from data.layouts import suggestion
from data.reading import dataset_of
from data.rows import Rows
from data.turns import begins_with, check_answered, split_pair


logger = logging.getLogger(__name__)
LARGEST = torch.finfo(torch.float32).max  # a margin enters the loss in float32
# Columns of well-known datasets that rate each side.
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
OTHER_LOSSES = {"ranking": "plackett_luce", "rating": "regression"}  # that read rows with such a column
COLUMNS = ("prompt", "chosen", "rejected", "margin", "agreement")


def load_preferences(name: str, split: str, *, drop: bool = False) -> Dataset:
    """Load checked preference pairs of the embedded default (`human_ratings`), or of any data that `load_rows` reads.

    With `drop`, rows that cannot be used are left out.
    """
    if name == "human_ratings":
        return human_ratings.ranked_pairs(split) if split == "train" else human_ratings.preference_pairs(split)
    return check_preferences(load_rows(name, split), name, drop=drop)


def check_preferences(rows: Dataset, name: str, *, drop: bool = False) -> Dataset:
    """Check preference pairs and return their columns prompt, chosen, rejected, margin and agreement.

    A column that `rows` lacks is left out. If both sides repeat the prompt of a column `prompt`, it is removed from them.

    Raises:
        ValueError: the column `chosen` or `rejected` is missing; or in some row a cell is neither a text nor a
            conversation, or not of the kind in the first row; a completion is empty; both completions are the same, or
            answer different prompts; a conversation does not end in an answer, or has an unknown role; `margin` is not a
            finite number; or `agreement` is not a share from 0 to 1.
    """
    if not {"chosen", "rejected"} <= set(rows.column_names):
        remedy = suggestion(rows, name)
        if {"completion", "label"} <= set(rows.column_names):
            raise ValueError(
                f"{name}: no column 'chosen'. Rows of completion and label are unpaired, but this stage learns from pairs. "
                f"{remedy or 'Pair a completion with label True, as chosen, with one of the same prompt with label False.'}"
            )
        if remedy:
            known = next((loss for column, loss in OTHER_LOSSES.items() if column in rows.column_names), None)
            other = f". Or learn them as they are (loss_type: {known})" if known else ""
            raise ValueError(f"{name}: no columns 'chosen' and 'rejected'. {remedy}{other}")
    require_columns(rows, ("chosen", "rejected"), name)
    check_no_tools(rows, name)
    columns = [column for column in COLUMNS if column in rows.column_names]
    unread = [column for column in rows.column_names if column not in columns]
    if unread:
        logger.info(f"{name}: these columns are not read: {', '.join(unread)}.")
    for pair in SCORES:
        if set(pair) <= set(unread):
            logger.warning(
                f"{name}: the columns {' and '.join(pair)} are not read. To use them, put their difference into a column "
                f"'margin'."
            )
    rows = rows.select_columns(columns)
    doubled = "prompt" in columns and all(map(_doubled, rows))

    def check(where: str, row: dict, kind: str | None) -> str | None:
        kind = check_pair(where, row, kind)
        split_pair(where, row, doubled=doubled)
        return kind

    rows = check_rows(rows, columns, name, check, drop=drop)
    whole = doubled or ("prompt" in columns and any(map(_whole, rows)))
    return _apart(rows, name, doubled=doubled) if whole else rows


def explicit_prompts(rows: Dataset, name: str, *, drop: bool = False) -> Dataset:
    """Check pairs and return them with the prompt in a column of its own.

    Raises:
        ValueError: a prompt is empty, or the two sides of a pair begin with different words.
    """

    def check(where: str, row: dict, kind: str | None) -> None:
        prompt = row["prompt"] if "prompt" in row else split_pair(where, row).prompt
        if isinstance(prompt, str) and not prompt.strip():
            if "prompt" in row:
                raise cell_error(where, "prompt", prompt, "must not be empty (there is nothing to complete)")
            problem = "must begin with the same words as 'chosen', which are the prompt"
            raise cell_error(where, "rejected", row["rejected"], problem, "Give the pairs a column 'prompt'.")

    sides = [column for column in ("prompt", "chosen", "rejected") if column in rows.column_names]
    rows = check_rows(rows, sides, name, check, drop=drop)
    return rows if "prompt" in sides else _apart(rows, name)


def _apart(rows: Dataset, name: str, *, doubled: bool = False) -> Dataset:
    """Return checked pairs with the prompt split from both sides."""
    parts = [split_pair(name, row, doubled=doubled) for row in rows]
    columns = {field: [getattr(part, field) for part in parts] for field in ("prompt", "chosen", "rejected")}
    others = [column for column in rows.column_names if column not in columns]
    made = dataset_of(columns | {column: rows[column][:] for column in others}, name)
    return rows.as_rows(made) if isinstance(rows, Rows) else made


def _doubled(row: dict) -> bool:
    """Tell whether both texts begin with the text of their column `prompt`."""
    cells = [row[field] for field in ("prompt", "chosen", "rejected")]
    return all(isinstance(cell, str) for cell in cells) and all(begins_with(cells[0], side) for side in cells[1:])


def _whole(row: dict) -> bool:
    """Tell whether the sides are conversations that hold the prompt too."""
    return isinstance(row["chosen"], list) and row["chosen"][0]["role"] != "assistant"


def check_pair(where: str, row: dict, kind: str | None) -> str | None:
    """Check the cells of a pair, and return their kind; see `data.cells.check_cell`.

    Raises:
        CellError: a cell cannot be used.
    """
    for field in ("chosen", "rejected"):
        kind = check_cell(where, field, row[field], kind, filled=True)
    if "prompt" in row and not (isinstance(row["prompt"], str) and kind == "conversation"):
        check_cell(where, "prompt", row["prompt"], kind, filled=False)
    elif "prompt" in row and row["chosen"][0]["role"] == "assistant":
        raise cell_error(where, "chosen", row["chosen"], "must be a text (texts and conversations do not mix)")
    if row["chosen"] == row["rejected"]:
        raise cell_error(where, "rejected", row["rejected"], "must differ from 'chosen'")
    if kind == "conversation":
        for field in ("chosen", "rejected"):
            check_answered(where, field, row[field])
    if "margin" in row and not _is_finite(row["margin"]):
        raise cell_error(where, "margin", row["margin"], "must be a finite number")
    if "margin" in row and abs(row["margin"]) > LARGEST:
        raise cell_error(
            where, "margin", row["margin"], f"must be at most {LARGEST:.1e}, the largest number of float32"
        )
    if "agreement" in row and not (_is_finite(row["agreement"]) and 0 <= row["agreement"] <= 1):
        raise cell_error(where, "agreement", row["agreement"], "must be a share from 0 to 1")
    return kind


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
