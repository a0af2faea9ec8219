"""Load texts for supervised fine-tuning, check them, and turn them into tokens."""

import logging

from datasets import Dataset

from data import human_ratings
from data.cells import cell_error, check_cell, check_no_tools, check_rows
from data.files import load_rows
from data.layouts import suggestion
from data.turns import begins_with, check_answered


logger = logging.getLogger(__name__)
MEANT = ("prompt", "chosen", "rejected", "label")  # columns of other formats
NOT_IMITATED = ("false", "0", "0.0")  # labels of bad completions; spreadsheets write FALSE
# TRL's formats: the columns of each, and the kind of cell they hold (None: text or conversations).
FORMATS = {("text",): "text", ("messages",): "conversation", ("prompt", "completion"): None}


def load_texts(name: str, split: str, *, drop: bool = False) -> Dataset:
    """Load checked texts of the embedded default (`human_ratings`), or of any data that `load_rows` reads.

    With `drop`, rows that cannot be used are left out.
    """
    if name == "human_ratings":
        return human_ratings.texts(split)
    return check_texts(load_rows(name, split), name, drop=drop)


def check_texts(rows: Dataset, name: str, *, drop: bool = False) -> Dataset:
    """Check texts and return only the columns of their format: text, messages, or prompt and completion.

    Raises:
        ValueError: the columns fit no format or several formats; or in some row a text, completion or last message is
            empty, a conversation does not end in an answer, `label` is False, a completion repeats its prompt, or a cell
            is not what its format needs.
    """
    columns = _format_of(rows, name)
    read = list(columns)
    if "completion" in columns and "label" in rows.column_names:
        read.append("label")
    check_no_tools(rows, name)
    unread = [column for column in MEANT if column in rows.column_names and column not in read]
    if unread:
        logger.warning(f"{name}: only {' and '.join(columns)} are read. The columns {', '.join(unread)} are not.")
    rows = rows.select_columns(read)
    doubled = "completion" in columns and all(_doubled(row) for row in rows)

    def check(where: str, row: dict, kind: str | None) -> str | None:
        kind = kind or FORMATS[columns]
        for field in columns:
            kind = check_cell(where, field, row[field], kind, filled=field != "prompt")
        if kind == "conversation":
            check_answered(where, columns[-1], row[columns[-1]])
        if "completion" in row and (kind == "conversation" or doubled) and _doubled(row):
            raise cell_error(where, "completion", row["completion"], "must not begin with the prompt", "Remove it.")
        if str(row.get("label", True)).strip().lower() in NOT_IMITATED:
            problem = "must be True (the model learns to write every completion)"
            raise cell_error(where, "label", row["label"], problem, "Keep only the rows to learn from.")
        return kind

    return check_rows(rows, read, name, check, drop=drop).select_columns(list(columns))


def _doubled(row: dict) -> bool:
    """Tell whether a completion begins with its prompt."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return begins_with(prompt, completion)
    return (
        isinstance(prompt, list)
        and isinstance(completion, list)
        and bool(prompt)
        and completion[: len(prompt)] == prompt
    )


def tokenize_texts(rows: Dataset, tokenizer, max_length: int) -> list[list[int]]:
    """Return the tokens of each row, cut at `max_length`.

    A text, or a prompt with its completion, gets the end-of-text token if it does not end with it. A conversation is
    written by the tokenizer's chat template, which ends it in its own way.
    """
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
    problem = f"the columns {rows.column_names} fit {'several formats' if formats else 'no format'}"
    remedy = "" if formats else suggestion(rows, name)
    raise ValueError(f"{name}: {problem}. {remedy or 'Give exactly one of: text; messages; prompt and completion.'}")
