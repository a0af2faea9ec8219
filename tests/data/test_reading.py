"""`data.reading` and folders: no cell changes, whatever the format, and every error names file and line or row."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from data.files import has_splits, load_rows
from data.preferences import check_preferences
from data.prompts import check_prompts


def write(folder, name: str, content: str | bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(path)


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


TEXTS = (
    *("1991-02-03", "2019-04-01T10:00:00Z", "10:30", "007", "42", "1e5", "1_000", "3.0", "0x10", "+1", "00:00", "1/2"),
    *("NaN", "nan", "NA", "N/A", "None", "null", "NULL", "", " ", "True", "false", "-inf", "#N/A", "<NA>"),
    *(
        "12345678901234567890123",
        '{"a": 1}',
        "[1]",
        '"',
        "a\nb",
        "a\r\nb",
        "\ttab, comma",
        "\u2028",
        "\ufeff",
        "é",
        "😀",
    ),
)


def as_csv(values, mark: str = ",") -> str:
    return "".join(mark.join('"' + cell.replace('"', '""') + '"' for cell in (text, text)) + "\r\n" for text in values)


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("where", ["file", "folder", "folder [v2]*?", "shards"])
def test_text_stays_text(form, zipped, where, tmp_path):
    """In a column of our own and in one of the user's, each text alone in its file's head or among others."""
    rows = [{"prompt": text, "answer": text} for text in TEXTS]

    def content(rows: list[dict]) -> str | bytes:
        if form == ".parquet":
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows), sink)
            return sink.getvalue().to_pybytes()
        if form in (".csv", ".tsv"):
            mark = "," if form == ".csv" else "\t"
            return f"prompt{mark}answer\r\n" + as_csv([row["prompt"] for row in rows], mark)
        return lines(rows) if form == ".jsonl" else json.dumps(rows, indent=1)

    suffix = form + zipped
    if where == "file":
        name = write(tmp_path, f"rows {suffix}", content(rows))
    elif where == "shards":
        for number, part in enumerate((rows[:1], rows[1:5], rows[5:])):
            write(tmp_path / "set", f"train-0000{number}-of-00003{suffix}", content(part))
        name = str(tmp_path / "set")
    else:
        write(tmp_path / where, f"train{suffix}", content(rows))
        name = str(tmp_path / where)
    assert list(load_rows(name, "train")) == rows
    assert has_splits(name) == (where != "file")


VALUES = [
    [1, 2, 2**62],
    [1.5, -0.1, 1e300],
    [True, False, True],
    [1, "1", "x"],
    ["7", 7, None],
    [True, 1, "1991-02-03"],
    [{"a": 1}, {"b": "007"}, {}],
    [[1], ["1"], []],
    [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b", "name": "c"}], []],
    [None, None, "NaN"],
]


@pytest.mark.parametrize("form", [".jsonl", ".json"])
@pytest.mark.parametrize("values", VALUES, ids=str)
def test_values_of_json_keep_type_and_value(values, form, tmp_path):
    rows = [{"x": value} for value in values]
    name = write(tmp_path, f"rows{form}", lines(rows) if form == ".jsonl" else json.dumps(rows))
    read = [row["x"] for row in load_rows(name, "train")]
    assert json.dumps(read) == json.dumps(values)  # True is not 1 there, nor 1.5 "1.5"


def test_shards_whose_numbers_are_of_two_types(tmp_path):
    write(tmp_path / "set", "a-train.jsonl", lines([{"chosen": "a", "margin": 1}]))
    write(tmp_path / "set", "b-train.jsonl", lines([{"chosen": "b", "margin": 1.5}]))
    assert load_rows(str(tmp_path / "set"), "train")["margin"][:] == [1, 1.5]


@pytest.mark.parametrize("number", [2**70, -(2**64), 10**30])
def test_a_number_that_no_dataset_holds_is_refused(number, tmp_path):
    name = write(tmp_path, "a.jsonl", lines([{"x": 1}, {"x": number}]))
    with pytest.raises(ValueError, match=r"a\.jsonl: column 'x' cannot keep the value of row 2 .*Write it as text"):
        load_rows(name, "train")


def test_the_columns_that_are_numbers_by_definition(tmp_path):
    name = write(tmp_path, "a.csv", "chosen,margin,agreement,score\na,1,0.5,9\nb,1_0,,9\n")
    assert list(load_rows(name, "train")) == [
        {"chosen": "a", "margin": 1.0, "agreement": 0.5, "score": "9"},
        {"chosen": "b", "margin": "1_0", "agreement": None, "score": "9"},
    ]


HALF = '{"prompt": "good \\ud83d film"}'
BAD = {
    "half a surrogate pair, lines": ("a.jsonl", f'{{"prompt": "a"}}\n\n{HALF}\n', r"line 3: half of a surrogate pair"),
    "half a pair, array": (
        "a.json",
        f'[\n{{"prompt": "a"}},\n{HALF}\n]',
        r"line 3, row 2 .*: half of a surrogate pair",
    ),
    "half a pair in a key": ("a.json", '[{"a\\udc00": 1}]', r"line 1, row 1 .*: half of a surrogate"),
    "half a pair, deep": ("a.jsonl.gz", '{"m": [{"content": "\\uD83D"}]}', r"line 1: half of a surrogate"),
    "an array cut short": ("a.json", '[\n{"a": 1},\n{"a": "x', r"line 3, row 2 .*: not valid JSON"),
    "an array of texts": ("a.json", '["a", "b"]', r"line 1, row 1 .*: not a JSON object \('a'\)"),
    "text after an array": ("a.json", "[{}] x", r"not valid JSON \(text after the array's end\)"),
    "a key given twice, deep": ("a.jsonl", '{"m": {"a": 1, "a": 2}}', r"line 1: .*the key 'a' is specified twice"),
    "nested too deep": ("a.jsonl", '{"a": ' + "[" * 100_000, r"line 1: not usable JSON \(nested too deep\)"),
    "a number of 5,000 digits": ("a.jsonl", '{"a": ' + "9" * 5000 + "}", r"line 1: not usable JSON"),
    "Latin-1 in an array": ("a.json", b'[\n{"a": "caf\xe9"}]', r"line 2: not UTF-8 text .* at byte 11"),
    "fewer cells": ("a.csv", "a,b\n1,2\n3\n", r"line 3: fewer cells than the header \(1, not 2\)"),
    "more cells after a long one": ("a.csv", 'a,b\n"x\ny",2\n3,4,5\n', r"line 4: more cells than the header"),
    "a quote left open": ("a.tsv", 'a\tb\n1\t2\n"3\t4\n', r"line 3: unexpected end of data\. Quote"),
    "a column twice": ("a.csv", "a,b,a\n", r"line 1: the header names 'a' twice"),
    "an archive cut short": ("a.csv", None, r"the archive is damaged"),
    "parquet cut short": ("a.parquet", b"PAR1 and no more", r"could not be read as \.parquet"),
}


@pytest.mark.parametrize(("file", "content", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("where", ["file", "folder"])
def test_an_error_names_file_and_line(file, content, message, where, tmp_path):
    if content is None:
        file, content = "a.csv.gz", "a,b\n1,2\n" * 99
    name = write(tmp_path / "set", file, content)
    if "damaged" in message:
        whole = (tmp_path / "set" / file).read_bytes()
        (tmp_path / "set" / file).write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=rf"^{name}:? ?{message}"):
        load_rows(name if where == "file" else str(tmp_path / "set"), "train")


FOLDERS = {
    "two formats": (
        ["train.csv", "train.jsonl"],
        r"the folder has files of several formats \(train\.csv, train\.jsonl\)",
    ),
    "two formats in two splits": (["train.csv", "test.parquet"], "the folder has files of several formats"),
    "two formats in folders": (["a/train.json", "b/train.jsonl.gz"], "the folder has files of several formats"),
    "a file and its archive": (
        ["train.jsonl", "train.jsonl.gz"],
        r"train\.jsonl and train\.jsonl\.gz would both be read",
    ),
    "a file of no split": (
        ["train.jsonl", "more.jsonl"],
        r"the name of more\.jsonl tells no split, but the name of train\.jsonl tells one",
    ),
}


@pytest.mark.parametrize(("files", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_of_which_something_would_be_left_out(files, message, tmp_path):
    for file in files:
        write(tmp_path / "set", file, "")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/set: {message}"):
        load_rows(str(tmp_path / "set"), "train")


def test_shards_of_other_columns(tmp_path):
    write(tmp_path, "set/preferences_train.jsonl", lines([{"chosen": "a", "rejected": "b"}]))
    write(tmp_path, "set/sft_train.jsonl", lines([{"text": "a"}]))
    with pytest.raises(
        ValueError, match=r"sft_train\.jsonl: the columns \['text'\] differ from those of .*preferences_tr"
    ):
        load_rows(str(tmp_path / "set"), "train")


SPLITS = {
    "train.jsonl": "train",
    "my-training_1.jsonl": "train",
    "rows.jsonl": "train",
    "dev.jsonl": "validation",
    "val/part-1.jsonl.gz": "validation",
    "x_eval.jsonl": "test",
    "data/train_prefs-00000-of-00001-ab12.jsonl": "train_prefs",
    "contest.jsonl": "train",
}


@pytest.mark.parametrize(("file", "split"), SPLITS.items(), ids=SPLITS)
def test_the_split_that_a_name_tells(file, split, tmp_path):
    write(tmp_path / "set", file, lines([{"a": 1}]))
    write(tmp_path / "set", "README.md", "---\nconfigs:\n- data_files: /etc/passwd\n---\n")
    assert len(load_rows(str(tmp_path / "set"), split)) == 1
    with pytest.raises(ValueError, match="split 'other' could not be loaded"):
        load_rows(str(tmp_path / "set"), "other")


def test_parts_of_splits(tmp_path):
    write(tmp_path / "set", "train.jsonl", lines([{"a": number} for number in range(10)]))
    write(tmp_path / "set", "test.jsonl", lines([{"a": 10}]))
    rows = load_rows(str(tmp_path / "set"), "train[4:6]+test")
    assert rows["a"][:] == [4, 5, 10]
    with pytest.raises(ValueError, match=r"^.*set/train\.jsonl row 6 \(counting from 1\): 'prompt' must be text"):
        check_prompts(rows.rename_column("a", "prompt").select([1]), "p")


@pytest.mark.parametrize("form", ["file", "shards", "shuffled", "sorted", "kept"])
def test_a_row_is_that_of_the_file(form, tmp_path):
    """Case: row 3 of the second shard, and of a shuffled selection the row of the file."""
    rows = [{"chosen": f"a{number}", "rejected": "b", "margin": 1.0} for number in range(9)]
    rows[7]["rejected"] = " "
    if form == "file":
        name = write(tmp_path, "a.jsonl", lines(rows))
        read, where = load_rows(name, "train"), f"{name} row 8"
    else:
        for number in range(3):
            write(tmp_path / "set", f"train-{number}.jsonl", lines(rows[3 * number : 3 * number + 3]))
        read, where = load_rows(str(tmp_path / "set"), "train"), f"{tmp_path}/set/train-2.jsonl row 2"
    if form == "shuffled":
        read = read.shuffle(seed=1)
        assert read["rejected"][7] != " "
    if form == "sorted":
        read = read.sort("chosen", reverse=True)
    if form == "kept":
        read = read.select([8, 7, 2]).select(range(1, 3))
    with pytest.raises(ValueError, match=rf"^{where} \(counting from 1\): 'rejected' must not be empty"):
        check_preferences(read.select_columns(["chosen", "rejected"]), "p")
    assert (
        type(read.filter(lambda row: row["chosen"] != "a0")) is Dataset
    )  # which knows no origin, rather than a wrong one


def test_other_files_of_a_folder_are_said(tmp_path, caplog):
    write(tmp_path / "set", "train.jsonl", lines([{"a": 1}]))
    write(tmp_path / "set", "more.txt", "a")
    assert len(load_rows(str(tmp_path / "set"), "train")) == 1
    assert "1 other files in this folder are not read (such as more.txt)" in caplog.text
