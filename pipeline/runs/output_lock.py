"""Let one run at a time write in an output folder, and see that all its processes find the same folder.

The lock is `flock` on a file in the folder. It ends with the process that holds it, however that ends, so a killed run
leaves none. The file says who holds it, and is removed when the run ends. Its name begins with an underscore: Trainer
uploads no such file.
"""

import atexit
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path

from accelerate.utils import gather_object
from transformers import TrainingArguments

from data.boundaries import real_path
from data.waiting import waiting_for
from pipeline.runs.live_files import LOCK


# A file system or mount without locks answers with one of these.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
PATIENCE = 30.0  # seconds until other machines see a new file: network file systems keep lists of files that long

_held: dict[Path, tuple[int, dict]] = {}  # of this process: the descriptor of each lock, and what its file says


def lock_output(output_dir: str, *, writes: bool, shared: bool = False, each_node: bool = False) -> None:
    """Lock the output folder for this run until the process ends. All processes of a run call this together.

    Args:
        writes: whether this process writes in the folder, and so takes the lock.
        shared: whether the run needs every process to find what those that write have written.
        each_node: whether a process of each machine writes (`save_on_each_node`).

    Raises:
        ValueError: another run writes in the folder; or not all processes find the same folder.
        OSError: the folder or the file cannot be made.
    """
    folder = real_path(Path(output_dir).expanduser())
    host = socket.gethostname()
    found: dict = {"host": host}
    if writes:
        try:
            found["mine"] = claim(folder)
        except BlockingIOError as error:
            found["theirs"] = error.args[0]
        except OSError as error:
            found["error"] = f"{folder / LOCK}: cannot be made ({error.strerror}). Name another folder in output_dir."
    with waiting_for(f"all processes of this run to look for {output_dir}"):
        of_all = gather_object([found])
    ours = [one["mine"]["id"] for one in of_all if "mine" in one]
    for one in of_all:
        if "error" in one:
            raise OSError(one["error"])
        if "theirs" in one and one["theirs"].get("id") in ours:
            raise ValueError(
                f"output_dir={output_dir!r}: save_on_each_node is true, and the machines share this folder. Leave "
                f"save_on_each_node unset."
            )
        if "theirs" in one:
            raise ValueError(_refusal(output_dir, one["theirs"]))
    if not shared:
        return
    with waiting_for(f"all processes of this run to see {LOCK} in {output_dir}"):
        blind = [name for name, sees in gather_object([(host, _sees(folder, ours))]) if not sees]
    if blind:
        raise ValueError(
            f"output_dir={output_dir!r}: the processes on {blind[0]} do not find what the main process writes there. Each "
            f"process writes its part of a checkpoint, and none could be resumed. "
            + (
                "Each machine needs a process with local rank 0."
                if each_node
                else "Name a folder that all machines share. Without one, set save_on_each_node: true, so that each "
                "machine keeps the parts of its own processes."
            )
        )


def lock_for_training(args: TrainingArguments) -> None:
    """Lock the output folder of a run that trains. Raises the errors of `lock_output`."""
    shared = args.world_size > 1 and not args.save_only_model
    lock_output(args.output_dir, writes=args.should_save, shared=shared, each_node=args.save_on_each_node)


def claim(folder: Path) -> dict:
    """Take the lock of a folder, which is made if it is not there, and return what its file says.

    A file system without locks is said, and the run goes on.

    Raises:
        BlockingIOError: another process has the lock; its first argument is what the file says, or an empty dict.
        OSError: the folder or the file cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        if folder in _held and _is_at(_held[folder][0], path):  # an earlier stage of this process
            return _held[folder][1]
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _read(descriptor)
            os.close(descriptor)
            raise BlockingIOError(holder) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(descriptor)
                raise
            print(
                f"{folder}: the file system has no locks ({error.strerror}). Another run in this folder would not be "
                f"noticed: start none.",
                flush=True,
            )
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # a run that ended has removed the file in between
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    mine["id"] = uuid.uuid4().hex
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(mine) + "\n").encode(), 0)
    _release_at_the_end()
    _held[folder] = descriptor, mine
    return mine


@cache
def _release_at_the_end() -> None:
    atexit.register(release_all)
    os.register_at_fork(after_in_child=_let_go)


def release_all() -> None:
    """Remove the files of this process's locks, and end the locks."""
    while _held:
        folder, (descriptor, _) = _held.popitem()
        with suppress(OSError):  # the folder may be gone
            if _is_at(descriptor, folder / LOCK):
                (folder / LOCK).unlink()
        os.close(descriptor)


def _let_go() -> None:
    """In a forked process: do not keep the lock of a run that has ended."""
    for descriptor, _ in _held.values():
        os.close(descriptor)
    _held.clear()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(source: int | Path) -> dict:
    """Return what a lock's file says; an empty dict while its owner has not written it yet."""
    try:
        text = source.read_bytes() if isinstance(source, Path) else os.pread(source, 4096, 0)
        found = json.loads(text)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _sees(folder: Path, ids: list[str]) -> bool:
    end = time.monotonic() + PATIENCE
    while _read(folder / LOCK).get("id") not in ids:
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _refusal(output_dir: str, holder: dict) -> str:
    pid, host, since = (holder.get(name, "unknown") for name in ("pid", "host", "since"))
    return (
        f"output_dir={output_dir!r}: another run writes there: process {pid} on {host}, since {since}. Two runs would "
        f"overwrite each other's files. Wait until it has ended, or end it (kill {pid} on {host}), or name another folder "
        f"in output_dir."
    )
