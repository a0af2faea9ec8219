"""Recognise the layout of preference data by its columns: pairs, judgements, ratings, rankings, or thumbs up and down.

Names of columns tell the layout, since people use few of them. Where they do not, options name the columns.
"""

import re
import shlex
from collections.abc import Iterable
from typing import NamedTuple

from datasets import Dataset

from data.hh import TURN
from data.quoting import quoted
from data.verdicts import are_numbers, are_thumbs, listed


HH, PAIRS, JUDGEMENTS = "HH dialogues", "preference pairs", "judgements of two responses"
RATINGS, RANKS, THUMBS = "ratings of texts", "rankings of texts", "thumbs up and down"

# Names of columns, best first. Case and punctuation do not matter.
PROMPTS = ("prompt", "question", "instruction", "query", "context", "post", "user", "source", "input")
RESPONSES = (
    "completion", "response", "answer", "output", "text", "reply", "summary", "translation", "generation", "review",
    "candidate", "conversation", "messages",
)  # fmt: skip
LISTS = (*(f"{name}s" for name in RESPONSES[:6]), "candidates", "generations", "summaries", "translations")
GROUPS = ("group", "group_id", "batch_id", "prompt_id", "question_id", "pair_id", "item_id")
LABELS = (
    "label", "winner", "preference", "preferred", "choice", "verdict", "judgement", "judgment", "better_response_id",
    "preferred_response", "better", "vote", "labels", "votes", "annotations", "verdicts", "choices",
)  # fmt: skip
SCORES = (
    "rating", "score", "stars", "grade", "overall_score", "quality", "points", "ratings", "scores", "sentiment", "label",
    "labels",
)  # fmt: skip
PLACES = ("rank", "ranks")
FEEDBACK = ("label", "thumbs", "thumb", "feedback", "liked", "like", "vote", "sentiment", "is_good")
RANKED = ("ranking", "ranked", "ranked_responses", "ranked_completions")
ANNOTATOR = re.compile(
    r"(annotat(or|ion)|rater|judge|worker|labell?er|crowdworker|evaluator|label|vote|rating|score)_?([0-9]+|[a-z])"
)
OTHER_RESPONSES = ("model_output", "message", "sample", "option")  # with an ending
# Endings of the names of two responses.
TWO = (("1", "2"), ("a", "b"), ("0", "1"), ("first", "second"), ("left", "right"), ("one", "two"))
THIRD = ("3", "c", "2", "third", "middle", "three")
COLUMNS = ("prompt", "first", "second", "text", "group", "label", "rating", "rank")  # options that name columns


class Layout(NamedTuple):
    """Columns of preference data.

    Attributes:
        kind: one of the names above, such as `JUDGEMENTS`.
        prompt: columns that together are the prompt; empty if there are none.
        texts: the two responses; or the column of one text or of a list of texts.
        labels: columns of verdicts, ratings or ranks, one for each annotator.
        group: column with equal values in the texts that belong together; used if there is no prompt.
    """

    kind: str
    prompt: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    group: str | None = None

    def __str__(self) -> str:
        parts = {"prompt": self.prompt, "texts": self.texts, "labels": self.labels}
        said = [f"{part}: {quoted(', '.join(columns), 100)[1:-1]}" for part, columns in parts.items() if columns]
        said += [f"group: {quoted(self.group)[1:-1]}"] if self.group else []
        return f"{self.kind} ({'; '.join(said)})" if said else self.kind


def recognise(rows: Dataset, name: str, given: dict[str, list[str]] | None = None) -> Layout:
    """Return the layout of rows; `given` maps an option of `COLUMNS` to the columns that the user names.

    Raises:
        ValueError: a column that is named is not there, or the columns fit no layout.
    """
    given = {option: columns for option, columns in (given or {}).items() if columns}
    names = rows.column_names
    for option, columns in given.items():
        for column in columns:
            if column not in names:
                raise ValueError(f"{name}: --{option} {column}: no such column; found: {quoted(names, 300)}.")
    if bool(given.get("first")) != bool(given.get("second")):
        raise ValueError(f"{name}: --first and --second belong together. Give both or neither.")
    if {"chosen", "rejected"} <= set(names) and not given.keys() - {"prompt", "group"}:
        return Layout(HH) if _is_hh(rows) else Layout(PAIRS, _prompt_of_pairs(rows, given))
    found = _judgements(rows, given) or _scored(rows, given)
    if found is None:
        raise ValueError(f"{name}: {_unrecognised(names)}")
    if found.labels == () and found.kind == JUDGEMENTS:
        raise ValueError(
            f"{name}: the columns {' and '.join(found.texts)} are two responses, but no column tells which is better. Name "
            f"it with --label; found: {quoted(names, 300)}."
        )
    if found.kind not in (JUDGEMENTS, HH, PAIRS) and not (found.prompt or found.group):
        raise ValueError(
            f"{name}: these are {found.kind}, but no column tells which texts answer the same prompt. Name it with --prompt "
            f"or --group; found: {quoted(names, 300)}."
        )
    return found


