"""Check the cells of rows, and report every fault in one form.

A row that cannot be used is an error. If the user sets `drop_bad_rows`, such rows are left out instead, and a warning says
how many and why.
"""

import difflib
import logging
from collections.abc import Callable
from typing import Any

import datasets
from datasets import Dataset

from data.quoting import quoted as shorten
from data.reading import dataset_of, format_of
from data.rows import Rows, place, short_place


logger = logging.getLogger(__name__)

# Roles that chat templates know, and the names that other formats use for them.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
OTHER_ROLES = {
    **dict.fromkeys(("human", "prompter", "question", "instruction"), "user"),
    **dict.fromkeys(("gpt", "bot", "chatbot", "ai", "model", "answer", "response"), "assistant"),
}


class CellError(ValueError):
    """Error about a cell that cannot be used.

    `problem` says what the cell must be; it names neither the row nor the value.
    """

    def __init__(self, message: str, problem: str):
        super().__init__(message)
        self.problem = problem


def cell_error(
    where: str, field: str, value: object, problem: str, remedy: str = "Correct or delete the row."
) -> CellError:
    """Return the error for one cell; `where` is a `row_name`."""
    problem = f"{field!r} {problem}"
    return CellError(f"{where}: {problem}, but is {shorten(value)}. {remedy}", problem)


def check_rows(
    rows: Dataset,
    columns: list[str],
    name: str,
    check: Callable[[str, dict, str | None], str | None],
    *,
    drop: bool = False,
) -> Dataset:
    """Check the cells of `columns` in each row and return the rows; with `drop`, return those that pass.

    `check` gets the row's name, its cells and the kind of cell in the rows before it (None for the first row). It returns
    that kind. With `drop`, a warning says how many rows are left out, why, and which is the first.

    Raises the errors of `check`, and with `drop`:
        ValueError: no row passes.
    """
    kind, kept = None, []
    problems: dict[str, list[int]] = {}
    for number, row in enumerate(rows.select_columns(columns), 1):
        try:
            kind = check(place(rows, number - 1, name), row, kind)
        except CellError as error:
            if not drop:
                raise
            problems.setdefault(error.problem, []).append(number)
        else:
            kept.append(number - 1)
    if not problems:
        return rows
    dropped = "; ".join(
        f"{len(found)} because {problem} (first: {short_place(rows, found[0] - 1)})"
        for problem, found in problems.items()
    )
    if not kept:
        raise ValueError(f"{name}: drop_bad_rows=True leaves out all {len(rows)} rows: {dropped}. Name other data.")
    logger.warning(f"{name}: {len(rows) - len(kept)} of {len(rows)} rows are left out: {dropped}.")
    left = rows.select(kept)
    if isinstance(left, Rows):
        left.left_out = rows.left_out + len(rows) - len(kept)
    return _typed_anew(left, columns, name)


def _typed_anew(rows: Dataset, columns: list[str], name: str) -> Dataset:
    """Return the rows with each column stored in its own type, where it can be.

    A column of mixed types is stored as JSON texts. Once the rows of other types are gone, it can have one type.
    """
    if not any(isinstance(rows.features[column], datasets.Json) for column in columns):
        return rows
    made = dataset_of({column: rows[column][:] for column in rows.column_names}, name)
    return rows.as_rows(made) if isinstance(rows, Rows) else made


def require_columns(rows: Dataset, needed: tuple[str, ...], name: str) -> None:
    """Raise a ValueError for the first missing column of `needed`; suggest the column that may be a misspelling of it."""
    found = rows.column_names
    for column in needed:
        if column not in found:
            near = difflib.get_close_matches(column, [other for other in found if other not in needed], n=1)
            remedy = f"Did you mean {near[0]!r}? Rename it." if near else "Rename the column that holds it."
            if len(found) == 1 and any(mark in found[0] for mark in ";,\t|"):
                remedy = f"Separate the cells by {'tabs' if format_of(name) == '.tsv' else 'commas'}."
            raise ValueError(
                f"{name}: no column {column!r}; needed: {list(needed)}, found: {shorten(found, 300)}. {remedy}"
            )


def check_cell(where: str, field: str, value: Any, kind: str | None, *, filled: bool) -> str:
    """Check one cell and return its kind: "text" (a string) or "conversation" (a list of role and content messages).

    Raises:
        ValueError: the cell is neither a text nor a conversation; it is not of `kind` (None accepts both); or `filled`
            is set and the text, or the last message, is only white space.
    """
    found = _cell_kind(value)
    if found is None:
        problem = "must be text, or a list of messages that each have a text 'role' and a text 'content'"
        raise cell_error(where, field, value, problem)
    if kind not in (None, found):
        raise cell_error(where, field, value, f"must be a {kind} (texts and conversations do not mix)")
    if found == "conversation":
        check_roles(where, field, value)
    last = value if found == "text" else value[-1]["content"]
    if filled and not last.strip():
        raise cell_error(where, field, value, "must not be empty")
    return found


def check_roles(where: str, field: str, turns: list[dict]) -> None:
    """Raise a CellError for a message whose role chat templates do not know."""
    for turn in turns:
        if turn["role"] not in ROLES:
            plain = turn["role"].strip().lower()
            name = OTHER_ROLES.get(plain, plain)
            remedy = f"Rename the role {shorten(turn['role'])} to {name!r}." if name in ROLES else "Rename the role."
            raise cell_error(where, field, turn["role"], f"must have only the roles {', '.join(ROLES)}", remedy)


def check_chat_template(rows: Dataset, tokenizer, name: str) -> None:
    """Check that the tokenizer has a chat template if the rows are conversations.

    Raises:
        ValueError: the rows are conversations, and the tokenizer has no chat template.
    """
    if tokenizer.chat_template is not None:
        return
    for field, value in rows[0].items():
        if _cell_kind(value) == "conversation":
            raise ValueError(
                f"{place(rows, 0, name)}: {field!r} is a conversation ({shorten(value)}), but the tokenizer has no chat "
                f"template. Give text, or use a model whose tokenizer has a chat template."
            )


def _cell_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "text"
    return "conversation" if isinstance(value, list) and value and all(map(_is_message, value)) else None


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def check_no_tools(rows: Dataset, name: str) -> None:
    """Raise a ValueError for the first filled cell of `tools` or `chat_template_kwargs`.

    With such a cell, TRL would have the chat template write a different text than the stages do.
    """
    for column in ("tools", "chat_template_kwargs"):
        for number, cell in enumerate(rows[column][:] if column in rows.column_names else []):
            if cell not in (None, "", [], {}, "[]", "{}"):
                raise cell_error(
                    place(rows, number, name),
                    column,
                    cell,
                    "must be empty (the stages write conversations without it)",
                    "Write its content into a system turn, and delete or rename the column.",
                )
