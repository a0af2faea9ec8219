"""`data.ratings`: texts with a number each, in SFT's formats, and pairs to be held out."""

import json

import pytest
from datasets import Dataset

from data.ratings import check_ratings, load_ratings, whole_texts, with_prompts
from data.rows import Rows


TURNS = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
FORMATS = {
    "text": ({"text": "It was fine."}, "It was fine."),
    "prompt and completion": ({"prompt": "It was", "completion": " fine."}, "It was fine."),
    "messages": ({"messages": TURNS}, TURNS),
    "turns": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, TURNS),
}


@pytest.mark.parametrize(("row", "whole"), FORMATS.values(), ids=FORMATS)
def test_rated_texts_of_each_format(row, whole):
    rows = check_ratings(Dataset.from_list([row | {"rating": 2, "source": "x"}]), "data")
    assert rows.to_list() == [row | {"rating": 2.0}] and whole_texts(rows) == [whole]


def test_csv_files_hold_numbers_as_text(tmp_path):
    file = tmp_path / "ratings.csv"
    file.write_text("text,rating\nfine,4.5\nbad,-1\n")
    assert load_ratings(str(file), "train").to_list() == [
        {"text": "fine", "rating": 4.5}, {"text": "bad", "rating": -1.0}
    ]  # fmt: skip


@pytest.mark.parametrize("rating", ["good", None, "", "nan", "inf", True, "1e20"])
def test_what_is_no_rating(rating, tmp_path):
    file = tmp_path / "ratings.jsonl"
    rows = [{"text": "a", "rating": "3"}, {"text": "b", "rating": rating}, {"text": " ", "rating": "1"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"ratings.jsonl row 2 \(counting from 1\): 'rating' must be a number"):
        load_ratings(str(file), "train")
    kept = load_ratings(str(file), "train", drop=True)  # the last row has no text
    assert kept.to_list() == [{"text": "a", "rating": 3.0}] and kept.left_out == 2 and kept.numbers.tolist() == [1]


def test_pairs_are_for_held_out_rows(tmp_path):
    file = tmp_path / "pairs.jsonl"
    pair = {"prompt": "x", "chosen": " a", "rejected": " b"}
    file.write_text(json.dumps(pair) + "\n")
    assert load_ratings(str(file), "train").to_list() == [pair]
    with pytest.raises(ValueError, match="data: no column 'rating'; needed"):
        check_ratings(Dataset.from_list([{"text": "a", "stars": 3}]), "data")


def test_prompts_are_split_from_conversations():
    def split(row: dict) -> list[dict]:
        return with_prompts(check_ratings(Dataset.from_list([row | {"rating": 1.0}]), "data"), "data").to_list()

    turns = {"prompt": TURNS[:1], "completion": TURNS[1:], "rating": 1.0}
    assert split({"messages": TURNS}) == split({"prompt": TURNS[:1], "completion": TURNS[1:]}) == [turns]
    with pytest.raises(
        ValueError, match="^data: the rows have no prompts, and sft_adapter asks to complete them. Give"
    ):
        split({"text": "a"})
    rows = Dataset.from_list([{"prompt": prompt, "completion": "b", "rating": 1.0} for prompt in ("a", " ")])
    with pytest.raises(ValueError, match=r"data row 2 .*'prompt' must not be empty"):
        with_prompts(rows, "data")
    assert len(with_prompts(Rows.of_file(rows, "data"), "data", drop=True)) == 1
