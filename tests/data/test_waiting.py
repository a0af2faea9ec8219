"""`data.waiting`: nothing waits in silence."""

import re
import subprocess
import time
from pathlib import Path

import datasets
import pytest

from data import files, pip_files, waiting
from data.pip_files import Release, fetch
from data.waiting import waiting_for


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(waiting, "SILENCE", 0.05)


def test_a_wait_is_said_again_and_again_until_it_ends(capsys):
    ranks = iter((1, 2))
    with waiting_for(lambda: f"rank {next(ranks, 3)}"):
        time.sleep(0.2)
    time.sleep(0.1)  # a line that is under way
    said = capsys.readouterr().err
    assert re.match(r"Waiting for rank 1 \(0 s so far\)\.\nWaiting for rank 2 \(0 s so far\)\.\n", said)
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_what_is_quick_is_not_said(capsys):
    with pytest.raises(KeyError), waiting_for("a thing"):
        raise KeyError
    time.sleep(0.15)
    assert capsys.readouterr().err == ""


def slow(*args, **kwargs):
    time.sleep(0.12)
    raise FileNotFoundError("no answer")


def index(monkeypatch, folder: Path) -> None:
    """A package index that never answers: pip gives up, after it was told how long to wait."""
    monkeypatch.setenv("SPINE_CACHE", str(folder))
    asked = []

    def pip(command, **kwargs):
        asked.extend(command)
        time.sleep(0.12)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: timed out")

    monkeypatch.setattr(pip_files.subprocess, "run", pip)
    with pytest.raises(ConnectionError, match="timed out"):
        fetch(Release("spam==1.0", "spam-1.0.tar.gz", "0" * 64))
    assert int(asked[asked.index("--timeout") + 1]) * (1 + int(asked[asked.index("--retries") + 1])) < 60


def hub(monkeypatch, folder: Path) -> None:
    monkeypatch.setattr(datasets, "load_dataset", slow)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    with pytest.raises(FileNotFoundError, match="no answer"):
        files.load_rows("owner/name", "train")


@pytest.mark.parametrize(
    ("wait", "phrase"),
    [
        (index, "pip, which fetches spam==1.0 from the package index"),
        (hub, "owner/name, from the hub or from another"),
    ],
)
def test_who_waits_says_for_what(wait, phrase, monkeypatch, tmp_path, capsys):
    wait(monkeypatch, tmp_path)
    assert f"Waiting for {phrase}" in capsys.readouterr().err
