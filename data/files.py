"""Rows from a file, a folder or the hub, and the words in which an error names a cell of them.

Datasets come from anywhere, so nothing about them is assumed: a row that cannot be used is an error that says where it
is, before any model is loaded. No row is repaired or filled in, and none is dropped unless a user asks for it
(`drop_bad_rows`); then the number of rows dropped is said, and why.
"""

import difflib
import glob
import json
import logging
from collections.abc import Callable
from pathlib import Path

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetsError


logger = logging.getLogger(__name__)

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# pandas would read the answers "007" and "None" of a CSV file as 7 and as a missing cell.
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion", "text")
CSV_OPTIONS = {"converters": dict.fromkeys(TEXT_COLUMNS, str), "keep_default_na": False, "na_values": [""]}


def load_rows(name: str, split: str, *, data_dir: str | None = None) -> Dataset:
    """The rows of a local file, of one split of a local folder, or of one split of a dataset on the hub.

    A file (.jsonl, .json, .csv, .parquet) and a folder that `Dataset.save_to_disk` wrote have no splits: all their
    rows are returned whatever `split` is, so training and evaluation rows belong in two of them.

    On the hub, `owner/name@revision` is a branch, a tag or a commit, and `data_dir` a folder of the dataset.

    Raises:
        FileNotFoundError: there is no such file or folder, and the hub does not give such a dataset.
        ValueError: it cannot be read, has no such split, or has no rows.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        rows = _load_folder(name, path, split)
    elif path.is_file():
        rows = _load_file(name, path)
    elif path.suffix.lower() in READERS or name.startswith((".", "/", "~")) or name.count("/") != 1:
        # A name without owner never goes to the hub: `datasets` takes `text` or `csv` for all files of this folder.
        raise FileNotFoundError(
            f"{name}: no such file or folder (looked for {path.absolute()}). Correct the path; a dataset on the hub "
            f"is `owner/name`, or `owner/name@revision`."
        )
    else:
        source, _, revision = name.partition("@")
        options = {"revision": revision, "data_dir": data_dir}
        rows = _load_split(name, source, split, **{key: value for key, value in options.items() if value})
    if len(rows) == 0:
        raise _no_rows(name)
    return rows


def has_splits(name: str) -> bool:
    """Whether `load_rows` gives other rows for another split of this dataset."""
    path = Path(name).expanduser()
    if path.is_dir():
        saved = datasets.config.DATASETDICT_JSON_FILENAME, datasets.config.DATASET_STATE_JSON_FILENAME
        of_splits, alone = ((path / file).exists() for file in saved)
        return of_splits or not alone
    return path.suffix.lower() not in READERS


def _load_file(name: str, path: Path) -> Dataset:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"{name}: a file must end in one of {', '.join(READERS)}, not {suffix!r}. Convert the file.")
    if suffix == ".jsonl":
        _check_json_lines(name, path)
    try:
        # `data_files` is a glob pattern, and `[` may be part of a file's name.
        rows = datasets.load_dataset(
            READERS[suffix], data_files=glob.escape(str(path)), split="train", **_reader_options(path, suffix)
        )
    except (DatasetsError, ValueError, StopIteration) as error:
        raise _unreadable(name, f"could not be read as {suffix}", error, "Correct the file.") from error
    if suffix == ".csv" and "__index_level_0__" in rows.column_names:  # pandas has shifted the cells to the left
        raise ValueError(f"{name}: the rows have more cells than the header. Quote the cells that hold a comma.")
    return rows


def _reader_options(path: Path, suffix: str) -> dict:
    if suffix == ".parquet":
        return {}
    # One chunk. Else the first 10 MB of JSON or 10,000 rows of CSV set the columns' types, and `datasets` casts later
    # rows to them: margins 1 and then 1.5 are an error, and a conversation among texts turns into a text.
    chunk = {"chunksize": path.stat().st_size or 1}
    return chunk | CSV_OPTIONS if suffix == ".csv" else chunk


def _check_json_lines(name: str, path: Path) -> None:
    """Raise for the first line that is not a JSON object; `datasets` would not tell the line. Blank lines may be."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            problem = json_problem(line) if line.strip() else None
            if problem:
                raise ValueError(f"{name} line {number}: {problem}. Correct or delete the line.")


def json_problem(line: bytes) -> str | None:
    try:
        value = json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error.reason} at byte {error.start + 1})"
    except json.JSONDecodeError as error:
        return f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    return None if isinstance(value, dict) else f"not a JSON object ({shorten(value)})"


def _load_folder(name: str, path: Path, split: str) -> Dataset:
    saved_splits = path / datasets.config.DATASETDICT_JSON_FILENAME
    if saved_splits.exists():
        splits = json.loads(saved_splits.read_text())["splits"]
        if split not in splits:
            raise ValueError(f"{name}: no split {split!r}; it has {', '.join(splits)}. Name one of them.")
        return _load_saved(name, path / split)
    if (path / datasets.config.DATASET_STATE_JSON_FILENAME).exists():
        return _load_saved(name, path)
    # An absolute path: a folder called `csv` must not be taken for the reader of that name.
    return _load_split(name, str(path.absolute()), split)


def _load_saved(name: str, path: Path) -> Dataset:
    try:
        return datasets.load_from_disk(path)
    except (ValueError, IndexError, FileNotFoundError) as error:
        raise _unreadable(name, f"{path} could not be loaded", error, "Save the dataset anew.") from error


