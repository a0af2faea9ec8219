"""`pipeline.convert_hh`: what it prints, what it leaves, and which command lines it refuses."""

import json

import pytest
from transformers import AutoTokenizer

from pipeline import convert_hh


CHAT = "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}"


def row(number: int, rejected: str = "No.") -> str:
    asked = f"\n\nHuman: Question {number}?\n\nAssistant: "
    return json.dumps({"chosen": f"{asked}Answer {number}.", "rejected": asked + rejected}) + "\n"


@pytest.fixture
def chatty(tiny, tmp_path) -> str:
    """A model's folder whose tokenizer has a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "chatty")
    return str(tmp_path / "chatty")


def test_what_is_left_out_is_said(tmp_path, chatty, capsys):
    source, out = tmp_path / "hh.jsonl", tmp_path / "out"
    rows = [row(0, ""), *(row(number) for number in range(20)), row(20, ""), row(21, "No, " * 50)]
    source.write_text("".join(rows))
    convert_hh.main([str(source), str(out), "--max_tokens", "60", "--tokenizer", chatty, "--max_pairs", "18"])
    counts = {split: len((out / f"sft_{split}.jsonl").read_text().splitlines()) for split in ("train", "test")}
    assert counts["train"] + counts["test"] == 18 and counts["test"] > 0
    assert capsys.readouterr().out.splitlines() == [
        f"{source}: 23 rows, 20 of them sound pairs.",
        "  left out 2: the final reply is empty; the first is row 1",
        "  left out 1: the dialogue is too long (over 60 tokens); the first is row 23",
        f"{out}: {counts['train']} pairs to train on, {counts['test']} held out.",
    ]


def test_tokens_are_those_of_the_chat_template(tmp_path, chatty):
    source = tmp_path / "hh.jsonl"
    source.write_text("".join(row(number) for number in (2, 3, 4, 5)))
    text = "user: Question 2?\nassistant: Answer 2.\n"
    longest = len(AutoTokenizer.from_pretrained(chatty)(text)["input_ids"])
    options = ["--tokenizer", chatty, "--held_out", "0.5", "--max_tokens"]
    convert_hh.main([str(source), str(tmp_path / "out"), *options, str(longest)])
    with pytest.raises(ValueError, match="held_out=0.5 of 0 pairs"):
        convert_hh.main([str(source), str(tmp_path / "out"), *options, str(longest - 1)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--held_out", "1"], "--held_out 1.0 must be a share between 0 and 1."),
        (["--held_out", "0"], "--held_out 0.0 must be a share between 0 and 1."),
        (["--max_pairs", "1"], "--max_pairs 1 must be 2 or more."),
        (["--max_tokens", "0", "--tokenizer", "x"], "--max_tokens 0 must be 1 or more."),
        (["--max_tokens", "9"], "--max_tokens and --tokenizer belong together. Give both or neither."),
        (["--tokenizer", "x"], "--max_tokens and --tokenizer belong together. Give both or neither."),
        (["--max_pair", "9"], "unrecognized arguments: --max_pair 9"),
    ],
)
def test_command_lines_that_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        convert_hh.main(["hh.jsonl", "out", *options])
    assert message in capsys.readouterr().err


def test_a_tokenizer_without_a_chat_template(tiny, tmp_path):
    (tmp_path / "hh.jsonl").write_text(row(1) + row(2))
    options = ["--max_tokens", "60", "--tokenizer", tiny]
    with pytest.raises(ValueError, match="the tokenizer has no chat template. Name the tokenizer of a chat model."):
        convert_hh.main([str(tmp_path / "hh.jsonl"), str(tmp_path / "out"), *options])
