"""Cut a piece of work short at each of its writes in turn, as a kill or a full disk does."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch


REMOVES = ("os.rename", "os.remove", "os.rmdir", "os.chmod")  # these work on a full disk
WRITES = (*REMOVES, "os.mkdir", "os.link", "os.symlink", "os.truncate")


class Killed(BaseException):
    """The process is dead: nothing catches this, and nothing is written after it."""


class Cut:
    """Ends the work at its `number`th write beneath a folder. Python tells each to an audit hook, whoever asks for it."""

    def __init__(self):
        self.armed = False
        sys.addaudithook(self._hook)

    def __call__(
        self, work: Callable[[], None], folder: Path, number: int, monkeypatch, *, full: bool = False
    ) -> bool:
        """Do the work with the `number`th write refused, and tell whether it has as many.

        It is killed there, or, if `full`, finds the disk full from there on.
        """
        self.folder, self.left, self.full, self.over = str(folder), number, full, False
        with monkeypatch.context() as patch:
            fsync, serialize = os.fsync, safetensors.torch.serialize_file

            def seen_sync(descriptor):
                self._write(os.readlink(f"/proc/self/fd/{descriptor}"), removes=False)
                fsync(descriptor)

            def seen_serialize(tensors, path, **options):
                self._write(path, removes=False)
                serialize(tensors, path, **options)

            patch.setattr(os, "fsync", seen_sync)
            patch.setattr(safetensors.torch, "serialize_file", seen_serialize)
            self.armed = True
            try:
                work()
            except Killed:
                assert not full
            finally:
                self.armed = False
        return self.over

    def _hook(self, event: str, args: tuple) -> None:
        if not self.armed:
            return
        if event == "open":
            path, mode, flags = args
            if not (set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
        elif event in WRITES:
            path = args[0]
        else:
            return
        self._write(path, event in REMOVES)

    def _write(self, path, removes: bool) -> None:
        beneath = isinstance(path, (str, bytes, os.PathLike)) and (
            os.fsdecode(path).startswith(self.folder)
            or not os.path.isabs(path)  # `rmtree` names what is in an open folder
        )
        if self.over and not self.full:
            raise Killed
        if not beneath or (self.full and removes):
            return
        self.left -= 1
        if self.left <= 0:
            self.over = True
            if not self.full:
                raise Killed
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def contents(folder: Path, without: str = ".saving") -> dict[str, bytes]:
    """Every file of a folder, without what a killed save left."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(without)}
