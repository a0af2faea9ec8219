"""Load rankings of completions for the reward model, and check each row before any training.

A row has a `ranking`: a list of two or more completions, the best first, as texts or as conversations. With a column `prompt`
they are what follows it; without one they are whole texts, or whole conversations. Pairs are rankings of two.
"""

import logging
from typing import Any

import numpy as np
from datasets import Dataset

from data import human_ratings
from data.cells import CellError, cell_error, check_cell, check_no_tools, check_rows, require_columns
from data.files import load_rows
from data.layouts import suggestion
from data.pairing import letters_of
from data.preferences import check_preferences
from data.reading import dataset_of
from data.rows import Rows
from data.tokens import Lengths, prepare_tokens
from data.turns import Parts, check_answered, split_pair


logger = logging.getLogger(__name__)
OF_PAIRS = ("prompt", "margin", "agreement")  # columns that rankings of two keep


def load_rankings(name: str, split: str, *, drop: bool = False) -> Dataset:
    """Load checked rankings of the embedded default (`human_ratings`), or of any data that `load_rows` reads.

    The embedded ones are of the ratings to train on, and pairs of those held out. With `drop`, rows that cannot be used are
    left out.
    """
    if name == "human_ratings":
        if split == "train":
            return human_ratings.rankings(split)
        return of_pairs(human_ratings.preference_pairs(split), name)
    rows = load_rows(name, split)
    if "ranking" not in rows.column_names and {"chosen", "rejected"} <= set(rows.column_names):
        return of_pairs(check_preferences(rows, name, drop=drop), name)
    return check_rankings(rows, name, drop=drop)


def of_pairs(pairs: Dataset, name: str) -> Dataset:
    """Return checked pairs as rankings of two, with their margin and agreement."""
    ranking = [list(sides) for sides in zip(pairs["chosen"][:], pairs["rejected"][:], strict=True)]
    kept = {column: pairs[column][:] for column in OF_PAIRS if column in pairs.column_names}
    return _as_rows(pairs, {"ranking": ranking} | kept, name)


def check_rankings(rows: Dataset, name: str, *, drop: bool = False) -> Dataset:
    """Check rankings and return their columns prompt and ranking; without a prompt the column is left out.

    Raises:
        ValueError: there is no column `ranking`; or in some row it is no list of two or more completions, or one of them is
            empty, comes twice, is neither a text nor a conversation, is not of the kind in the first row, or answers
            another prompt.
    """
    if "ranking" not in rows.column_names and (remedy := suggestion(rows, name)):
        raise ValueError(f"{name}: no column 'ranking'. {remedy} (pairs: leave loss_type unset)")
    require_columns(rows, ("ranking",), name)
    check_no_tools(rows, name)
    columns = [column for column in ("prompt", "ranking") if column in rows.column_names]
    unread = [column for column in rows.column_names if column not in columns]
    if unread:
        logger.info(f"{name}: these columns are not read: {', '.join(unread)}.")
    return check_rows(rows.select_columns(columns), columns, name, check_ranking, drop=drop)


def check_ranking(where: str, row: dict, kind: str | None) -> str | None:
    """Check the cells of a ranking, and return their kind; see `data.cells.check_cell`.

    Raises:
        CellError: a cell cannot be used.
    """
    cell = row["ranking"]
    turns = isinstance(cell, list) and any(isinstance(entry, dict) for entry in cell)
    if not isinstance(cell, list) or len(cell) < 2 or turns:
        raise cell_error(where, "ranking", cell, "must be a list of two or more completions, the best first")
    for entry in cell:
        kind = check_cell(where, "ranking", entry, kind, filled=True)
        if isinstance(entry, list):
            check_answered(where, "ranking", entry)
            if "prompt" in row and entry[0]["role"] != "assistant":
                problem = "must begin with the answer, since the turns before it stand in 'prompt'"
                raise cell_error(where, "ranking", entry, problem)
    if len(set(map(letters_of, cell))) < len(cell):
        raise cell_error(where, "ranking", cell, "must not hold a completion twice")
    if "prompt" in row:
        check_cell(where, "prompt", row["prompt"], kind, filled=False)
    _parts(where, row)
    return kind


