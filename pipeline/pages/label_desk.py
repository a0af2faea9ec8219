"""Give each annotator a pair, record the answer, and say how far all have come.

The desk is one object that all annotators share, each in a thread of the server. What it knows it has from the file of
answers, so that a process that was killed goes on where it was.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from data.judgements import disagreement
from data.quoting import quoted
from pipeline.pages.label_answers import LABELS, SURE, UNDO, AnswerFile, current, votes, write_preferences
from pipeline.pages.label_pairs import Pair, Pool, is_swapped


PATIENCE = 600.0  # seconds for which a pair is kept for an annotator who does not answer
LONGEST_NAME = 40


class Task(NamedTuple):
    """A pair as an annotator sees it."""

    pair: Pair
    number: int  # of the pair, from 1
    swapped: bool  # whether the second completion stands first

    @property
    def sides(self) -> tuple[Any, Any]:
        """Return the completions in the order in which they are shown."""
        first, second = self.pair.completions
        return (second, first) if self.swapped else (first, second)

    @property
    def ticket(self) -> str:
        """Return what the page sends back with an answer: the pair, and the order in which it was shown."""
        return f"{self.pair.id}.{int(self.swapped)}"


class Progress(NamedTuple):
    """Progress of the annotators.

    Attributes:
        total: pairs to be answered.
        done: pairs that somebody has answered or skipped.
        mine, skipped: answers of this annotator without and with `skip`.
        annotators: people who have answered.
        several: pairs with votes of two or more annotators.
        agreement: share of these on which all say the same, share of pairs of annotators who say the same, and kappa; None
            without such pairs.
    """

    total: int
    done: int
    mine: int
    skipped: int
    annotators: int
    several: int
    agreement: tuple[float, float, float] | None


class Desk:
    """Pairs and answers of a folder.

    Args:
        file: the answers.
        pool: pairs that nobody has seen yet.
        seed: seed of the order in which completions are shown.
        overlap: every `overlap`th pair goes to all annotators; 0: none.
        total: number of pairs to be answered.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        file: AnswerFile,
        pool: Pool,
        *,
        seed: int,
        overlap: int,
        total: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.file, self.pool, self.seed, self.overlap, self.total, self._clock = (
            file,
            pool,
            seed,
            overlap,
            total,
            clock,
        )
        self.lines = list(file.lines)
        self._lock = threading.Lock()
        self._pairs: dict[str, Pair] = {}  # by id, in the order in which they were first shown
        self._numbers: dict[str, int] = {}
        self._shared: set[str] = set()
        self._given: dict[str, dict[str, dict[str, Any]]] = {}  # the answers that count, by pair and annotator
        self._claims: dict[str, tuple[str, float]] = {}  # the pair that each annotator has open, and since when
        self.written = 0  # pairs in the file of preferences
        self._writing = threading.Lock()
        self._coming = 0  # pairs that somebody waits for
        for number, line in enumerate(self.lines, 1):
            if line["pair"] not in self._pairs:
                pair = _pair_of(line)
                if pair.id != line["pair"]:
                    raise ValueError(
                        f"{file.path} line {number}: the texts are not those of the pair {quoted(line['pair'])} that was "
                        f"answered. Restore the line, or delete it."
                    )
                self._remember(pair, line["number"], line["shared"])
        for line in current(self.lines):
            self._given[line["pair"]][line["annotator"]] = line

    def _remember(self, pair: Pair, number: int, shared: bool) -> None:
        self._pairs[pair.id], self._numbers[pair.id], self._given[pair.id] = pair, number, {}
        if shared:
            self._shared.add(pair.id)

    def _open(self, pair: Pair) -> None:
        """Give a new pair its number, which says whether all annotators see it."""
        number = max(self._numbers.values(), default=0) + 1
        self._remember(pair, number, self.overlap > 0 and number % self.overlap == 0)

    def next_task(self, annotator: str) -> Task | None:
        """Return the pair that an annotator is to answer, or None if there is none left; wait while pairs are sampled.

        It is the pair that the annotator has open; or one that others have left, or that all are to answer; or a new one.

        Raises the errors of `Pool.take`.
        """
        with self._lock:
            found = self._left(annotator)
            if found is not None:
                return self._claim(annotator, found)
            if len(self._pairs) + self._coming >= self.total:
                return None
            self._coming += 1
        try:
            while (pair := self.pool.take()) is not None:
                with self._lock:
                    if pair.id not in self._pairs:  # else an earlier run has shown it
                        self._open(pair)
                        return self._claim(annotator, pair.id)
            return None
        finally:
            with self._lock:
                self._coming -= 1

    def _left(self, annotator: str) -> str | None:
        now = self._clock()
        own = self._claims.get(annotator, ("", 0.0))[0]
        if own and annotator not in self._given[own]:
            return own
        taken = {pair for pair, since in self._claims.values() if now - since < PATIENCE}
        for pair, given in self._given.items():
            if annotator not in given and (pair in self._shared or not (given or pair in taken)):
                return pair
        return None

    def _claim(self, annotator: str, pair: str) -> Task:
        if self._claims.get(annotator, ("", 0.0))[0] != pair:
            self._claims[annotator] = pair, self._clock()
        return Task(self._pairs[pair], self._numbers[pair], is_swapped(self.seed, pair, annotator))

    def answer(self, annotator: str, ticket: str, label: str, sure: str | None = None) -> bool:
        """Record an answer: it is on the disk when this returns.

        Args:
            ticket: that of the task which was shown.
            label: 1 or 2 for the completion that stood first or second, tie, or skip.
            sure: one of `SURE`, or None if the annotator does not say.

        Returns:
            False if this annotator has answered the pair already, in another window or with a key pressed twice. Nothing is
            recorded then.

        Raises the errors of `AnswerFile.append`, and:
            ValueError: the pair, the label or `sure` is unknown.
        """
        if label not in LABELS or sure not in (None, *SURE):
            raise ValueError(f"label={label!r}, sure={sure!r} must be of {LABELS} and {SURE}.")
        pair, _, swapped = ticket.partition(".")
        with self._lock:
            if pair not in self._pairs:
                waiting = self.pool.take_known(pair)  # a window that was open before the page was started again
                if waiting is None:
                    raise ValueError(
                        "The page was started again and has other pairs now. Please answer this one instead."
                    )
                self._open(waiting)
            if annotator in self._given[pair]:
                return False
            opened, since = self._claims.get(annotator, ("", 0.0))
            line = self._line(annotator, Task(self._pairs[pair], self._numbers[pair], swapped == "1"), label)
            line |= {"sure": sure, "seconds": round(self._clock() - since, 1) if opened == pair else None}
            self.file.append(line)
            self.lines.append(line)
            self._given[pair][annotator] = line
            if opened == pair:
                del self._claims[annotator]
            return True

    def undo(self, annotator: str) -> bool:
        """Take back the last answer of an annotator, who gets the pair again; return whether there was one.

        Raises the errors of `AnswerFile.append`.
        """
        with self._lock:
            mine = [line for line in current(self.lines) if line["annotator"] == annotator]
            if not mine:
                return False
            pair = mine[-1]["pair"]
            line = mine[-1] | {"label": UNDO, "sure": None, "seconds": None, "time": _now()}
            self.file.append(line)
            self.lines.append(line)
            del self._given[pair][annotator]
            self._claims[annotator] = pair, self._clock()
            return True

    def _line(self, annotator: str, task: Task, label: str) -> dict[str, Any]:
        sources = task.pair.sources[::-1] if task.swapped else task.pair.sources
        return {
            "pair": task.pair.id,
            "annotator": annotator,
            "label": label,
            "prompt": task.pair.prompt,
            "first": task.sides[0],
            "second": task.sides[1],
            "first_from": sources[0],
            "second_from": sources[1],
            "swapped": task.swapped,
            "seed": self.seed,
            "number": task.number,
            "shared": task.pair.id in self._shared,
            "disagreement": task.pair.disagreement,
            "time": _now(),
        }

    def write_preferences(self, *, ties: bool) -> None:
        """Write the preferences beside the answers. Raises the errors of `data.saving.save`."""
        with self._writing:
            self.written = write_preferences(self.file.path.parent, list(self.lines), ties=ties)

    def progress(self, annotator: str) -> Progress:
        """Return how far all annotators and this one have come."""
        with self._lock:
            answers = [line for given in self._given.values() for line in given.values()]
            mine = [line["label"] for line in answers if line["annotator"] == annotator]
            of_pairs = list(votes(answers).values())
            return Progress(
                total=self.total,
                done=sum(bool(given) for given in self._given.values()),
                mine=len(mine) - mine.count("skip"),
                skipped=mine.count("skip"),
                annotators=len({line["annotator"] for line in answers}),
                several=sum(len(found) > 1 for found in of_pairs),
                agreement=disagreement(of_pairs),
            )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _pair_of(line: dict[str, Any]) -> Pair:
    sides, sources = (line["first"], line["second"]), (line["first_from"], line["second_from"])
    if line["swapped"]:
        sides, sources = sides[::-1], sources[::-1]
    return Pair(line["prompt"], sides, sources, line["disagreement"])


def checked_name(name: str) -> str:
    """Return the name of an annotator without white space around it.

    Raises:
        ValueError: it is empty, too long, or has characters that cannot be printed.
    """
    name = " ".join(name.split())
    if not name:
        raise ValueError("Please enter your name.")
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError(f"Please enter a name of at most {LONGEST_NAME} printable characters.")
    return name
