"""Anthropic's HH dialogues (Bai et al. 2022, arXiv 2204.05862) as conversations, for every stage.

A row of HH is two texts, `chosen` and `rejected`: the same dialogue, of turns that `\\n\\nHuman:` and `\\n\\nAssistant:` begin,
with two last replies. The rows are as people left them, so some are broken: those are left out, and counted by what is
wrong with them.

A marker inside a turn, after other white space than two line breaks, is text; so is the name of any other speaker, which
no rule tells from a heading.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from data.files import load_rows


ROLES = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(rf"\n\n({'|'.join(ROLES)}):")

# What can be wrong with a row.
NOT_TEXT = "chosen or rejected is no text"
UNKNOWN = "the dialogue does not begin with a human turn"
OPEN = "the dialogue does not end in an assistant turn"
DIFFERENT = "the prompts of chosen and rejected differ"
REPEATED = "one speaker has two turns in a row"
EMPTY_REPLY = "the final reply is empty"
EMPTY_TURN = "an earlier turn is empty"
IDENTICAL = "chosen and rejected are the same"
LONG = "the dialogue is too long"


class BrokenRow(ValueError):
    """A row that cannot be used; the message is one of the kinds above."""


class Conversion(NamedTuple):
    """Pairs of a dataset, in TRL's conversational preference format, and rows left out: their numbers, from 1, by kind."""

    pairs: list[dict]
    dropped: dict[str, list[int]]


def messages(text: str) -> list[dict[str, str]]:
    """Split a dialogue into messages of `role` (user or assistant) and `content`, stripped of white space.

    Raises:
        BrokenRow: it does not begin with a human turn.
    """
    before, *parts = TURN.split(text)
    found = [
        {"role": ROLES[name], "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if before.strip() or not found or found[0]["role"] != "user":
        raise BrokenRow(UNKNOWN)
    return found


def pair(chosen: object, rejected: object) -> dict[str, list[dict[str, str]]]:
    """Make one pair of a row: `prompt` is all turns but the last, `chosen` and `rejected` are one assistant's turn each.

    Raises:
        BrokenRow: the row is of no use.
    """
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise BrokenRow(NOT_TEXT)
    sides = [messages(text) for text in (chosen, rejected)]
    if any(side[-1]["role"] != "assistant" for side in sides):
        raise BrokenRow(OPEN)
    (*prompt, first), (*other, second) = sides
    if prompt != other:
        raise BrokenRow(DIFFERENT)
    if any(one["role"] == two["role"] for one, two in pairwise([*prompt, first])):
        raise BrokenRow(REPEATED)
    if not (first["content"] and second["content"]):
        raise BrokenRow(EMPTY_REPLY)
    if not all(turn["content"] for turn in prompt):
        raise BrokenRow(EMPTY_TURN)
    if first == second:
        raise BrokenRow(IDENTICAL)
    return {"prompt": prompt, "chosen": [first], "rejected": [second]}


def convert(
    rows: Iterable[dict], length: Callable[[list[dict]], int] | None = None, max_tokens: int | None = None
) -> Conversion:
    """Make a pair of each sound row.

    Args:
        rows: with `chosen` and `rejected`.
        length: tokens of a conversation, as the model reads it.
        max_tokens: pairs of which a side is longer are left out; None: none is.
    """
    pairs = []
    dropped: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
        try:
            found = pair(row.get("chosen"), row.get("rejected"))
            if max_tokens is not None:
                assert length is not None  # it counts them
                sides = (found["prompt"] + found[name] for name in ("chosen", "rejected"))
                if max(map(length, sides)) > max_tokens:
                    raise BrokenRow(LONG)
        except BrokenRow as broken:
            dropped.setdefault(str(broken), []).append(number)
        else:
            pairs.append(found)
    return Conversion(pairs, dropped)


def is_held_out(prompt: list[dict], share: float) -> bool:
    """Tell whether a dialogue is held out, by a hash of the letters of its first turn.

    Dialogues that begin alike, or differ there in case or punctuation alone, fall on one side: no held-out prompt, nor a
    beginning of it, is trained on.
    """
    letters = "".join(character for character in prompt[0]["content"].lower() if character.isalnum())
    return int(hashlib.sha256(letters.encode()).hexdigest()[:8], 16) / 16**8 < share


def stage_rows(pairs: list[dict]) -> dict[str, list[dict]]:
    """Give the rows of each stage's file: `preferences` for the reward model, `sft` (the prompt and the chosen reply) and
    `prompts`, each once, for PPO and the evaluation."""
    prompts = {json.dumps(row["prompt"]): row["prompt"] for row in pairs}
    return {
        "preferences": pairs,
        "sft": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs],
        "prompts": [{"prompt": prompt} for prompt in prompts.values()],
    }


def read_rows(name: str, data_dir: str | None = None) -> Dataset:
    """Read the rows of a file; or of the split `train` of a folder or of a dataset on the hub, of all of it or of its folder
    `data_dir`.

    Raises what `load_rows` raises, and:
        ValueError: a line is not a JSON object, the archive is damaged, or a column is missing.
    """
    if data_dir and Path(name).expanduser().is_file():
        raise ValueError(
            f"data_dir={data_dir!r} is a folder of a dataset on the hub, and {name} is a file. Leave it out."
        )
    rows = load_rows(name, "train", data_dir=data_dir)
    columns = rows.column_names
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        raise ValueError(
            f"{name}: no column {missing[0]!r}; found: {list(columns)}. Rows of HH have chosen and rejected."
        )
    return rows


def write_stages(pairs: list[dict], folder: Path, share: float) -> dict[str, int]:
    """Write `<stage>_train.jsonl` and `<stage>_test.jsonl` of every stage, each at once or not at all.

    Returns:
        The number of pairs in `train` and in `test`.

    Raises:
        ValueError: one of them would be empty.
    """
    sides: dict[str, list[dict]] = {"train": [], "test": []}
    for row in pairs:
        sides["test" if is_held_out(row["prompt"], share) else "train"].append(row)
    counts = {split: len(rows) for split, rows in sides.items()}
    if not all(counts.values()):
        raise ValueError(
            f"held_out={share} of {len(pairs)} pairs leaves {counts['train']} to train on and {counts['test']} held out. Give "
            f"more rows, or another share."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in sides.items():
        for stage, of_stage in stage_rows(rows).items():
            path = folder / f"{stage}_{split}.jsonl"
            staged = path.with_suffix(".tmp")
            staged.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of_stage), encoding="utf-8"
            )
            os.replace(staged, path)
    return counts
