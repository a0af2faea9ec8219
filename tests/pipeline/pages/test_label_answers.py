"""`pipeline.pages.label_answers`: no answer is lost, a cut line costs one answer, and preferences are what people said."""

import errno
import json
import os

import pytest

from data.judgements import disagreement
from data.preferences import load_preferences
from pipeline.pages.label_answers import AnswerFile, current, preferences, read_answers, votes, write_preferences


def line(pair: str, annotator: str, label: str, *, swapped: bool = False, **others) -> dict:
    """A line about a pair whose completions are ` a <pair>` and ` b <pair>`, in the order in which they were made."""
    sides = [f" a {pair}", f" b {pair}"]
    first, second = sides[::-1] if swapped else sides
    found = {
        "pair": pair,
        "annotator": annotator,
        "label": label,
        "prompt": "The film",
        "first": first,
        "second": second,
    }
    found |= {"first_from": "ppo", "second_from": "sft", "swapped": swapped, "shared": False, "number": 1}
    return found | {"disagreement": None} | others


def test_an_answer_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size) or real(descriptor)
    )
    file = AnswerFile(tmp_path / "answers.jsonl")
    synced.clear()
    file.append(line("p", "Ana", "1"))
    assert synced == [(tmp_path / "answers.jsonl").stat().st_size]
    file.append(line("q", "Ana", "tie", prompt="Été 🎬\n"))
    assert [found["pair"] for found in read_answers(file.path)] == ["p", "q"]
    assert read_answers(file.path)[1]["prompt"] == "Été 🎬\n"


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    file = AnswerFile(tmp_path / "answers.jsonl")
    file.append(line("p", "Ana", "1"))
    before, real = file.path.read_bytes(), os.write

    def fills(descriptor, content):
        if len(content) < 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, content[:50])

    monkeypatch.setattr(os, "write", fills)
    with pytest.raises(OSError, match=r"answers\.jsonl: the answer could not be saved \(No space left on device\)"):
        file.append(line("q", "Ana", "2"))
    assert file.path.read_bytes() == before


@pytest.mark.parametrize("left", [1, 10, -1])
def test_a_last_line_that_was_cut_is_dropped_and_said(tmp_path, capsys, left):
    file = AnswerFile(tmp_path / "answers.jsonl")
    file.append(line("p", "Ana", "1"))
    whole = file.path.read_bytes()
    file.append(line("q", "Ana", "2"))
    file.path.write_bytes(whole + file.path.read_bytes()[len(whole) :][: left if left > 0 else -2])
    assert [found["pair"] for found in read_answers(file.path)] == ["p"]
    assert "answers.jsonl: the last line was cut off and is dropped: '{" in capsys.readouterr().out
    assert file.path.read_bytes() == whole
    again = AnswerFile(file.path)
    again.append(line("r", "Ana", "2"))
    assert [found["pair"] for found in read_answers(file.path)] == ["p", "r"]


def test_a_line_that_lacks_only_its_end_is_kept(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(line("p", "Ana", "1")))
    assert [found["pair"] for found in read_answers(path)] == ["p"]
    AnswerFile(path).append(line("q", "Ana", "2"))
    assert [found["pair"] for found in read_answers(path)] == ["p", "q"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}\n", r"answers\.jsonl line 1: 'pair' is missing.*move the file if pipeline.label has not written it"),
        ('{"pair": "x"\n{}\n', r"line 1: not valid JSON"),
        ("my notes", r"answers\.jsonl: no file of answers, but b'my notes'"),
        (json.dumps(line("p", "Ana", "3")) + "\n", r"line 1: 'label' is '3', but must be \"1\" or \"2\""),
        (json.dumps(line("p", "Ana", "1") | {"first": []}) + "\n", r"line 1: 'first' is \[\], but must be"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_and_kept(tmp_path, content, message):
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_answers(path)
    assert path.read_text() == content


def test_the_last_line_of_an_annotator_about_a_pair_counts():
    lines = [line("p", "Ana", "1"), line("p", "Ben", "2"), line("q", "Ana", "1"), line("p", "Ana", "undo")]
    assert [(found["pair"], found["annotator"]) for found in current(lines)] == [("p", "Ben"), ("q", "Ana")]
    lines.append(line("p", "Ana", "tie"))
    assert [found["label"] for found in current(lines)] == ["2", "1", "tie"]


def test_preferences_by_hand():
    """p: both prefer b, in either order. q: one of two prefers a, the other sees a tie. r: tied. s: skipped. t: Ana alone."""
    lines = [
        line("p", "Ana", "2"),
        line("p", "Ben", "1", swapped=True),
        line("q", "Ana", "1"),
        line("q", "Ben", "tie", swapped=True),
        line("r", "Ana", "1"),
        line("r", "Ben", "1", swapped=True),
        line("s", "Ana", "skip"),
        line("t", "Ana", "1", swapped=True),
        line("t", "Ben", "skip"),
    ]
    expected = [("p", "b", 1.0), ("q", "a", 0.75), ("t", "b", 1.0)]
    found = preferences(lines)
    assert [(row["chosen"], row["agreement"]) for row in found] == [
        (f" {side} {p}", share) for p, side, share in expected
    ]
    assert all(row["prompt"] == "The film" and row["chosen"] != row["rejected"] for row in found)
    tied = [row["agreement"] for row in preferences(lines, ties=True)]
    assert tied == [1.0, 0.75, 0.5, 1.0]


def test_kappa_by_hand():
    """Two annotators and six pairs: they agree on four, and the votes are 7 for a, 4 for b and 1 tie of 12.

    By chance they would agree on (49 + 16 + 1) / 144 of the pairs, so kappa is (4/6 - 66/144) / (1 - 66/144) = 5/13.
    """
    answers = {"a": "11", "b": "11", "c": "11", "d": "22", "e": "12", "f": "2t"}
    lines = []
    for pair, (ana, ben) in answers.items():
        turned = {"1": "2", "2": "1", "t": "tie"}[ben]
        lines += [line(pair, "Ana", ana), line(pair, "Ben", turned, swapped=True)]
    lines.append(line("g", "Ana", "1"))
    assert votes(lines)["f"] == [0.0, 0.5]
    unanimous, same, kappa = disagreement(list(votes(lines).values()))
    assert (unanimous, same) == (4 / 6, 4 / 6)
    assert kappa == pytest.approx(5 / 13)


def test_the_reward_stage_reads_the_preferences(tmp_path):
    turns = {"prompt": [{"role": "user", "content": "Hi"}], "first": [{"role": "assistant", "content": "Hello!"}]}
    turns |= {"second": [{"role": "assistant", "content": "Go away."}]}
    assert write_preferences(tmp_path, [line("p", "Ana", "2", **turns), line("q", "Ana", "skip", **turns)]) == 1
    (row,) = load_preferences(str(tmp_path / "preferences.jsonl"), "train")
    assert row == {"prompt": turns["prompt"], "chosen": turns["second"], "rejected": turns["first"], "agreement": 1.0}
    assert write_preferences(tmp_path, []) == 0
    assert not (tmp_path / "preferences.jsonl").exists()
