"""`data.mixture`: several datasets in one, each passed over as often as it says, and the same rows in every epoch."""

import json
from collections import Counter

import pytest
from datasets import Dataset

from data.mixture import Entry, entries_of, load_mixture
from data.preferences import load_preferences
from data.rankings import load_rankings
from data.ratings import load_ratings


@pytest.fixture
def pairs(tmp_path):
    """Write a file of pairs whose letters name the file and the row, and return its path."""

    def write(name: str, number: int, **more) -> str:
        rows = [{"prompt": "x", "chosen": f" {name}{i}", "rejected": " no"} | more for i in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / f"{name}.jsonl")

    return write


def mixed(*entries: Entry, seed: int = 0, load=load_preferences, **options) -> Dataset:
    return load_mixture(list(entries), load, seed=seed, **options)[0]


def taken(rows: Dataset) -> Counter:
    return Counter(side.strip() for side in rows["chosen"])


def test_without_weights_the_rows_are_joined(pairs):
    a, b = pairs("a", 3), pairs("b", 2)
    rows = mixed(Entry(a, "train"), Entry(b, "train"))
    assert [side.strip() for side in rows["chosen"]] == ["a0", "a1", "a2", "b0", "b1"]
    assert rows.files == (a, b) and rows.numbers.tolist() == [1, 2, 3, 1, 2]


def test_a_weight_is_the_number_of_passes(pairs):
    a, b = pairs("a", 10), pairs("b", 4)
    rows, shares = load_mixture([Entry(a, "train", 0.3), Entry(b, "train", 2.5)], load_preferences, seed=0)
    found = taken(rows)
    assert sum(found[f"a{i}"] for i in range(10)) == 3 and max(found[f"a{i}"] for i in range(10)) == 1
    assert sorted(found[f"b{i}"] for i in range(4)) == [2, 2, 3, 3]
    assert [(share.rows, share.taken) for share in shares] == [(10, 3), (4, 10)]
    assert str(shares[0]) == f"{a}: 3 rows an epoch, of 10"
    numbers = [number for number, of in zip(rows.numbers, rows.of, strict=True) if of == 0]
    assert numbers == sorted(numbers)  # rows that follow each other still do


def test_the_seed_draws_the_rows(pairs):
    entries = [Entry(pairs("a", 40), "train", 0.5), Entry(pairs("b", 40), "train", 0.5)]
    draws = [taken(mixed(*entries, seed=seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    numbers = [{name[1:] for name in draws[0] if name[0] == letter} for letter in "ab"]
    assert numbers[0] != numbers[1]  # files of one length are not drawn alike


def test_fractions_are_those_of_trl(pairs):
    """Shares of the mixture, as large as it can be with no row twice: 10 of 0.2 are 50, of which 40 come from the other."""
    rows = mixed(Entry(pairs("a", 100), "train", fraction=4.0), Entry(pairs("b", 10), "train", fraction=1.0))
    found = taken(rows)
    assert max(found.values()) == 1
    assert Counter(name[0] for name in found) == {"a": 40, "b": 10}


def test_columns_that_only_some_have_are_left_out(pairs):
    a, b = pairs("a", 2, margin=1, agreement=0.75), pairs("b", 2, margin=0.5)
    rows = mixed(Entry(a, "train"), Entry(b, "train"))
    assert set(rows.column_names) == {"prompt", "chosen", "rejected", "margin"}
    assert rows["margin"][:] == [1, 1, 0.5, 0.5]


def test_bad_rows_are_counted(pairs, tmp_path):
    a = pairs("a", 2)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "x", "chosen": "", "rejected": "b"}) + "\n" + open(a).readline())
    with pytest.raises(ValueError, match="bad.jsonl row 1 .*'chosen' must not be empty"):
        mixed(Entry(a, "train"), Entry(str(bad), "train"))
    assert mixed(Entry(a, "train", 2.0), Entry(str(bad), "train"), drop=True).left_out == 1


def test_pairs_and_rankings_are_ranked_together(pairs, tmp_path):
    """A pair is a ranking of two; its agreement is of no use to rankings of more."""
    file = tmp_path / "rankings.jsonl"
    file.write_text(json.dumps({"prompt": "x", "ranking": [" a", " b", " c"]}) + "\n")
    rows = mixed(Entry(pairs("a", 1, agreement=0.75), "train"), Entry(str(file), "train"), load=load_rankings)
    assert rows.to_list() == [
        {"prompt": "x", "ranking": [" a0", " no"]}, {"prompt": "x", "ranking": [" a", " b", " c"]}
    ]  # fmt: skip


def test_other_formats_are_refused(pairs, tmp_path):
    a, file = pairs("a", 1), tmp_path / "other.jsonl"

    def refused(row: dict, load=load_preferences) -> str:
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError) as caught:
            mixed(Entry(a, "train"), Entry(str(file), "train"), load=load)
        return str(caught.value)

    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    assert refused({"chosen": "x a", "rejected": "x b"}).startswith(
        f"datasets: {a} has the columns chosen, prompt, rejected (texts), and {file} has the columns chosen, rejected (texts)."
    )
    dialogue = {"prompt": turns[:1], "chosen": turns[1:], "rejected": [turns[1] | {"content": "No."}]}
    assert "rejected (conversations). Give all of them one format" in refused(dialogue)
    assert "the columns completion, prompt, rating" in refused(
        {"prompt": "a", "completion": "b", "rating": 1}, load_ratings
    )
    with pytest.raises(ValueError, match="a.jsonl: of 1 rows none is left. Raise its weight or fraction."):
        mixed(Entry(a, "train", 0.1))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("a.jsonl", "must be a list of entries"),
        ([], "must be a list of entries"),
        (["a.jsonl"], "must be a mapping with a path"),
        ([{"weight": 1}], "must be a mapping with a path"),
        ([{"path": ""}], "must be a mapping with a path"),
        ([{"path": 3}], "must be a mapping with a path"),
        ([{"path": "a", "wieght": 1}], "unknown key 'wieght'. The keys are path, split, weight, fraction"),
        ([{"path": "a", "split": 3}], "must name its split as text"),
        ([{"path": "a", "weight": 0}], "must have a weight above 0 and at most 1,000"),
        ([{"path": "a", "weight": 1001}], "must have a weight above 0 and at most 1,000"),
        ([{"path": "a", "weight": True}], "must have a weight"),
        ([{"path": "a", "weight": float("nan")}], "must have a weight"),
        ([{"path": "a", "fraction": float("inf")}], "must have a fraction above 0."),
        ([{"path": "a", "fraction": "half"}], "must have a fraction above 0."),
        ([{"path": "a", "fraction": 1, "weight": 1}], "has a weight and a fraction"),
        ([{"path": "a", "fraction": 1}, {"path": "b"}], "some entries have a fraction and others none"),
    ],
)
def test_entries_that_are_wrong(given, problem):
    with pytest.raises(ValueError) as caught:
        entries_of(given, "train")
    assert str(caught.value).startswith("datasets") and problem in str(caught.value)


def test_entries():
    assert entries_of([{"path": "a", "weight": 2}, {"path": "b", "split": "test"}], "dev") == [
        Entry("a", "dev", 2.0), Entry("b", "test", 1.0)
    ]  # fmt: skip
