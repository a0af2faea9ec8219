"""Signals: the first lets a run end its update and says so, the second ends it whatever it does, and the processes that it
forks are ended as any."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from pipeline.runs.errors import report


pytestmark = pytest.mark.slow


SCRIPT = Path(__file__).with_name("signalled.py")
TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
APART = 1.4  # seconds: more than the same signal takes to come from all that pass it on


@pytest.fixture
def start():
    """Starts `signalled.py` in a session of its own, and returns it with the number of the process that listens."""
    started = []

    def start(what: str, **environment: str) -> tuple[subprocess.Popen, int]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), what], env={**clean, "PYTHONPATH": str(ROOT), **environment}, text=True,
            start_new_session=True, **pipes,
        )  # fmt: skip
        started.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """The exit code and what was said; fails if the process does not end."""
    _, said = process.communicate(timeout=30)
    return process.returncode, said


@pytest.mark.parametrize("number", [TERM, INT, USR1])
def test_the_first_signal_is_answered_at_once_and_the_update_ends(start, number):
    process, pid = start("update")
    process.send_signal(number)
    line = process.stderr.readline()
    assert process.poll() is None  # the update goes on
    name = signal.Signals(number).name
    assert line == f"{name}: the run ends after this update (step 3); a second signal ends it now (kill {pid}).\n"
    assert finish(process) == (128 + number, "")


def test_a_signal_that_comes_twice_at_once_is_one(start):
    """`timeout` signals its child, and then its group."""
    process, _ = start("update")
    process.send_signal(TERM)
    time.sleep(0.1)
    process.send_signal(TERM)
    code, said = finish(process)
    assert code == 143 and said.count("\n") == 1


@pytest.mark.parametrize("second", [TERM, INT])
@pytest.mark.parametrize("what", ["python_code", "waiting", "c_code"])
def test_the_second_signal_ends_whatever_the_run_does(start, what, second):
    process, _ = start(what)
    process.send_signal(TERM)
    assert process.stderr.readline().startswith("SIGTERM: the run ends after this update (step 3)")
    time.sleep(APART)
    assert process.poll() is None
    process.send_signal(second)
    code, _ = finish(process)
    assert code == (-signal.SIGKILL if what == "c_code" else -second)


def test_a_pool_ends_its_workers(start):
    process, _ = start("pools")
    assert finish(process) == (0, "")


def test_forked_processes_outlive_the_first_ctrl_c_so_that_the_update_can_end(start):
    process, pid = start("workers")
    code, said = finish(process)
    assert code == 130 and said.count("\n") == 1 and f"(kill {pid})" in said


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux tells of the end of a process that is no child")
@pytest.mark.parametrize("variable", ["ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"])
def test_the_end_of_the_launcher_is_a_first_signal(start, variable):
    process, pid = start("orphan of update", **{variable: "no"})
    process.kill()
    _, said = process.communicate(timeout=30)  # until the orphan has ended too: it holds the pipe
    ends = "the run ends after this update (step 3); a second signal ends it now"
    assert said == f"The launcher (process {process.pid}) has ended: {ends} (kill {pid}).\n"


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux tells of the end of a process that is no child")
@pytest.mark.parametrize(("variable", "ends"), [("TORCHELASTIC_RUN_ID", True), ("ACCELERATE_MIXED_PRECISION", False)])
def test_a_launcher_that_passes_signals_on_ends_first_only_at_the_second(start, variable, ends):
    """accelerate's launcher of a single process ends at the first Ctrl-C, and the run has its update to finish."""
    process, pid = start("orphan of python_code", **{variable: "no"})
    os.kill(pid, INT)
    assert process.stderr.readline().startswith("SIGINT: ")
    time.sleep(APART)
    process.kill()
    process.wait()
    if ends:
        assert process.communicate(timeout=30) == ("", "")
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=2)


def test_the_end_of_a_shell_is_no_signal(start):
    process, _ = start("orphan of python_code")  # as under nohup
    process.kill()
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=2.5)


@pytest.mark.parametrize("world", ["1", "2"])
def test_ctrl_c_outside_of_training_is_a_line(world, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", world)
    for rank in range(int(world)):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        with pytest.raises(SystemExit) as caught:
            report(KeyboardInterrupt, KeyboardInterrupt(), None)
        assert caught.value.code == 130
    assert capsys.readouterr().err == "SIGINT: the command ends now.\n"


STARTING = """
import os, signal, sys
sys.argv = ["-m"]  # as while Python looks for `pipeline.ppo`
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import pipeline
os.kill(os.getpid(), signal.SIGINT)
"""


def test_ctrl_c_while_a_command_is_imported_is_a_line():
    done = subprocess.run([sys.executable, "-c", STARTING], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "SIGINT: the command ends now.\n")