def with_prompts(rows: Dataset, name: str, *, drop: bool = False) -> Dataset:
    """Return checked rankings with the prompt in a column of its own.

    Raises:
        ValueError: a prompt is empty, or the completions of a ranking begin with different words.
    """

    def check(where: str, row: dict, kind: str | None) -> None:
        prompt = row["prompt"] if "prompt" in row else _parts(where, row)[0].prompt
        if not (prompt.strip() if isinstance(prompt, str) else prompt):
            if "prompt" in row:
                raise cell_error(where, "prompt", prompt, "must not be empty (there is nothing to complete)")
            problem = "must hold texts that begin with the same words, which are the prompt"
            raise cell_error(where, "ranking", row["ranking"], problem, "Give the rows a column 'prompt'.")

    columns = [column for column in ("prompt", "ranking") if column in rows.column_names]
    rows = check_rows(rows, columns, name, check, drop=drop)
    if "prompt" in columns:
        return rows
    prompts: list = [_parts(name, row)[0].prompt for row in rows]
    rankings = [[entry[len(prompt) :] for entry in row["ranking"]] for prompt, row in zip(prompts, rows, strict=True)]
    others = {column: rows[column][:] for column in rows.column_names if column != "ranking"}
    return _as_rows(rows, {"prompt": prompts, "ranking": rankings} | others, name)


def _parts(where: str, row: dict) -> list[Parts]:
    """Split pairs of a ranking's completions from their prompt: as many pairs as show what all completions share.

    Of texts it is one pair: what the first and the last in the order of the alphabet share, all share. Of conversations it is
    each with the best one.

    Raises:
        CellError: the completions answer different prompts, or repeat that of the column.
    """
    first, *others = row["ranking"]
    if isinstance(first, str):
        first, *_, last = sorted(row["ranking"])
        others = [last]
    prompt = {"prompt": row["prompt"]} if "prompt" in row else {}
    try:
        parts = [split_pair(where, prompt | {"chosen": first, "rejected": other}) for other in others]
    except CellError as error:
        raise CellError(_in_words(str(error)), _in_words(error.problem)) from None
    if any(part.prompt != parts[0].prompt for part in parts):
        raise cell_error(
            where, "ranking", row["ranking"], "must hold answers to one prompt (the same turns before it)"
        )
    return parts


def _in_words(message: str) -> str:
    """Return a message about two sides as one about a ranking."""
    message = message.replace("both sides", "the completions").replace("'chosen' and 'rejected'", "'ranking'")
    return message.replace("'chosen'", "'ranking'").replace("'rejected'", "'ranking'")


def whole_texts(rows: Dataset) -> list[list[Any]]:
    """Return the texts or conversations of each ranking, with their prompt, the best first."""
    prompts = rows["prompt"][:] if "prompt" in rows.column_names else [None] * len(rows)
    return [
        [entry if prompt is None else prompt + entry for entry in ranking]
        for prompt, ranking in zip(prompts, rows["ranking"][:], strict=True)
    ]


def prepare_rankings(rows: Dataset, tokenizer, name: str, *, drop: bool = False) -> tuple[Dataset, Lengths]:
    """Check rankings as TRL's trainers will tokenize them, as `prepare_tokens` does; the length is that of the longest.

    With `drop`, a ranking is left out if one of its completions is.

    Raises the errors of `prepare_tokens`.
    """
    rows = rows if isinstance(rows, Rows) else Rows.of_file(rows, name)
    sizes = list(map(len, rows["ranking"][:]))
    of = np.repeat(np.arange(len(rows)), sizes)
    entries = [entry for ranking in rows["ranking"] for entry in ranking]
    whole = "messages" if isinstance(entries[0], list) else "text"
    columns: dict[str, list] = {"of": of.tolist()}
    if "prompt" in rows.column_names:
        prompts = rows["prompt"][:]
        columns |= {"prompt": [prompts[number] for number in of], "completion": entries}
    else:
        columns[whole] = entries
    each = rows.select(of).as_rows(dataset_of(columns, name))
    each, lengths = prepare_tokens(each, tokenizer, name, drop=drop)
    column = "completion" if "completion" in columns else whole
    found: dict[int, dict[str, list]] = {}
    for number, text, length, asked in zip(each["of"], each[column], lengths.rows, lengths.prompts, strict=True):
        entry = found.setdefault(number, {"texts": [], "rows": [], "prompts": []})
        entry["texts"].append(text)
        entry["rows"].append(length)
        entry["prompts"].append(asked)
    kept = [number for number, entry in found.items() if len(entry["texts"]) == sizes[number]]
    bad = rows.left_out + len(rows) - len(kept)
    rows = rows.select(kept)
    rows.left_out = bad
    changed = {"ranking": [found[number]["texts"] for number in kept]}
    if "prompt" in rows.column_names:
        prompt_of = dict(zip(each["of"], each["prompt"], strict=True))
        changed["prompt"] = [prompt_of[number] for number in kept]
    others = {column: rows[column][:] for column in rows.column_names if column not in changed}
    of_rows = Lengths([max(found[n]["rows"]) for n in kept], [max(found[n]["prompts"]) for n in kept], bad)
    return _as_rows(rows, changed | others, name), of_rows


def _as_rows(rows: Dataset, columns: dict[str, list], name: str) -> Dataset:
    made = dataset_of(columns, name)
    return rows.as_rows(made) if isinstance(rows, Rows) else made
