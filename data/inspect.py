"""Inspect a data file: its format, its faults, its lengths, and what each stage would do with it.

    python -m data.inspect pairs.jsonl --tokenizer runs/model --eval held_out_pairs.jsonl
    python -m data.inspect pairs.jsonl --fix runs/clean

Tells how many rows are duplicates, how far annotators agree, which rows each stage would leave out and why, how long the
rows are, and how many prompts are in both splits. `--fix` writes `clean.jsonl` and `dropped.jsonl` to a folder. A file that
no stage reads is none to fix: `python -m data.convert` makes files for the stages of it.
"""

import argparse
import os
from pathlib import Path

from data.boundaries import real_path
from data.commands import run
from data.conversion import json_lines
from data.embedded import find_embedded
from data.files import load_rows, splits_of
from data.inspection import inspect, said, unfit
from data.layouts import command
from data.listing import read_listing
from data.rows import Rows
from data.saving import complete, save


FILES = ("clean.jsonl", "dropped.jsonl")


def arguments(args: list[str]) -> argparse.Namespace:
    """Parse the command line; exit with a message if an option is invalid."""
    parser = argparse.ArgumentParser("python -m data.inspect", allow_abbrev=False)
    parser.add_argument("source", help="File, folder or hub id.")
    parser.add_argument("--eval", metavar="SOURCE", help="Held-out data: tell which prompts are in both.")
    parser.add_argument("--tokenizer", help="Model whose tokenizer counts tokens; unset: lengths are in words.")
    parser.add_argument(
        "--fix", metavar="FOLDER", type=Path, help="Folder for a clean copy and the list of what it lacks."
    )
    return parser.parse_args(args)


def load_tokenizer(name: str):
    """Load the tokenizer of a model.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer  # here, because its import takes seconds

    try:
        # Longer rows are what is looked for: no warning of them.
        return AutoTokenizer.from_pretrained(find_embedded(name), model_max_length=10**9)
    except Exception as error:  # what transformers makes of a wrong name or a damaged file, of any type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--tokenizer {name}: cannot be loaded ({reason}). Correct the name.") from error


def check_folder(folder: Path, source: str) -> None:
    """Check that the clean copy can be written to a folder.

    Raises:
        NotADirectoryError: it is a file, or beneath one.
        ValueError: a file of one of the names is there that no inspection wrote, or it is the source.
    """
    if real_path(Path(source).expanduser()) in [real_path(folder), *(real_path(folder) / name for name in FILES)]:
        raise ValueError(
            f"--fix {folder}: the command reads {source} there, and would write over it. Name another folder."
        )
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    if not there.is_dir():
        raise NotADirectoryError(f"--fix {folder}: {there} is a file. Name a folder.")
    complete(folder)
    listed = read_listing(folder) or {} if folder.is_dir() else {}
    others = [name for name in FILES if os.path.lexists(folder / name) and name not in listed]
    if others:
        raise ValueError(
            f"--fix {folder}: {others[0]} is there, and no inspection has written it. Name another folder."
        )


def write_clean(rows: Rows, name: str, folder: Path, other: tuple[Rows, str] | None) -> None:
    """Write the rows that can be used, as they are, and the list of the others.

    Raises the errors of `save`, and:
        ValueError: no stage reads the rows, no row is left, or a cell cannot be written as JSON.
    """
    problems = unfit(rows, name, other)
    if problems is None:
        raise ValueError(
            f"{name}: no stage reads these rows as they are, so there is no clean copy. Convert them: {command(name)}"
        )
    dropped = sorted((index, problem) for problem, indices in problems.items() for index in indices)
    left = sorted(set(range(len(rows))) - {index for index, _ in dropped})
    if not left:
        raise ValueError(f"{name}: no row is left: {'; '.join(said(rows, problems))}. Name other data.")
    reasons = [
        {"file": rows.files[rows.of[index]], "row": int(rows.numbers[index]), "reason": problem}
        for index, problem in dropped
    ]
    try:
        texts = [json_lines(dict(row) for row in rows.select(left)), json_lines(reasons)]
    except TypeError as error:
        raise ValueError(f"{name}: a cell cannot be written as JSON ({error}). Remove its column.") from error

    def write(staged: Path) -> None:
        for file, text in zip(FILES, texts, strict=True):
            (staged / file).write_text(text, encoding="utf-8")

    save(folder, "clean", write)
    print(
        f"{folder / FILES[0]}: {len(left):,} of {len(rows):,} rows. {folder / FILES[1]} lists the other {len(dropped):,}."
    )


def main(args: list[str]) -> None:
    given = arguments(args)
    if given.fix:
        check_folder(given.fix, given.source)
    splits = splits_of(given.source)
    parts = [(load_rows(given.source, split), given.source if len(splits) == 1 else f"{given.source} ({split})")
             for split in splits]  # fmt: skip
    if given.fix and len(parts) > 1:
        raise ValueError(f"{given.source}: the folder has the splits {', '.join(splits)}. To fix one, name its file.")
    tokenizer = load_tokenizer(given.tokenizer) if given.tokenizer else None
    held_out = (load_rows(given.eval, splits_of(given.eval)[-1]), given.eval) if given.eval else None
    for number, (rows, name) in enumerate(parts):
        inspect(rows, name, tokenizer, print, held_out or (parts[0] if number else None))
    if given.fix:
        write_clean(parts[0][0], given.source, given.fix, held_out)


if __name__ == "__main__":
    run(main)
