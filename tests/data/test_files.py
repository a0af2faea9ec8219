"""`data.files`: what can be read, and what each error says."""

import json
import re

import datasets
import pytest
from datasets import Dataset, DatasetDict

from data.cells import require_columns, shorten
from data.files import load_rows


ROWS = [{"prompt": "The film", "margin": 1.0}, {"prompt": "It is", "margin": 2.5}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _file(tmp_path, name: str, content: str | bytes) -> str:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def _lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _refuse(*args, **kwargs):
    raise AssertionError(f"load_dataset{args} was called")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", _lines(ROWS)),
        ("rows [1]*.jsonl", _lines(ROWS)),
        ("rows.JSONL", "\ufeff" + _lines(ROWS).replace("\n", "\n\n")),
        ("rows.json", json.dumps(ROWS)),
        ("rows.csv", "prompt,margin\nThe film,1.0\nIt is,2.5\n"),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_whole_file_is_the_data_whatever_the_split(tmp_path, name, content, split):
    assert list(load_rows(_file(tmp_path, name, content), split)) == ROWS


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    Dataset.from_list(ROWS).to_parquet(path)
    assert list(load_rows(str(path), "test")) == ROWS


def test_csv_texts_stay_as_written(tmp_path):
    rows = load_rows(_file(tmp_path, "a.csv", "chosen,rejected,margin\n007,None,1\n4,NA,\n"), "train")
    assert rows["chosen"][:] == ["007", "4"]
    assert rows["rejected"][:] == ["None", "NA"]
    assert rows["margin"][:] == [1.0, None]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_rows_far_down_are_not_cast_to_the_type_of_the_first(tmp_path, suffix):
    if suffix == ".csv":
        content = "chosen,margin\n" + "good,1\n" * 12_000 + "good,1.5\n"
    else:
        content = _lines([{"chosen": "x" * 1000, "margin": 1}] * 11_000 + [{"chosen": ["y"], "margin": 1.5}])
    rows = load_rows(_file(tmp_path, "long" + suffix, content), "train")
    assert rows[-1] == {"chosen": "good" if suffix == ".csv" else ["y"], "margin": 1.5}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": 1 "b": 2}', "not valid JSON (Expecting ',' delimiter at column 9)"),
        (b'{"a": "open', "not valid JSON (Unterminated string starting at column 7)"),
        (b'["a", "b"]', "not a JSON object (['a', 'b'])"),
        (b"null", "not a JSON object (None)"),
        (b'{"a": "caf\xe9"}', "not UTF-8 text (invalid continuation byte at byte 11)"),
    ],
)
def test_bad_json_line(tmp_path, line, problem):
    path = _file(tmp_path, "prefs.jsonl", b'{"a": 1}\n\n{"a": 2}\n' + line + b'\n{"a": 3}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path} line 4: {problem}. Correct or delete the line.")):
        load_rows(path, "train")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", '{"a": 1, "a": 2}\n', r" line 1: not valid JSON \(the key 'a' is specified twice\)\. Correct or"),
        ("a.json", '[{"a": 1}', r" line 1: not valid JSON \(Expecting ',' or '\]'\)\. Correct the file"),
        (
            "a.csv",
            "chosen,rejected\na,b\na,b,c,d\n",
            r" line 3: more cells than the header \(4, not 2\)\. Quote the cells",
        ),
        ("a.parquet", "text", r": could not be read as \.parquet \(.*4 bytes.*\)\. Correct the file"),
    ],
)
def test_unreadable_file_gives_the_readers_reason(tmp_path, name, content, reason):
    path = _file(tmp_path, name, content)
    with pytest.raises(ValueError, match=name + reason):
        load_rows(path, "train")


def test_csv_rows_longer_than_the_header(tmp_path):
    path = _file(tmp_path, "a.csv", "chosen,rejected\nWell, good,bad\n")
    with pytest.raises(ValueError, match=r"a\.csv line 2: more cells than the header \(3, not 2\)\. Quote the cells"):
        load_rows(path, "train")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", ""), ("a.json", "[]"), ("a.csv", ""), ("a.csv", "text\n")],
)
def test_empty_file(tmp_path, name, content):
    with pytest.raises(ValueError, match=rf"{name}: the data has no rows\. Name a file or split that has rows"):
        load_rows(_file(tmp_path, name, content), "train")


