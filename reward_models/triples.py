"""Score a knowledge graph that is written as lines `subject | relation | object`: F1 over triples, malformed lines punished.

The functions have TRL's protocol (see `reward_models.rules`) and read the dataset's column `triples`. They serve as rewards
and as judges.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any


Triple = tuple[str, str, str]


def read_line(line: str) -> Triple | None:
    """Return the triple of a line, in lower case and with single spaces; None if the line is malformed.

    A line has three parts between two bars, and none of them is empty.
    """
    subject, *others = (" ".join(part.split()).lower() for part in line.split("|"))
    if len(others) != 2 or not all((subject, *others)):
        return None
    return subject, others[0], others[1]


def references(triples: Any) -> set[Triple]:
    """Return the triples in a cell of the column `triples`.

    A cell is a text of lines, a list of lines (as in WebNLG), or a list of lists `[subject, relation, object]`.

    Raises:
        ValueError: the cell is something else, or a line of it is malformed.
    """
    lines = [line for line in triples.splitlines() if line.strip()] if isinstance(triples, str) else triples
    if not isinstance(lines, list):
        raise ValueError(
            f"'triples' must be lines 'subject | relation | object', or lists of the three, but is {str(triples)[:100]!r}. "
            f"Correct the row. A text that states nothing has an empty list."
        )
    found = set()
    for line in lines:
        if isinstance(line, list) and all(isinstance(part, str) and "|" not in part for part in line):
            line = "|".join(line)
        triple = read_line(line) if isinstance(line, str) else None
        if triple is None:
            raise ValueError(
                f"'triples' must have three filled parts in each line, but has {str(line)[:100]!r}. Correct or delete the "
                f"line."
            )
        found.add(triple)
    return found


def triple_f1(completions: list, triples: list, **kwargs) -> list[float]:
    """Return the F1 of the completion's lines with the reference triples, in 0..1.

        F1 = 2 right lines / (lines of the completion + triples of the reference)

    A malformed line is a wrong line, and so is one that repeats an earlier one. Blank lines do not count. If there is
    nothing to state, an empty completion gets 1.
    """
    return [_score(completion, cell)[0] for completion, cell in zip(completions, triples, strict=True)]


def get_triple_reward(malformed_penalty: float = 0.5) -> Callable:
    """Make a function that returns `triple_f1` minus `malformed_penalty` times the share of malformed lines.

    With F1 alone, a malformed line costs no more than a wrong triple.

    Raises:
        ValueError: malformed_penalty is below 0.
    """
    if not malformed_penalty >= 0:
        raise ValueError(f"malformed_penalty={malformed_penalty} must be 0 or more: it is subtracted from the reward.")

    def triple_reward(completions: list, triples: list, **kwargs) -> list[float]:
        scores = [_score(completion, cell) for completion, cell in zip(completions, triples, strict=True)]
        return [f1 - malformed_penalty * malformed for f1, malformed in scores]

    return triple_reward


def _score(completion: str | list[dict], triples: Any) -> tuple[float, float]:
    """Return the F1 of a completion, and the share of its lines that are malformed."""
    text = completion if isinstance(completion, str) else completion[0]["content"]
    lines = [read_line(line) for line in text.splitlines() if line.strip()]
    wanted = references(triples)
    stated = Counter(line for line in lines if line is not None)
    right = sum(1 for triple in stated if triple in wanted)
    total = len(lines) + len(wanted)
    return (2 * right / total if total else 1.0), (lines.count(None) / len(lines) if lines else 0.0)
