"""Read what annotators wrote: which of two responses is better, thumbs up or down, ratings."""

import json
import math
from collections.abc import Iterable

from data.quoting import quoted


FIRST, SECOND, TIE = 1.0, 0.0, 0.5  # the first response's share of a vote
MISSING = ("", "nan", "na", "n/a", "null", "none", "skip", "skipped")
OF_FIRST = ("a", "first", "left", "model_a", "model_1", "response_a", "response_1", "[[a]]", "1st")
OF_SECOND = ("b", "second", "right", "model_b", "model_2", "response_b", "response_2", "[[b]]", "2nd")
OF_TIE = ("tie", "tied", "equal", "same", "draw", "both", "neither", "tie (bothbad)", "both_bad", "c", "[[c]]", "0.5")
LIKED = (
    "true", "1", "up", "thumbs_up", "thumbs up", "good", "like", "liked", "positive", "pos", "yes", "desirable", "+1", "👍",
)  # fmt: skip
DISLIKED = (
    "false", "0", "down", "thumbs_down", "thumbs down", "bad", "dislike", "disliked", "negative", "neg", "no", "undesirable",
    "-1", "👎",
)  # fmt: skip


def word(cell: object) -> str:
    """Return a label as a word: small letters, without white space around it, whole numbers without a point."""
    if isinstance(cell, float) and math.isfinite(cell) and cell == int(cell):
        cell = int(cell)
    text = "" if cell is None else str(cell).strip().lower()
    return text.removesuffix(".0") if text.removesuffix(".0").lstrip("+-").isdigit() else text


def listed(cell: object) -> object:
    """Return the list that a cell of a CSV or TSV file spells in JSON, or the cell."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            found = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        return found if isinstance(found, list) else cell
    return cell


def each(cell: object) -> list:
    """Return the values of a cell that may hold those of several annotators."""
    found = listed(cell)
    return found if isinstance(found, list) else [found]


def number(cell: object) -> float | None:
    """Return the number in a cell, or None."""
    if isinstance(cell, bool) or not isinstance(cell, (int, float, str)):
        return None
    try:
        found = float(cell)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def are_numbers(cells: Iterable[object]) -> bool:
    """Tell whether cells hold numbers; at most one in ten may hold something else."""
    filled = [cell for cell in cells if word(cell) not in MISSING]
    return bool(filled) and sum(number(cell) is not None for cell in filled) >= 0.9 * len(filled)


def are_thumbs(cells: Iterable[object]) -> bool:
    """Tell whether cells say yes or no; at most one in ten may say something else."""
    filled = [word(cell) for cell in cells if word(cell) not in MISSING]
    return bool(filled) and sum(cell in LIKED + DISLIKED for cell in filled) >= 0.9 * len(filled)


def liking(cell: object) -> float | None:
    """Return 1 for thumbs up, 0 for thumbs down, and None for anything else."""
    found = word(cell)
    return 1.0 if found in LIKED else 0.0 if found in DISLIKED else None


def meanings(
    cells: Iterable[object],
    name: str,
    columns: tuple[str, str],
    given: dict[str, list[str]] | None = None,
) -> dict[str, float]:
    """Return what each label of a file means: `FIRST`, `SECOND` or `TIE`. Words that are unknown are left out.

    Numbers are read as 1, 2 and 0 for a tie. If the responses are called 0 and 1, they are read as those.

    Args:
        cells: all labels of the file.
        columns: names of the two responses.
        given: labels that the user gives for the options `first_wins`, `second_wins` and `tie`. Others then mean nothing.

    Raises:
        ValueError: 0 and 1 could mean several things; or a label is given twice.
    """
    given = {option: labels for option, labels in (given or {}).items() if labels}
    if given:
        pairs = [
            (word(label), value)
            for option, value in (("first_wins", FIRST), ("second_wins", SECOND), ("tie", TIE))
            for label in given.get(option, ())
        ]
        if len(dict(pairs)) < len(pairs):
            raise ValueError("A label stands in two of --first_wins, --second_wins and --tie. Name it once.")
        return dict(pairs)
    words = {word(cell) for cell in cells}
    known = {
        label: value for labels, value in ((OF_FIRST, FIRST), (OF_SECOND, SECOND), (OF_TIE, TIE)) for label in labels
    }
    known |= {columns[0].strip().lower(): FIRST, columns[1].strip().lower(): SECOND}
    if columns[0].endswith("0") and columns[1].endswith("1"):
        return known | {"0": FIRST, "1": SECOND}
    numbers = {found for found in words if number(found) is not None and found not in OF_TIE}
    signed = any(found.startswith("-") for found in numbers)
    if signed or (numbers and "2" not in numbers and "0" in numbers):
        raise ValueError(
            f"{name}: the labels {quoted(sorted(numbers), 100)} do not tell which response is better. Say what they mean, "
            f"such as --first_wins=0 --second_wins=1; several labels are separated by commas."
        )
    return known | {"1": FIRST, "2": SECOND, "0": TIE}
