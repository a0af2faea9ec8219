"""Keep a dataset to its own files: whatever somebody wrote into it, nothing outside of its folder or repository is read.

One rule: a file of a dataset lies in the dataset. A path, a pattern, a URL or a link that leads elsewhere is refused. Columns
whose cells are files (images, audio, ...) are left out. A local folder's README is not read.
"""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import datasets
import yaml
from datasets import Dataset, Features
from huggingface_hub import DatasetCard, hf_hub_download

from data.json_files import check_object, parse_json, read_json
from data.quoting import escaped, quoted
from data.schemas import DATASET_INFO, DATASET_STATE, record


logger = logging.getLogger(__name__)

# Types of columns whose cells are in the table itself. The others may name a file in each cell.
TABLE_TYPES = (
    "Value",
    "ClassLabel",
    "List",
    "LargeList",
    "Sequence",
    "Json",
    "Translation",
    "TranslationVariableLanguages",
    *(f"Array{number}D" for number in range(2, 6)),
)


def real_path(path: Path) -> Path:
    """Return a path without symbolic links. Unlike `Path.resolve`, it raises no error where links lead in a circle."""
    return Path(os.path.realpath(path))


def check_link(name: str, folder: Path, path: Path) -> None:
    """Check that a path in a folder leads to a file in the folder.

    The cache of the hub keeps the files of a repository's snapshot in `blobs` beside it, and the snapshot has links there.

    Raises:
        ValueError: the path leads elsewhere.
    """
    own, real = real_path(folder), real_path(path)
    blobs = own.parents[1] / "blobs" if own.parent.name == "snapshots" else own
    if not real.is_relative_to(own) and not real.is_relative_to(blobs):
        raise ValueError(
            f"{name}: {escaped(path.relative_to(folder))} is a link to {escaped(real)}, which is not in this folder. Name "
            f"that file itself as the dataset, or copy it into the folder."
        )


def check_saved(name: str, folder: Path) -> None:
    """Check what `Dataset.save_to_disk` wrote beside the rows, before `datasets` opens the files that it names.

    Raises:
        ValueError: a file is damaged, or names a file that is not in the folder.
    """
    remedy = "Save the dataset anew."
    state = read_json(folder / datasets.config.DATASET_STATE_JSON_FILENAME, DATASET_STATE, remedy=remedy)
    info = folder / datasets.config.DATASET_INFO_FILENAME
    check_features(read_json(info, DATASET_INFO, remedy=remedy).get("features"), str(info))
    for file in state["_data_files"]:
        check_link(name, folder, folder / file["filename"])


def check_parquet_metadata(metadata: dict[bytes, bytes] | None, name: str) -> None:
    """Check what `datasets` wrote into a parquet file about its columns.

    Raises:
        ValueError: it is damaged, or names a file.
    """
    text = (metadata or {}).get(b"huggingface")
    if text is not None:
        found = parse_json(text, f"{name}: its metadata", remedy="Save the rows anew.")
        check_object(
            found, f"{name}: its metadata", record(None, {"info": DATASET_INFO}), remedy="Save the rows anew."
        )
        check_features(found.get("info", {}).get("features"), name)


def check_features(features: object, where: str) -> None:
    """Raise a ValueError if the types of a dataset's columns name a file, from which `datasets` would read the labels."""
    for entry in _parts(features):
        if isinstance(entry, dict) and entry.get("names_file"):
            raise ValueError(
                f"{where}: the labels are to be read from the file {quoted(entry['names_file'], 300)}. Save the dataset anew, "
                f"with the labels' names in it."
            )


def check_card(name: str, source: str, revision: str | None) -> None:
    """Check the files and URLs that the card of a dataset on the hub names, before `datasets` reads them.

    Raises:
        ValueError: the card names something outside of its repository, or cannot be read.
    """
    for file in (datasets.config.REPOCARD_FILENAME, datasets.config.REPOYAML_FILENAME):
        try:
            path = Path(hf_hub_download(source, file, repo_type="dataset", revision=revision))
        except (OSError, ValueError):  # there is none, or `datasets` tells what is wrong with the name or the network
            continue
        try:
            read = (
                DatasetCard.load(path).data.to_dict()
                if file.endswith(".md")
                else yaml.safe_load(path.read_text(encoding="utf-8"))
            )
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{name}: {file} cannot be read ({escaped(error)}). Name other data.") from error
        check_card_data(name, file, read)


def check_card_data(name: str, file: str, card: object) -> None:
    """Check the data of a card. Raises the ValueErrors of `check_card`."""
    configs = card.get("configs") if isinstance(card, dict) else None
    for config in configs if isinstance(configs, list) else []:
        named = [config.get(key) for key in ("data_files", "data_dir")] if isinstance(config, dict) else []
        for text in (part for part in _parts(named) if isinstance(part, str)):
            if (
                re.search(r"://|::|^[A-Za-z]:", text)
                or text.startswith(("/", "\\", "~"))
                or ".." in PurePosixPath(text).parts
            ):
                raise ValueError(
                    f"{name}: {file} names the data file {quoted(text, 300)}, which is not in this repository. Name other "
                    f"data, or save its rows to a .jsonl file."
                )
    check_features(card, f"{name}: {file}")


def without_file_columns(rows: Dataset, name: str) -> Dataset:
    """Return the rows without the columns whose cells may be files, and warn of it.

    `datasets` would open the file that such a cell names, wherever it is.
    """
    columns = [column for column, feature in rows.features.items() if not _in_table(feature)]
    if columns:
        logger.warning(
            f"{name}: {len(columns)} columns of files, such as images, are not read (first: {quoted(columns[0])})."
        )
        rows = rows.remove_columns(columns)
    return rows


def warn_of_card(name: str, folder: Path) -> None:
    """Warn if the README of a local folder says which files are which split, because only the files' names do."""
    card = folder / datasets.config.REPOCARD_FILENAME
    if card.is_file():
        with card.open("rb") as file:
            start = file.read(2**16)
        if start.startswith(b"---") and re.search(rb"^configs:", start.split(b"\n---", 1)[0], re.MULTILINE):
            logger.warning(
                f"{name}: the `configs` of README.md are not read: the names of files and folders tell the splits."
            )


def _in_table(feature: object) -> bool:
    """Tell whether a column's type keeps all of its cells in the table."""
    if isinstance(feature, (dict, Features)):
        return all(map(_in_table, feature.values()))
    if isinstance(feature, (list, tuple)):
        return all(map(_in_table, feature))
    return type(feature).__name__ in TABLE_TYPES and _in_table(getattr(feature, "feature", {}))


def _parts(value: object) -> Iterator[object]:
    """Yield a value and all that is in it, each once: YAML can name one list many times."""
    seen, left = set(), [value]
    while left:
        part = left.pop()
        yield part
        if isinstance(part, (dict, list)) and id(part) not in seen:
            seen.add(id(part))
            left += [*part.keys(), *part.values()] if isinstance(part, dict) else part
