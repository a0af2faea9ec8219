"""Broken and odd files go through `data.convert` and `data.inspect`: each has its verdict, and none a traceback."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data import convert, inspect


ROOT = Path(__file__).parents[2]


def lines(*rows: dict, times: int = 1) -> bytes:
    """Rows as JSON lines; `times` repeats them with other prompts (`#` in a prompt is a number)."""
    written = [json.dumps(row).replace("#", str(number)) for number in range(times) for row in rows]
    return "\n".join(written).encode()


def judged(one, two, label, prompt="Question #?") -> dict:
    return {"prompt": prompt, "response_1": one, "response_2": two, "label": label}


def hh(chosen: str, rejected: str, asked: str = "\n\nHuman: Question #?") -> dict:
    return {"chosen": f"{asked}\n\nAssistant: {chosen}", "rejected": f"{asked}\n\nAssistant: {rejected}"}


def turns(*said: str, roles: tuple[str, str] = ("user", "assistant")) -> list[dict]:
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(said)]


GOOD = judged("x", "y", 1)
# Name and content of a file, what data.convert says of it, and what data.inspect says. None: what data.convert says.
ODD = {
    "no bytes": ("a.jsonl", b"", "the data has no rows", None),
    "blank lines": ("a.jsonl", b"\n \n\n", "the data has no rows", None),
    "a line that is cut short": ("a.jsonl", lines(GOOD) + b'\n{"prompt": "Q', "a.jsonl line 2: not valid JSON", None),
    "another encoding": ("a.csv", "prompt,text,rating\nCaf\xe9,x,1\n".encode("latin-1"), "line 2: not UTF-8 text", None),
    "UTF-16": ("a.tsv", "prompt\ttext\trating\n".encode("utf-16"), "it is UTF-16, save it as UTF-8", None),
    "an archive that is cut short": ("a.jsonl.gz", gzip.compress(lines(GOOD))[:-9], "the archive is damaged", None),
    "no archive": ("a.jsonl.gz", lines(GOOD), "the archive is damaged", None),
    "semicolons": ("a.csv", b"prompt;text;rating\nQ;x;1\n", "Separate the cells of .csv by commas", "not recognised"),
    "an open quote": ("a.csv", b'prompt,text,rating\nQ,"x,1\n', "a.csv line 2: unexpected end of data", None),
    "a row with too few cells": ("a.tsv", b"prompt\ttext\trating\nQ\tx\n", "line 2: fewer cells than the header", None),
    "a column that is named twice": ("a.csv", b"prompt,text,text\nQ,x,y\n", "the header names 'text' twice", None),
    "numbers": ("a.json", b"[1, 2]", r"row 1 \(counting from 1\): not a JSON object", None),
    "rows inside of an object": ("a.json", json.dumps({"data": [GOOD]}).encode(), "no preferences are recognised in the "
        r"columns \['data'\]", "not recognised"),
    "brackets without end": ("a.json", b"[" * 100_000, "not usable JSON|not a JSON object|not valid JSON", None),
    "no known ending": ("a.txt", lines(GOOD), "a file must end in one of .jsonl", None),
    "half a character": ("a.jsonl", b'{"prompt": "\\ud83d", "text": "x"}', "half of a surrogate pair", None),
    "damaged parquet": ("a.parquet", b"PAR1 and no more", "could not be read as .parquet", None),
    "a number beyond 64 bits": ("a.jsonl", b'{"prompt": "Q", "text": "x", "rating": 1' + b"0" * 30 + b"}",
        "a number beyond 64 bits", None),
    "nothing but ties": ("a.jsonl", lines(judged("x", "y", "tie"), times=8), "nothing can be made of these rows",
        "ties: 8 of 8 judged pairs"),
    "labels 0 and 1": ("a.jsonl", lines(judged("x", "y", 0), judged("x", "y", 1), times=8), "do not tell which response is",
        "do not tell which response is"),
    "labels that mean nothing": ("a.jsonl", lines(judged("x", "y", "blue"), times=8), "nothing can be made of these rows",
        "8 because a label is none that is known"),
    "missing and empty responses": ("a.jsonl", lines(GOOD, judged(None, "y", 1), judged("x", " ", 1), times=20),
        r"left out 20: 'response_1' must not be empty; the first is row 2\n  left out 20: 'response_2' must not be empty",
        "20 because 'response_2' must not be empty"),
    "equal responses": ("a.jsonl", lines(GOOD, judged("x", "x", 1, "Same #?"), times=20), "'response_2' must differ from",
        "20 because 'response_2' must differ"),
    "a prompt that is a number": ("a.jsonl", lines(GOOD, judged("x", "y", 1, 7), times=20), "left out 20: 'prompt' must be",
        "because 'prompt' must be text"),
    "texts among conversations": ("a.jsonl", lines(GOOD, judged("x", "y", 2, turns("Other #?")), times=20), "40 pairs",
        "40 pairs"),
    "a rating for every prompt": ("a.jsonl", lines({"prompt": "Q#", "text": "x", "rating": 2}, times=8),
        "left out 8: no other text has this prompt", "8 because no other text"),
    "ratings that are missing": ("a.csv", b"prompt,text,rating\n" + b"".join(
        f"Q{n},x,1\nQ{n},y,2\nQ{n},z,\n".encode() for n in range(20)), "left out 20: a rating is missing",
        "20 because a rating is missing"),
    "ratings in words": ("a.tsv", b"prompt\ttext\trating\nQ\tx\tfairly so\n", "no preferences are recognised",
        "pipeline.ppo takes 1 of 1 rows"),
    "more texts than ratings": ("a.jsonl", lines({"prompt": "Q#", "responses": ["x", "y"], "scores": [1, 2]},
        {"prompt": "R#", "responses": ["x", "y"], "scores": [1]}, times=20), "left out 20: the texts and their ratings",
        "20 pairs"),
    "nothing but likes": ("a.jsonl", lines({"prompt": "Q#", "completion": "x", "label": True}, times=20), "0 pairs",
        "pipeline.sft takes 20 of 20 rows"),
    "codes for a terminal": ("a.jsonl", lines({"\x1b[2Jprompt": "\x1b[31mQ", "text": "x"}), "x1b", "x1b"),
    "a mark of the byte order, and Windows lines": ("a.csv", b"\xef\xbb\xbfprompt,response_1,response_2,label\r\n" + b"".join(
        f"Q{n},x,y,2\r\n".encode() for n in range(20)), "20 rows, judgements", "20 pairs"),
    "HH with broken dialogues": ("a.jsonl", lines(hh("x", "y"), hh("", "y"), hh("x", "x"), hh("x", "z\n\nHuman: w"), times=20),
        "left out 20: the final reply is empty; the first is row 2", "pipeline.reward takes 20 of 80 rows"),
    "other prompts on the two sides": ("a.jsonl", lines(
        {"chosen": turns("Q#", "x"), "rejected": turns("Q#", "y")}, {"chosen": turns("Q#", "x"), "rejected": turns("R#", "y")},
        times=20), "left out 20: 'rejected' must answer the same prompt", "20 because 'rejected' must answer the same prompt"),
    "roles of ShareGPT": ("a.jsonl", lines({"chosen": turns("Q#", "x", roles=("human", "gpt")),
        "rejected": turns("Q#", "y", roles=("human", "gpt"))}, times=8), "must have only the roles",
        "8 because 'chosen' must have only the roles"),
    "rows that repeat": ("a.jsonl", lines(*[{"prompt": "Q", "chosen": "x", "rejected": "y"}] * 3, {"prompt": "Q",
        "chosen": "y", "rejected": "x"}), "leaves", r"duplicates: 2 rows repeat an earlier one \(first: row 2\)"),
    "texts alone": ("a.jsonl", lines({"text": "x"}, {"text": ""}), "no preferences are recognised",
        r"1 because 'text' must not be empty \(first: row 2\)"),
}  # fmt: skip


def said_by(command, args: list[str], capsys) -> str:
    """Return what a command prints, and the error that it tells; any other error fails the test."""
    try:
        command.main(args)
        error = ""
    except (ValueError, OSError) as expected:
        error = str(expected)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.out + error


@pytest.mark.parametrize(("name", "content", "converted", "inspected"), ODD.values(), ids=ODD)
def test_each_odd_file_has_its_verdict(name, content, converted, inspected, tmp_path, capsys):
    source = tmp_path / name
    source.write_bytes(content)
    said = {
        "convert": said_by(convert, [str(source), str(tmp_path / "out")], capsys),
        "inspect": said_by(inspect, [str(source)], capsys),
    }
    for command, expected in (("convert", converted), ("inspect", inspected or converted)):
        matches = re.search(expected, said[command])
        assert matches, said[command]
        assert "\x1b" not in said[command] and "None" not in said[command]
    assert source.read_bytes() == content


def test_there_are_at_least_25():
    assert len(ODD) >= 25


@pytest.mark.slow
def test_an_error_is_one_line_and_exit_code_1(tmp_path):
    command = [sys.executable, "-m", "data.convert", str(tmp_path / "none.jsonl"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "none.jsonl: no such file or folder" in done.stderr


# ------------------------------------------------------------------------------------ the inspector
def pairs_file(path: Path, *rows: dict) -> str:
    path.write_bytes(lines(*rows))
    return str(path)


def pair(prompt: str, chosen: str = " x", rejected: str = " y") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "id": 7}


def test_a_clean_copy_keeps_the_cells_and_lists_what_it_drops(tmp_path, capsys):
    rows = [pair("A"), pair("A"), pair("B", " x", " x"), pair("C"), pair("D", ""), pair("E"), pair("D", "")]
    source = pairs_file(tmp_path / "p.jsonl", *rows)
    held = pairs_file(tmp_path / "held.jsonl", pair("c!", " z"), pair("F"))
    inspect.main([source, "--eval", held, "--fix", str(tmp_path / "clean")])
    said = capsys.readouterr().out
    assert f"leakage: the prompts of 1 rows are also in {held} (first: row 4)" in said
    assert "pipeline.reward takes 4 of 7 rows with drop_bad_rows: true" in said and "pipeline.sft stops" in said
    assert said.splitlines()[-1].endswith(
        "2 of 7 rows. " + str(tmp_path / "clean" / "dropped.jsonl") + " lists the other 5."
    )
    kept = [json.loads(line) for line in (tmp_path / "clean" / "clean.jsonl").read_text().splitlines()]
    assert kept == [pair("A"), pair("E")]
    dropped = [json.loads(line) for line in (tmp_path / "clean" / "dropped.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"]) for row in dropped] == [
        (2, "the row repeats an earlier one"),
        (3, "'rejected' must differ from 'chosen'"),
        (4, "its prompt is also in the other data"),
        (5, "'chosen' must not be empty"),
        (7, "'chosen' must not be empty"),
    ]
    assert {row["file"] for row in dropped} == {source}


def test_a_clean_copy_overwrites_no_file_of_a_user(tmp_path):
    source, folder = pairs_file(tmp_path / "p.jsonl", pair("A"), pair("B")), tmp_path / "mine"
    folder.mkdir()
    (folder / "clean.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="clean.jsonl is there, and no inspection has written it"):
        inspect.main([source, "--fix", str(folder)])
    assert (folder / "clean.jsonl").read_text() == "mine" and len(list(folder.iterdir())) == 1
    with pytest.raises(ValueError, match="the command reads .* there, and would write over it"):
        inspect.main([str(folder / "clean.jsonl"), "--fix", str(folder)])
    judgements = tmp_path / "j.jsonl"
    judgements.write_bytes(lines(GOOD))
    with pytest.raises(ValueError, match=r"no stage reads these rows as they are.*python -m data\.convert"):
        inspect.main([str(judgements), "--fix", str(tmp_path / "other")])


def test_splits_of_a_folder_are_compared(tmp_path, capsys):
    pairs_file(tmp_path / "train.jsonl", pair("A"), pair("B"))
    pairs_file(tmp_path / "test.jsonl", pair("b."), pair("C"))
    inspect.main([str(tmp_path)])
    assert f"leakage: the prompts of 1 rows are also in {tmp_path} (train) (first: row 1)" in capsys.readouterr().out


def test_lengths_are_counted_in_words_or_tokens(tmp_path, capsys):
    source = pairs_file(tmp_path / "p.jsonl", *[pair("A film", " of its" + " day" * n, " x") for n in range(1, 6)])
    inspect.main([source])
    assert "words, rows: least 5, median 7, 90% 9, 99% 9, most 9" in capsys.readouterr().out
    inspect.main([source, "--tokenizer", "data/backbone"])
    assert (
        "tokens, rows: least 6, median 8, 90% 10, 99% 10, most 10" in capsys.readouterr().out
    )  # with the end of text
    with pytest.raises(ValueError, match="--tokenizer nowhere/none: cannot be loaded"):
        inspect.main([source, "--tokenizer", "nowhere/none"])


def test_noise_of_labels_by_hand(tmp_path, capsys):
    rows = [
        judged("x", "y", None, f"Q{n}") | {"label": labels}
        for n, labels in enumerate(([1, 1], [1, 2], [2, 2], [1, 1]))
    ]
    inspect.main([pairs_file(tmp_path / "j.jsonl", *rows)])
    said = capsys.readouterr().out
    # 5 of 8 votes are for the first: by chance two agree on 0.625^2 + 0.375^2 = 0.53125, so kappa is 0.21875 / 0.46875
    assert "annotators: unanimous on 75.0%; two of them agree on 75.0% (kappa 0.47)" in said
    assert "ties: 1 of 4 judged pairs" in said and "agreement with the label: 100.0% on average" in said
