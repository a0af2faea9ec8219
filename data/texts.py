"""Texts for supervised fine-tuning."""

from datasets import Dataset

from data import human_ratings
from data.files import check_cell, check_rows, load_rows


# TRL's formats: the columns of each, and the kind of cell they hold (None: text or conversations).
FORMATS = {("text",): "text", ("messages",): "conversation", ("prompt", "completion"): None}


def load_texts(name: str, split: str, *, drop: bool = False) -> Dataset:
    """Checked texts of the embedded default (`human_ratings`), or of whatever `load_rows` can read; with `drop`, without
    the rows that cannot be used."""
    if name == "human_ratings":
        return human_ratings.texts(split)
    return check_texts(load_rows(name, split), name, drop=drop)


def check_texts(rows: Dataset, name: str, *, drop: bool = False) -> Dataset:
    """The `rows` with only the columns of the one format they are in: text, messages, or prompt and completion.

    Raises:
        ValueError: the columns are those of no format or of several; or in some row a text, completion or last message
            is empty, or a cell is not what its format needs.
    """
    columns = _format_of(rows, name)
    rows = rows.select_columns(list(columns))

    def check(where: str, row: dict, kind: str | None) -> str:
        kind = kind or FORMATS[columns]
        for field in columns:
            kind = check_cell(where, field, row[field], kind, filled=field != "prompt")
        return kind

    return check_rows(rows, list(columns), name, check, drop=drop)


def tokenize_texts(rows: Dataset, tokenizer, max_length: int) -> list[list[int]]:
    """Token rows, cut at `max_length`: of texts, or of prompt and completion together, with the end-of-text token
    unless they end in it; or of conversations through the tokenizer's chat template, which ends them its own way."""
    if isinstance(rows[0][rows.column_names[-1]], str):
        texts = ["".join(row[column] for column in ("prompt", "completion", "text") if column in row) for row in rows]
        end = tokenizer.eos_token_id
        ids = [row if row[-1:] == [end] else [*row, end] for row in tokenizer(texts)["input_ids"]]
    else:
        turns = [row.get("messages") or row["prompt"] + row["completion"] for row in rows]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    return [row[:max_length] for row in ids]


def _format_of(rows: Dataset, name: str) -> tuple[str, ...]:
    formats = [columns for columns in FORMATS if set(columns) <= set(rows.column_names)]
    if len(formats) == 1:
        return formats[0]
    problem = f"its columns {rows.column_names} are those of {'several formats' if formats else 'no format'}"
    raise ValueError(f"{name}: {problem}. Give it just one of: text; messages; prompt and completion.")