def _load_split(name: str, source: str, split: str, **options) -> Dataset:
    try:
        return datasets.load_dataset(source, split=split, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name}: no data found, neither here nor on the hub ({error}). Check the name and the network; a private "
            f"or gated dataset needs `hf auth login`."
        ) from error
    except (DatasetsError, ValueError, RuntimeError, StopIteration) as error:
        remedy = (
            "Name a split that exists, or save the rows you want to a .jsonl file and name that; eval_dataset_name='' "
            "leaves evaluation out."
        )
        raise _unreadable(name, f"split {split!r} could not be loaded", error, remedy) from error


def _unreadable(name: str, problem: str, error: BaseException, remedy: str) -> ValueError:
    while error.__cause__ is not None:  # `datasets` wraps the reader's own words, which name the place
        error = error.__cause__
    reason = " ".join(str(error).split())
    # What `datasets` and its readers raise where there are no rows: of JSON, of a saved dataset, and of other files.
    empty = ("corresponds to no data", "No columns to parse from file")
    if isinstance(error, (StopIteration, IndexError)) or any(words in reason for words in empty):
        return _no_rows(name)
    return ValueError(f"{name}: {problem} ({reason.rstrip('.') or type(error).__name__}). {remedy}")


def _no_rows(name: str) -> ValueError:
    return ValueError(f"{name}: it has no rows. Name a file or split that has some.")


def shorten(value: object) -> str:
    """`repr(value)` in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def row_name(name: str, number: int) -> str:
    """How errors name a row. `number` counts from 1."""
    return f"{name} row {number} (counting from 1)"


class CellError(ValueError):
    """A cell that cannot be used. `problem` says what it must be, without the row and the value."""

    def __init__(self, message: str, problem: str):
        super().__init__(message)
        self.problem = problem


def cell_error(where: str, field: str, value: object, problem: str) -> CellError:
    """The error for one cell, where `where` is a `row_name`."""
    problem = f"{field!r} {problem}"
    return CellError(f"{where}: {problem}, but is {shorten(value)}. Correct or delete the row.", problem)


def check_rows(
    rows: Dataset,
    columns: list[str],
    name: str,
    check: Callable[[str, dict, str | None], str | None],
    *,
    drop: bool = False,
) -> Dataset:
    """Check the cells of `columns` in each row and return the rows; with `drop`, return those that pass.

    `check` gets the row's name, its cells and the kind of cell that the rows before it hold (None before the first), and
    returns that kind. With `drop`, a warning says how many rows are left out, of what kind, and which is the first.

    Raises what `check` raises, and with `drop`:
        ValueError: no row passes.
    """
    kind, kept, problems = None, [], {}
    for number, row in enumerate(rows.select_columns(columns), 1):
        try:
            kind = check(row_name(name, number), row, kind)
        except CellError as error:
            if not drop:
                raise
            problems.setdefault(error.problem, []).append(number)
        else:
            kept.append(number - 1)
    if not problems:
        return rows
    dropped = "; ".join(f"{len(found)} where {problem} (first: row {found[0]})" for problem, found in problems.items())
    if not kept:
        raise ValueError(f"{name}: drop_bad_rows=True leaves none of {len(rows)} rows: {dropped}. Name other data.")
    logger.warning(f"{name}: {len(rows) - len(kept)} of {len(rows)} rows are left out: {dropped}.")
    return rows.select(kept)


def require_columns(rows: Dataset, needed: tuple[str, ...], name: str) -> None:
    """Raise a ValueError for the first of the `needed` columns that `rows` lacks, with a likely misspelling of it."""
    found = rows.column_names
    for column in needed:
        if column not in found:
            near = difflib.get_close_matches(column, [other for other in found if other not in needed], n=1)
            remedy = f"Did you mean {near[0]!r}? Rename it." if near else "Rename the column that holds it."
            if len(found) == 1 and any(mark in found[0] for mark in ";\t|"):
                remedy = "Separate the cells by commas."
            raise ValueError(f"{name}: no column {column!r}; needed: {list(needed)}, found: {found}. {remedy}")


def check_cell(where: str, field: str, value: object, kind: str | None, *, filled: bool) -> str:
    """Check one cell and return its kind: "text" (a string) or "conversation" (a list of role and content messages).

    Raises:
        ValueError: the cell is neither, is not of `kind` (None: either will do), or, where it must be `filled`, has
            nothing but white space in it or in its last message.
    """
    found = _cell_kind(value)
    if found is None:
        problem = "must be text, or a list of messages that each have a text 'role' and a text 'content'"
        raise cell_error(where, field, value, problem)
    if kind not in (None, found):
        raise cell_error(where, field, value, f"must be a {kind} (texts and conversations do not mix)")
    last = value if found == "text" else value[-1]["content"]
    if filled and not last.strip():
        raise cell_error(where, field, value, "must not be empty")
    return found


def check_chat_template(rows: Dataset, tokenizer, name: str) -> None:
    """Check that the tokenizer can write conversations, where the rows are some.

    Raises:
        ValueError: they are, and it has no chat template.
    """
    if tokenizer.chat_template is not None:
        return
    for field, value in rows[0].items():
        if _cell_kind(value) == "conversation":
            raise ValueError(
                f"{row_name(name, 1)}: {field!r} is a conversation ({shorten(value)}), but the tokenizer has no chat "
                f"template. Give text, or take a model whose tokenizer has one."
            )


def _cell_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "text"
    return "conversation" if isinstance(value, list) and value and all(map(_is_message, value)) else None


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
