"""Watch a training run from a process of its own: say what its first signal does, and end the run at the second.

    python -I -S pipeline/runs/watcher.py <descriptors: signals, plan> <launcher> <whether it passes signals on>

`pipeline.runs.stopping` starts it, one for each process that trains. Python handles a signal only when its main thread
returns from C code, and a thread needs Python's lock. So a run that waits in a collective that another process never joins,
or in C code that keeps the lock, can neither say nor do anything. But CPython writes the number of each signal to a pipe at
once (`signal.set_wakeup_fd`), and this process reads it. It imports the standard library alone, to start in milliseconds.
"""

import os
import select
import signal
import sys
import time


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Seconds in which a signal that comes again is the same one: `timeout` and slurm signal a run, and its launcher or its
# group too.
PASSED_ON = 1.0
# Seconds that a run has to end by itself at the second signal: then its exit status names the signal.
LAST_WORD = 0.5


def watch(signals: int, plan: int, launcher: int, passes_on: bool) -> None:
    """Read the signals of the run, which is this process's parent, until the run ends or trains no more.

    Args:
        signals: descriptor of the pipe with the signals' numbers, each a byte.
        plan: descriptor of the file in which the run says when it would end, as "the run ends after this update (step 8)".
        launcher: the process that started the run, if its end is to end the run too; else 0.
        passes_on: whether the launcher passes signals on and waits for the run. If so it ends before the run only at a
            second signal.
    """
    run, gone = os.getppid(), _end_of(launcher)
    first: float | None = None  # when the first signal came
    while os.getppid() == run:
        ready, _, _ = select.select([signals, *gone], [], [], 1.0)
        if signals in ready:
            numbers = os.read(signals, 4096)
            if not numbers:
                return
            asked = [number for number in numbers if number in STOP_SIGNALS]
            if asked and first is None:
                first = time.monotonic()
                _say(signal.Signals(asked[0]).name, plan, run)
            elif asked and first is not None and time.monotonic() - first > PASSED_ON:
                time.sleep(LAST_WORD)
                _end(run, signal.SIGKILL)
        elif ready:
            gone = []
            if first is None:
                first = time.monotonic()
                _say(f"The launcher (process {launcher}) has ended", plan, run)
                _end(run, signal.SIGTERM)
            elif passes_on:
                _end(run, signal.SIGTERM)
                time.sleep(LAST_WORD)
                _end(run, signal.SIGKILL)


def _end_of(process: int) -> list[int]:
    """Return a descriptor that is readable when a process has ended; none if there is no way to make one."""
    try:
        return [os.pidfd_open(process)] if process else []
    except (AttributeError, OSError):  # not Linux, or an old one
        return []


def _say(cause: str, plan: int, run: int) -> None:
    """Print what happens now; of several processes each begins with its rank."""
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    text = os.pread(plan, 4096, 0).decode().strip()
    line = f"{rank}{cause}: {text}; a second signal ends it now (kill {run}).\n"
    try:
        os.write(2, line.encode())
    except OSError:  # nobody reads it
        pass


def _end(run: int, number: int) -> None:
    if os.getppid() == run:  # it has not ended, and nobody else has its number
        os.kill(run, number)


if __name__ == "__main__":
    for number in (*STOP_SIGNALS, signal.SIGHUP, signal.SIGPIPE):  # a whole job may be signalled
        signal.signal(number, signal.SIG_IGN)
    signals, plan, launcher, passes_on = map(int, sys.argv[1:])
    watch(signals, plan, launcher, bool(passes_on))
