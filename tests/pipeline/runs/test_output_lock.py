"""`pipeline.runs.output_lock`: one run at a time in a folder, and all its processes find the same folder."""

import errno
import fcntl
import os
import signal
import socket
from pathlib import Path

import pytest

from pipeline.runs import output_lock
from pipeline.runs.output_lock import LOCK, claim, lock_output, release_all


@pytest.fixture(autouse=True)
def released(monkeypatch):
    monkeypatch.setattr(output_lock, "PATIENCE", 0.3)
    yield
    release_all()


@pytest.fixture
def other_run():
    """Has another process do something that ends in it holding a lock, and returns its number."""
    started = []

    def other_run(work) -> int:
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.close(read)
                work()
                os.write(write, b".")
                signal.pause()
            finally:
                os._exit(1)
        started.append(pid)
        os.close(write)
        assert os.read(read, 1) == b"."
        os.close(read)
        return pid

    yield other_run
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def lock(folder: Path, **options) -> None:
    lock_output(str(folder), writes=True, **options)


def test_the_second_of_two_runs_is_refused_until_the_first_has_ended_however_it_ended(other_run, tmp_path):
    folder = tmp_path / "a" / "out"  # not there yet
    pid = other_run(lambda: claim(folder))
    (folder / "mine").write_text("x")
    for name in (str(folder), str(tmp_path / "a" / ".." / "a" / "out")):
        with pytest.raises(ValueError) as caught:
            lock_output(name, writes=True)
        message = str(caught.value)
        assert message.startswith(
            f"output_dir={name!r}: another run writes there: process {pid} on {socket.gethostname()}"
        )
        assert "since 20" in message and f"end it (kill {pid} on" in message and "\n" not in message
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert (folder / LOCK).is_file()  # of the killed run
    lock(folder)
    lock(folder)  # the next stage of this process
    release_all()
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_a_forked_worker_does_not_keep_the_lock_of_a_run_that_has_ended(other_run, tmp_path):
    def run_with_worker() -> None:
        claim(tmp_path)
        if not os.fork():
            signal.alarm(20)  # it outlives the run
            signal.pause()

    pid = other_run(run_with_worker)
    with pytest.raises(BlockingIOError):
        claim(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    claim(tmp_path)


def test_a_worker_that_ends_leaves_the_lock(tmp_path):
    claim(tmp_path)
    pid = os.fork()
    if not pid:
        release_all()  # as the interpreter does at its end
        os._exit(0)
    os.waitpid(pid, 0)
    assert (tmp_path / LOCK).is_file()


def test_a_file_that_was_removed_in_between_locks_nothing(monkeypatch, tmp_path):
    """The run before removes its file after this one has opened it."""
    flock, removed = fcntl.flock, []

    def late(descriptor, flags):
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
        return flock(descriptor, flags)

    monkeypatch.setattr(fcntl, "flock", late)
    mine = claim(tmp_path)
    assert mine["id"] in (tmp_path / LOCK).read_text()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_the_run_goes_on_and_says_so(number, monkeypatch, tmp_path, capsys):
    def flock(descriptor, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock(tmp_path)
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path}: the file system has no locks (") and said.count("\n") == 1


def test_a_lock_that_cannot_be_made_is_an_error_of_all_processes(monkeypatch, tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(OSError, match=rf"{LOCK}: cannot be made \(Is a directory\). Name another folder"):
        lock(tmp_path)


# ------------------------------------------------------------------------------------------ several processes
def others(monkeypatch, *objects) -> None:
    """Play the other processes of the run: give what they bring to each gathering in turn."""
    rounds = iter(objects)
    monkeypatch.setattr(output_lock, "gather_object", lambda mine: [*next(rounds), *mine])


def test_a_refusal_reaches_all_processes(monkeypatch, tmp_path):
    holder = {"pid": 7, "host": "node1", "since": "2026-01-01 10:00:00 +0000", "id": "x"}
    others(monkeypatch, [{"host": "node0", "theirs": holder}])
    with pytest.raises(ValueError, match="process 7 on node1, since 2026-01-01 10:00:00"):
        lock_output(str(tmp_path), writes=False, shared=True)
    assert not list(tmp_path.iterdir())


def test_a_machine_that_does_not_see_the_main_process_s_folder_is_named_at_the_start(monkeypatch, tmp_path):
    here = socket.gethostname()
    others(monkeypatch, [{"host": "node0", "mine": {"id": "x"}}], [("node0", True)])
    with pytest.raises(
        ValueError, match=f"the processes on {here} do not find what the main .*save_on_each_node: true"
    ):
        lock_output(str(tmp_path / "elsewhere"), writes=False, shared=True)
    assert not list(tmp_path.iterdir())
    others(monkeypatch, [{"host": "node0", "mine": {"id": "x"}}])  # a run that leaves nothing to resume from
    lock_output(str(tmp_path / "elsewhere"), writes=False)


def test_each_machine_may_have_a_folder_of_its_own(monkeypatch, tmp_path):
    given = {"shared": True, "each_node": True}
    others(monkeypatch, [{"host": "node0", "mine": {"id": "x"}}], [("node0", True)])
    lock(tmp_path / "node1", **given)
    release_all()
    (tmp_path / LOCK).write_text('{"id": "x"}')
    with (tmp_path / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        others(monkeypatch, [{"host": "node0", "mine": {"id": "x"}}])
        with pytest.raises(ValueError, match="save_on_each_node is true, and the machines share this folder"):
            lock(tmp_path, **given)
