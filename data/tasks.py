r"""Make the data of a task's recipes: texts about films, with questions and answers or with triples.

    python -m data.tasks question_answering runs/question_answering/data
    python -m data.tasks knowledge_graph runs/knowledge_graph/data

The files written are `sft_train.jsonl` (prompt and completion, to learn the form from), `prompts_train.jsonl` and
`prompts_test.jsonl` (prompt and references). No fact of `test` is one of `train`. The same command always writes the same
files.
"""

import argparse
import json
import random
from pathlib import Path

from data.commands import run
from data.film_facts import knowledge_graph, question_answering
from data.saving import save


TASKS = {"question_answering": question_answering, "knowledge_graph": knowledge_graph}


def arguments(args: list[str]) -> argparse.Namespace:
    """Parse the command line; exit with a message if an option is invalid."""
    parser = argparse.ArgumentParser("python -m data.tasks", allow_abbrev=False)
    parser.add_argument("task", choices=TASKS, help="The task whose data are made.")
    parser.add_argument("folder", type=Path, help="Folder to write the files to.")
    for option, default, what in (
        ("demonstrations", 2048, "prompts with a completion, for SFT"),
        ("prompts", 2048, "other prompts, for PPO"),
        ("held_out", 512, "prompts for the report"),
    ):
        parser.add_argument(f"--{option}", type=int, default=default, help=f"Number of {what}.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the draws.")
    found = parser.parse_args(args)
    for option in ("demonstrations", "prompts", "held_out"):
        if getattr(found, option) < 1:
            parser.error(f"--{option} {getattr(found, option)} must be 1 or more.")
    return found


def make(task: str, demonstrations: int, prompts: int, held_out: int, seed: int) -> dict[str, list[dict]]:
    """Return the rows of each file of a task. No prompt is in two files, or in one twice.

    Raises:
        ValueError: there are not as many different prompts.
    """
    generator = random.Random(seed)
    seen: set[str] = set()
    files: dict[str, list[dict]] = {}
    for name, count in (("sft_train", demonstrations), ("prompts_train", prompts), ("prompts_test", held_out)):
        rows: list[dict] = []
        fruitless = 0
        while len(rows) < count:
            row = TASKS[task](generator, held_out=name == "prompts_test")
            fruitless += 1
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                rows.append(row)
                fruitless = 0
            elif fruitless > 1000:
                raise ValueError(
                    f"{name}: {count} rows are wanted, and there are only about {len(rows)}. Lower the number."
                )
        dropped = {"answers", "triples"} if name == "sft_train" else {"completion"}
        files[name] = [{key: value for key, value in row.items() if key not in dropped} for row in rows]
    return files


def main(args: list[str]) -> None:
    given = arguments(args)
    files = make(given.task, given.demonstrations, given.prompts, given.held_out, given.seed)

    def write(folder: Path) -> None:
        for name, rows in files.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    save(given.folder, "task", write)
    print(f"{given.folder}: " + ", ".join(f"{len(rows):,} rows in {name}.jsonl" for name, rows in files.items()) + ".")


if __name__ == "__main__":
    run(main)
