"""Keep for each row of a dataset the file and the row number that it was read from."""

from collections.abc import Iterable
from typing import Self

import numpy as np
from datasets import Dataset


def row_name(name: str, number: int) -> str:
    """Return the name of a row for error messages; `number` counts from 1."""
    return f"{name} row {number} (counting from 1)"


class Rows(Dataset):
    """A dataset whose rows can be named by file and row, even after they were selected, shuffled, sorted or left out.

    Args:
        dataset: the rows.
        files: names of the files that the rows come from.
        of: (rows,) index in `files` of each row's file.
        numbers: (rows,) number of each row in its file, counting from 1.
        left_out: number of rows of these files that could not be used (`drop_bad_rows`). It is 0 for a part of the rows,
            where the number is not known.
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
        """Make rows of all rows of one file, or of one split on the hub."""
        return cls(dataset, (name,), np.zeros(len(dataset), dtype=int), np.arange(1, len(dataset) + 1))

    def with_columns(self, columns: dict[str, list]) -> Self:
        """Return the same rows with only the cells of `columns`."""
        return self.as_rows(Dataset.from_dict(columns))

    def as_rows(self, dataset: Dataset) -> Self:
        """Return a dataset as rows of the same origin.

        `dataset` has one row for each of these rows, in the same order.
        """
        return Rows(dataset, self.files, self.of, self.numbers, self.left_out)

    def select(self, indices: Iterable, *args, **kwargs) -> Self:
        """Override `select`, which shuffle, sort and train_test_split call: keep the origin of each row."""
        indices = np.asarray(list(indices), dtype=int) if not isinstance(indices, (range, np.ndarray)) else indices
        selected = super().select(indices, *args, **kwargs)
        where = np.arange(len(self))[np.asarray(indices, dtype=int)]
        left_out = self.left_out if len(where) >= len(self) else 0
        return Rows(selected, self.files, self.of[where], self.numbers[where], left_out)

    def filter(self, *args, **kwargs) -> Dataset:
        """Override `filter`: return a plain dataset, because the rows that remain no longer know their origin.

        The base class would copy the attributes, which then name the wrong rows.
        """
        plain = Dataset(
            self.data, info=self.info, split=self.split, indices_table=self._indices, fingerprint=self._fingerprint
        )
        return plain.filter(*args, **kwargs)


def left_out(rows: Dataset) -> int:
    """Return how many rows of the same files were left out because they could not be used."""
    return rows.left_out if isinstance(rows, Rows) else 0


def place(rows: Dataset, index: int, name: str) -> str:
    """Return the name of the row at `index` (from 0) for error messages: by its file and row there, if they are known."""
    if isinstance(rows, Rows):
        return row_name(rows.files[rows.of[index]], int(rows.numbers[index]))
    return row_name(name, index + 1)


def short_place(rows: Dataset, index: int) -> str:
    """Return a short name such as `row 3`, with the file if there are several."""
    if not isinstance(rows, Rows):
        return f"row {index + 1}"
    number = f"row {rows.numbers[index]}"
    return number if len(rows.files) == 1 else f"{rows.files[rows.of[index]]} {number}"
