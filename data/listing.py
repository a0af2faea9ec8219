"""List the files that a stage has saved in a folder, with their size and SHA-256."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from data.json_files import read_json, write_json


LISTING = "saved_files.json"
Files = dict[str, dict[str, Any]]


def read_listing(folder: Path, name: str = LISTING) -> Files | None:
    """Return the files that stages have saved in a folder, with kind, size and SHA-256, or None without a listing.

    Raises:
        ValueError: the listing is damaged.
    """
    path = folder / name
    if not path.is_file():
        return None
    content = read_json(path)
    files, digest = content.get("files"), content.pop("sha256", None)
    sound = digest == json_digest(content) and isinstance(files, dict) and all(map(_is_entry, files.items()))
    if not sound or files is None:
        raise ValueError(
            f"{path}: the file is damaged, or was changed. Restore it from a copy, or run the stage in another folder."
        )
    return files


def _is_entry(item: tuple[str, Any]) -> bool:
    """Tell whether a file of a listing lies beneath its folder, and has all that is asked of it."""
    name, entry = item
    inside = bool(name) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    kinds = {"kind": str, "bytes": int, "sha256": str}
    return inside and isinstance(entry, dict) and all(isinstance(entry.get(key), of) for key, of in kinds.items())


def write_listing(path: Path, files: Files) -> None:
    content: dict[str, Any] = {"files": dict(sorted(files.items()))}
    write_json(path, content | {"sha256": json_digest(content)})


def entry_of(path: Path, kind: str) -> dict[str, Any]:
    return {"kind": kind, "bytes": path.stat().st_size, "sha256": file_digest(path)}


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1024)
def known_digest(path: Path, size: int, modified: int, inode: int) -> str:
    """Return `file_digest`, computed once for a file that has not changed."""
    return file_digest(path)


def json_digest(value: Any) -> str:
    """Return the hex SHA-256 of a JSON value; the order of the keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
