"""Turn preference data into the files of every stage, with held-out prompts apart."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset

from data.boundaries import real_path
from data.cells import CellError
from data.hh import convert, is_held_out, stage_rows
from data.judgements import of_judgements
from data.layouts import HH, JUDGEMENTS, PAIRS, Layout
from data.listing import read_listing
from data.pairing import Made, Options, apart, key_of, letters_of, never_rejected, prompt_of
from data.preferences import SCORES, check_preferences
from data.rated_texts import of_texts
from data.reading import dataset_of
from data.rows import place
from data.saving import complete, save
from data.sifting import merged, sift
from data.verdicts import number


TEXT, CONVERSATION = "text", "conversation"
FILES = tuple(f"{stage}_{split}.jsonl" for stage in ("preferences", "sft", "prompts") for split in ("train", "test"))


def make(rows: Dataset, name: str, layout: Layout, options: Options) -> Made:
    """Make pairs of rows in a layout.

    Raises:
        ValueError: the labels do not tell which response is better, or there would be more than `MOST` pairs.
    """
    if layout.kind == HH:
        found = convert(rows)
        keys = [pair["prompt"][0]["content"] for pair in found.pairs]
        left_out = {fault: [number - 1 for number in numbers] for fault, numbers in found.dropped.items()}
        return Made(found.pairs, stage_rows(found.pairs)["sft"], keys, keys, merged(left_out))
    if layout.kind == PAIRS:
        return _of_pairs(rows, name, layout)
    return (
        of_judgements(rows, name, layout, options)
        if layout.kind == JUDGEMENTS
        else of_texts(rows, name, layout, options)
    )


def _of_pairs(rows: Dataset, name: str, layout: Layout) -> Made:
    """Return pairs of TRL's formats with the prompt apart; `margin` may be the difference of two columns of scores."""
    if layout.prompt:
        rows = _with_prompt(rows, layout)
    kept, problems = sift(rows, name, check_preferences)
    if kept is None:
        return Made([], [], [], [], problems)
    indices = kept.numbers - 1
    pairs = [dict(row) for row in kept]
    scored = next((two for two in SCORES if set(two) <= set(rows.column_names)), None)
    for index, pair in zip(indices.tolist(), pairs, strict=True):
        where = place(rows, index, name)
        if "prompt" not in pair or (isinstance(pair["prompt"], str) and not isinstance(pair["chosen"], str)):
            pair |= apart(where, pair)
        if scored and "margin" not in pair:
            gap = [number(rows[index][column]) for column in scored]
            if None not in gap:
                pair["margin"] = gap[0] - gap[1]  # type: ignore[operator]
    if not all("margin" in pair for pair in pairs):
        for pair in pairs:
            pair.pop("margin", None)
    order = ("prompt", "chosen", "rejected", "margin", "agreement")
    pairs = [{column: pair[column] for column in order if column in pair} for pair in pairs]
    keys = [key_of(pair["prompt"]) or letters_of(pair["chosen"]) for pair in pairs]
    liked, liked_keys = never_rejected(pairs, keys)
    return Made(pairs, liked, keys, liked_keys, problems)


def _with_prompt(rows: Dataset, layout: Layout) -> Dataset:
    """Return pairs with the columns of the prompt as one column `prompt`; a cell that cannot be used stays for the check."""
    prompts = []
    for row in rows.select_columns(list(layout.prompt)):
        try:
            prompts.append(prompt_of(row, layout, ""))
        except CellError:
            prompts.append(None)
    columns = {column: rows[column][:] for column in rows.column_names if column != "prompt"}
    return dataset_of({"prompt": prompts} | columns, "")


