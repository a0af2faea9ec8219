"""Wait for the processes of a launch and say which are missing; refuse processes that do not run the same.

Processes with other options or other rows would train on, or end in an abort that names neither.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from typing import Any

from accelerate.utils import gather_object
from torch.distributed import TCPStore, is_initialized

from data.waiting import waiting_for


# Options that may differ between the processes of a run: a rank; and a secret, which no message may show.
MAY_DIFFER = ("local_rank", "hub_token")
PATIENCE = timedelta(seconds=5)  # for an answer of the store


# --------------------------------------------------------------------------------------- who is missing
def check_rendezvous() -> None:
    """Check that the environment tells a process of several where the others are.

    A shell or a container may have a WORLD_SIZE that no launcher has set.

    Raises:
        ValueError: it does not.
    """
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        if not os.environ.get(name, "0").isdecimal():
            raise ValueError(
                f"the environment has {name}={os.environ[name]!r}, which is no whole number. Unset {name}."
            )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not os.environ.get("MASTER_ADDR"):
        raise ValueError(
            f"the environment has WORLD_SIZE={world}, and no MASTER_ADDR that says where the other processes are. Unset "
            f"WORLD_SIZE to run one process. To run several, launch with accelerate_configs/ddp.yaml or cpu_ddp.yaml."
        )


class Roll:
    """The processes that have come to a launch, as the store of torch's rendezvous knows them.

    Each process writes its name there as it comes, beside what torch writes.
    """

    def __init__(self):
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.place = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0))
        self.complete = threading.Event()
        self._store: TCPStore | None = None

    def answer(self) -> None:
        """Tell the others that this process is there, as soon as the store answers."""
        while self._store is None and not self.complete.wait(0.2):
            try:  # the process or launcher that has the store may come later
                # torch would write pages to the screen if nobody answers.
                socket.create_connection(self.place, PATIENCE.total_seconds()).close()
                store = TCPStore(*self.place, is_master=False, timeout=PATIENCE, wait_for_workers=False)
                store.set(_name(self.rank), str(self.world))
                self._store = store
            except (OSError, RuntimeError):
                continue

    def missing(self) -> str:
        """Return a phrase on the processes that have not come, or that were started with another WORLD_SIZE."""
        others = f"the other processes (WORLD_SIZE={self.world})"
        address = "{}:{}".format(*self.place)
        if self._store is None:
            return f"{others}; nothing answers at {address}"
        try:
            come = [rank for rank in range(self.world) if self._store.check([_name(rank)])]
            worlds = {rank: int(self._store.get(_name(rank))) for rank in come}
        except RuntimeError as error:
            return f"{others}; the store at {address} failed: {error}"
        for rank, world in worlds.items():
            if world != self.world:
                return (
                    f"{others}, but process {rank} was started with WORLD_SIZE="
                    f"{world}. End all of them, and start them with the same number"
                )
        absent = [str(rank) for rank in range(self.world) if rank not in come]
        if absent:
            ranks = ", ".join(absent[:8]) + (" and others" if len(absent) > 8 else "")
            return f"{len(absent)} of {self.world} processes at {address}: not yet here is rank {ranks}"
        return f"the processes to connect: all {self.world} are at {address}"


def _name(rank: int) -> str:
    return f"spine/process/{rank}"


@contextmanager
def awaiting_processes() -> Iterator[None]:
    """Have the processes of a launch connect in the code inside: while that takes long, a line says who is missing."""
    roll = Roll()
    if roll.world == 1 or not all(roll.place) or is_initialized():
        yield
        return
    threading.Thread(target=roll.answer, daemon=True).start()
    try:
        with waiting_for(roll.missing):
            yield
    finally:
        roll.complete.set()


# --------------------------------------------------------------------------------------- who differs
def check_same_options(*parts: Any) -> None:
    """Check that all processes of a run have the same options. All of them call this together.

    Args:
        parts: dataclasses of options.

    Raises:
        ValueError: an option differs.
    """
    if not is_initialized():  # one process
        return
    options = {field.name: getattr(part, field.name) for part in parts for field in fields(part) if field.init}
    mine = {name: repr(value) for name, value in options.items() if name not in MAY_DIFFER}
    if found := _difference(mine):
        name, rank, first, other = found
        raise ValueError(
            f"{name}={first} in process 0, and {name}={other} in process {rank}. All processes of a run need the same "
            f"options: start all of them with the same command and recipe."
        )


def check_same_rows(rows: dict[str, Any]) -> None:
    """Check that all processes of a run have read the same rows. All of them call this together.

    Args:
        rows: for each set of rows something that says which they are: counts, or a digest.

    Raises:
        ValueError: the rows of a set differ.
    """
    if not is_initialized():  # one process
        return
    if found := _difference({name: str(value) for name, value in rows.items()}):
        name, rank, first, other = found
        raise ValueError(
            f"{name}: process 0 has other rows than process {rank} ({first}; {other}). All processes of a run need the same "
            f"data: give all machines the same files."
        )


def _difference(mine: dict[str, str]) -> tuple[str, int, str, str] | None:
    """Return the first name whose value differs between processes: the name, a rank, and its values in 0 and there."""
    first, *others = gather_object([mine])
    for rank, other in enumerate(others, 1):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                return name, rank, first.get(name, "nothing"), other.get(name, "nothing")
    return None
