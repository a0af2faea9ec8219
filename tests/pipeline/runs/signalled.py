"""Does one thing under the handlers of `pipeline.runs.listening`, until a signal ends it.

    python signalled.py <what>

Imports little, so that it starts at once.
"""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time

import pipeline.runs.listening as listening_module
from pipeline.runs.listening import Listening


def update(listening: Listening) -> None:
    """An update that goes on for a second after the signal, and ends well."""
    while not listening.signal:
        time.sleep(0.02)
    time.sleep(1.2)


def python_code(listening: Listening) -> None:
    while True:
        pass


def waiting(listening: Listening) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def c_code(listening: Listening) -> None:
    """Code that keeps the interpreter's lock and returns to Python never."""
    sum(itertools.repeat(0))


def pools(listening: Listening) -> None:
    """A reward function's: each is ended by SIGTERM as soon as its work is done, workers that just begin too."""
    for _ in range(20):
        with multiprocessing.get_context("fork").Pool(6) as pool:
            assert pool.map(abs, [-1, 2]) == [1, 2]


def wait_for_signal(count) -> None:
    with count.get_lock():
        count.value += 1
    time.sleep(1.0)
    with count.get_lock():
        count.value += 100


def workers(listening: Listening) -> None:
    """Two forked processes that the signal reaches too; the update needs what they do."""
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)
    started = [context.Process(target=wait_for_signal, args=(count,)) for _ in range(2)]
    for process in started:
        process.start()
    while count.value < 2:
        time.sleep(0.01)
    os.killpg(0, signal.SIGINT)
    for process in started:
        process.join()
    assert count.value == 202 and listening.signal == signal.SIGINT, count.value


if __name__ == "__main__":
    what = sys.argv[1]
    if what.startswith("orphan"):
        child = os.fork()
        if child:
            sys.stdin.read()
            os._exit(0)
        listening_module.PARENT = os.getppid()  # it was imported before the fork
        what = what.removeprefix("orphan of ")
    before = signal.getsignal(signal.SIGTERM)
    listening = Listening("the run ends after this update (step 3)")
    print(os.getpid(), flush=True)
    globals()[what](listening)
    listening.close()
    assert signal.getsignal(signal.SIGTERM) is before and signal.set_wakeup_fd(-1) == -1
    sys.exit(128 + listening.signal if listening.signal else 0)
