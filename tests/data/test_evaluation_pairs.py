"""Pairs to measure a reward model on: RewardBench's format, other columns, domains and votes."""

import json

import pytest

from data import convert
from data.evaluation_pairs import MOST_DOMAINS, domains_of, load_evaluation_pairs


BENCH = [
    {"prompt": f"Question {i}?", "chosen": "Yes.", "rejected": "No.", "subset": ("hep-go", "math-prm")[i % 2], "id": i}
    for i in range(4)
]
PAIR = {"prompt": "The film", "chosen": " is fine.", "rejected": " is poor."}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_of_rewardbench_become_conversations_where_asked(tmp_path):
    name = write(tmp_path / "bench.jsonl", BENCH)
    with pytest.raises(ValueError, match=r"run together, such as 'Question 0\?' and 'Yes.'. Set form: conversation"):
        load_evaluation_pairs(name, "filtered")
    rows = load_evaluation_pairs(name, "filtered", form="conversation")
    assert rows[1] == {
        "prompt": [{"role": "user", "content": "Question 1?"}],
        "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "No."}],
        "subset": "math-prm",
        "id": 1,
    }
    assert domains_of(rows, name, None) == ["hep-go", "math-prm"] * 2
    as_they_are = load_evaluation_pairs(name, "filtered", form="text")
    assert as_they_are["chosen"][:] == ["Yes."] * 4


def test_other_columns_stay_with_their_rows(tmp_path):
    rows = [PAIR | {"domain": "a"}, PAIR | {"chosen": "", "domain": "b"}, PAIR | {"chosen": " is odd.", "domain": "c"}]
    name = write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(ValueError, match=r"pairs.jsonl row 2 .*'chosen' must not be empty"):
        load_evaluation_pairs(name, "test")
    found = load_evaluation_pairs(name, "test", drop=True)
    assert found["chosen"][:] == [" is fine.", " is odd."] and domains_of(found, name, "domain") == ["a", "c"]
    assert found.left_out == 1


def test_implicit_prompts_are_taken_apart(tmp_path):
    rows = [{"chosen": "The film is fine.", "rejected": "The film was poor.", "margin": 1.5}]
    found = load_evaluation_pairs(write(tmp_path / "pairs.jsonl", rows), "test")
    assert found[0] == {"prompt": "The film", "chosen": " is fine.", "rejected": " was poor.", "margin": 1.5}


WRONG = {
    "conversations as texts": (
        [{"prompt": [{"role": "user", "content": "Q"}], "chosen": [{"role": "assistant", "content": "a"}],
          "rejected": [{"role": "assistant", "content": "b"}]}], {"form": "text"}, "form='text', but the rows are conv"),
    "no prompt to begin a conversation": (
        [PAIR, {"prompt": "", "chosen": "a", "rejected": "b"}], {"form": "conversation"}, "some rows have no prompt"),
    "a vote that is none": ([PAIR | {"votes": {"a": 2}}], {}, r"row 1 .*'votes' must give each rater 1"),
    "votes without raters": ([PAIR | {"votes": [1, 0]}], {}, r"row 1 .*'votes' must give each rater 1"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "options", "message"), WRONG.values(), ids=WRONG)
def test_rows_that_cannot_be_used(rows, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_evaluation_pairs(write(tmp_path / "pairs.jsonl", rows), "test", **options)


def test_domains_that_cannot_be_used(tmp_path):
    rows = [PAIR | {"subset": "a", "topic": f"{i}", "empty": None} for i in range(MOST_DOMAINS + 1)]
    found = load_evaluation_pairs(write(tmp_path / "pairs.jsonl", rows), "test")
    with pytest.raises(ValueError, match="p: no column 'topics'; .*Did you mean 'topic'"):
        domains_of(found, "p", "topics")
    with pytest.raises(ValueError, match=f"p: the column 'topic' has {MOST_DOMAINS + 1} different values"):
        domains_of(found, "p", "topic")
    with pytest.raises(ValueError, match="row 1 .*'empty' must name the domain"):
        domains_of(found, "p", "empty")
    with pytest.raises(ValueError, match=r"human_ratings:films, split 'test': the domains are film, products"):
        load_evaluation_pairs("human_ratings:films", "test")
    with pytest.raises(ValueError, match=r"split 'tests': .* splits train, validation, test"):
        load_evaluation_pairs("human_ratings", "tests")


def test_votes_come_through_a_conversion(tmp_path):
    """Each annotator's, turned to the chosen side."""
    labels = [(1, 1, 2), (2, 2, 0), (2, None, 2), (1, 1, 1), (1, 0, 1)] * 6
    rows = [
        {"prompt": f"Q{i}?", "response1": "x", "response2": "y"} | {f"annotator{n}": of for n, of in enumerate(row)}
        for i, row in enumerate(labels)
    ]
    convert.main([write(tmp_path / "judged.jsonl", rows), str(tmp_path / "out")])
    found = load_evaluation_pairs(str(tmp_path / "out" / "preferences_train.jsonl"), "train")
    expected = {
        0: ("x", [1.0, 1.0, 0.0]),
        1: ("y", [1.0, 1.0, 0.5]),
        2: ("y", [1.0, None, 1.0]),
        3: ("x", [1.0] * 3),
        4: ("x", [1.0, 0.5, 1.0]),
    }
    assert len(found) > 10
    for row in found:
        chosen, votes = expected[int(row["prompt"][0]["content"][1:-1]) % 5]
        assert row["chosen"][0]["content"] == chosen
        assert row["votes"] == dict(zip(("annotator0", "annotator1", "annotator2"), votes, strict=True))
