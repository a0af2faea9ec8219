"""`data.preferences`: TRL's preference formats pass, and every unusable row is named."""

import json
import math
import re

import datasets
import pytest
from datasets import Dataset

from data.preferences import check_preferences, load_preferences


GOOD = {"prompt": "The film is", "chosen": " great", "rejected": " dull"}


def _says(content: str, role: str = "assistant") -> list[dict]:
    return [{"role": role, "content": content}]


FORMATS = {
    "explicit": GOOD,
    "implicit": {"chosen": "The film is great", "rejected": "The film is dull"},
    "explicit conversation": {"prompt": _says("Hi", "user"), "chosen": _says("Good."), "rejected": _says("Bad.")},
    "implicit conversation": {
        "chosen": _says("Hi", "user") + _says("Good."),
        "rejected": _says("Hi", "user") + _says("Bad."),
    },
}


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)
def test_formats(row):
    assert list(check_preferences(Dataset.from_list([row, row]), "prefs")) == [row, row]


def test_only_known_columns_are_kept():
    row = {**GOOD, "margin": 1, "agreement": 0.75, "id": 3, "score_chosen": 9.0}
    rows = check_preferences(Dataset.from_list([row]), "prefs")
    assert rows.column_names == ["prompt", "chosen", "rejected", "margin", "agreement"]


def test_empty_prompt_is_allowed():
    assert len(check_preferences(Dataset.from_list([GOOD | {"prompt": ""}]), "prefs")) == 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt", "choosen", "rejected"], r"no column 'chosen'; .*, 'rejected'\]\. Did you mean 'choosen'\?"),
        (["chosen", "reject"], r"no column 'rejected'; needed: \['chosen', 'rejected'\], .* Did you mean 'reject'\?"),
        (["text"], r"no column 'chosen'; needed: \['chosen', 'rejected'\], found: \['text'\]\. Rename the column"),
    ],
)
def test_missing_column(columns, message):
    rows = Dataset.from_dict({column: ["a"] for column in columns})
    with pytest.raises(ValueError, match=rf"^prefs\.jsonl: {message}"):
        check_preferences(rows, "prefs.jsonl")


KIND = "must be text, or a list of messages that each have a text 'role' and a text 'content'"
BAD_CELLS = [
    ("chosen", None, KIND),
    ("rejected", None, KIND),
    ("prompt", None, KIND),
    ("chosen", "", "must not be empty"),
    ("rejected", " \n", "must not be empty"),
    ("rejected", " great", "must differ from 'chosen'"),
    ("margin", math.nan, "must be a finite number"),
    ("margin", math.inf, "must be a finite number"),
    ("margin", None, "must be a finite number"),
    ("agreement", 1.5, "must be a share from 0 to 1"),
    ("agreement", None, "must be a share from 0 to 1"),
]


@pytest.mark.parametrize(("field", "value", "problem"), BAD_CELLS)
def test_bad_cell_in_the_second_row(field, value, problem):
    good = GOOD | {"margin": 1.0, "agreement": 0.9}
    rows = Dataset.from_list([good, good | {field: value}, good])
    message = f"prefs.jsonl row 2 (counting from 1): {field!r} {problem}, but is {value!r}. Correct or delete the row."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_preferences(rows, "prefs.jsonl")


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("chosen", [4], KIND),
        ("chosen", [["a", "b"]], KIND),
        ("chosen", [[]], KIND),
        ("chosen", [[{"role": "user"}]], KIND),
        ("chosen", [[{"role": "user", "content": None}]], KIND),
        ("margin", ["2"], "must be a finite number"),
        ("margin", [True], "must be a finite number"),
    ],
)
def test_column_of_another_type(field, value, problem):
    rows = Dataset.from_dict({name: [cell] for name, cell in GOOD.items()} | {field: value})
    with pytest.raises(ValueError, match=re.escape(f"prefs row 1 (counting from 1): {field!r} {problem}, but is")):
        check_preferences(rows, "prefs")


@pytest.mark.parametrize("kind", ["explicit conversation", "implicit conversation"])
def test_conversation_with_empty_last_message(kind):
    row = FORMATS[kind]
    bad = row | {"rejected": row["rejected"][:-1] + _says("  ")}
    with pytest.raises(ValueError, match=r"^prefs row 2 \(counting from 1\): 'rejected' must not be empty, but is \["):
        check_preferences(Dataset.from_list([row, bad]), "prefs")


def test_equal_conversations():
    row = {"chosen": _says("Same."), "rejected": _says("Same.")}
    with pytest.raises(ValueError, match=r"row 1 .*'rejected' must differ from 'chosen'"):
        check_preferences(Dataset.from_list([row]), "prefs")


def test_text_prompt_for_conversations():
    row = FORMATS["explicit conversation"] | {"prompt": "Hi"}
    with pytest.raises(ValueError, match=r"row 1 .*'chosen' must be a text \(texts and conversations do not mix\)"):
        check_preferences(Dataset.from_list([row]), "prefs")


def test_long_values_are_shortened():
    row = GOOD | {"chosen": "a" * 500, "rejected": "a" * 500}
    with pytest.raises(ValueError, match=r"but is 'a{56}\.\.\.\. Correct"):
        check_preferences(Dataset.from_list([row]), "prefs")


def test_load_preferences_reads_and_checks(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "prefs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n")
    assert list(load_preferences(str(path), "train")) == [GOOD, GOOD]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(json.dumps(FORMATS["implicit"]) + "\n" + json.dumps(FORMATS["implicit conversation"]) + "\n")
    with pytest.raises(ValueError, match=r"mixed\.jsonl row 2 \(counting from 1\): 'chosen' must be a text \("):
        load_preferences(str(mixed), "train")


def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(caplog):
    bad = [GOOD | {"rejected": " great"}, GOOD | {"chosen": " "}, GOOD | {"rejected": " great"}]
    rows = Dataset.from_list([bad[0], GOOD, *bad[1:], GOOD])
    assert list(check_preferences(rows, "p", drop=True)) == [GOOD, GOOD]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "p: 3 of 5 rows are left out: 2 because 'rejected' must differ from 'chosen' (first: row 1); 1 because 'chosen' must "
        "not be empty (first: row 3)."
    )
    caplog.clear()
    assert check_preferences(Dataset.from_list([GOOD]), "p", drop=True).num_rows == 1 and not caplog.records
    with pytest.raises(
        ValueError, match=r"^p: drop_bad_rows=True leaves out all 1 rows: 1 because 'chosen' must not be "
    ):
        check_preferences(Dataset.from_list([bad[1]]), "p", drop=True)
    with pytest.raises(ValueError, match="no column 'chosen'"):  # not of a row
        check_preferences(Dataset.from_list([{"rejected": "a"}]), "p", drop=True)
