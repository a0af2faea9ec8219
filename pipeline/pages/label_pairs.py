"""Hold pairs of completions that wait for an annotator: read from a file, or added by a thread that samples."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data.cells import require_columns
from data.files import load_rows
from data.layouts import responses
from data.pairing import conversation, prompt_of, sides
from data.preferences import explicit_prompts, load_preferences
from data.quoting import quoted
from data.rows import place


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt, in the order in which they were made or read.

    Attributes:
        prompt: a text, or a conversation.
        completions: two texts, or two lists of turns.
        sources: the policy or the column that each completion is from. Annotators do not see it.
        disagreement: how far reward models disagree about the pair, if that was measured.
        id: hash of the prompt and the completions.
    """

    prompt: Any
    completions: tuple[Any, Any]
    sources: tuple[str, str]
    disagreement: float | None = None
    id: str = field(init=False)

    def __post_init__(self):
        content = json.dumps([self.prompt, *self.completions], sort_keys=True)
        object.__setattr__(self, "id", hashlib.sha256(content.encode()).hexdigest()[:16])


def is_swapped(seed: int, pair: str, annotator: str) -> bool:
    """Draw whether an annotator sees the second completion of a pair first.

    The draw is a hash, so that a reload and a restart show the same order.
    """
    return bool(hashlib.sha256(json.dumps([seed, pair, annotator]).encode()).digest()[0] & 1)


def read_pairs(name: str, split: str) -> list[Pair]:
    """Read pairs from a file, a folder or the hub: preferences, or a prompt and two responses with or without a label.

    A label that is there is not used. Pairs that are there twice are read once.

    Raises the errors of `load_rows` and of the checks of preferences, and:
        ValueError: no two columns are two responses.
        CellError: a pair cannot be used.
    """
    found: list[Pair] = []
    rows = None if name == "human_ratings" else load_rows(name, split)
    if rows is None or {"chosen", "rejected"} <= set(rows.column_names):
        columns = ("chosen", "rejected")
        for row in explicit_prompts(load_preferences(name, split), name):
            found.append(Pair(row["prompt"], (row["chosen"], row["rejected"]), columns))
    else:
        layout = responses(rows)
        if layout is None:
            raise ValueError(
                f"{name}: no two columns are two responses to a prompt; found: {quoted(rows.column_names, 300)}. Name them "
                f"prompt, response_1 and response_2, or chosen and rejected."
            )
        if not layout.prompt:
            require_columns(rows, ("prompt",), name)
        columns = (layout.texts[0], layout.texts[1])
        for index, row in enumerate(rows):
            where = place(rows, index, name)
            texts = (conversation(row[columns[0]]), conversation(row[columns[1]]))
            pair = sides(where, prompt_of(row, layout, where), texts)
            found.append(Pair(pair["prompt"], (pair["chosen"], pair["rejected"]), columns))
    return list({pair.id: pair for pair in found}.values())


class Closed(Exception):
    """The pool was closed while a thread worked for it."""


class Pool:
    """Pairs that wait to be shown. One thread adds pairs while others take them.

    Args:
        pairs: those of a file, all at once; None: a thread adds them until the pool is closed.
        disputed: whether the pair is taken about which the reward models disagree most, and not the one that waits longest.
        least: number of pairs from which to take, while more may come.
    """

    def __init__(self, pairs: Iterable[Pair] | None = None, *, disputed: bool = False, least: int = 1):
        self._waiting = {pair.id: pair for pair in pairs or ()}
        self._disputed, self._least = disputed, least
        self._closed = pairs is not None
        self.error: Exception | None = None  # that ended the sampling
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def take(self) -> Pair | None:
        """Wait for a pair and take it; None once there are no more. Raises the error that ended the sampling."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._waiting) >= self._least)
            if not self._waiting:
                if self.error is not None:
                    raise self.error
                return None
            pairs = self._waiting.values()
            pair = max(pairs, key=lambda pair: pair.disagreement or 0.0) if self._disputed else next(iter(pairs))
            self._changed.notify_all()
            return self._waiting.pop(pair.id)

    def take_known(self, pair: str) -> Pair | None:
        """Take the pair with this id, or return None if it does not wait."""
        with self._changed:
            self._changed.notify_all()
            return self._waiting.pop(pair, None)

    def close(self, error: Exception | None = None) -> None:
        """Add no more pairs. Those that wait can still be taken, and after them `error` is raised, if there is one."""
        with self._changed:
            if not self._closed:
                self._closed, self.error = True, error
            self._changed.notify_all()

    def start(self, batches: Iterator[list[Pair]], ahead: int, tell: Callable[[Exception], object]) -> None:
        """Start a thread that keeps the pool filled; `tell` gets the error that ends it, if there is one."""

        def fill() -> None:
            self.keep_filled(batches, ahead)
            if self.error is not None:
                tell(self.error)

        self._thread = threading.Thread(target=fill, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the pool, and wait until its thread has ended."""
        self.close()
        if self._thread is not None:
            self._thread.join()

    def check_open(self, tokens: int = 0) -> None:
        """Raise `Closed` if the pool was closed. A sampler calls this after each token, so that it ends with the page."""
        if self._closed:
            raise Closed

    def keep_filled(self, batches: Iterator[list[Pair]], ahead: int) -> None:
        """Add batches whenever fewer than `ahead` pairs wait, until the pool is closed; an error closes it."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._waiting) < ahead)
                self.check_open()
                batch = next(batches)
                with self._changed:
                    self._waiting.update((pair.id, pair) for pair in batch)
                    self._changed.notify_all()
        except Exception as error:  # of any kind: the annotators are told, and the answers are on the disk
            self.close(error)