def test_empty_saved_dataset(tmp_path):
    Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved: the data has no rows\."):
        load_rows(str(tmp_path / "saved"), "train")


def test_empty_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"text": []}).to_parquet(path)
    with pytest.raises(ValueError, match=r"a\.parquet: the data has no rows\."):
        load_rows(str(path), "train")


@pytest.mark.parametrize("name", ["a.jsonl", "b/a.csv", "./prefs", "/nowhere/prefs", "~/no-prefs", "prefs", "a/b/c"])
def test_missing_local_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", _refuse)
    with pytest.raises(FileNotFoundError, match=rf"^{re.escape(name)}: no such file or folder .*Correct the path"):
        load_rows(name, "train")


def test_unknown_suffix(tmp_path):
    path = _file(tmp_path, "prefs.txt", "text")
    with pytest.raises(
        ValueError, match=r"must end in one of \.jsonl, .*\.parquet, or one of them plus \.gz, not '\.txt'"
    ):
        load_rows(path, "train")


def test_folder_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _file(tmp_path, "csv/train.jsonl", _lines(ROWS))  # `csv` is also the name of a reader of `datasets`
    _file(tmp_path, "csv/test.jsonl", _lines(ROWS[:1]))
    assert list(load_rows("csv", "train")) == ROWS
    assert list(load_rows("csv", "test")) == ROWS[:1]
    with pytest.raises(ValueError, match=r"^csv: split 'validation' could not be loaded .*\['train', 'test'\]"):
        load_rows("csv", "validation")
    with pytest.raises(ValueError, match=r"^csv: the data has no rows"):
        load_rows("csv", "train[:0]")


def test_folder_without_data(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: no data found in this folder"):
        load_rows(str(tmp_path / "empty"), "train")


def test_saved_dataset_has_no_splits(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert list(load_rows(str(tmp_path / "saved"), "validation")) == ROWS


def test_saved_splits(tmp_path):
    parts = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))
    parts.save_to_disk(tmp_path / "saved")
    assert list(load_rows(str(tmp_path / "saved"), "test")) == ROWS[:1]
    with pytest.raises(ValueError, match=r"saved: no split 'validation'; the splits are train, test\. Name one"):
        load_rows(str(tmp_path / "saved"), "validation")


def test_damaged_saved_dataset(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"saved: \S+saved could not be loaded \(.+\)\. Save the dataset anew"):
        load_rows(str(tmp_path / "saved"), "train")
    arrow.unlink()
    with pytest.raises(ValueError, match=r"saved: \S+saved could not be loaded \(.*No such file.*\)\. Save the"):
        load_rows(str(tmp_path / "saved"), "train")


def test_empty_hub_split(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Dataset.from_dict({"text": []}))
    with pytest.raises(ValueError, match=r"^owner/name: the data has no rows\."):
        load_rows("owner/name", "train")


def test_hub_dataset(monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or Dataset.from_list(ROWS))
    assert list(load_rows("owner/name", "train[:2]")) == ROWS
    assert calls == [(("owner/name",), {"split": "train[:2]"})]


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("gone"), FileNotFoundError, r"no data.*\(gone\).*hf auth login"),
        (ConnectionError("offline"), FileNotFoundError, r"no data.*\(offline\)\. Check the name and the network"),
        (ValueError("Unknown split. Should be one of ['train']."), ValueError, r"'dev' could.*\['train'\]\)\. "),
        (RuntimeError("Dataset scripts are no longer supported"), ValueError, r"\(Dataset scripts are no longer"),
    ],
)
def test_hub_errors(monkeypatch, raised, kind, message):
    def load_dataset(*args, **kwargs):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(kind, match=rf"^owner/name: .*{message}"):
        load_rows("owner/name", "dev")


def test_require_columns_suggests_the_near_name():
    rows = Dataset.from_dict({"promt": ["a"], "id": [1]})
    with pytest.raises(ValueError, match=r"^x: no column 'prompt'; .*: \['promt', 'id'\]\. Did you mean 'promt'\?"):
        require_columns(rows, ("prompt",), "x")
    require_columns(rows, ("promt",), "x")


def test_shorten_keeps_60_characters():
    assert shorten("a" * 58) == repr("a" * 58)
    assert shorten("a" * 59) == "'" + "a" * 56 + "..."
