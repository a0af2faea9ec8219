"""Read the rows of a file: a cell is exactly what was written, and an error names the line.

Text stays text: no reader guesses dates, numbers or missing cells. In CSV and TSV files every cell is text, except in the
columns that are numbers by definition (`NUMBERS`). JSON and parquet files state the type of each cell.
"""

import csv
import gzip
import io
import json
import math
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features, Json

from data.boundaries import check_parquet_metadata
from data.quoting import escaped, quoted


FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
NUMBERS = ("margin", "agreement")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf(inity)?)", re.IGNORECASE)


def format_of(path: str | Path) -> str | None:
    """Return the format that a file's name ends in, with or without `.gz`, or None if it is not a known one."""
    name = str(path).lower().removesuffix(".gz")
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def read_file(name: str, path: Path) -> Dataset:
    """Read all rows of a file; errors call the file `name`.

    Raises:
        ValueError: the file's name ends in no known format, or the file cannot be read. The message names the line.
    """
    kind = format_of(path)
    if kind is None:
        raise ValueError(
            f"{name}: a file must end in one of {', '.join(FORMATS)}, or one of them plus .gz, not {path.suffix!r}. "
            f"Convert the file."
        )
    try:
        if kind == ".parquet":
            return _parquet(name, path)
        rows = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv}[kind](name, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name}: the archive is damaged ({error}). Fetch it anew.") from error
    names = list(dict.fromkeys(column for row in rows for column in row))
    return dataset_of({column: [row.get(column) for row in rows] for column in names}, name)


def dataset_of(columns: dict[str, list], name: str) -> Dataset:
    """Make a dataset from columns of Python values, without changing a value.

    Raises:
        ValueError: a column has a number, or a mixture of types, that no dataset can hold.
    """
    made = {column: _array(values, f"{name}: column {quoted(column)}") for column, values in columns.items()}
    table = pa.table({column: array for column, (array, _) in made.items()})
    features = Features.from_arrow_schema(table.schema)
    features.update({column: Json() for column, (_, mixed) in made.items() if mixed})
    return Dataset(table, info=DatasetInfo(features=features))


def _array(values: list, where: str) -> tuple[pa.Array | pa.ChunkedArray, bool]:
    """Return the values as an arrow array, and True if they have mixed types and are stored as JSON texts."""
    if all(value is None or isinstance(value, str) for value in values):
        return pa.array(values), False
    try:
        array = pa.array(values)
        if _same(array.to_pylist(), values):
            return array, False
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        pass
    texts = [None if value is None else json.dumps(value) for value in values]
    array = pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))
    for number, (value, text) in enumerate(zip(values, texts, strict=True), 1):
        try:
            kept = text is None or _same(Json().decode_example(text), value)
        except ValueError:
            kept = False
        if not kept:
            raise ValueError(
                f"{where} cannot keep the value of row {number} (counting from 1), {repr(value)[:60]}. It is a number beyond "
                f"64 bits, or a number among other types. Write it as text."
            )
    return array, True


def _same(one: object, other: object) -> bool:
    """Tell whether two values are equal and of one type.

    1 equals 1.0, NaN equals NaN, and True is not a number.
    """
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (one, other))
    return one == other and (numbers or type(one) is type(other))


def _open(path: Path):
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


# ------------------------------------------------------------------------------------ JSON
def _json_lines(name: str, path: Path) -> list[dict]:
    """Read rows of JSON lines; skip blank lines."""
    rows = []
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(_row(_decode(line).rstrip("\r\n")))
            except _Problem as problem:
                raise ValueError(f"{name} line {number}: {problem}. Correct or delete the line.") from None
    return rows


def _json(name: str, path: Path) -> list[dict]:
    """Read rows of a .json file: an array of objects, JSON lines, or one object."""
    with _open(path) as file:
        content = file.read()
    try:
        text = _decode(content)
    except _Problem as problem:
        line, reason = _line_of(content, problem)
        raise ValueError(f"{name} line {line}: {reason}. Correct the file.") from None
    if not text.strip():
        return []
    if not text.lstrip().startswith("["):
        first = text.lstrip().split("\n", 1)[0]
        try:
            _row(first)
        except _Problem:
            try:
                return [_row(text)]
            except _Problem as problem:
                raise ValueError(f"{name}: {problem}. Correct the file.") from None
        return _json_lines(name, path)
    rows: list[dict] = []
    at, line, counted = text.index("[") + 1, 1, 0
    for number in range(1, sys.maxsize):
        at = _skip(text, at)
        if text[at : at + 1] == "]" and not rows:
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = _decoded(text, at)
            rows.append(_object_of(value))
        except _Problem as problem:
            where = f"line {problem.line or line}, row {number} (counting from 1)"
            raise ValueError(f"{name} {where}: {problem}. Correct or delete the row.") from None
        at = _skip(text, at)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            line += text.count("\n", counted, at)
            raise ValueError(f"{name} line {line}: not valid JSON (Expecting ',' or ']'). Correct the file.")
        at += 1
    if text[at + 1 :].strip():
        raise ValueError(f"{name}: not valid JSON (text after the array's end). Correct the file.")
    return rows


