"""Load rated texts for a reward model that learns ratings, and check each row before any training.

A row is a text in a format of SFT (`text`, `messages`, or `prompt` and `completion`) with a number `rating`; higher is better.
"""

import math
from typing import Any

from datasets import Dataset

from data import human_ratings
from data.cells import cell_error, check_rows, require_columns
from data.files import load_rows
from data.preferences import check_preferences
from data.reading import dataset_of
from data.rows import Rows
from data.texts import check_texts


LARGEST = 1e15  # far beyond any scale of ratings; squares of them are sums that float64 holds


def load_ratings(name: str, split: str, *, drop: bool = False) -> Dataset:
    """Load checked rated texts of the embedded default (`human_ratings`), or of any data that `load_rows` reads.

    Held-out rows may also be pairs, which show whether scores order texts as people do; they are returned as
    `check_preferences` returns them, and the embedded held-out rows are such. With `drop`, rows that cannot be used are left
    out.
    """
    if name == "human_ratings":
        return human_ratings.rated_texts(split) if split == "train" else human_ratings.preference_pairs(split)
    rows = load_rows(name, split)
    if "rating" not in rows.column_names and {"chosen", "rejected"} <= set(rows.column_names):
        return check_preferences(rows, name, drop=drop)
    return check_ratings(rows, name, drop=drop)


def check_ratings(rows: Dataset, name: str, *, drop: bool = False) -> Dataset:
    """Check rated texts and return the columns of their format and `rating`.

    Raises:
        ValueError: there is no column `rating`, or in some row it is not a finite number; or an error of `check_texts`.
    """
    require_columns(rows, ("rating",), name)

    def check(where: str, row: dict, kind: str | None) -> None:
        rating = _number(row["rating"])
        if rating is None or not abs(rating) <= LARGEST:
            raise cell_error(where, "rating", row["rating"], f"must be a number, at most {LARGEST:g}")

    rows = rows if isinstance(rows, Rows) else Rows.of_file(rows, name)
    rows = check_rows(rows, ["rating"], name, check, drop=drop)
    ratings = dict(zip(zip(rows.of.tolist(), rows.numbers.tolist(), strict=True), rows["rating"][:], strict=True))
    texts = check_texts(rows, name, drop=drop)
    places = zip(texts.of.tolist(), texts.numbers.tolist(), strict=True)
    columns = {column: texts[column][:] for column in texts.column_names}
    return texts.as_rows(dataset_of(columns | {"rating": [_number(ratings[place]) for place in places]}, name))


def _number(cell: Any) -> float | None:
    """Return a rating as a number; CSV files hold it as text."""
    if isinstance(cell, bool) or cell is None:
        return None
    try:
        number = float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def with_prompts(rows: Dataset, name: str, *, drop: bool = False) -> Dataset:
    """Return checked rated texts with the prompt in a column of its own.

    Raises:
        ValueError: the rows are plain texts, or a prompt is empty.
    """
    if "text" in rows.column_names:
        raise ValueError(
            f"{name}: the rows have no prompts, and sft_adapter asks to complete them. Give the columns 'prompt' and "
            f"'completion', or leave sft_adapter unset."
        )
    if "messages" in rows.column_names:
        turns = rows["messages"][:]
        columns = {
            "prompt": [of[:-1] for of in turns],
            "completion": [of[-1:] for of in turns],
            "rating": rows["rating"][:],
        }
        rows = rows.as_rows(dataset_of(columns, name)) if isinstance(rows, Rows) else dataset_of(columns, name)

    def check(where: str, row: dict, kind: str | None) -> None:
        prompt = row["prompt"]
        if not (prompt.strip() if isinstance(prompt, str) else prompt):
            raise cell_error(where, "prompt", prompt, "must not be empty (there is nothing to complete)")

    return check_rows(rows, ["prompt"], name, check, drop=drop)


def whole_texts(rows: Dataset) -> list[Any]:
    """Return the text or conversation of each row, with its prompt."""
    if "completion" in rows.column_names:
        return [prompt + text for prompt, text in zip(rows["prompt"][:], rows["completion"][:], strict=True)]
    return rows["text" if "text" in rows.column_names else "messages"][:]
