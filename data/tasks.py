"""Make the data of a task's recipes: films, with questions and answers or with triples; sentences, with translations.

    python -m data.tasks question_answering runs/question_answering/data
    python -m data.tasks knowledge_graph runs/knowledge_graph/data
    python -m data.tasks translation runs/translation/data

The files written are `sft_train.jsonl` (prompt and completion, to learn the form from), `prompts_train.jsonl` and
`prompts_test.jsonl` (prompt and references). No prompt is in two of them, or in one twice. No fact of `test`, and no pair of
words that a sentence puts together, is one of `train`. The same command always writes the same files.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data.commands import run
from data.conversion import check_folder, json_lines
from data.film_facts import knowledge_graph, question_answering
from data.saving import save
from data.translation import translation


class Task(NamedTuple):
    """Rows of a task as they are drawn: `prompt`, `completion` and a column of references."""

    draw: Callable[..., dict]
    references: str
    rows: int  # of each training file, unless told


TASKS = {
    "question_answering": Task(question_answering, "answers", 2048),
    "knowledge_graph": Task(knowledge_graph, "triples", 2048),
    "translation": Task(translation, "references", 6144),
}


def arguments(args: list[str]) -> argparse.Namespace:
    """Parse the command line; exit with a message if an option is invalid."""
    parser = argparse.ArgumentParser("python -m data.tasks", allow_abbrev=False)
    parser.add_argument("task", choices=TASKS, help="The task whose data are made.")
    parser.add_argument("folder", type=Path, help="Folder to write the files to.")
    many = " or ".join(f"{count:,}" for count in sorted({task.rows for task in TASKS.values()}))
    for option, default, what in (
        ("demonstrations", None, f"prompts with a completion, for SFT (unset: {many}, by the task)"),
        ("prompts", None, "other prompts, for PPO (unset: as many)"),
        ("held_out", 512, "prompts for the report"),
    ):
        parser.add_argument(f"--{option}", type=int, default=default, help=f"Number of {what}.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the draws.")
    found = parser.parse_args(args)
    for option in ("demonstrations", "prompts", "held_out"):
        if getattr(found, option) is None:
            setattr(found, option, TASKS[found.task].rows)
        if getattr(found, option) < 1:
            parser.error(f"--{option} {getattr(found, option)} must be 1 or more.")
    return found


def make(task: str, demonstrations: int, prompts: int, held_out: int, seed: int) -> dict[str, list[dict]]:
    """Return the rows of each file of a task. No prompt is in two files, or in one twice.

    Raises:
        ValueError: there are not as many different prompts.
    """
    draw, references, _ = TASKS[task]
    generator = random.Random(seed)
    seen: set[str] = set()
    files: dict[str, list[dict]] = {}
    for name, count in (("sft_train", demonstrations), ("prompts_train", prompts), ("prompts_test", held_out)):
        rows: list[dict] = []
        fruitless = 0
        while len(rows) < count:
            row = draw(generator, held_out=name == "prompts_test")
            fruitless += 1
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                rows.append(row)
                fruitless = 0
            elif fruitless > 1000:
                raise ValueError(
                    f"{name}: {count} rows are wanted, and there are only about {len(rows)}. Lower the number."
                )
        unread = references if name == "sft_train" else "completion"
        files[name] = [{key: value for key, value in row.items() if key != unread} for row in rows]
    return files


def main(args: list[str]) -> None:
    given = arguments(args)
    check_folder(given.folder, __file__)
    files = make(given.task, given.demonstrations, given.prompts, given.held_out, given.seed)

    def write(folder: Path) -> None:
        for name, rows in files.items():
            (folder / f"{name}.jsonl").write_text(json_lines(rows), encoding="utf-8")

    save(given.folder, "data", write)
    print(f"{given.folder}: " + ", ".join(f"{len(rows):,} rows in {name}.jsonl" for name, rows in files.items()) + ".")


if __name__ == "__main__":
    run(main)