class _Problem(ValueError):
    """Error about a piece of JSON.

    `line` counts from the beginning of the piece; `byte` is the first one that is not UTF-8.
    """

    def __init__(self, problem: str, line: int | None = None, byte: int | None = None):
        super().__init__(problem)
        self.line, self.byte = line, byte


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text ({error.reason} at byte {error.start + 1})"
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            problem = f"{problem}: it is UTF-16, save it as UTF-8"
        raise _Problem(problem, byte=error.start) from None


def _line_of(content: bytes, problem: _Problem) -> tuple[int, str]:
    """Return the line of the byte that is not UTF-8, and the problem with the byte counted within that line."""
    assert problem.byte is not None  # as in every problem of `_decode`
    line = content.count(b"\n", 0, problem.byte) + 1
    start = content.rfind(b"\n", 0, problem.byte) + 1
    return line, str(problem).replace(f"byte {problem.byte + 1}", f"byte {problem.byte - start + 1}")


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n") and at < len(text):
        at += 1
    return at


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise _Problem(f"not valid JSON (the key {quoted(twice)} is specified twice)")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _decoded(text: str, at: int) -> tuple[object, int]:
    try:
        value, end = DECODER.raw_decode(text, at)
    except _Problem:
        raise
    except json.JSONDecodeError as error:
        problem = f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
        raise _Problem(problem, line=error.lineno) from None
    except (RecursionError, ValueError) as error:
        problem = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise _Problem(f"not usable JSON ({problem})") from None
    if "\\ud" in text[at:end].lower():
        half = _half(value)
        if half is not None:
            raise _Problem(
                f"half of a surrogate pair ({half!a}), which is not a character, in the text {_start(half, value)}"
            )
    return value, end


def _half(value: object) -> str | None:
    """Return the first surrogate that stands alone in the texts of a value."""
    texts = json.dumps(value, ensure_ascii=False)
    return next((character for character in texts if "\ud800" <= character <= "\udfff"), None)


def _start(half: str, value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return ascii(text[max(0, text.index(half) - 30) : text.index(half) + 10])


def _row(text: str) -> dict:
    value, end = _decoded(text, _skip(text, 0))
    if text[end:].strip():
        raise _Problem(f"not valid JSON (Extra data at column {end + 1})")
    return _object_of(value)


def _object_of(value: object) -> dict:
    if not isinstance(value, dict):
        shown = repr(value)
        raise _Problem(f"not a JSON object ({shown if len(shown) <= 60 else shown[:57] + '...'})")
    return value


# ------------------------------------------------------------------------------------ CSV and TSV
@contextmanager
def _cells_of_any_size() -> Iterator[None]:
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv(name: str, path: Path) -> list[dict]:
    """Read rows of cells that commas or tabs separate and `"` quotes; skip blank lines."""
    mark = ("\t", "tab") if format_of(path) == ".tsv" else (",", "comma")
    with _open(path) as file:
        content = file.read()
    try:
        text = _decode(content)
    except _Problem as problem:
        line, reason = _line_of(content, problem)
        raise ValueError(f"{name} line {line}: {reason}. Correct the file.") from None
    # Strict: a quote that is never closed is an error. Otherwise the rest of the file would become one cell.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark[0], strict=True)
    rows: list[dict] = []
    header, line = None, 1
    with _cells_of_any_size():
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(
                    f"{name} line {line}: {error}. Quote a cell that holds a quote, and double the quote inside it."
                ) from None
            if cells is None:
                return rows
            if not cells:
                continue
            if header is None:
                # Pandas writes its index under an empty name, and reads it back under the name used here.
                header = [cell or f"Unnamed: {number}" for number, cell in enumerate(cells)]
                twice = [column for column in header if header.count(column) > 1]
                if twice:
                    raise ValueError(f"{name} line {line}: the header names {quoted(twice[0])} twice. Rename one.")
                continue
            if len(cells) != len(header):
                kind = "more" if len(cells) > len(header) else "fewer"
                raise ValueError(
                    f"{name} line {line}: {kind} cells than the header ({len(cells)}, not {len(header)}). Quote the cells "
                    f"that hold a {mark[1]}."
                )
            rows.append({column: _cell(column, cell) for column, cell in zip(header, cells, strict=True)})


def _cell(column: str, cell: str) -> str | float | None:
    if column not in NUMBERS:
        return cell
    cell = cell.strip()
    return None if not cell else float(cell) if NUMBER.fullmatch(cell) else cell


# ------------------------------------------------------------------------------------ parquet
def _parquet(name: str, path: Path) -> Dataset:
    with _open(path) as file:
        content = file.read()
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read()
        table.validate(full=True)  # texts are UTF-8
        check_parquet_metadata(table.schema.metadata, name)
        for number, field in enumerate(table.schema):
            if pa.types.is_dictionary(field.type):  # categories of pandas: the cells are their names
                decoded = table.column(number).cast(field.type.value_type)
                table = table.set_column(number, field.name, decoded)
        return Dataset(table)
    except Exception as error:  # what arrow and `datasets` make of a damaged file, of any type
        if str(error).startswith(f"{name}: "):
            raise
        reason = escaped(" ".join(str(error).split()).rstrip("."), 1000) or type(error).__name__
        raise ValueError(f"{name}: could not be read as .parquet ({reason}). Correct the file.") from error
