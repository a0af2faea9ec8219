"""Rows that know the file, and the row of it, that each of them was read from."""

from collections.abc import Iterable
from typing import Self

import numpy as np
from datasets import Dataset


def row_name(name: str, number: int) -> str:
    """Return how errors name a row. `number` counts from 1."""
    return f"{name} row {number} (counting from 1)"


class Rows(Dataset):
    """A dataset whose rows can be named by file and row, also after rows were selected, shuffled, sorted or left out.

    Args:
        dataset: the rows.
        files: name of each file that they come from.
        of: (rows,) which of the files each row comes from.
        numbers: (rows,) its row there, counting from 1.
        left_out: rows beside them that could not be used (`drop_bad_rows`). Of a part of the rows it is not known, and 0.
    """

    def __init__(
        self, dataset: Dataset, files: tuple[str, ...], of: np.ndarray, numbers: np.ndarray, left_out: int = 0
    ):
        super().__init__(
            dataset.data,
            info=dataset.info,
            split=dataset.split,
            indices_table=dataset._indices,
            fingerprint=dataset._fingerprint,
        )
        self.files, self.of, self.numbers, self.left_out = files, of, numbers, left_out

    @classmethod
    def of_file(cls, dataset: Dataset, name: str) -> Self:
        """Take all rows of one file, or of one split on the hub."""
        return cls(dataset, (name,), np.zeros(len(dataset), dtype=int), np.arange(1, len(dataset) + 1))

    def with_columns(self, columns: dict[str, list]) -> Self:
        """Return the same rows with the cells of `columns` alone."""
        return self.as_rows(Dataset.from_dict(columns))

    def as_rows(self, dataset: Dataset) -> Self:
        """Return a dataset, made of each of these rows in their order, as rows of the same origin."""
        return Rows(dataset, self.files, self.of, self.numbers, self.left_out)

    def select(self, indices: Iterable, *args, **kwargs) -> Self:
        """Override `select`, which shuffle, sort and train_test_split call: keep the origin of each row."""
        indices = np.asarray(list(indices), dtype=int) if not isinstance(indices, (range, np.ndarray)) else indices
        selected = super().select(indices, *args, **kwargs)
        where = np.arange(len(self))[np.asarray(indices, dtype=int)]
        left_out = self.left_out if len(where) >= len(self) else 0
        return Rows(selected, self.files, self.of[where], self.numbers[where], left_out)

    def filter(self, *args, **kwargs) -> Dataset:
        """Override `filter`, which copies attributes: the rows that it leaves no longer know their origin."""
        plain = Dataset(
            self.data, info=self.info, split=self.split, indices_table=self._indices, fingerprint=self._fingerprint
        )
        return plain.filter(*args, **kwargs)


def left_out(rows: Dataset) -> int:
    """Return how many rows that could not be used stood beside these."""
    return rows.left_out if isinstance(rows, Rows) else 0


def place(rows: Dataset, index: int, name: str) -> str:
    """Return how errors name the row at `index` (counting from 0): by file and row of the file where they are known."""
    if isinstance(rows, Rows):
        return row_name(rows.files[rows.of[index]], int(rows.numbers[index]))
    return row_name(name, index + 1)


def short_place(rows: Dataset, index: int) -> str:
    """Return `row 3`, with the file where there are several."""
    if not isinstance(rows, Rows):
        return f"row {index + 1}"
    number = f"row {rows.numbers[index]}"
    return number if len(rows.files) == 1 else f"{rows.files[rows.of[index]]} {number}"
