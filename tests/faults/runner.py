"""Run commands of the pipeline in forked children of a process that has imported everything: a case costs seconds.

A child ends as `python -m pipeline.<command>` would: the same error reporting, the same exit code. Its memory is bounded,
and so is its time, mostly in seconds of CPU, so that a busy machine makes no hangs. A child that hangs is ended by SIGABRT,
and leaves the stack that it hung in.
"""

import faulthandler
import gc
import importlib
import io
import os
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil


ROOT = Path(__file__).parents[2]
STAGES = ("sft", "reward", "ppo", "evaluation", "best_of_n", "rloo", "grpo", "dpo")
TOOLS = ("plan", "migrate", "tables", "convert_hh")
CPU_SECONDS, IDLE_SECONDS, SECONDS = 40, 30, 600  # of a case, before it counts as a hang: of CPU, without any, in all
MEMORY = 4 * 2**30  # bytes that a case may ask for beyond what is imported


class Ended(NamedTuple):
    """A command that has ended."""

    code: int  # its exit code; -n: ended by signal n
    out: str
    err: str
    seconds: float
    hung: str  # where it hung; empty if it ended by itself

    @property
    def said(self) -> str:
        return self.out + self.err

    @property
    def message(self) -> str:
        """The last line of its errors."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def import_all() -> None:
    """Import what the commands import, once, and freeze it, so that children share its memory."""
    for name in (*STAGES, *TOOLS):
        importlib.import_module(f"pipeline.{name}")
        del sys.modules[f"pipeline.{name}"]  # runpy runs it as a new __main__
    # What libraries import only when a stage trains.
    for name in (
        "torch._dynamo",
        "torch.optim.adamw",
        "matplotlib.pyplot",
        "matplotlib.backends.backend_agg",
        "IPython",
    ):
        try:
            importlib.import_module(name)
        except ImportError:
            pass
    gc.collect()
    gc.freeze()


class Running:
    """A command in a child process."""

    def __init__(self, command: str, words: list[str], folder: Path, setup: Callable[[], None] | None = None):
        self.folder, self.began = folder, time.time()
        logs = folder / ".logs"
        logs.mkdir(exist_ok=True)
        number = len(list(logs.glob("*.out")))
        self.out, self.err, self.stack = (logs / f"{number}-{command}.{end}" for end in ("out", "err", "stack"))
        for path in (self.out, self.err, self.stack):
            path.touch()  # by now: the child may be killed before it opens them
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._be(command, words, setup)
        self.code: int | None = None

    def _be(self, command: str, words: list[str], setup: Callable[[], None] | None) -> None:
        """Be the command; never return."""
        code = 1
        try:
            os.setsid()
            for number, path in ((0, None), (1, self.out), (2, self.err)):
                target = os.open(path or os.devnull, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(target, number)
                os.close(target)
            sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8", errors="strict")
            sys.stderr = io.TextIOWrapper(
                os.fdopen(2, "wb", closefd=False), encoding="utf-8", errors="backslashreplace", line_buffering=True
            )
            stack = open(self.stack, "w")  # for the life of the process
            faulthandler.enable(stack)
            limit = psutil.Process().memory_info().vms + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.chdir(self.folder)
            sys.path[0] = str(self.folder)  # as `python -m` does; the packages are imported already
            sys.path.append(str(ROOT))
            sys.argv = [f"pipeline/{command}.py", *words]
            try:
                if setup:
                    setup()
                runpy.run_module(f"pipeline.{command}", run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
                if isinstance(error.code, str):
                    print(error.code, file=sys.stderr)
            except BaseException as error:  # as the interpreter does
                try:
                    sys.excepthook(type(error), error, error.__traceback__)
                    if isinstance(error, KeyboardInterrupt):
                        code = -signal.SIGINT
                except SystemExit as end:
                    code = end.code
            threading._shutdown()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        except BaseException as error:  # the streams of a case may be broken
            os.write(2, f"while it ended: {error!r}\n".encode())
            code = code or 120
        finally:
            if code < 0:
                signal.signal(-code, signal.SIG_DFL)
                os.kill(os.getpid(), -code)
            os._exit(code & 255)

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self._end_group()
        return self.code

    def kill(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _end_group(self) -> None:
        """End what the command has started and left, and wait until it is gone: a child that has just begun holds the lock."""
        until = time.time() + 2
        while time.time() < until:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            time.sleep(0.005)

    def _cpu_seconds(self) -> float:
        """Return the seconds of CPU of the command and of what it has started."""
        try:
            return sum(psutil.Process(self.pid).cpu_times()[:4])
        except psutil.Error:
            return 0.0

    def wait(self) -> Ended:
        """Wait for the command to end, and end it where it computes for too long, or waits for too long."""
        hung, computed, moved = "", 0.0, time.time()
        while self.poll() is None:
            time.sleep(0.005)
            if (now := self._cpu_seconds()) > computed + 0.05:
                computed, moved = now, time.time()
            if computed > CPU_SECONDS or time.time() > min(moved + IDLE_SECONDS, self.began + SECONDS):
                hung = self._end_hung()
                break
        read = {path: path.read_text(encoding="utf-8", errors="replace") for path in (self.out, self.err)}
        assert self.code is not None
        return Ended(self.code, read[self.out], read[self.err], time.time() - self.began, hung)

    def _end_hung(self) -> str:
        """End a command that hangs; return the line of ours, or else the line, that it hung in."""
        self.kill(signal.SIGABRT)
        until = time.time() + 5
        while self.poll() is None and time.time() < until:
            time.sleep(0.02)
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self._end_group()
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        lines = [line.strip() for line in self.stack.read_text(errors="replace").splitlines() if "line" in line]
        ours = [
            line
            for line in lines
            if str(ROOT / "tests") not in line and str(ROOT) + "/" in line and ".venv" not in line
        ]
        return (ours or lines or ["nowhere that is known"])[0]