def responses(rows: Dataset) -> Layout | None:
    """Return the columns of a prompt and of two responses to it, with or without a label; None if there are none."""
    return _judgements(rows, {})


def suggestion(rows: Dataset, name: str) -> str:
    """Return the sentence for an error that names the command which converts such rows, or nothing."""
    try:
        layout = recognise(rows, name)
    except ValueError:
        return ""
    return f"The columns are {layout}. Convert the file: {command(name)}"


def command(name: str) -> str:
    """Return the command that converts a file."""
    return f"python -m data.convert {shlex.quote(quoted(name, 300)[1:-1])} FOLDER"


def plain(name: str) -> str:
    """Return a column's name in small letters, with `_` for what is no letter and no digit."""
    return re.sub(r"[\W_]+", "_", name.strip().lower()).strip("_")


def _find(columns: Iterable[str], names: tuple[str, ...]) -> str | None:
    of = {plain(column): column for column in reversed(list(columns))}
    return next((of[name] for name in names if name in of), None)


def _is_hh(rows: Dataset) -> bool:
    """Tell whether most of the first rows are dialogues that begin with a turn of HH, and have no prompt beside them."""
    first = rows[:100]["chosen"]
    begun = [isinstance(cell, str) and bool(TURN.match(f"\n\n{cell.lstrip()}")) for cell in first]
    return "prompt" not in rows.column_names and 2 * sum(begun) > len(begun)


def _prompt_of_pairs(rows: Dataset, given: dict[str, list[str]]) -> tuple[str, ...]:
    """Return the columns of the prompt of pairs that have another name than `prompt`."""
    if "prompt" in given:
        return () if given["prompt"] == ["prompt"] else tuple(given["prompt"])
    other = None if "prompt" in rows.column_names else _find(rows.column_names, PROMPTS[1:3])
    if other is None or not all(isinstance(cell, str) for cell in rows[:100]["chosen"]):
        return ()
    return (other,)


def _prompts(columns: list[str], given: dict[str, list[str]]) -> tuple[str, ...]:
    """Return the columns of the prompt: those given, or `instruction` and `input` (as in Alpaca), or one."""
    if "prompt" in given:
        return tuple(given["prompt"])
    if "group" in given:
        return ()
    both = [_find(columns, (name,)) for name in ("instruction", "input")]
    if all(both) and not _find(columns, PROMPTS[:2]):
        return tuple(filter(None, both))
    one = _find(columns, PROMPTS)
    return (one,) if one else ()


