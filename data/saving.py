"""Save the files of a stage so that all of them become visible at once, and know them again later.

They are written to `.saving` in the folder and forced to disk, with `saved_files.json`, which lists them with their SHA-256.
One rename, of `.saving` to `.saved`, makes them the files of the folder. Then each is moved to its place, where plain peft and
transformers look for it. A process that dies before the rename has changed nothing. If it dies later, the next one that opens
the folder moves the rest (`complete`).

A file is ours if `saved_files.json` lists it. What a save would replace and is not listed, or was changed since, is renamed
and kept.
"""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from data.listing import LISTING, entry_of, file_digest, known_digest, read_listing, write_listing


logger = logging.getLogger(__name__)

REPLACED = "replaced_files.json"  # in `.saving` and `.saved`: the files of the save before, which this one replaces
SAVING, SAVED = ".saving", ".saved"
# Files that stages read. The others (model card, plots, tables) are for people, who may edit them.
CHECKED = (".json", ".safetensors")


# ------------------------------------------------------------------------------------------ writing
def save(
    folder: str | Path,
    kind: str,
    write: Callable[[Path], None],
    *,
    former: Iterable[str] = (),
    adds: bool = False,
    retry: bool = True,
) -> None:
    """Save the files that `write` writes to the folder it is given; they replace the last save of this kind all at once.

    Args:
        kind: name of this set of files. A folder may hold several kinds; each save replaces its own.
        former: files of the kind that an earlier release wrote and did not list.
        adds: whether the other files of the last save stay.
        retry: whether to write the files to a temporary folder if they cannot be written here. Then `write` is called twice.

    Raises:
        OSError: the files could not be written. The folder is as it was. The message says which file failed, and where the
            files are instead.
    """
    folder = Path(folder)
    try:
        _stage(folder, kind, write, former, adds)
    except Exception as error:
        name = _file_of(error, folder)
        with suppress(OSError):
            _remove_staged(folder)
        if not _is_of_writing(error):
            raise
        text = (
            f"{folder / name if name else folder} could not be saved ({_reason(error)}). {folder} is as it was before."
        )
        if not retry:
            raise OSError(text) from error
        raise OSError(f"{text} {_save_elsewhere(folder, kind, write)}") from error
    complete(folder)


def _stage(folder: Path, kind: str, write: Callable[[Path], None], former: Iterable[str], adds: bool) -> None:
    """Write the files to `.saving`, force them to disk, and rename it to `.saved`."""
    folder.mkdir(parents=True, exist_ok=True)
    complete(folder)
    staged = folder / SAVING
    if not is_ours(staged):
        raise FileExistsError(f"{staged} is not of this run")
    try:
        before = read_listing(folder) or {}
    except ValueError:  # then no file is known to be ours, and all that are in the way are kept
        put_aside(folder / LISTING)
        before = {}
    _remove_staged(folder)
    staged.mkdir()
    (staged / LISTING).write_text("{}\n", encoding="utf-8")  # the folder is ours from here on
    write(staged)
    written = [path for path in sorted(staged.rglob("*")) if path.is_file() and path != staged / LISTING]
    open_to_umask(staged, "*")
    fresh = {path.relative_to(staged).as_posix(): entry_of(path, kind) for path in written}
    listed = {name: entry for name, entry in before.items() if entry.get("kind") == kind}
    unlisted = [name for name in former if name not in before and (folder / name).is_file()]
    replaced = listed | {name: entry_of(folder / name, kind) for name in unlisted}
    others = {name: entry for name, entry in before.items() if name not in listed}
    gone = {name: entry for name, entry in replaced.items() if name in fresh or not adds}
    files = {**others, **(replaced if adds else {}), **fresh}
    write_listing(staged / REPLACED, gone)
    write_listing(staged / LISTING, files)
    for path in (*staged.rglob("*"), staged):
        sync(path)
    os.rename(staged, folder / SAVED)


def _remove_staged(folder: Path) -> None:
    """Remove what a save wrote that did not come to its end, and last the listing, by which it is known."""
    staged = folder / SAVING
    if not staged.is_dir() or not is_ours(staged):
        return
    for path in staged.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LISTING:
            path.unlink()
    shutil.rmtree(staged)


def _save_elsewhere(folder: Path, kind: str, write: Callable[[Path], None]) -> str:
    """Save the files to a temporary folder, so that the work is not lost, and return what to tell the user."""
    other = None
    try:
        other = Path(tempfile.mkdtemp(prefix=f"spine-{folder.name}-"))
        save(other, kind, write, retry=False)
    except OSError as error:
        if other:
            shutil.rmtree(other, ignore_errors=True)
        return (
            f"Nor could the files be saved in {tempfile.gettempdir()} ({_reason(error)}). Free some space and run the stage "
            f"again, from its last checkpoint if it has one (--resume_from_checkpoint auto)."
        )
    return f"The files are in {other} instead. Make room, and then copy all of them to {folder}."


def _is_of_writing(error: Exception) -> bool:
    """Tell whether a writer raised this error: tokenizers raise a bare Exception, torch a RuntimeError of its streams."""
    of_torch = isinstance(error, RuntimeError) and ("iostream" in str(error) or "inline_container" in str(error))
    return isinstance(error, (OSError, SafetensorError)) or type(error) is Exception or of_torch


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(". ")


