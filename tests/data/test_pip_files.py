"""`data.pip_files`: no file is trusted or half-cached."""

import hashlib
import re
import subprocess
from pathlib import Path

import pytest

from data import pip_files
from data.pip_files import Release, cache_dir, fetch


ARCHIVE = Release("vaderSentiment==3.3.2", "vaderSentiment-3.3.2.tar.gz", hashlib.sha256(b"archive").hexdigest())
WHEEL = Release("spam==1.0", "spam-1.0-py3-none-any.whl", hashlib.sha256(b"archive").hexdigest())


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder that does not exist yet."""
    monkeypatch.setenv("SPINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class FakePip:
    """Stands for `subprocess.run`: leaves `content` in the folder that pip was told, and keeps what it was asked."""

    def __init__(self, returncode: int = 0, stderr: str = "", content: bytes | None = None):
        self.returncode, self.stderr, self.content = returncode, stderr, content
        self.commands, self.requirements = [], []

    def __call__(self, command, **kwargs):
        self.commands.append(command)
        self.requirements.append(Path(command[command.index("--requirement") + 1]).read_text())
        if self.content is not None:
            name = ARCHIVE.file if "--no-binary" in command else WHEEL.file
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(self.content)
        return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)


def use_pip(monkeypatch, **kwargs) -> FakePip:
    pip = FakePip(**kwargs)
    monkeypatch.setattr(pip_files.subprocess, "run", pip)
    return pip


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("SPINE_CACHE", "/some/where")
    assert cache_dir() == Path("/some/where")
    monkeypatch.delenv("SPINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/spine-rlhf")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "spine-rlhf"


@pytest.mark.parametrize(("release", "kind"), [(ARCHIVE, "--no-binary"), (WHEEL, "--only-binary")])
def test_first_fetch_asks_pip_for_the_pinned_file_and_the_second_asks_nobody(cache, monkeypatch, release, kind):
    pip = use_pip(monkeypatch, content=b"archive")
    assert fetch(release) == fetch(release) == cache / release.file
    assert (cache / release.file).read_bytes() == b"archive"
    assert len(pip.commands) == 1
    assert pip.requirements == [f"{release.requirement} --hash=sha256:{sha256(b'archive')}\n"]
    assert {"download", "--require-hashes", "--no-deps", kind} <= set(pip.commands[0])
    assert [path.name for path in cache.iterdir()] == [release.file]


@pytest.mark.parametrize("content", [b"", b"not the archive"])
def test_wrong_file_in_the_cache(cache, monkeypatch, content):
    pip = use_pip(monkeypatch)
    cache.mkdir()
    (cache / ARCHIVE.file).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        fetch(ARCHIVE)
    message = str(caught.value)
    assert message.startswith(f"{cache / ARCHIVE.file}: sha256 is {sha256(content)}, expected {ARCHIVE.sha256}.")
    assert "Delete the file and run again" in message
    assert not pip.commands
    assert (cache / ARCHIVE.file).read_bytes() == content  # the user's to delete


OFFLINE = "WARNING: Retrying\nERROR: No matching distribution found for vaderSentiment==3.3.2\nnotice: a new pip\n"


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (OFFLINE, "ERROR: No matching distribution found for vaderSentiment==3.3.2"),
        ("No module named pip\n", "No module named pip"),
        ("", "exit code 1"),
    ],
    ids=["offline", "no pip", "no word"],
)
@pytest.mark.parametrize("content", [None, b"half of"], ids=["nothing", "half"])
def test_pip_fails(cache, monkeypatch, stderr, reason, content):
    use_pip(monkeypatch, returncode=1, stderr=stderr, content=content)
    with pytest.raises(ConnectionError) as caught:
        fetch(ARCHIVE)
    first, second = str(caught.value).splitlines()
    assert first == f"Could not fetch vaderSentiment==3.3.2 through pip: {reason}"
    assert second.startswith("Check the network. Or download vaderSentiment-3.3.2.tar.gz")
    assert second.endswith(f"put it at {cache / ARCHIVE.file}.")
    assert list(cache.iterdir()) == []


def test_pip_says_it_succeeded_and_left_nothing(cache, monkeypatch):
    use_pip(monkeypatch)
    with pytest.raises(ConnectionError, match="Could not fetch"):
        fetch(ARCHIVE)
    assert list(cache.iterdir()) == []


def test_pip_finds_another_hash(cache, monkeypatch):
    stderr = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n    Got  abc\n"
    use_pip(monkeypatch, returncode=1, stderr=stderr)
    with pytest.raises(ValueError, match=f"does not have the pinned sha256 {ARCHIVE.sha256}.*pip config list"):
        fetch(ARCHIVE)
    assert list(cache.iterdir()) == []


def test_pip_succeeds_with_a_wrong_file(cache, monkeypatch):
    use_pip(monkeypatch, content=b"wrong")
    with pytest.raises(
        ValueError, match=f"{re.escape(ARCHIVE.file)}: sha256 is {sha256(b'wrong')}, expected {ARCHIVE.sha256}"
    ):
        fetch(ARCHIVE)
    assert list(cache.iterdir()) == []
