"""Read rows from a file, a folder or the hub.

Datasets come from anywhere, so nothing about them is assumed. What cannot be read is an error that says where it is,
before any model is loaded; no row is repaired or filled in.
"""

import json
import logging
import re
import tempfile
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, ReadInstruction
from datasets.exceptions import DatasetsError

from data.reading import dataset_of, format_of, read_file
from data.rows import Rows


logger = logging.getLogger(__name__)

# Words in the name of a file or folder that tell its split, as on the hub.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"(?P<split>\w[\w.-]*)-\d{5}-of-\d{5}")
# Files that stand beside data and hold none.
BESIDE = (
    "readme.md",
    "dataset_infos.json",
    "dataset_info.json",
    "config.json",
    "license",
    "license.txt",
    "license.md",
)


def load_rows(name: str, split: str, *, data_dir: str | None = None) -> Rows:
    """The rows of a local file, of one split of a local folder, or of one split of a dataset on the hub.

    A file (.jsonl, .json, .csv, .tsv, .parquet, or one of them and .gz) and a folder that `Dataset.save_to_disk` wrote
    have no splits: all their rows are returned whatever `split` is, so training and evaluation rows belong in two of them.
    A folder's files are its shards: their names tell the split.

    On the hub, `owner/name@revision` is a branch, a tag or a commit, and `data_dir` a folder of the dataset.

    Raises:
        FileNotFoundError: there is no such file or folder, and the hub does not give such a dataset.
        ValueError: it cannot be read, has no such split, or has no rows.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        rows = _load_folder(name, path, split)
    elif path.is_file():
        rows = Rows.of_file(read_file(name, path), name)
    elif format_of(path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        # A name without owner never goes to the hub: `datasets` takes `text` or `csv` for all files of this folder.
        raise FileNotFoundError(
            f"{name}: no such file or folder (looked for {path.absolute()}). Correct the path; a dataset on the hub "
            f"is `owner/name`, or `owner/name@revision`."
        )
    else:
        source, _, revision = name.partition("@")
        options = {"revision": revision, "data_dir": data_dir}
        rows = _load_split(name, source, split, **{key: value for key, value in options.items() if value})
    if not isinstance(rows, Rows):
        rows = Rows.of_file(rows, name)
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
    return format_of(path) is None


def _check_cache() -> None:
    """Check that `datasets` can write where it keeps what it fetches from the hub.

    Raises:
        OSError: it cannot.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise OSError(
            f"{cache}: nothing can be written in the cache of datasets ({error.strerror}). Set HF_DATASETS_CACHE, or HF_HOME, "
            f"to a folder that can be written, or free some space."
        ) from error