def _file_of(error: Exception, folder: Path) -> str | None:
    """Return the name of the file that could not be written, if the error or the newest file tells it."""
    if isinstance(error, SafetensorError):  # which names no file, and removes it
        return "*.safetensors"
    staged, named = folder / SAVING, getattr(error, "filename", None)
    if named and Path(os.fsdecode(named)).is_relative_to(staged):
        return Path(os.fsdecode(named)).relative_to(staged).as_posix()
    written = [path for path in staged.rglob("*") if path.is_file()] if staged.is_dir() else []
    if named or len(written) < 2:  # only the listing is there
        return None
    return max(written, key=lambda path: path.stat().st_mtime_ns).relative_to(staged).as_posix()


# ------------------------------------------------------------------------------------------ opening
def complete(folder: str | Path) -> None:
    """Move the files of a finished save to their places, if the process that saved them died before it had.

    Raises:
        OSError: a file cannot be moved.
    """
    folder = Path(folder)
    saved = folder / SAVED
    if not saved.is_dir() or not is_ours(saved):
        return
    try:
        with _locked(saved):
            sync(folder)  # the rename is on the disk before a file is moved
            files = read_listing(saved)
            if files is not None:
                replaced = read_listing(saved, REPLACED) or {}  # missing: everything was moved
                moved = [name for name in files if (saved / name).is_file() and _is_beneath(saved, name)]
                for name in moved:
                    _make_way(folder, name, (replaced.get(name), files[name]))
                    os.replace(saved / name, folder / name)
                for name in replaced.keys() - files.keys():
                    _remove(folder, name, replaced[name])
                for path in {(folder / name).parent for name in moved}:
                    sync(path)
                (saved / REPLACED).unlink(missing_ok=True)
                os.replace(saved / LISTING, folder / LISTING)
                sync(folder)
            shutil.rmtree(saved, ignore_errors=True)
    except OSError as error:
        if not saved.exists():  # another process was faster
            return
        raise OSError(
            f"{folder}: its files were saved, and wait in {saved} to be moved to their places, which fails "
            f"({_reason(error)}). Make {folder} writable. The next stage that opens it then moves them."
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, so that of several processes one moves the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_beneath(folder: Path, name: str) -> bool:
    """Tell whether no link leads out of the folder on the way to a file."""
    return not any((folder / parent).is_symlink() for parent in PurePosixPath(name).parents[:-1])


def _is_one_of(path: Path, known: Iterable[dict[str, Any] | None]) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    found = file_digest(path)
    return any(entry is not None and entry["sha256"] == found for entry in known)


def _make_way(folder: Path, name: str, known: Iterable[dict[str, Any] | None]) -> None:
    """Rename what stands where a saved file goes, unless it is one of the `known` files."""
    for parent in reversed(PurePosixPath(name).parents[:-1]):
        path = folder / parent
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            put_aside(path)
        path.mkdir(exist_ok=True)
    if os.path.lexists(folder / name) and not _is_one_of(folder / name, known):
        put_aside(folder / name)


def _remove(folder: Path, name: str, known: dict[str, Any]) -> None:
    """Remove a file of the last save that the new one does not have; rename it instead if it was changed."""
    path = folder / name
    if not os.path.lexists(path) or not _is_beneath(folder, name):
        return
    if not _is_one_of(path, (known,)):
        put_aside(path)
        return
    path.unlink(missing_ok=True)
    if path.parent != folder and not any(path.parent.iterdir()):
        path.parent.rmdir()


def put_aside(path: Path) -> None:
    """Rename a file or folder that is not ours, and say so."""
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.kept-{number}")):
        number += 1
    os.rename(path, kept)
    logger.warning(f"{path} was not as a stage had left it. It is kept as {kept.name}.")


def check_saved(folder: str | Path, kind: str) -> None:
    """Complete a save that was cut short, and check the files of a kind that stages read, before they are read.

    A folder without a listing comes from elsewhere, and passes.

    Raises:
        FileNotFoundError: a file that is listed is missing.
        ValueError: the listing is damaged, or a file is not the one that was saved with the others.
        OSError: a save that was cut short cannot be completed.
    """
    folder = Path(folder)
    root, prefix = (folder.parent, "value/") if folder.name == "value" else (folder, "")
    complete(root)
    for name, entry in (read_listing(root) or {}).items():
        if entry["kind"] != kind or not name.startswith(prefix) or not name.endswith(CHECKED):
            continue
        path = root / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: the file is missing, and {LISTING} lists it. Run the stage again, or copy the whole folder again."
            )
        at = path.stat()
        if (
            at.st_size != entry["bytes"]
            or known_digest(path, at.st_size, at.st_mtime_ns, at.st_ino) != entry["sha256"]
        ):
            raise ValueError(
                f"{path}: not the file that was saved with the others: {LISTING} has another size or SHA-256. Run the stage "
                f"again, or copy the whole folder again. If you changed the file yourself, remove {root / LISTING}."
            )


def is_ours(folder: Path) -> bool:
    """Tell whether `.saving` or `.saved` is of a save: it has a listing, or no file at all."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return False
    return (folder / LISTING).is_file() or not any(not path.is_dir() for path in folder.rglob("*"))


# ------------------------------------------------------------------------------------------ files
def open_to_umask(folder: str | Path, pattern: str = "*.safetensors") -> None:
    """Give files in a folder the permissions that the user's umask gives a new file.

    safetensors writes through a temporary file, which only its owner can read.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for path in Path(folder).rglob(pattern):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def sync(path: Path) -> None:
    """Force a file, or the list of a folder's files, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
