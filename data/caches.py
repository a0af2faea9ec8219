"""Check the folders in which fetched files are kept, before anything is fetched."""

import tempfile
from pathlib import Path


def check_cache(folder: Path, name: str, variables: str) -> None:
    """Check that a cache can be written.

    Args:
        name: what the cache is called in the error.
        variables: the environment variables that name another folder.

    Raises:
        OSError: it cannot.
    """
    try:
        folder = folder.expanduser()
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home folder
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise OSError(
            f"{folder}: {name} cannot be written ({reason}). Set {variables} to a writable folder, or free some space."
        ) from error
