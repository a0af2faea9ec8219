"""Mix several datasets into one: each is passed over once in an epoch, or as often as its weight says.

The entries are TRL's (`DatasetMixtureConfig`): `path`, `split`, and `fraction`, the share of the mixture. `weight` is ours.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from data.cells import shorten
from data.files import joined
from data.rows import Rows


KEYS = ("path", "split", "weight", "fraction")
MOST = 1000  # passes over a dataset in an epoch
Load = Callable[..., Dataset]  # such as `load_preferences`


class Entry(NamedTuple):
    """A dataset of a mixture.

    Attributes:
        weight: passes over its rows in an epoch. Below 1, this share of its rows is trained on.
        fraction: share of the mixture, as in TRL, relative to the other datasets; no dataset is passed over more than once.
    """

    path: str
    split: str
    weight: float = 1.0
    fraction: float | None = None


class Share(NamedTuple):
    """Share of a dataset in a mixture: how many rows it has, and how many of them an epoch takes."""

    path: str
    rows: int
    taken: int

    def __str__(self) -> str:
        return f"{self.path}: {self.taken:,} rows an epoch, of {self.rows:,}"


def entries_of(given: Any, split: str) -> list[Entry]:
    """Return the entries of a recipe's `datasets`.

    Args:
        split: the split of those that name none.

    Raises:
        ValueError: an entry is no mapping, has no path or an unknown key, or a number that is out of range.
    """
    if not isinstance(given, list) or not given:
        raise ValueError(f"datasets={shorten(given)} must be a list of entries, each with a path. Correct it.")
    found = []
    for entry in given:
        where = f"datasets: the entry {shorten(entry)}"
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
            raise ValueError(f"{where} must be a mapping with a path, such as {{path: pairs.jsonl, weight: 2}}.")
        unknown = [key for key in entry if key not in KEYS]
        if unknown:
            raise ValueError(f"{where} has the unknown key {shorten(unknown[0])}. The keys are {', '.join(KEYS)}.")
        if not isinstance(entry.get("split", ""), str):
            raise ValueError(f"{where} must name its split as text.")
        if "weight" in entry and "fraction" in entry:
            raise ValueError(
                f"{where} has a weight and a fraction. Give one: passes in an epoch, or share of the mixture."
            )
        for key, most in (("weight", MOST), ("fraction", math.inf)):
            value = entry.get(key, 1)
            if not _is_number(value) or not 0 < value <= most or value == math.inf:
                raise ValueError(
                    f"{where} must have a {key} above 0{f' and at most {most:,}' if key == 'weight' else ''}."
                )
        numbers = {key: float(entry[key]) for key in ("weight", "fraction") if key in entry}
        found.append(Entry(entry["path"], entry.get("split") or split, **numbers))
    if len({entry.fraction is None for entry in found}) > 1:
        raise ValueError("datasets: some entries have a fraction and others none. Give all of them one, or none.")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def load_mixture(entries: list[Entry], load: Load, *, seed: int, drop: bool = False) -> tuple[Dataset, list[Share]]:
    """Load datasets and mix their rows.

    A dataset of weight 2.5 comes twice, and half of its rows, drawn with the seed, once more. All epochs have the same rows,
    so a run can be resumed at any of them. Rows that follow each other still do, as those of one ranking should. Of the
    columns `margin` and `agreement`, one that only some datasets have is left out.

    Args:
        load: reader of one dataset, which checks its rows.

    Raises the errors of `load`, and:
        ValueError: the datasets have rows of several formats, with and without prompts, or texts and conversations; or a
            weight leaves no row.
    """
    parts = []
    for entry in entries:
        rows = load(entry.path, entry.split, drop=drop)
        parts.append(rows if isinstance(rows, Rows) else Rows.of_file(rows, entry.path))
    _check_alike(parts, entries)
    taken, shares = [], []
    for number, (part, entry, passes) in enumerate(zip(parts, entries, _passes(entries, parts), strict=True)):
        chosen = _chosen(len(part), passes, seed + number)
        if len(chosen) == 0:
            raise ValueError(
                f"datasets: {entry.path}: of {len(part):,} rows none is left. Raise its weight or fraction."
            )
        taken.append(part.select(chosen))
        shares.append(Share(entry.path, len(part), len(chosen)))
    common = [column for column in parts[0].column_names if all(column in part.column_names for part in parts)]
    mixed = joined([part.select_columns(common) for part in taken])
    mixed.left_out = sum(part.left_out for part in parts)
    return mixed, shares


def _check_alike(parts: list[Rows], entries: list[Entry]) -> None:
    """Check that the datasets have rows of one format, and texts or conversations alike."""
    kinds = []
    for part in parts:
        columns = tuple(sorted(set(part.column_names) - {"margin", "agreement"}))
        cell = part[0][next(column for column in columns if column not in ("prompt", "rating"))]
        turns = isinstance(cell, list) and not isinstance(cell[0], str)
        kinds.append(f"the columns {', '.join(columns)} ({'conversations' if turns else 'texts'})")
    for entry, kind in zip(entries, kinds, strict=True):
        if kind != kinds[0]:
            raise ValueError(
                f"datasets: {entries[0].path} has {kinds[0]}, and {entry.path} has {kind}. Give all of them one format; "
                f"data.convert writes pairs with the prompt apart."
            )


def _passes(entries: list[Entry], parts: list[Rows]) -> list[float]:
    """Return the passes over each dataset in an epoch.

    Fractions become passes of at most 1, as in TRL's `get_dataset`: the mixture is as large as it can be with no row twice.
    """
    fractions = [entry.fraction for entry in entries if entry.fraction is not None]
    if not fractions:
        return [entry.weight for entry in entries]
    shares = [fraction / sum(fractions) for fraction in fractions]
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    return [share * total / len(part) for part, share in zip(parts, shares, strict=True)]


def _chosen(number: int, passes: float, seed: int) -> np.ndarray:
    """Return the indices of the rows of an epoch, in order within each pass."""
    whole = int(passes)
    rest = round((passes - whole) * number)
    part = np.sort(np.random.default_rng(seed).permutation(number)[:rest])
    return np.concatenate([np.tile(np.arange(number), whole), part])
