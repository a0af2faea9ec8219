"""`data.boundaries`: a dataset reads no file outside of itself, and a damaged one is an error that names its file."""

import json
import random
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from data import boundaries
from data.boundaries import check_card_data
from data.files import load_rows


SECRET = "a secret of somebody"
ROWS = {"prompt": ["The film", "It is"], "label": [0, 1]}


@pytest.fixture
def outside(tmp_path) -> Path:
    """A folder beside the dataset's, whose files no dataset may name."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.jsonl").write_text(json.dumps({"prompt": SECRET}) + "\n")
    (folder / "secret.txt").write_text(SECRET + "\n")
    Dataset.from_dict({"prompt": [SECRET]}).save_to_disk(folder / "saved")
    return folder


def saved(tmp_path, rows: Dataset | None = None) -> Path:
    (rows or Dataset.from_dict(ROWS)).save_to_disk(tmp_path / "rows")
    return tmp_path / "rows"


def edit(path: Path, change) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def refused(folder: Path, message: str, split: str = "train") -> None:
    with pytest.raises(ValueError, match=message) as caught:
        list(load_rows(str(folder), split))
    assert SECRET not in str(caught.value) and str(caught.value).isprintable()
    assert str(folder) in str(caught.value)


# ------------------------------------------------------------------------------------ files outside
ARROW = "saved/data-00000-of-00001.arrow"


@pytest.mark.parametrize("name", [f"../outside/{ARROW}", f"{{}}/{ARROW}", "..", ""])
def test_a_saved_dataset_names_a_file_elsewhere(name, tmp_path, outside):
    folder = saved(tmp_path)
    edit(folder / "state.json", lambda found: found["_data_files"].append({"filename": name.format(outside)}))
    refused(
        folder, r"state\.json: '_data_files'\[1\]\['filename'\] is .*, but must be the name of a file in this folder"
    )


def test_a_split_is_elsewhere(tmp_path, outside):
    DatasetDict(train=Dataset.from_dict(ROWS)).save_to_disk(tmp_path / "rows")
    edit(tmp_path / "rows" / "dataset_dict.json", lambda found: found["splits"].append("../outside/saved"))
    refused(tmp_path / "rows", r"dataset_dict\.json: 'splits'\[1\] is .*must be the name", split="../outside/saved")
    edit(tmp_path / "rows" / "dataset_dict.json", lambda found: found.update(splits=["train"]))
    shutil.rmtree(tmp_path / "rows" / "train")
    (tmp_path / "rows" / "train").symlink_to(outside / "saved")
    refused(
        tmp_path / "rows", r"rows: train is a link to \S+saved, which is not in this folder\. Name that file itself"
    )


@pytest.mark.parametrize("linked", ["data-00000-of-00001.arrow", "train.jsonl"])
def test_a_link_leads_elsewhere(linked, tmp_path, outside):
    if linked.endswith(".arrow"):
        folder, target = saved(tmp_path), outside / "saved" / linked
        (folder / linked).unlink()
    else:
        folder, target = tmp_path / "rows", outside / "secret.jsonl"
        folder.mkdir()
    (folder / linked).symlink_to(target)
    refused(folder, rf"rows: {linked} is a link to \S+, which is not in this folder")


def test_links_in_a_circle(tmp_path):
    folder = saved(tmp_path)
    rows = folder / "data-00000-of-00001.arrow"
    rows.unlink()
    rows.symlink_to(rows)
    refused(folder, r"rows could not be loaded .*Too many levels of symbolic links")


def test_links_within_a_folder_and_in_the_hubs_cache_are_read(tmp_path):
    folder = tmp_path / "datasets--a--b" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (tmp_path / "datasets--a--b" / "blobs").mkdir()
    (tmp_path / "datasets--a--b" / "blobs" / "f00").write_text('{"prompt": "A"}\n')
    (folder / "train.jsonl").symlink_to("../../blobs/f00")
    (folder / "test.jsonl").symlink_to("train.jsonl")
    (tmp_path / "link").symlink_to(folder)
    for name in (folder, tmp_path / "link"):
        assert list(load_rows(str(name), "train")) == list(load_rows(str(name), "test")) == [{"prompt": "A"}]


def test_labels_from_a_file(tmp_path, outside):
    rows = Dataset.from_dict(ROWS, features=Features(prompt=Value("string"), label=ClassLabel(names=["a", "b"])))
    folder = saved(tmp_path, rows)
    label = {"names_file": str(outside / "secret.txt"), "_type": "ClassLabel"}
    edit(folder / "dataset_info.json", lambda found: found["features"].update(label=label))
    refused(
        folder, r"dataset_info\.json: the labels are to be read from the file '\S+secret\.txt'\. Save the dataset anew"
    )
    table = pa.table(ROWS)
    kept = {"info": {"features": {"prompt": {"dtype": "string", "_type": "Value"}, "label": label}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(kept)})
    pq.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", r"a\.parquet: the labels are to be read from the file")


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_cells_that_name_files_are_not_opened(kind, tmp_path, outside, caplog):
    features = {"prompt": Value("string"), "picture": Image(), "turns": [{"text": Value("string"), "image": Image()}]}
    cell = {"path": str(outside / "secret.txt"), "bytes": None}
    turns = [[{"text": "a", "image": cell}]]
    table = pa.table({"prompt": ["A"], "picture": [cell], "turns": turns})
    rows = Dataset(table.cast(Features(features).arrow_schema), info=datasets.DatasetInfo(features=Features(features)))
    if kind == "saved":
        path = saved(tmp_path, rows)
    else:
        path = tmp_path / "a.parquet"
        pq.write_table(rows.data.table, path)
    assert list(load_rows(str(path), "train")) == [{"prompt": "A"}]
    assert "2 columns of files, such as images, are not read (first: 'picture')" in caplog.text


def test_the_readme_of_a_folder_is_not_read(tmp_path, outside, caplog):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "A"}\n')
    card = {"configs": [{"config_name": "default", "data_files": str(outside / "secret.jsonl")}]}
    (folder / "README.md").write_text(f"---\n{yaml.dump(card)}---\n# Rows\n")
    assert list(load_rows(str(folder), "train")) == [{"prompt": "A"}]
    assert "the `configs` of README.md are not read: the names of files and folders tell the splits" in caplog.text


OUTSIDE = [
    "/etc/passwd",
    "/**",
    "../../other/name/train.jsonl",
    "data/../../x.jsonl",
    "file:///etc/passwd",
    "https://example.org/a.jsonl",
    "hf://datasets/other/name/a.jsonl",
    "zip://a.jsonl::/tmp/a.zip",
    "C:\\rows.jsonl",
    "~/rows.jsonl",
]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("form", ["text", "list", "splits", "folder"])
def test_the_card_of_a_hub_dataset_names_a_file_elsewhere(form, path):
    forms = {
        "text": {"data_files": path},
        "list": {"data_files": ["a.jsonl", path]},
        "splits": {"data_files": [{"split": "train", "path": ["a.jsonl", path]}]},
        "folder": {"data_dir": path},
    }
    card = {"configs": [{"config_name": "a", "data_files": "data/*.parquet"}, {"config_name": "b", **forms[form]}]}
    with pytest.raises(
        ValueError, match=r"^owner/name: README\.md names the data file '.*', which is not in this repo"
    ):
        check_card_data("owner/name", "README.md", card)


def test_the_card_is_read_before_the_data(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(
        f"---\n{yaml.dump({'configs': [{'config_name': 'default', 'data_files': '/etc/*'}]})}---\n"
    )
    monkeypatch.setattr(boundaries, "hf_hub_download", lambda source, file, **options: tmp_path / file)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("the data was loaded"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"^owner/name: README\.md names the data file '/etc/\*'"):
        load_rows("owner/name", "train")
    (tmp_path / "README.md").write_text("---\nconfigs: [&a [&b {x: *a, y: *b}\n---\n")
    with pytest.raises(ValueError, match=r"^owner/name: README\.md cannot be read \(.+\)\. Name other data"):
        load_rows("owner/name", "train")


CARDS = [
    {},
    None,
    [],
    {"configs": None},
    {"configs": "a"},
    {
        "configs": [
            {"config_name": "a", "data_files": [{"split": "train", "path": "data/train-*"}], "data_dir": "data"}
        ]
    },
    {"configs": [{"config_name": "a", "data_files": "**/*..jsonl"}], "dataset_info": [{"features": [{"name": "a"}]}]},
]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_other_cards(card):
    check_card_data("owner/name", "README.md", card)


# ------------------------------------------------------------------------------------ damage
DAMAGE = {
    "dataset_dict.json": [
        "{}",
        "[]",
        '{"splits": "train"}',
        '{"splits": [1]}',
        "{",
        '{"splits": {"train": 1}}',
        "[" * 10**5,
    ],
    "train/state.json": [
        "{}",
        "[]",
        "{",
        '{"_data_files": "a"}',
        '{"_data_files": [{}]}',
        '{"a": 1, "a": 2}',
        "[" * 10**5,
    ],
    "train/dataset_info.json": [
        "[]",
        "{",
        '{"features": "x"}',
        '{"features": {"prompt": {"_type": "Own"}}}',
        '{"features": {"prompt": {"dtype": "own", "_type": "Value"}}}',
        '{"features": {"other": {"dtype": "string", "_type": "Value"}}}',
        '{"features": {"prompt": 1}}',
        '{"splits": [1]}',
        '{"splits": {"train": {"name": "train", "own": 1}}}',
        "[" * 10**5,
    ],
}


@pytest.mark.parametrize(
    ("file", "content"), [(file, content) for file in DAMAGE for content in DAMAGE[file]], ids=str
)
def test_damaged_descriptions(file, content, tmp_path):
    DatasetDict(train=Dataset.from_dict(ROWS)).save_to_disk(tmp_path / "rows")
    (tmp_path / "rows" / file).write_text(content)
    refused(tmp_path / "rows", r"rows\S* ?.*\. (Save the dataset anew|Name one of them)\.$")


@pytest.mark.parametrize("key", ["_data_files", "_fingerprint", "_format_type", "_format_kwargs", "_split"])
@pytest.mark.parametrize("value", [None, 7, "own", ["a"], {"a": 1}, "\x1b[2J"], ids=str)
def test_states_of_other_kinds(key, value, tmp_path):
    folder = saved(tmp_path)
    edit(folder / "state.json", lambda found: found.update({key: value}))
    try:
        assert len(load_rows(str(folder), "train")) == 2
    except ValueError as error:
        assert str(folder) in str(error) and str(error).isprintable()


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_damaged_bytes_name_the_file(kind, tmp_path):
    """Each is an error of ours, or its cells can be read."""
    draw, long = random.Random(0), Dataset.from_dict({"prompt": [f"The film {number}" for number in range(300)]})
    if kind == "arrow":
        folder = saved(tmp_path, long)
        path = next(folder.glob("*.arrow"))
    else:
        folder = path = tmp_path / "a.parquet"
        long.to_parquet(path)
    good, refused_ = path.read_bytes(), 0
    for _ in range(120):
        bad = bytearray(good)
        for _ in range(draw.choice([1, 4, 64])):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        if draw.random() < 0.2:
            del bad[draw.randrange(len(bad)) :]
        path.unlink()  # the file may still be mapped
        path.write_bytes(bytes(bad))
        try:
            rows = load_rows(str(folder), "train")
            assert all(len(rows[column][:]) == len(rows) for column in rows.column_names)
        except ValueError as error:
            assert str(folder) in str(error) and str(error).isprintable(), error
            refused_ += 1
    assert refused_ > 20


def test_names_of_files_are_shown_without_codes(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("\x1b[2Ja.jsonl", "b.csv"):
        (folder / name).write_text("x")
    with pytest.raises(ValueError, match=r"several formats \(.*\\x1b\[2Ja\.jsonl") as caught:
        load_rows(str(folder), "train")
    assert str(caught.value).isprintable()
    (folder / "b.csv").unlink()
    with pytest.raises(ValueError, match=r"rows/\\x1b\[2Ja\.jsonl line 1: not valid JSON"):
        load_rows(str(folder), "train")