def _labels(rows: Dataset, left: list[str], names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the column of labels, or the columns of several annotators."""
    several = [column for column in left if ANNOTATOR.fullmatch(plain(column)) and not _are_sentences(rows, column)]
    one = _find(left, names)
    return tuple(several) if len(several) > 1 else (one,) if one else tuple(several)


def _judgements(rows: Dataset, given: dict[str, list[str]]) -> Layout | None:
    columns = rows.column_names
    two = (given["first"][0], given["second"][0]) if "first" in given else _find_two(columns)
    if two is None or given.keys() & {"text", "rating", "rank"}:
        return None
    left = [column for column in columns if column not in two]
    prompt = _prompts(left, given)
    left = [column for column in left if column not in prompt]
    scores = None if "label" in given else _find_two(left, SCORES)
    if scores and all(_are_numbers(rows, column) for column in scores):  # a rating of each
        return Layout(RATINGS, prompt, two, scores)
    return Layout(JUDGEMENTS, prompt, two, tuple(given.get("label", ())) or _labels(rows, left, LABELS))


def _find_two(columns: list[str], stems: tuple[str, ...] = (*RESPONSES, *OTHER_RESPONSES)) -> tuple[str, str] | None:
    """Return the columns of two responses, such as `response_1` and `response_2`, unless there is a third one."""
    of = {plain(column).replace("_", ""): column for column in columns}
    for stem in stems:
        stem = stem.replace("_", "")
        for (one, two), third in zip(TWO, THIRD, strict=True):
            for pattern in ("{0}{1}", "{1}{0}"):
                names = [pattern.format(stem, end) for end in (one, two, third)]
                if names[0] in of and names[1] in of and names[2] not in of:
                    return of[names[0]], of[names[1]]
    return None


def _scored(rows: Dataset, given: dict[str, list[str]]) -> Layout | None:
    """Return the layout of rated, ranked or liked texts, in a row each or in a list a row."""
    columns = rows.column_names
    prompt = _prompts(columns, given)
    group = given["group"][0] if "group" in given else None if prompt else _find(columns, GROUPS)
    left = [column for column in columns if column not in prompt and column != group]
    text = given["text"][0] if "text" in given else None
    if text is None:
        ranked = _find(left, RANKED)
        if ranked and not _are_numbers(rows, ranked):
            return Layout(RANKS, prompt, (ranked,), (), group)  # a list of texts, best first
        text = _find(left, LISTS) or _find(left, RESPONSES)
    if text is None:
        return None
    left = [column for column in left if column != text]
    inner = _inner(rows, text)
    if inner:
        return Layout(inner, prompt, (text,), (), group)
    if "rank" in given or not given.keys() & {"rating", "label"} and _find(left, PLACES):
        return Layout(RANKS, prompt, (text,), tuple(given.get("rank", ())) or (_find(left, PLACES) or "",), group)
    labels = tuple(given.get("rating", ()))
    if not labels and "label" not in given:
        found = _labels(rows, left, SCORES)
        labels = found if found and all(_are_numbers(rows, column) for column in found) else ()
    liked = tuple(given.get("label", ())) or tuple(filter(None, [_find(left, FEEDBACK)]))
    if liked and "rating" not in given and all(_are_thumbs(rows, column) for column in liked):
        return Layout(THUMBS, prompt, (text,), liked, group)
    if not labels and "label" in given:
        raise ValueError(
            f"--label {given['label'][0]}: the values are not thumbs up and down (such as true and false). Name numbers with "
            f"--rating or --rank, and the two responses of a judgement with --first and --second."
        )
    return Layout(RATINGS, prompt, (text,), labels, group) if labels else None


def _inner(rows: Dataset, column: str) -> str | None:
    """Return the kind of a list of objects that each hold a text and its rating or rank."""
    cell = next((cell for cell in map(listed, rows[:100][column]) if isinstance(cell, list) and cell), None)
    if cell is None or not all(isinstance(entry, dict) and "role" not in entry for entry in cell):
        return None
    keys = list(cell[0])
    if not _find(keys, RESPONSES):
        return None
    return RANKS if _find(keys, PLACES) else RATINGS if _find(keys, SCORES) else None


def inner_keys(entry: dict) -> tuple[str | None, str | None]:
    """Return the keys of the text, and of the rating or rank, in an entry of a list."""
    return _find(entry, RESPONSES), _find(entry, PLACES) or _find(entry, SCORES)


def _cells(rows: Dataset, column: str) -> list:
    cells = (listed(cell) for cell in rows[:1000][column])
    return [value for cell in cells for value in (cell if isinstance(cell, list) else [cell])]


def _are_numbers(rows: Dataset, column: str) -> bool:
    return are_numbers(_cells(rows, column))


def _are_thumbs(rows: Dataset, column: str) -> bool:
    return are_thumbs(_cells(rows, column))


def _are_sentences(rows: Dataset, column: str) -> bool:
    return any(isinstance(cell, str) and len(cell.split()) > 3 for cell in _cells(rows, column))


def _unrecognised(names: list[str]) -> str:
    if len(names) == 1 and any(mark in names[0] for mark in ";,\t|"):
        return (
            f"the header is one column, {quoted(names[0])}. Separate the cells of .csv by commas, and of .tsv by tabs."
        )
    return (
        f"no preferences are recognised in the columns {quoted(names, 300)}. Name them: two responses and who won with "
        f"--first, --second and --label; texts of a prompt with --text and --rating, --rank or --label (thumbs up and down). "
        f"--prompt names the prompt."
    )
