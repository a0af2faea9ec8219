"""Files of pinned releases on the package index: fetched through pip, checked by SHA-256, kept in the user's cache.

pip knows the mirrors and proxies of the machine. Nothing is trusted before its hash was checked, and nothing is ever
half-cached.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Release:
    """One file of one release: what pip is asked for, the file's name and its SHA-256."""

    requirement: str  # name==version
    file: str
    sha256: str


def cache_dir() -> Path:
    """Return the folder for what is fetched and converted: `$SPINE_CACHE`, else `spine-rlhf` in the user's cache folder."""
    if "SPINE_CACHE" in os.environ:
        return Path(os.environ["SPINE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spine-rlhf"


def fetch(release: Release) -> Path:
    """Return the path of the verified file, fetched through pip unless it is in the cache already.

    pip is given the hash too (`--require-hashes`), so it builds no metadata from a file that does not match. The
    file enters the cache by an atomic rename, after we have verified it ourselves.

    Raises:
        ValueError: the file's sha256 is not the pinned one.
        ConnectionError: pip could not fetch it.
        OSError: nothing can be written in the cache.
    """
    cached = cache_dir() / release.file
    if cached.exists():
        _verify(cached, release, "delete the file and run again to fetch it anew.")
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cached.parent):
            pass
    except OSError as error:
        raise OSError(
            f"{cached.parent}: nothing can be written in this cache ({error.strerror}). Set SPINE_CACHE to a folder that can "
            f"be written."
        ) from error
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{release.requirement} --hash=sha256:{release.sha256}\n", encoding="utf-8")
        kind = "--only-binary" if release.file.endswith(".whl") else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:"]
        command += ["--require-hashes", "--requirement", str(requirements), "--dest", folder]
        result = subprocess.run(command, capture_output=True, text=True)
        fetched = Path(folder) / release.file
        if result.returncode != 0 or not fetched.exists():
            lines = [line for line in result.stderr.splitlines() if "ERROR" in line] or result.stderr.splitlines()
            reason = lines[-1] if lines else f"exit code {result.returncode}"
            if "DO NOT MATCH" in result.stderr:
                raise ValueError(
                    f"{release.requirement}: the file the package index serves does not have the pinned sha256 "
                    f"{release.sha256}. Check the index or mirror that pip is set up to use (`pip config list`)."
                )
            raise ConnectionError(
                f"Could not fetch {release.requirement} through pip: {reason}\nCheck the network, or download "
                f"{release.file} from a package index elsewhere and put it at {cached}."
            )
        _verify(fetched, release, "check the package index that pip is set up to use (`pip config list`).")
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
            f"{path}: sha256 is {found}, expected {release.sha256}. The file is truncated or is not the published one; "
            f"{remedy}"
        )
