"""Read rows from a file, a folder or the hub.

A dataset can come from anywhere, so nothing about it is assumed. Data that cannot be read is an error that names the
place. The error comes before any model is loaded. No row is repaired or filled in.
"""

import logging
import re
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, ReadInstruction
from datasets.exceptions import DatasetsError

from data.boundaries import check_card, check_link, check_saved, warn_of_card, without_file_columns
from data.caches import check_cache
from data.embedded import find_file
from data.json_files import read_json
from data.listing import LISTING
from data.quoting import escaped
from data.reading import dataset_of, format_of, read_file
from data.rows import Rows
from data.saving import complete
from data.schemas import DATASET_DICT
from data.waiting import waiting_for


logger = logging.getLogger(__name__)

# Words in the name of a file or folder that tell its split. The hub uses the same words.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"(?P<split>\w[\w.-]*)-\d{5}-of-\d{5}")
# Files that often lie beside the data but hold no rows.
BESIDE = (
    "readme.md",
    "dataset_infos.json",
    "dataset_info.json",
    "config.json",
    LISTING,
    "license",
    "license.txt",
    "license.md",
)


def load_rows(name: str, split: str, *, data_dir: str | None = None) -> Rows:
    """Load the rows of a file, or of one split of a folder or of a dataset on the hub.

    A file (.jsonl, .json, .csv, .tsv, .parquet, or one of them plus .gz) has no splits, and neither has a folder that
    `Dataset.save_to_disk` wrote. All their rows are returned for any `split`, so keep training and evaluation rows apart.
    The files of any other folder are its shards, and their names tell the split. Nothing outside of a folder or a repository
    is read: see `data.boundaries`.

    On the hub, `owner/name@revision` names a branch, a tag or a commit, and `data_dir` is a folder of the dataset.

    Raises:
        FileNotFoundError: there is no such file or folder, and no such dataset on the hub.
        ValueError: the data cannot be read, has no such split, or has no rows.
    """
    path = Path(find_file(name)).expanduser()
    complete(path if path.is_dir() else path.parent)  # data of a conversion that was cut short
    if path.is_dir():
        rows = _load_folder(name, path, split)
    elif path.is_file():
        rows = Rows.of_file(_read(name, path), name)
    elif format_of(path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        # A name without an owner never goes to the hub: `datasets` would read `text` or `csv` as all files of this folder.
        raise FileNotFoundError(
            f"{name}: no such file or folder (looked for {path.absolute()}). Correct the path. A dataset on the hub "
            f"is named `owner/name` or `owner/name@revision`."
        )
    else:
        source, _, revision = name.partition("@")
        options = {"revision": revision, "data_dir": data_dir}
        rows = _load_split(name, source, split, **{key: value for key, value in options.items() if value})
    if not isinstance(rows, Rows):
        rows = Rows.of_file(without_file_columns(rows, name), name)
    if len(rows) == 0:
        raise _no_rows(name)
    return rows


def has_splits(name: str) -> bool:
    """Tell whether `load_rows` returns different rows for different splits of this dataset."""
    path = Path(name).expanduser()
    if path.is_dir():
        saved = datasets.config.DATASETDICT_JSON_FILENAME, datasets.config.DATASET_STATE_JSON_FILENAME
        of_splits, alone = ((path / file).exists() for file in saved)
        return of_splits or not alone
    return format_of(path) is None


def splits_of(name: str) -> list[str]:
    """Return the splits of a folder; a file, a folder that holds one split and a dataset on the hub give `train`."""
    path = Path(name).expanduser()
    saved_splits = path / datasets.config.DATASETDICT_JSON_FILENAME
    if not path.is_dir() or not has_splits(name):
        return ["train"]
    if saved_splits.exists():
        return list(read_json(saved_splits, DATASET_DICT, remedy="Save the dataset anew.")["splits"]) or ["train"]
    return list(_data_files(name, path))


def _load_folder(name: str, path: Path, split: str) -> Dataset:
    saved_splits = path / datasets.config.DATASETDICT_JSON_FILENAME
    if saved_splits.exists():
        splits = read_json(saved_splits, DATASET_DICT, remedy="Save the dataset anew.")["splits"]
        if split not in splits:
            known = escaped(", ".join(splits)) or "none"
            raise ValueError(f"{name}: no split {split!r}; the splits are {known}. Name one of them.")
        check_link(name, path, path / split)
        return _load_saved(name, path / split)
    if (path / datasets.config.DATASET_STATE_JSON_FILENAME).exists():
        return _load_saved(name, path)
    warn_of_card(name, path)
    return _load_shards(name, path, split)


def _read(called: str, path: Path) -> Dataset:
    return without_file_columns(read_file(called, path), called)


def _data_files(name: str, folder: Path) -> dict[str, list[Path]]:
    """Find the files with rows below a folder, by split.

    The names of files and folders tell the split, as on the hub. If no name tells a split, all files belong to `train`.

    Raises:
        FileNotFoundError: the folder has no file with rows.
        ValueError: the files have several formats; a file is there both plain and as .gz; or only some names tell a split.
    """
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    found = [path for path in found if not any(part.startswith((".", "_")) for part in path.parts)]
    found = [path for path in found if path.name.lower() not in BESIDE]
    files = [path for path in found if format_of(path)]
    if not files:
        raise FileNotFoundError(
            f"{name}: no data found in this folder (none of its {len(found)} files ends in .jsonl, .json, .csv, .tsv, "
            f".parquet, or one of them plus .gz). Check the name."
        )
    formats = {format_of(path): path for path in reversed(files)}
    if len(formats) > 1:
        examples = ", ".join(escaped(path) for _, path in sorted(formats.items()))
        raise ValueError(
            f"{name}: the folder has files of several formats ({examples}). Name one file, or keep the files of one format "
            f"and move the others elsewhere."
        )
    for path in files:
        if path.suffix.lower() == ".gz" and path.with_suffix("") in files:
            both = f"{escaped(path.with_suffix(''))} and {escaped(path)}"
            raise ValueError(f"{name}: {both} would both be read. Remove one of them.")
    others = [path for path in found if path not in files]
    if others:
        logger.warning(
            f"{name}: {len(others)} other files in this folder are not read (such as {escaped(others[0])})."
        )
    splits: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for path in files:
        split = _split_of(path)
        (unnamed if split is None else splits.setdefault(split, [])).append(path)
    if not splits:
        return {"train": unnamed}
    splits = {split: splits[split] for split in dict.fromkeys([*SPLITS, *splits]) if split in splits}
    if unnamed:
        odd, named = escaped(unnamed[0]), escaped(next(iter(splits.values()))[0])
        raise ValueError(
            f"{name}: the name of {odd} tells no split, but the name of {named} tells one. Put the split into the name of "
            f"{odd}, or move the file elsewhere."
        )
    return splits


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name tells, or else the name of its nearest folder that tells one, or None."""
    if shard := SHARD.match(path.name):
        return shard["split"]
    for part in (path.name, *reversed(path.parts[:-1])):
        words = re.split(r"[-._ 0-9]+", part.lower())
        for split, names in SPLITS.items():
            if not set(names).isdisjoint(words):
                return split
    return None


def _load_shards(name: str, folder: Path, split: str) -> Rows:
    """Read the files of a split, or the rows that an instruction such as `train[:100]` or `train+test` selects."""
    of_split = _data_files(name, folder)
    asked = [part.split("[")[0].strip() for part in split.split("+")]
    unknown = [one for one in asked if one not in of_split]
    if unknown:
        raise ValueError(
            f"{name}: split {unknown[0]!r} could not be loaded (the file names tell the splits {list(of_split)}). Name a "
            f"split that exists, or a file. To skip evaluation, set eval_dataset_name=''."
        )
    read = {one: _concatenated(name, folder, of_split[one]) for one in dict.fromkeys(asked)}
    if asked == [split]:
        return read[split]
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({one: len(rows) for one, rows in read.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{name}: split {split!r} is not a valid split instruction ({error}). Correct it.") from error
    selected = [
        read[part.splitname].select(range(part.from_ or 0, _end(part.to, read[part.splitname]))) for part in parts
    ]
    return selected[0] if len(selected) == 1 else joined(selected)


def _end(to: int | None, rows: Dataset) -> int:
    return len(rows) if to is None else to


def _concatenated(name: str, folder: Path, files: list[Path]) -> Rows:
    parts = []
    for path in files:
        called = f"{name.rstrip('/')}/{escaped(path)}"
        check_link(name, folder, folder / path)
        parts.append(Rows.of_file(_read(called, folder / path), called))
        if len(parts[-1]) == 0:
            logger.warning(f"{called}: the file has no rows.")
    parts = [part for part in parts if len(part)] or parts[:1]
    first = parts[0]
    for part in parts[1:]:
        if set(part.column_names) != set(first.column_names):
            raise ValueError(
                f"{part.files[0]}: the columns {part.column_names} differ from those of {first.files[0]}, "
                f"{first.column_names}. All files of a split need the same columns. Move the other files elsewhere."
            )
    return first if len(parts) == 1 else joined(parts)


def joined(parts: list[Rows]) -> Rows:
    """Join the rows of several files.

    Each column gets a type that holds all of its cells. No cell changes.
    """
    names = parts[0].column_names
    if all(part.features == parts[0].features for part in parts):
        rows = datasets.concatenate_datasets([part.select_columns(names) for part in parts])
    else:
        rows = dataset_of(
            {column: [cell for part in parts for cell in part[column]] for column in names}, parts[0].files[0]
        )
    files = [file for part in parts for file in part.files]
    starts = np.cumsum([0, *(len(part.files) for part in parts[:-1])])
    of = np.concatenate([part.of + start for part, start in zip(parts, starts, strict=True)])
    return Rows(rows, tuple(files), of, np.concatenate([part.numbers for part in parts]))


def _load_saved(name: str, path: Path) -> Dataset:
    check_saved(name, path)
    try:
        rows = datasets.load_from_disk(path)
        rows.data.table.validate(full=True)  # arrow files are mapped as they are, and damage would crash later
        return rows
    except Exception as error:  # what `datasets` makes of a damaged file or description, of any type
        raise _unreadable(name, f"{escaped(path)} could not be loaded", error, "Save the dataset anew.") from error


def _load_split(name: str, source: str, split: str, **options) -> Dataset:
    check_cache(Path(datasets.config.HF_DATASETS_CACHE), "the cache of `datasets`", "HF_DATASETS_CACHE or HF_HOME")
    check_card(name, source, options.get("revision"))
    try:
        with waiting_for(f"{name}, from the hub or from another process that prepares it in the cache"):
            return datasets.load_dataset(source, split=split, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name}: no data found, neither here nor on the hub ({error}). Check the name and the network. A private "
            f"or gated dataset needs `hf auth login`."
        ) from error
    except (DatasetsError, ValueError, RuntimeError, StopIteration) as error:
        remedy = (
            "Name a split that exists, or save the rows to a .jsonl file and name that file. To skip evaluation, set "
            "eval_dataset_name=''."
        )
        raise _unreadable(name, f"split {split!r} could not be loaded", error, remedy) from error


def _unreadable(name: str, problem: str, error: BaseException, remedy: str) -> ValueError:
    while error.__cause__ is not None:  # `datasets` wraps the reader's error, which names the place
        error = error.__cause__
    reason = escaped(" ".join(str(error).split()), 1000)
    # Messages of `datasets` and its readers when there are no rows. StopIteration: JSON. IndexError: a saved dataset.
    empty = ("corresponds to no data", "No columns to parse from file")
    if isinstance(error, (StopIteration, IndexError)) or any(words in reason for words in empty):
        return _no_rows(name)
    return ValueError(f"{name}: {problem} ({reason.rstrip('.') or type(error).__name__}). {remedy}")


def _no_rows(name: str) -> ValueError:
    return ValueError(f"{name}: the data has no rows. Name a file or split that has rows.")
