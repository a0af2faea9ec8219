"""Keep what annotators answer, and make preferences of it.

`answers.jsonl` has a line for each answer. A line is on the disk before the next pair is shown, and is never changed. The last
line of an annotator about a pair counts; `undo` takes the answer back. `preferences.jsonl` is made of it, in TRL's format.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.conversion import json_lines
from data.json_files import parse_json
from data.judgements import of_judgements
from data.layouts import JUDGEMENTS, Layout
from data.pairing import Options
from data.quoting import escaped, quoted
from data.reading import dataset_of
from data.saving import save, sync
from data.schemas import ANSWER
from data.verdicts import FIRST, SECOND, TIE


ANSWERS, PREFERENCES = "answers.jsonl", "preferences.jsonl"
VOTES = {"1": FIRST, "2": SECOND, "tie": TIE}  # share of the vote that goes to the completion that was shown first
LABELS = (*VOTES, "skip")
UNDO = "undo"
SURE = ("a guess", "fairly sure", "certain")


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file of answers; none if the file is not there.

    A last line that was cut off, as the process or the machine died, is removed from the file, and that is said.

    Raises:
        ValueError: another line is not an answer.
        OSError: the file cannot be read or repaired.
    """
    if not path.exists():
        return []
    whole, newline, rest = path.read_bytes().rpartition(b"\n")
    remedy = "Correct or delete the line, or move the file if pipeline.label has not written it."
    lines = whole.split(b"\n") if newline else []
    found = [
        parse_json(line, f"{escaped(path)} line {number}", ANSWER, remedy=remedy)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if rest:
        try:
            found.append(parse_json(rest, str(path), ANSWER))
        except ValueError:
            if not (found or rest.startswith(b'{"pair": "')):
                raise ValueError(f"{escaped(path)}: no file of answers, but {quoted(rest)}. {remedy}") from None
            os.truncate(path, len(whole) + len(newline))
            print(
                f"{escaped(path)}: the last line was cut off and is dropped: {quoted(rest.decode(errors='replace'))}."
            )
        else:
            with path.open("ab") as file:
                file.write(b"\n")
        sync(path)
    return found


class AnswerFile:
    """A file of answers that is open to be appended to.

    Attributes:
        lines: its lines as it was opened. Raises the errors of `read_answers`.
    """

    def __init__(self, path: Path):
        self.path, self.lines = path, read_answers(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        sync(path.parent)

    def append(self, line: dict[str, Any]) -> None:
        """Write a line and force it to the disk; if that fails, leave nothing of it.

        Raises:
            OSError: the line is not on the disk.
        """
        content = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        size = os.fstat(self._descriptor).st_size
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
            os.fsync(self._descriptor)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._descriptor, size)
            raise OSError(
                f"{self.path}: the answer could not be saved ({error.strerror}). Make room on the disk, and answer again."
            ) from error

    def close(self) -> None:
        os.close(self._descriptor)


def current(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the answers that count, in the order in which they were given."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        key = line["pair"], line["annotator"]
        found.pop(key, None)
        if line["label"] != UNDO:
            found[key] = line
    return list(found.values())


def preferences(lines: Iterable[dict[str, Any]], *, ties: bool = False) -> list[dict[str, Any]]:
    """Return the preferences in the lines of a file of answers: prompt, chosen, rejected and agreement.

    `agreement` is the share of the annotators of a pair who prefer the chosen completion; one who sees a tie counts half.

    Args:
        ties: whether pairs whose annotators are tied stay, with an agreement of 0.5, for `use_agreement`.
    """
    answers = [line for line in current(lines) if line["label"] in VOTES]
    if not answers:
        return []
    columns = ("prompt", "first", "second", "label")
    rows = dataset_of({column: [line[column] for line in answers] for column in columns}, ANSWERS)
    layout = Layout(JUDGEMENTS, ("prompt",), ("first", "second"), ("label",))
    made = of_judgements(rows, ANSWERS, layout, Options(ties=True))
    return [pair for pair in made.pairs if ties or pair["agreement"] > TIE]


def write_preferences(folder: Path, lines: Iterable[dict[str, Any]], *, ties: bool = False) -> int:
    """Write `preferences.jsonl` to a folder, whole or not at all, and return its number of pairs; none: no file."""
    rows = preferences(lines, ties=ties)

    def write(staged: Path) -> None:
        if rows:
            (staged / PREFERENCES).write_text(json_lines(rows), encoding="utf-8")

    save(folder, "labels", write)
    return len(rows)


def votes(lines: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """Return each pair's votes for the completion that was made first: 1, 0, or 0.5 for a tie."""
    found: dict[str, list[float]] = {}
    for line in current(lines):
        if line["label"] in VOTES:
            vote = VOTES[line["label"]]
            found.setdefault(line["pair"], []).append(1 - vote if line["swapped"] else vote)
    return found
