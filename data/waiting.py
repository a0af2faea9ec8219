"""Say what a process waits for, so that it is never silent for long."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


SILENCE = 20.0  # seconds


@contextmanager
def waiting_for(what: str | Callable[[], str]) -> Iterator[None]:
    """Print a line every `SILENCE` seconds until the code inside is done: what it waits for, and for how long already.

    Args:
        what: a phrase such as "the package index", or a function that returns it at each line.
    """
    done, began = threading.Event(), time.monotonic()

    def say() -> None:
        while not done.wait(SILENCE):
            phrase = what() if callable(what) else what
            if not done.is_set():
                sys.stderr.write(f"Waiting for {phrase} ({time.monotonic() - began:.0f} s so far).\n")
                sys.stderr.flush()

    threading.Thread(target=say, daemon=True).start()
    try:
        yield
    finally:
        done.set()
