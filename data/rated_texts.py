"""Make preference pairs of texts of one prompt that were rated, ranked, or given thumbs up and down."""

import json
import statistics
from collections.abc import Iterator
from itertools import combinations, pairwise, product
from typing import Any, NamedTuple

from datasets import Dataset

from data.cells import CellError, check_cell
from data.layouts import RANKS, THUMBS, Layout, inner_keys
from data.pairing import Made, Options, conversation, in_words_of, key_of, letters_of, never_rejected, prompt_of, sides
from data.rows import place
from data.sifting import Problems, merged
from data.turns import check_answered, split_pair
from data.verdicts import MISSING, TIE, each, liking, listed, number, word


MOST = 1_000_000  # pairs; more are a mistake, such as ratings of texts that share one prompt
NO_RATING, NO_LIST = "a rating is missing or is no number", "the texts and their ratings are not lists of one length"
MIXED = "texts and conversations do not mix in a group"
NO_GROUP = "the group is missing"
NO_THUMB = "the label is neither thumbs up nor thumbs down"
ALONE, LEVEL = "no other text has this prompt", "all texts of the prompt are rated alike"
CONTRARY = "the same text is liked as often as disliked"


class Text(NamedTuple):
    """A rated text: its values (ratings, ranks with the sign turned, or 1 and 0), and the rows that it stands in."""

    text: Any
    values: list[float]
    rows: list[int]


