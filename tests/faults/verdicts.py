"""What became of a case: one of seven verdicts, and the reason."""

import re
import signal
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tests.faults.runner import Ended


RIGHT, CLEAR, UNCLEAR, TRACEBACK, HANG, LOST, SILENT = (
    "right", "clear error", "unclear", "traceback", "hang", "lost", "silent",
)  # fmt: skip
VERDICTS = (RIGHT, CLEAR, UNCLEAR, TRACEBACK, HANG, LOST, SILENT)
GOOD = (RIGHT, CLEAR)


class Verdict(NamedTuple):
    name: str
    why: str = ""


def judge(
    ended: Ended,
    *,
    names: Iterable[str] = (),
    lost: Iterable[str] = (),
    wrong: Callable[[], str | None] = lambda: None,
) -> Verdict:
    """Return the verdict on a command that has ended.

    Args:
        names: what a clear error names, one of these at least: a file, a field, a value.
        lost: what was damaged of the user's or of an earlier run's.
        wrong: the oracle: what is wrong with what a run left that ended with exit code 0, or None.
    """
    if ended.hung:
        return Verdict(HANG, f"{ended.seconds:.0f} s, in {ended.hung}")
    lost = list(lost)
    if lost:
        return Verdict(LOST, f"{lost[0]} (exit code {ended.code}{ended.code and f': {shown(ended.message)}' or ''})")
    if ended.code < 0:
        return Verdict(TRACEBACK, f"ended by {signal.Signals(-ended.code).name}: {shown(ended.message)}")
    if ended.code:
        return judge_error(ended, names)
    problem = wrong()
    return Verdict(SILENT, problem) if problem else Verdict(RIGHT)


def judge_error(ended: Ended, names: Iterable[str]) -> Verdict:
    """Return the verdict on a command that has ended with an error."""
    if "Traceback (most recent call last)" in ended.err:
        return Verdict(TRACEBACK, shown(ended.message))
    names = [*map(str, names)]
    names += [name.strip("[]'\"") for name in names]  # what a list of one holds
    names = [name for name in names if name]
    if not any(is_named(name, ended.message) for name in names):
        return Verdict(UNCLEAR, f"names none of {names}: {shown(ended.message)}")
    if "\x1b" in ended.message:
        return Verdict(UNCLEAR, f"has a terminal escape: {shown(ended.message)}")
    return Verdict(CLEAR, shown(ended.message))


def is_named(name: str, message: str) -> bool:
    """Return whether a message has a name as words of their own: `out` is not in `without`."""
    before, after = (r"(?<!\w)" if name[0].isalnum() else ""), (r"(?!\w)" if name[-1].isalnum() else "")
    return re.search(f"{before}{re.escape(name)}{after}", message) is not None


def shown(text: str, most: int = 240) -> str:
    """Return a text fit for one line."""
    text = ascii(text)[1:-1]
    return text if len(text) <= most else f"{text[:most]}..."