def _load_folder(name: str, path: Path, split: str) -> Dataset:
    saved_splits = path / datasets.config.DATASETDICT_JSON_FILENAME
    if saved_splits.exists():
        splits = json.loads(saved_splits.read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            raise ValueError(f"{name}: no split {split!r}; it has {', '.join(splits)}. Name one of them.")
        return _load_saved(name, path / split)
    if (path / datasets.config.DATASET_STATE_JSON_FILENAME).exists():
        return _load_saved(name, path)
    return _load_shards(name, path, split)


def _data_files(name: str, folder: Path) -> dict[str, list[Path]]:
    """Find files with rows below a folder, by split. The names tell the split, as on the hub: of one in whose path no word
    names any, all rows are of the split `train`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the files are of several formats, or not all of them would be read.
    """
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    found = [path for path in found if not any(part.startswith((".", "_")) for part in path.parts)]
    found = [path for path in found if path.name.lower() not in BESIDE]
    files = [path for path in found if format_of(path)]
    if not files:
        raise FileNotFoundError(
            f"{name}: no data found, neither here nor on the hub (none of the {len(found)} files in this folder ends in "
            f".jsonl, .json, .csv, .tsv, .parquet, or one of them and .gz). Check the name."
        )
    formats = {format_of(path): path for path in reversed(files)}
    if len(formats) > 1:
        examples = ", ".join(str(path) for _, path in sorted(formats.items()))
        raise ValueError(
            f"{name}: files of several formats ({examples}), and which of them hold the rows is not told. Move all but "
            f"those of one format elsewhere, or name one file."
        )
    for path in files:
        if path.suffix.lower() == ".gz" and path.with_suffix("") in files:
            raise ValueError(f"{name}: {path.with_suffix('')} and {path} would both be read. Remove one of them.")
    others = [path for path in found if path not in files]
    if others:
        logger.warning(f"{name}: {len(others)} other files in this folder are not read (such as {others[0]}).")
    splits: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for path in files:
        split = _split_of(path)
        (unnamed if split is None else splits.setdefault(split, [])).append(path)
    if not splits:
        return {"train": unnamed}
    splits = {split: splits[split] for split in dict.fromkeys([*SPLITS, *splits]) if split in splits}
    if unnamed:
        raise ValueError(
            f"{name}: {unnamed[0]} belongs to no split, and {next(iter(splits.values()))[0]} to one by its name. Name the "
            f"split in the file's name too, or move it elsewhere."
        )
    return splits


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name tells, or its folders', the nearest first; None: they tell none."""
    if shard := SHARD.match(path.name):
        return shard["split"]
    for part in (path.name, *reversed(path.parts[:-1])):
        words = re.split(r"[-._ 0-9]+", part.lower())
        for split, names in SPLITS.items():
            if not set(names).isdisjoint(words):
                return split
    return None


def _load_shards(name: str, folder: Path, split: str) -> Rows:
    """Read the files of a split, or of what an instruction such as `train[:100]` or `train+test` takes of several."""
    of_split = _data_files(name, folder)
    asked = [part.split("[")[0].strip() for part in split.split("+")]
    unknown = [one for one in asked if one not in of_split]
    if unknown:
        raise ValueError(
            f"{name}: split {unknown[0]!r} could not be loaded (the names of the files tell {list(of_split)}). Name a split "
            f"that exists, or a file; eval_dataset_name='' leaves evaluation out."
        )
    read = {one: _concatenated(name, folder, of_split[one]) for one in dict.fromkeys(asked)}
    if asked == [split]:
        return read[split]
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({one: len(rows) for one, rows in read.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"{name}: split {split!r} is no instruction that can be read ({error}). Correct it."
        ) from error
    selected = [
        read[part.splitname].select(range(part.from_ or 0, _end(part.to, read[part.splitname]))) for part in parts
    ]
    return selected[0] if len(selected) == 1 else _joined(selected)


def _end(to: int | None, rows: Dataset) -> int:
    return len(rows) if to is None else to


def _concatenated(name: str, folder: Path, files: list[Path]) -> Rows:
    parts = []
    for path in files:
        called = f"{name.rstrip('/')}/{path}"
        parts.append(Rows.of_file(read_file(called, folder / path), called))
        if len(parts[-1]) == 0:
            logger.warning(f"{called}: it has no rows.")
    parts = [part for part in parts if len(part)] or parts[:1]
    first = parts[0]
    for part in parts[1:]:
        if set(part.column_names) != set(first.column_names):
            raise ValueError(
                f"{part.files[0]}: its columns {part.column_names} are not those of {first.files[0]}, {first.column_names}. "
                f"Files of one split need the same; move the others elsewhere."
            )
    return first if len(parts) == 1 else _joined(parts)


def _joined(parts: list[Rows]) -> Rows:
    """Put rows of several files together. The columns get a type that holds all of them, and no cell changes."""
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
    try:
        return datasets.load_from_disk(path)
    except (ValueError, IndexError, FileNotFoundError) as error:
        raise _unreadable(name, f"{path} could not be loaded", error, "Save the dataset anew.") from error


def _load_split(name: str, source: str, split: str, **options) -> Dataset:
    _check_cache()
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
