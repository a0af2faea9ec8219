"""The harness of faults: two minutes of it, always the same cases; and that it sees what it is to see."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.deaths import mixture
from tests.faults.runner import Ended
from tests.faults.verdicts import CLEAR, HANG, LOST, RIGHT, SILENT, TRACEBACK, UNCLEAR, judge


ROOT = Path(__file__).parents[2]
CASES = 110  # about 100 seconds of CPU


@pytest.mark.slow
def test_no_case_ends_wrongly():
    command = [sys.executable, "-m", "tests.faults", "--cases", str(CASES), "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    assert f"| **all {CASES}** |" in done.stdout


def ended(code: int = 0, err: str = "", hung: str = "") -> Ended:
    return Ended(code, "", err, 1.0, hung)


BUG = "Traceback (most recent call last):\nKeyError: 'accuracy'\n"
VERDICTS = {
    RIGHT: (ended(), {}),
    CLEAR: (ended(1, "warning\nlora_r=0 must be 1 or more.\n"), {}),
    UNCLEAR: (ended(1, "something must be 1 or more.\n"), {}),
    TRACEBACK: (ended(1, BUG), {}),
    HANG: (ended(-signal.SIGABRT, hung="File 'a.py', line 3"), {}),
    LOST: (ended(), {"lost": ["thesis.txt was changed"]}),
    SILENT: (ended(), {"wrong": lambda: "the weights are not finite"}),
}


@pytest.mark.parametrize(("verdict", "given"), VERDICTS.items(), ids=VERDICTS)
def test_each_verdict(verdict, given):
    done, options = given
    assert judge(done, names=["lora_r"], **options).name == verdict


@pytest.mark.parametrize(
    ("done", "verdict"),
    [
        (ended(-signal.SIGSEGV), TRACEBACK),
        (ended(1, ""), UNCLEAR),
        (ended(1, "lora_r=\x1b[31mred must be a number.\n"), UNCLEAR),
        (ended(1, f"lora_r\n{BUG}"), TRACEBACK),
    ],
)
def test_other_ends(done, verdict):
    assert judge(done, names=["lora_r"]).name == verdict


def test_a_mixture_of_two_runs_is_seen(tmp_path):
    old = {"adapter_model.safetensors": b"old", "metrics.json": b'{"loss": 1}', "README.md": b"same"}
    new = {**old, "adapter_model.safetensors": b"new", "metrics.json": b'{"loss": 2}'}

    def left(**files: bytes) -> str | None:
        for name, content in ({**old, **{key.replace("__", "."): value for key, value in files.items()}}).items():
            (tmp_path / name).write_bytes(content)
        return mixture(tmp_path, old, new)

    assert left() is None
    assert left(adapter_model__safetensors=b"new", metrics__json=b'{"loss": 2}') is None
    assert "is new, and" in left(adapter_model__safetensors=b"new")
    assert "neither" in left(adapter_model__safetensors=b"cut")
    assert left() is None
    (tmp_path / "metrics.json").unlink()
    assert "metrics.json is gone" in mixture(tmp_path, old, new)
