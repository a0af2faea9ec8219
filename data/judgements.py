"""Make preference pairs of judgements: two responses, and what one or several annotators say of them."""

import json
import statistics
from collections import Counter
from itertools import combinations

from datasets import Dataset

from data.cells import CellError, check_cell
from data.layouts import Layout
from data.pairing import Made, Options, conversation, in_words_of, key_of, letters_of, never_rejected, prompt_of, sides
from data.rows import place
from data.sifting import Problems, merged
from data.verdicts import MISSING, TIE, each, meanings, word


NO_VERDICT, TIED = "no annotator says which response is better", "the annotators are tied"
UNKNOWN = "a label is none that is known"


def of_judgements(rows: Dataset, name: str, layout: Layout, options: Options) -> Made:
    """Make a pair of each two responses that were judged; rows that judge the same two are votes of several annotators.

    Where each annotator has a column, a pair has `votes`: the share of each that goes to the chosen side, None if missing.
    """
    columns = [rows[column][:] for column in layout.labels]
    cells = [[cell for of in labels for cell in each(of)] for labels in zip(*columns, strict=True)]
    two = (layout.texts[0], layout.texts[1])
    known = meanings((cell for row in cells for cell in row), name, two, options.labels)
    judged: dict[str, tuple[int, dict, list[float]]] = {}
    problems: Problems = {}
    rows_of: dict[str, list[int]] = {}
    named = len(layout.labels) > 1 and all(len(row) == len(layout.labels) for row in cells)
    of_raters: dict[str, dict[str, float | None]] = {}
    for index, row in enumerate(rows.select_columns(list(dict.fromkeys((*layout.prompt, *two))))):
        where = place(rows, index, name)
        try:
            texts = tuple(conversation(row[column]) for column in two)
            for column, text in zip(two, texts, strict=True):
                check_cell(where, column, text, None, filled=True)
            pair = sides(where, prompt_of(row, layout, where), (texts[0], texts[1]))
        except CellError as error:
            problems.setdefault(in_words_of(error.problem, two), []).append(index)
            continue
        said = [label for label in map(word, cells[index]) if label not in MISSING]
        if not all(label in known for label in said):
            problems.setdefault(UNKNOWN, []).append(index)
            continue
        votes = [known[label] for label in said]
        by_rater = {rater: known.get(word(cell)) for rater, cell in zip(layout.labels, cells[index], strict=named)}
        swapped = json.dumps([pair["prompt"], pair["rejected"], pair["chosen"]])
        same = json.dumps([pair["prompt"], pair["chosen"], pair["rejected"]])
        if swapped in judged:
            same, votes, by_rater = swapped, [1 - vote for vote in votes], _turned(by_rater)
        judged.setdefault(same, (index, pair, []))[2].extend(votes)
        rows_of.setdefault(same, []).append(index)
        of_raters.setdefault(same, by_rater)  # of a pair that stands there again, those of the first row
    pairs, every = [], []
    several = options.ties or any(len(votes) > 1 for _, _, votes in judged.values())
    for same, (_, pair, votes) in judged.items():
        share = statistics.fmean(votes) if votes else None
        if share is None or (share == TIE and not options.ties):
            problems.setdefault(NO_VERDICT if share is None else TIED, []).extend(rows_of[same])
        else:
            by_rater = of_raters[same]
            if share < TIE:
                pair = pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
                by_rater = _turned(by_rater)
            known_votes = {"votes": by_rater} if named else {}
            pairs.append(pair | ({"agreement": max(share, 1 - share)} if several else {}) | known_votes)
        if votes:
            every.append(votes)
    keys = [key_of(pair["prompt"]) or letters_of(pair["chosen"]) for pair in pairs]
    liked, liked_keys = never_rejected(pairs, keys)
    return Made(pairs, liked, keys, liked_keys, merged(problems), every)


def _turned(votes: dict[str, float | None]) -> dict[str, float | None]:
    """Return the votes of each rater for the other side."""
    return {rater: None if vote is None else 1 - vote for rater, vote in votes.items()}


def disagreement(votes: list[list[float]]) -> tuple[float, float, float] | None:
    """Return how far annotators agree, of the pairs that several of them judged.

    Returns:
        The share of pairs on which all say the same; the share of pairs of annotators who say the same; and Cohen's
        correction of the latter for chance (Fleiss' kappa where all pairs have as many votes). None without such pairs.
    """
    several = [found for found in votes if len(found) > 1]
    if not several:
        return None
    unanimous = statistics.fmean(len(set(found)) == 1 for found in several)
    same = statistics.fmean(statistics.fmean(a == b for a, b in combinations(found, 2)) for found in several)
    counts = Counter(vote for found in several for vote in found)
    chance = sum((count / counts.total()) ** 2 for count in counts.values())
    return unanimous, same, (same - chance) / (1 - chance) if chance < 1 else 1.0
