"""Load preference pairs to measure a reward model on: with the prompt apart, and with all of their columns.

Any pairs that `pipeline.reward` reads will do, and files of RewardBench's format (prompt, chosen, rejected, subset).
"""

from datasets import Dataset

from data import human_ratings
from data.cells import cell_error, require_columns
from data.conversion import CONVERSATION, in_form
from data.files import load_rows
from data.pairing import Made, apart
from data.preferences import COLUMNS, check_preferences
from data.reading import dataset_of
from data.rows import Rows, place


SIDES = ("prompt", "chosen", "rejected")
SUBSET = "subset"  # RewardBench's column of domains
MOST_DOMAINS = 200


def load_evaluation_pairs(name: str, split: str, *, form: str | None = None, drop: bool = False) -> Dataset:
    """Load checked pairs with the columns prompt, chosen and rejected, and all that the rows have besides.

    `human_ratings` are the embedded film snippets; `human_ratings:tweets` are those of another domain.

    Args:
        form: `conversation` makes texts the turns of a user and an assistant; `text` leaves them as they are. Unset: rows
            stay as they are, and texts that would run together are refused.
        drop: leave out rows that cannot be used.

    Raises the errors of `load_rows` and `check_preferences`, and:
        ValueError: there is no such embedded domain; the rows cannot have this form, or would run together; or a cell of
            `votes` is not a mapping of raters to shares.
    """
    source, _, domain = name.partition(":")
    if source == "human_ratings":
        return human_ratings.domain_pairs(domain or "film", split)
    rows = load_rows(name, split)
    checked = check_preferences(rows, name, drop=drop)
    assert isinstance(checked, Rows)  # as `load_rows` returns them
    if len(checked) < len(rows):
        kept = set(zip(checked.of.tolist(), checked.numbers.tolist(), strict=True))
        places = zip(rows.of.tolist(), rows.numbers.tolist(), strict=True)
        rows = rows.select([index for index, where in enumerate(places) if where in kept])
    others = [column for column in rows.column_names if column not in COLUMNS]
    columns = {column: checked[column][:] for column in checked.column_names if column not in SIDES}
    columns |= {column: rows[column][:] for column in others}
    pairs = [apart(place(checked, index, name), row) for index, row in enumerate(checked)]
    pairs = _in_form(pairs, name, form)
    made = dataset_of({side: [pair[side] for pair in pairs] for side in SIDES} | columns, name)
    found = checked.as_rows(made)
    _check_votes(found, name)
    return found


def _in_form(pairs: list[dict], name: str, form: str | None) -> list[dict]:
    """Return the pairs as texts or conversations.

    Raises:
        ValueError: they cannot have this form; or no form is given, and prompt and completion would run together.
    """
    if any(isinstance(pair["prompt"], list) for pair in pairs) and form not in (None, CONVERSATION):
        raise ValueError(f"{name}: form={form!r}, but the rows are conversations. Leave form unset.")
    if form == CONVERSATION and any(not pair["prompt"] for pair in pairs):
        raise ValueError(f"{name}: form={form!r}, but some rows have no prompt. Set form: text.")
    made, found = in_form(Made(pairs, [], [], [], {}), form)
    if form is None and found == CONVERSATION and isinstance(pairs[0]["prompt"], str):
        raise ValueError(
            f"{name}: prompts and completions would run together, such as {pairs[0]['prompt'][-20:]!r} and "
            f"{pairs[0]['chosen'][:20]!r}. Set form: conversation, for a model with a chat template, or form: text to score "
            f"them as they are."
        )
    return made.pairs


def _check_votes(rows: Dataset, name: str) -> None:
    """Raise a CellError for a cell of the column `votes` that does not map raters to shares from 0 to 1."""
    for index, votes in enumerate(rows["votes"][:] if "votes" in rows.column_names else []):
        shares = votes.values() if isinstance(votes, dict) else [votes]
        if votes is not None and not all(share is None or _is_share(share) for share in shares):
            problem = "must give each rater 1 (prefers 'chosen'), 0.5 (a tie), 0 (prefers 'rejected') or null"
            raise cell_error(place(rows, index, name), "votes", votes, problem)


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def domains_of(rows: Dataset, name: str, column: str | None) -> list[str] | None:
    """Return the domain of each row, as a text.

    Args:
        column: the column that names it; None is `subset`, if the rows have it.

    Returns:
        The domains, or None if no column names them.

    Raises:
        ValueError: there is no such column, a cell is empty, or there are more than `MOST_DOMAINS` domains.
    """
    if column is None and SUBSET not in rows.column_names:
        return None
    column = column or SUBSET
    require_columns(rows, (column,), name)
    cells = rows[column][:]
    for index, cell in enumerate(cells):
        if isinstance(cell, (dict, list)) or cell is None or not str(cell).strip():
            raise cell_error(place(rows, index, name), column, cell, "must name the domain of the pair")
    found = [str(cell).strip() for cell in cells]
    if len(set(found)) > MOST_DOMAINS:
        raise ValueError(
            f"{name}: the column {column!r} has {len(set(found)):,} different values, more than the {MOST_DOMAINS} that a "
            f"report can show. Name a column of few values in domain_column."
        )
    return found