def of_texts(rows: Dataset, name: str, layout: Layout, options: Options) -> Made:
    """Make pairs of the texts of each prompt that were rated, ranked or liked differently."""
    problems: Problems = {}
    prompts: dict[str, Any] = {}
    texts: dict[str, dict[str, Text]] = {}
    read = [*layout.prompt, *layout.texts, *layout.labels, *([layout.group] if layout.group else [])]
    for index, row in enumerate(rows.select_columns(list(dict.fromkeys(read)))):
        where = place(rows, index, name)
        try:
            prompt = prompt_of(row, layout, where)
            group = json.dumps(prompt) if layout.prompt else _group(where, row[layout.group])
            for column, text, values in _rated(where, row, layout):
                if check_cell(where, column, text, None, filled=True) == "conversation":
                    check_answered(where, column, text)
                same = texts.setdefault(group, {}).setdefault(json.dumps(text), Text(text, [], []))
                same.values.extend(values)
                same.rows.append(index)
            prompts.setdefault(group, prompt)
        except CellError as error:
            problems.setdefault(error.problem, []).append(index)
    groups = {group: list(of.values()) for group, of in texts.items() if group in prompts}
    total = sum(len(of) * (len(of) - 1) // 2 for of in groups.values())
    if total > MOST and not options.adjacent:
        raise ValueError(
            f"{name}: the texts of one prompt can be paired in {total:,} ways, and at most {MOST:,} pairs are made. Pair each "
            f"text with the next lower rating (--pairs adjacent), or leave out small differences with fewer texts a prompt."
        )
    made = Made([], [], [], [], problems)
    for group, of in groups.items():
        _pair_group(made, group, prompts[group], of, layout, options)
    if layout.kind != THUMBS:
        liked = never_rejected(made.pairs, made.keys)
        made = made._replace(liked=liked[0], liked_keys=liked[1])
    return made._replace(left_out=merged({problem: _distinct(found) for problem, found in problems.items()}))


def _distinct(indices: list[int]) -> list[int]:
    return list(dict.fromkeys(indices))


def _group(where: str, cell: Any) -> str:
    if word(cell) in MISSING:
        raise CellError(f"{where}: {NO_GROUP}.", NO_GROUP)
    return word(cell)


def _rated(where: str, row: dict, layout: Layout) -> Iterator[tuple[str, Any, list[float]]]:
    """Yield the column, the text and the values of each text of a row.

    Raises:
        CellError: a value cannot be read.
    """
    if len(layout.texts) == 2:  # two texts, each with a rating
        for column, label in zip(layout.texts, layout.labels, strict=True):
            yield column, conversation(row[column]), _values(where, each(row[label]), layout)
        return
    column = layout.texts[0]
    cell = listed(row[column])
    turns = isinstance(cell, list) and cell and all(isinstance(one, dict) and "role" in one for one in cell)
    if not isinstance(cell, list) or turns:  # one text
        values = [value for label in layout.labels for value in each(row[label])]
        yield column, conversation(cell), _values(where, values, layout)
    elif not layout.labels and all(isinstance(entry, dict) for entry in cell):  # texts with their values
        for entry in cell:
            text, value = inner_keys(entry)
            yield column, conversation(entry.get(text)), _values(where, each(entry.get(value)), layout)
    elif not layout.labels:  # texts, best first
        yield from ((column, conversation(text), [-float(at)]) for at, text in enumerate(cell))
    else:
        lists = [each(row[label]) for label in layout.labels]
        if any(len(values) != len(cell) for values in lists):
            raise CellError(f"{where}: {NO_LIST}.", NO_LIST)
        for text, *values in zip(cell, *lists, strict=True):
            several = [one for value in values for one in each(value)]
            yield column, conversation(text), _values(where, several, layout)


def _values(where: str, cells: list, layout: Layout) -> list[float]:
    problem = NO_THUMB if layout.kind == THUMBS else NO_RATING
    read = liking if layout.kind == THUMBS else number
    values = [read(cell) for cell in cells if word(cell) not in MISSING]
    if not values or None in values:
        raise CellError(f"{where}: {problem}.", problem)
    sign = -1.0 if layout.kind == RANKS else 1.0
    return [sign * value for value in values if value is not None]


def _pair_group(made: Made, group: str, prompt: Any, texts: list[Text], layout: Layout, options: Options) -> None:
    """Add the pairs of one prompt's texts to `made`, and for thumbs up the texts to imitate."""
    if prompt is None and len(texts) > 1:
        try:
            prompt = _common_prompt(texts)
        except CellError as error:
            made.left_out.setdefault(error.problem, []).extend(index for text in texts for index in text.rows)
            return
        texts = [text._replace(text=text.text[len(prompt) :]) for text in texts]
    prompt = "" if prompt is None else prompt
    key = key_of(prompt) or group
    means = {id(text): statistics.fmean(text.values) for text in texts}
    if layout.kind == THUMBS:
        for text in texts:
            if means[id(text)] == TIE:
                made.left_out.setdefault(CONTRARY, []).extend(text.rows)
            elif means[id(text)] > TIE:
                made.liked.append(_liked(prompt, text.text))
                made.liked_keys.append(key)
        levels = [[text for text in texts if above(means[id(text)])] for above in (TIE.__lt__, TIE.__gt__)]
    else:
        levels = [[text for text in texts if means[id(text)] == mean] for mean in sorted(set(means.values()))[::-1]]
    levels = [level for level in levels if level]
    before = len(made.pairs)
    for high, low in pairwise(levels) if options.adjacent else combinations(levels, 2):
        for better, worse in product(high, low):
            gap = means[id(better)] - means[id(worse)]
            if gap >= options.min_gap:
                _add(made, key, prompt, better, worse, gap, layout)
    rows = [index for text in texts for index in text.rows if layout.kind != THUMBS or means[id(text)] != TIE]
    if rows and len(made.pairs) == before and not (layout.kind == THUMBS and len(levels) > 1):
        made.left_out.setdefault(ALONE if len(texts) < 2 else LEVEL, []).extend(rows)


def _add(made: Made, key: str, prompt: Any, better: Text, worse: Text, gap: float, layout: Layout) -> None:
    try:
        pair = sides("", prompt, (better.text, worse.text))
    except CellError as error:
        made.left_out.setdefault(in_words_of(error.problem, (layout.texts[0], layout.texts[-1])), []).extend(
            worse.rows
        )
        return
    if layout.kind not in (RANKS, THUMBS):
        pair["margin"] = gap
    if len(better.values) > 1 or len(worse.values) > 1:
        pair["agreement"] = statistics.fmean((a > b) + TIE * (a == b) for a in better.values for b in worse.values)
    made.pairs.append(pair)
    made.keys.append(key)


def _liked(prompt: Any, text: Any) -> dict:
    """Return a row to imitate: prompt and completion are two texts, or two conversations."""
    if isinstance(text, list) and text[0]["role"] != "assistant":  # a whole conversation
        prompt, text = text[:-1], text[-1:]
    if isinstance(prompt, list) and isinstance(text, str):
        text = [{"role": "assistant", "content": text}]
    elif isinstance(text, list) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    return {"prompt": prompt, "completion": text}


def _common_prompt(texts: list[Text]) -> Any:
    """Return what all texts begin with: whole words, turns of a dialogue, or messages.

    Raises:
        CellError: some are texts and others conversations, or they are dialogues with different prompts.
    """
    if len({type(text.text) for text in texts}) > 1:
        raise CellError(f"{MIXED}.", MIXED)
    first, *others = sorted((text.text for text in texts), key=letters_of)
    return split_pair("", {"chosen": first, "rejected": others[-1]}).prompt
