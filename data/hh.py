"""Convert Anthropic's HH dialogues (Bai et al. 2022, arXiv 2204.05862) to conversations, for every stage.

A row of HH is two texts, `chosen` and `rejected`. Both are the same dialogue with different last replies. Each turn begins
with `\\n\\nHuman:` or `\\n\\nAssistant:`. Some rows are broken. They are left out, and counted by the kind of fault.

A marker that does not follow two line breaks is text inside a turn. The name of any other speaker is text too, because no
rule tells it from a heading.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from data.files import load_rows
from data.quoting import quoted
from data.saving import save


ROLES = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(rf"\n\n({'|'.join(ROLES)}):")

# Kinds of fault in a row.
NOT_TEXT = "chosen or rejected is not text"
UNKNOWN = "the dialogue does not begin with a human turn"
OPEN = "the dialogue does not end in an assistant turn"
DIFFERENT = "the prompts of chosen and rejected differ"
REPEATED = "one speaker has two turns in a row"
EMPTY_REPLY = "the final reply is empty"
EMPTY_TURN = "an earlier turn is empty"
IDENTICAL = "chosen and rejected are the same"
LONG = "the dialogue is too long"


class BrokenRow(ValueError):
    """Error about a row that cannot be used; the message is one of the kinds of fault above."""


class Conversion(NamedTuple):
    """Pairs of a dataset in TRL's conversational preference format, and the rows that were left out.

    `dropped` maps a kind of fault to the numbers of its rows, counted from 1.
    """

    pairs: list[dict]
    dropped: dict[str, list[int]]


def messages(text: str) -> list[dict[str, str]]:
    """Split a dialogue into messages of `role` (user or assistant) and `content`, stripped of white space.

    Raises:
        BrokenRow: the text does not begin with a human turn.
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
    """Make a pair from one row: `prompt` is all turns but the last, `chosen` and `rejected` are one assistant turn each.

    Raises:
        BrokenRow: the row cannot be used.
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
    """Convert each sound row to a pair.

    Args:
        rows: rows with `chosen` and `rejected`.
        length: function that counts the tokens of a conversation, as the model reads it.
        max_tokens: a pair with a longer side is left out; None sets no limit.
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

    Dialogues whose first turns are equal, or differ only in case or punctuation, fall on the same side. So no held-out
    prompt, and no beginning of one, is trained on.
    """
    letters = "".join(character for character in prompt[0]["content"].lower() if character.isalnum())
    return int(hashlib.sha256(letters.encode()).hexdigest()[:8], 16) / 16**8 < share


def stage_rows(pairs: list[dict]) -> dict[str, list[dict]]:
    """Return the rows of each stage's file.

    `preferences` is for the reward model. `sft` has the prompt and the chosen reply. `prompts` has each prompt once, for PPO
    and evaluation.
    """
    prompts = {json.dumps(row["prompt"]): row["prompt"] for row in pairs}
    return {
        "preferences": pairs,
        "sft": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs],
        "prompts": [{"prompt": prompt} for prompt in prompts.values()],
    }


def read_rows(name: str, data_dir: str | None = None) -> Dataset:
    """Read the rows of a file, or of the split `train` of a folder or of a dataset on the hub.

    `data_dir` selects one folder of a dataset on the hub.

    Raises the errors of `load_rows`, and:
        ValueError: `data_dir` is given for a file, or a column is missing.
    """
    if data_dir and Path(name).expanduser().is_file():
        raise ValueError(
            f"data_dir={data_dir!r} is for a dataset on the hub, but {name} is a file. Leave data_dir out."
        )
    rows = load_rows(name, "train", data_dir=data_dir)
    columns = rows.column_names
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        raise ValueError(
            f"{name}: no column {missing[0]!r}; found: {quoted(list(columns), 300)}. Name data of HH: its rows have "
            f"chosen and rejected."
        )
    return rows


def write_stages(pairs: list[dict], folder: Path, share: float, former: Iterable[str] = ()) -> dict[str, int]:
    """Write `<stage>_train.jsonl` and `<stage>_test.jsonl` of every stage, all of them or none.

    `former` are the files that an earlier release wrote and did not list.

    Returns:
        The number of pairs in `train` and in `test`.

    Raises the errors of `save`, and:
        ValueError: one of the two splits would be empty.
    """
    sides: dict[str, list[dict]] = {"train": [], "test": []}
    for row in pairs:
        sides["test" if is_held_out(row["prompt"], share) else "train"].append(row)
    counts = {split: len(rows) for split, rows in sides.items()}
    if not all(counts.values()):
        raise ValueError(
            f"held_out={share} of {len(pairs)} pairs leaves {counts['train']} to train on and {counts['test']} held out. Both "
            f"need at least one. Give more rows or another share."
        )

    def write(staged: Path) -> None:
        for split, rows in sides.items():
            for stage, of_stage in stage_rows(rows).items():
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of_stage)
                (staged / f"{stage}_{split}.jsonl").write_text(text, encoding="utf-8")

    save(folder, "data", write, former=former)
    return counts
