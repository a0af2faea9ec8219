"""Read and write JSON files: one object in UTF-8 and strict JSON, which every reader accepts."""

import json
import math
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ValueError: the file is not valid JSON, or holds no object.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Restore the file, or the folder it is in.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object. Restore the file, or the folder it is in.")
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
