"""Read and write JSON files: one object in UTF-8 and strict JSON, which every reader accepts.

`data.schemas` says what each file that is read must hold.
"""

import json
import math
from pathlib import Path
from typing import Any

from data.quoting import escaped, quoted
from data.schemas import Kind, fault


RESTORE = "Restore the file, or the folder it is in."
LIMIT = 32 * 2**20  # bytes of a file; its values take up to thirty times as many in memory


def read_json(
    path: str | Path, schema: Kind | None = None, *, remedy: str = RESTORE, limit: int = LIMIT
) -> dict[str, Any]:
    """Read a JSON object from a file, and check it against a schema if one is given.

    NaN and infinity, which strict JSON has not, are read as floats: a schema refuses them where a number must be finite.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
        ValueError: the file is larger than `limit` bytes, not UTF-8, not valid JSON, nested too deep, names a key twice,
            holds no object, or does not fit the schema. The message ends with `remedy`.
    """
    path = Path(path)
    where = escaped(path)
    try:
        if not path.is_file():  # a folder, or a pipe, which would never end
            raise FileNotFoundError(f"{where}: no such file. {remedy}")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"{where}: cannot be read ({error.strerror}). {remedy}") from error
    if len(content) > limit:
        raise ValueError(f"{where}: the file is larger than {limit // 2**20} MiB, the most that is read. {remedy}")
    return parse_json(content, where, schema, remedy=remedy)


def parse_json(
    content: bytes | str, where: str, schema: Kind | None = None, *, remedy: str = RESTORE
) -> dict[str, Any]:
    """Return the object in a JSON text, checked against a schema if one is given. `where` names the text in errors.

    Raises the ValueErrors of `read_json`.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        found = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{where}: not usable JSON (nested too deep). {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({escaped(error)}). {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: not a JSON object, but {quoted(found)}. {remedy}")
    check_object(found, where, schema, remedy=remedy)
    return found


def check_object(found: dict, where: str, schema: Kind | None, *, remedy: str = RESTORE) -> None:
    """Raise a ValueError that names the first field of an object that does not fit a schema."""
    problem = fault(found, schema) if schema is not None else None
    if problem:
        raise ValueError(f"{where}: {problem}. {remedy}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {quoted(twice)} is specified twice")
    return found


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as strict JSON, which every reader accepts.

    Strict JSON has no NaN and no infinity. Such a number was not measured, so null is written for it.
    """
    Path(path).write_text(json.dumps(_strict(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
