"""Sift rows with the checkers of the stages: which rows pass, and why the others do not."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from datasets import Dataset

from data.cells import CellError
from data.rows import Rows


Check = Callable[..., Dataset]  # such as `check_preferences`
Problems = dict[str, list[int]]  # indices of rows, from 0, by what is wrong with them
BESIDE_OTHERS = "it does not fit the other rows"


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Collect the warnings of `data` in a list; nothing is printed."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("data")
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def sift(rows: Dataset, name: str, check: Check) -> tuple[Dataset | None, Problems]:
    """Return the rows that pass `check`, as it returns them, and the problems of the others.

    No row passes: the rows are None.

    Raises:
        ValueError: the rows cannot be checked at all, for example because a column is missing.
    """
    numbered = Rows.of_file(rows, name)
    with quiet():
        try:
            kept = check(numbered, name, drop=True)
        except ValueError as error:
            if "leaves out all" not in str(error):
                raise
            kept = None
        left = np.zeros(0, dtype=int) if kept is None else _numbers(kept) - 1
        problems: Problems = {}
        for index in sorted(set(range(len(rows))) - set(left.tolist())):
            beside = [int(left[0])] if len(left) else []
            problems.setdefault(_problem(numbered, [*beside, index], name, check), []).append(index)
    return kept, problems


def _numbers(kept: Dataset) -> np.ndarray:
    assert isinstance(kept, Rows)  # as was given to the checker
    return kept.numbers


def _problem(rows: Rows, indices: list[int], name: str, check: Check) -> str:
    """Return what is wrong with the last of the rows; the first one passes."""
    for chosen in (indices[-1:], indices):
        try:
            check(rows.select(chosen), name)
        except CellError as error:
            return error.problem
        except ValueError:
            break
    return BESIDE_OTHERS


def merged(*several: Problems) -> Problems:
    """Join problems; the most frequent comes first."""
    found: Problems = {}
    for problems in several:
        for problem, indices in problems.items():
            found.setdefault(problem, []).extend(indices)
    return {problem: sorted(found[problem]) for problem in sorted(found, key=lambda problem: -len(found[problem]))}
