"""Fetch files of pinned releases from the package index, check their SHA-256, and keep them in the user's cache.

pip fetches them, because it knows the mirrors and proxies of the machine. No file is used before its hash is checked. The
cache never holds half a file.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data.caches import check_cache
from data.waiting import waiting_for


TIMEOUT, RETRIES = 15, 2  # seconds until a server that is silent is given up, and how often it is asked again


@dataclass(frozen=True)
class Release:
    """One file of one release: the requirement that pip gets, the name of the file and its SHA-256."""

    requirement: str  # name==version
    file: str
    sha256: str


def cache_dir() -> Path:
    """Return the folder of fetched and converted files: `$SPINE_CACHE`, or `spine-rlhf` in the user's cache folder.

    Raises:
        OSError: neither is named, and this user has no home folder.
    """
    if "SPINE_CACHE" in os.environ:
        return Path(os.environ["SPINE_CACHE"])
    if "XDG_CACHE_HOME" not in os.environ and os.path.expanduser("~") == "~":
        raise OSError("This user has no home folder to keep fetched files in. Set SPINE_CACHE to a writable folder.")
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "spine-rlhf").expanduser()


def fetch(release: Release) -> Path:
    """Return the path of the verified file; fetch it through pip if the cache does not have it.

    pip is given the hash too (`--require-hashes`), so it builds no metadata from a file that does not match. The
    file enters the cache by an atomic rename, after we have checked its hash too.

    Raises:
        ValueError: the file's sha256 is not the pinned one.
        ConnectionError: pip could not fetch it.
        OSError: the cache cannot be written.
    """
    cached = cache_dir() / release.file
    if cached.exists():
        _verify(cached, release, "Delete the file and run again to fetch it anew.")
        return cached
    check_cache(cached.parent, "this cache", "SPINE_CACHE")
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{release.requirement} --hash=sha256:{release.sha256}\n", encoding="utf-8")
        kind = "--only-binary" if release.file.endswith(".whl") else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:"]
        command += ["--timeout", str(TIMEOUT), "--retries", str(RETRIES)]
        command += ["--require-hashes", "--requirement", str(requirements), "--dest", folder]
        with waiting_for(f"pip, which fetches {release.requirement} from the package index"):
            result = subprocess.run(command, capture_output=True, text=True)
        fetched = Path(folder) / release.file
        if result.returncode != 0 or not fetched.exists():
            lines = [line for line in result.stderr.splitlines() if "ERROR" in line] or result.stderr.splitlines()
            reason = lines[-1] if lines else f"exit code {result.returncode}"
            if "DO NOT MATCH" in result.stderr:
                raise ValueError(
                    f"{release.requirement}: the file from the package index does not have the pinned sha256 "
                    f"{release.sha256}. Check the index or mirror that pip uses (`pip config list`)."
                )
            raise ConnectionError(
                f"Could not fetch {release.requirement} through pip: {reason}\nCheck the network. Or download "
                f"{release.file} on another machine and put it at {cached}."
            )
        _verify(fetched, release, "Check the package index that pip uses (`pip config list`).")
        os.replace(fetched, cached)
    return cached


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, release: Release, remedy: str) -> None:
    found = sha256_of(path)
    if found != release.sha256:
        raise ValueError(
            f"{path}: sha256 is {found}, expected {release.sha256}. The file is truncated or is not the published one. "
            f"{remedy}"
        )
