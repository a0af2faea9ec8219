"""Hold what is made of preference data, and make one pair of a prompt and two texts.

Pairs have the columns prompt, chosen and rejected, and where it is known `margin` (difference of the ratings) and `agreement`
(share of the annotators who prefer the chosen response; one who sees a tie counts half for each side).
"""

import json
from typing import Any, NamedTuple

from data.cells import check_cell
from data.layouts import Layout
from data.preferences import check_pair
from data.quoting import quoted
from data.sifting import Problems
from data.turns import split_pair
from data.verdicts import TIE, listed


class Made(NamedTuple):
    """Rows that were made of a file.

    Attributes:
        pairs: rows of prompt, chosen, rejected, and optionally margin and agreement.
        liked: rows of prompt and completion, to learn from by imitation.
        keys: for each pair, what it shares with no pair of another split.
        liked_keys: the same for each row of `liked`.
        left_out: indices of the rows of the file that are in no pair, by the reason.
        votes: votes for the first response of each judged pair (1, 0, or 0.5 for a tie), in the order of the labels.
    """

    pairs: list[dict]
    liked: list[dict]
    keys: list[str]
    liked_keys: list[str]
    left_out: Problems
    votes: list[list[float]] = []


class Options(NamedTuple):
    """Choices of the user.

    Attributes:
        ties: whether tied judgements become pairs with agreement 0.5.
        adjacent: whether a text is paired only with those of the next lower rank, not with all lower ones.
        min_gap: least difference of two ratings that makes a pair.
        labels: labels that the user explains, see `data.verdicts.meanings`.
    """

    ties: bool = False
    adjacent: bool = False
    min_gap: float = 0.0
    labels: dict[str, list[str]] = {}


def key_of(prompt: Any) -> str:
    """Return what tells prompts apart for the splits: a text, or the first turn of a conversation that is no system turn."""
    if isinstance(prompt, str):
        return prompt
    return next((turn["content"] for turn in prompt if turn["role"] not in ("system", "developer")), "")


def letters_of(side: Any) -> str:
    """Return a text, or a conversation as one."""
    return side if isinstance(side, str) else json.dumps(side)


def never_rejected(pairs: list[dict], keys: list[str]) -> tuple[list[dict], list[str]]:
    """Return each chosen response that no pair of its prompt rejects, once, and its key."""
    rejected = {json.dumps([pair["prompt"], pair["rejected"]]) for pair in pairs}
    found: dict[str, tuple[dict, str]] = {}
    for pair, key in zip(pairs, keys, strict=True):
        row = {"prompt": pair["prompt"], "completion": pair["chosen"]}
        same = json.dumps([pair["prompt"], pair["chosen"]])
        if same not in rejected and pair.get("agreement", 1.0) > TIE:
            found.setdefault(same, (row, key))
    return [row for row, _ in found.values()], [key for _, key in found.values()]


def prompt_of(row: dict, layout: Layout, where: str) -> Any:
    """Return the prompt of a row: one cell, or several texts with a blank line between them, or None without a column.

    Raises:
        CellError: the prompt is empty, or is neither text nor a conversation.
    """
    if not layout.prompt:
        return None
    cells = [row[column] for column in layout.prompt]
    if len(cells) > 1:
        for column, cell in zip(layout.prompt, cells, strict=True):
            check_cell(where, column, "" if cell is None else cell, "text", filled=False)
        cells = ["\n\n".join(cell.strip() for cell in cells if cell and cell.strip())]
    cell = conversation(cells[0])
    check_cell(where, layout.prompt[0], cell, None, filled=True)
    return cell


def conversation(cell: Any) -> Any:
    """Return a conversation that a cell spells in JSON, or the cell; a missing cell is an empty text."""
    found = listed(cell)
    if cell is None or cell != cell:  # NaN, which pandas writes for a missing cell
        return ""
    turns = isinstance(found, list) and found and all(isinstance(turn, dict) and "role" in turn for turn in found)
    if not turns:
        return cell
    # Other keys, such as the time, would make equal turns differ.
    return [{key: turn.get(key) for key in ("role", "content")} for turn in found]  # type: ignore[attr-defined]


def sides(where: str, prompt: Any, texts: tuple[Any, Any]) -> dict:
    """Return prompt, chosen and rejected in one form; whole conversations and prompts without a column are split.

    Raises:
        CellError: the sides are empty, equal, of several forms, or answer different prompts.
    """
    one, two = texts
    if prompt is not None and isinstance(prompt, list) and isinstance(one, str) and isinstance(two, str):
        one, two = ([{"role": "assistant", "content": side}] for side in (one, two))
    elif isinstance(prompt, str) and isinstance(one, list) and isinstance(two, list):
        whole = one[0]["role"] != "assistant"
        prompt = None if whole else [{"role": "user", "content": prompt}]
    pair = {"chosen": one, "rejected": two} | ({} if prompt is None else {"prompt": prompt})
    check_pair(where, pair, None)
    return apart(where, pair)


def apart(where: str, pair: dict) -> dict:
    """Return prompt, chosen and rejected of a pair, with the prompt split from both sides.

    Raises the errors of `split_pair`.
    """
    parts = split_pair(where, pair)
    return {"prompt": parts.prompt, "chosen": parts.chosen, "rejected": parts.rejected}


def in_words_of(problem: str, columns: tuple[str, str]) -> str:
    """Return a problem with the names that the file has for the two sides."""
    for side, column in zip(("chosen", "rejected"), columns, strict=True):
        problem = problem.replace(f"'{side}'", quoted(column))
    return problem