# ------------------------------------------------------------------------------------ text or conversation
def in_form(made: Made, form: str | None = None, between: str | None = None) -> tuple[Made, str]:
    """Return the rows as texts or as conversations, and which of the two they are.

    Without a `form`, texts stay texts if completions continue their prompts, that is, if white space is between them.
    Otherwise prompt and completion would run together as one text, so they become the turns of a user and an assistant.

    Args:
        between: text to put before each completion; the form is then text.

    Raises:
        ValueError: conversations cannot become texts; or a prompt is empty, with which no conversation can begin.
    """
    rows = [*made.pairs, *made.liked]
    found = any(isinstance(row["prompt"], list) for row in rows)
    if found and (form == TEXT or between is not None):
        raise ValueError(
            "The rows are conversations, which cannot be written as texts. Leave --form and --between out."
        )
    if between is not None:
        form = TEXT
    if form is None:
        empty = any(not row["prompt"] for row in rows)
        joined = [_runs_together(row) for row in rows if row["prompt"]]
        form = CONVERSATION if found or (not empty and 2 * sum(joined) > len(joined)) else TEXT
    sides = ("chosen", "rejected", "completion")
    if form == TEXT:
        if between:
            pairs, liked = (
                [row | {side: between + row[side] for side in sides if side in row} for row in of]
                for of in (made.pairs, made.liked)
            )
            made = made._replace(pairs=pairs, liked=liked)
        return made, TEXT
    if any(not row["prompt"] for row in rows):
        raise ValueError("A conversation begins with a prompt, and some texts have none. Write texts: --form text.")
    roles = {"prompt": "user"} | dict.fromkeys(sides, "assistant")
    pairs, liked = (
        [{name: _turn(roles[name], cell) if name in roles else cell for name, cell in row.items()} for row in of]
        for of in (made.pairs, made.liked)
    )
    return made._replace(pairs=pairs, liked=liked), CONVERSATION


def _runs_together(row: dict) -> bool:
    side = row["chosen"] if "chosen" in row else row["completion"]
    return isinstance(row["prompt"], str) and not (row["prompt"][-1].isspace() or side[:1].isspace())


def _turn(role: str, cell: Any) -> list[dict[str, str]]:
    return [{"role": role, "content": cell}] if isinstance(cell, str) else cell


# ------------------------------------------------------------------------------------ files
def check_folder(folder: Path, source: str) -> None:
    """Check that the files can be written to a folder, and that none of them is somebody else's.

    Raises:
        NotADirectoryError: it is a file, or beneath one.
        ValueError: a file of one of the names is there that no conversion wrote; or the source is one of them.
    """
    remedy = "Name another folder."
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    if not there.is_dir():
        raise NotADirectoryError(f"{folder}: {there} is a file. {remedy}")
    path = Path(source).expanduser()
    if path.exists() and real_path(path) in [real_path(folder), *(real_path(folder) / name for name in FILES)]:
        raise ValueError(f"{folder}: the command reads {source} there, and would write over it. {remedy}")
    complete(folder)
    listed = read_listing(folder) or {} if folder.is_dir() else {}
    others = [name for name in FILES if (folder / name).exists() and name not in listed]
    if others:
        raise ValueError(f"{folder}: {', '.join(others)} is there, and no conversion has written it. {remedy}")


def write(made: Made, folder: Path, share: float) -> dict[str, dict[str, int]]:
    """Write `<stage>_train.jsonl` and `<stage>_test.jsonl` of every stage that has rows, all of them or none.

    A prompt falls to one side by a hash of its letters (`data.hh.is_held_out`), so no prompt is in both.

    Returns:
        For `train` and `test`, the number of rows of each stage.

    Raises the errors of `save`, and:
        ValueError: one of the two splits would be empty.
    """
    rows: dict[str, dict[str, list[dict]]] = {
        split: {"preferences": [], "sft": [], "prompts": []} for split in ("train", "test")
    }
    for stage, of, keys in (("preferences", made.pairs, made.keys), ("sft", made.liked, made.liked_keys)):
        for row, key in zip(of, keys, strict=True):
            split = "test" if is_held_out([{"content": key}], share) else "train"
            rows[split][stage].append(row)
    for stages in rows.values():
        stages["prompts"] = _prompts([*stages["preferences"], *stages["sft"]])
    first = "preferences" if made.pairs else "sft"
    train, test = (len(rows[split][first]) for split in ("train", "test"))
    if not (train and test):
        what = "pairs" if made.pairs else "texts"
        raise ValueError(
            f"held_out={share} of {train + test} {what} leaves {train} to train on and {test} held out. Both need at least "
            f"one. Give more rows or another share."
        )

    def write_files(staged: Path) -> None:
        for split, stages in rows.items():
            for stage, of_stage in stages.items():
                if of_stage:
                    (staged / f"{stage}_{split}.jsonl").write_text(json_lines(of_stage), encoding="utf-8")

    save(folder, "data", write_files)
    return {split: {stage: len(of) for stage, of in stages.items()} for split, stages in rows.items()}


def json_lines(rows: Iterable[dict]) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _prompts(rows: list[dict]) -> list[dict]:
    """Return each prompt once; texts without a prompt have none to answer."""
    found = {json.dumps(row["prompt"]): row["prompt"] for row in rows if row["prompt"]}
    return [{"prompt": prompt} for prompt in found.values()]
