"""Handle the signals that stop a run, in the process that trains and in no other.

The first signal is recorded, so that the run ends after its update. The second ends the run at once. `pipeline.runs.watcher`
says so, and ends a run that cannot end itself. The end of the launcher that started the run counts as a signal.

A process that the run forks, such as a worker of `multiprocessing.Pool`, ends at SIGTERM as it would without these handlers,
or the pool could not end it. Ctrl-C and SIGUSR1 often reach all processes of a run, and an update that loses its workers
cannot be finished. So a forked process ignores the first of these, and ends at the second.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache

from pipeline.runs import watcher
from pipeline.runs.watcher import PASSED_ON, STOP_SIGNALS


PARENT = os.getppid()  # as this process starts: the launcher, if there is one


class Listening:
    """Handlers of the signals that stop a run, and the process that watches it. Only the main thread can make one."""

    def __init__(self, plan: str):
        self.signal = 0  # the first that came
        self._since = 0.0
        self._plan = tempfile.TemporaryFile()
        self.tell(plan)
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        passes_on = "TORCHELASTIC_RUN_ID" in os.environ
        launched = passes_on or "ACCELERATE_MIXED_PRECISION" in os.environ  # `accelerate launch` always sets this
        launcher = PARENT if launched and PARENT > 1 else 0
        words = [*map(str, (read, self._plan.fileno(), launcher)), str(int(passes_on))]
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", watcher.__file__, *words],
            pass_fds=(read, self._plan.fileno()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # signals to the run's group do not reach it
        )
        os.close(read)
        self._handlers = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        _listening.append(self)
        _listen_in_one_process()
        if launcher and os.getppid() != launcher:  # it ended while the run was set up
            os.kill(os.getpid(), signal.SIGTERM)

    def tell(self, plan: str) -> None:
        """Say in one line what the first signal does from now on."""
        os.pwrite(self._plan.fileno(), plan.ljust(200).encode(), 0)

    def _handle(self, number: int, frame) -> None:
        if not self.signal:
            self.signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def close(self) -> None:
        """Handle signals as before."""
        _listening.remove(self)
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._write)
        self._watcher.wait()
        self._plan.close()

    def leave_to_parent(self) -> None:
        """In a forked process: take no part, and outlive the first signal that a whole group gets."""
        signal.set_wakeup_fd(-1)
        os.close(self._write)
        for number, handler in self._handlers.items():
            signal.signal(number, handler if number == signal.SIGTERM else _ignore_once)


_listening: list[Listening] = []  # of this process; one, while it trains
_forking = threading.local()


def _ignore_once(number: int, frame) -> None:
    signal.signal(number, signal.SIG_DFL)


@cache
def _listen_in_one_process() -> None:
    """Have processes that this one forks take back the handlers before a signal can reach them."""

    def block() -> None:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)

    def unblock_child() -> None:
        while _listening:
            _listening.pop().leave_to_parent()
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=unblock_child)
