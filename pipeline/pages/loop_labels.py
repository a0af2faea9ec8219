"""Make the preferences of a round of the loop from what people answered, or from the judge that stands in for them.

The folder of a round has `pairs/pairs.jsonl` from `pipeline.pairs`, and `answers/answers.jsonl` from `pipeline.label`. Once
every pair is answered, `labels` gets `preferences.jsonl` and `votes.json`. Answers that come later change nothing.
"""

import json
import shlex
import statistics
from pathlib import Path
from typing import Any

from data.conversion import json_lines
from data.json_files import read_json, write_json
from data.listing import LISTING, file_digest, read_listing
from data.saving import check_saved, save
from data.schemas import SHARE, list_of, record
from pipeline.pages.label_answers import ANSWERS, current, read_answers, votes
from pipeline.pages.label_pairs import Pair


PAIRS, PREFERENCES, VOTES = "pairs/pairs.jsonl", "labels/preferences.jsonl", "labels/votes.json"
OF_VOTES = record({"votes": list_of(list_of(SHARE))})


def check_unchanged(path: Path) -> None:
    """Check that a file is as it was saved: the labels of a round belong to its pairs, and what follows to its labels.

    Raises:
        ValueError: it was changed.
    """
    entry = (read_listing(path.parent) or {}).get(path.name)
    if entry is not None and file_digest(path) != entry["sha256"]:
        raise ValueError(
            f"{path}: not the file that was saved. Labels belong to the pairs that people saw, and what was trained to its "
            f"labels. Restore the file, or begin a new loop in another folder."
        )


def read_pairs_file(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a round's pairs.jsonl. Raises the errors of `check_saved` and `check_unchanged`."""
    check_saved((folder / PAIRS).parent, "pairs")
    check_unchanged(folder / PAIRS)
    return [json.loads(line) for line in (folder / PAIRS).read_text(encoding="utf-8").splitlines()]


def read_votes_file(folder: Path) -> list[list[float]]:
    """Return the votes for the first completion of each pair of a round. Raises the errors of `check_saved`."""
    check_saved((folder / VOTES).parent, "round_labels")
    return read_json(folder / VOTES, OF_VOTES)["votes"]


def labels_of(folder: Path, *, by_judge: bool, ties: bool) -> bool:
    """Make a round's preferences from its labels, if they are not there yet; False if people have not answered all pairs.

    Args:
        by_judge: whether the judge of `pipeline.pairs` answers in the place of people.
        ties: whether a pair that is tied stays, with an agreement of 0.5.

    Raises the errors of `check_saved`, `check_unchanged` and `read_answers`, and:
        ValueError: no pair has a preference.
    """
    at = (folder / PREFERENCES).parent
    check_saved(at, "round_labels")
    if (at / LISTING).is_file():
        check_unchanged(folder / PREFERENCES)
        return True
    rows = read_pairs_file(folder)
    found = [judged(row) for row in rows] if by_judge else answered(folder, rows)
    if found is None:
        return False
    made = [pair for row, of in zip(rows, found, strict=True) if (pair := preference(row, of, ties=ties))]
    if not made:
        raise ValueError(
            f"{folder}: none of its {len(rows)} pairs has a preference: all are ties, or were skipped. Answer some again."
        )

    def write(staged: Path) -> None:
        (staged / Path(PREFERENCES).name).write_text(json_lines(made), encoding="utf-8")
        write_json(staged / Path(VOTES).name, {"votes": found})

    save(at, "round_labels", write)
    return True


def judged(row: dict[str, Any]) -> list[float]:
    """Return the vote of a judge for the first completion, as a list of one."""
    first, second = row["judged"]
    return [1.0 if first > second else 0.0 if first < second else 0.5]


def answered(folder: Path, rows: list[dict[str, Any]]) -> list[list[float]] | None:
    """Return people's votes for the first completion of each pair, none for one that all skipped.

    While a pair has no answer, print what people are to run, and return None.
    """
    lines = read_answers(folder / "answers" / ANSWERS)
    ids = [Pair(row["prompt"], (row["response_1"], row["response_2"]), ("", "")).id for row in rows]
    done, total = len({line["pair"] for line in current(lines)}.intersection(ids)), len(set(ids))
    if done < total:
        words = ["--pairs", folder / PAIRS, "--output_dir", folder / "answers", "--max_pairs", total]
        print(
            f"{folder.name}: {done:,} of {total:,} pairs are labelled. People label the others on the page of\n\n"
            f"    python -m pipeline.label {shlex.join(map(str, words))}\n\n"
            f"Then start this command again.",
            flush=True,
        )
        return None
    found = votes(lines)
    return [found.get(one, []) for one in ids]


def preference(row: dict[str, Any], of: list[float], *, ties: bool) -> dict[str, Any] | None:
    """Return a pair as a preference in TRL's format; None if it has no vote, or is tied and `ties` is False.

    `agreement` is the share of the annotators who prefer the chosen completion; one who sees a tie counts half.
    """
    share = statistics.fmean(of) if of else None
    if share is None or (share == 0.5 and not ties):
        return None
    sides = [row["response_1"], row["response_2"]]
    chosen, rejected = sides if share >= 0.5 else sides[::-1]
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, "agreement": max(share, 1 - share)}
