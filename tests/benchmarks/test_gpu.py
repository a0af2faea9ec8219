"""`make gpu` on the CPU, with tiny models: what is run on GPUs, and how its rows are judged."""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from tests.benchmarks import gpu
from tests.benchmarks.gpu import SCALES, Live, Result, Row, environment, judge, main, run, run_updates, table, tail
from tests.benchmarks.work import Clock, Turns


WRITES = "import sys, json, pathlib; (pathlib.Path(sys.argv[-1]).parent / 'found_0.json').write_text(json.dumps({}))"
SECONDS = f"77.{os.getpid()}"  # found again among all processes of the machine
# A process that has started another, in a session of its own, and waits for it.
WAITS = f"import subprocess; subprocess.Popen(['sleep', '{SECONDS}'], start_new_session=True).wait()"


def arguments(out: Path, *rows: str) -> argparse.Namespace:
    return argparse.Namespace(device="cpu", output_dir=out, smollm2=None, trl_python="nowhere/python", rows=list(rows))


def planted(name: str, folder: Path, code: str) -> Row:
    """A row whose process runs this code."""
    task = {"kind": "update", "device": "cpu", "folder": str(folder / name)}
    return Row(name, "none", task, (sys.executable, "-c", code))


def ppo_row(folder: Path, asked: str = "sdpa") -> tuple[Row, dict]:
    """A row of PPO and what it found, with nothing wrong."""
    (folder / "recipe.yaml").write_text(json.dumps({"attn_implementation": asked}))
    found = {"attention": "sdpa", "runs_on": "cuda:0", "planned": 1.1e9, "peak": 1.0e9, "stopped": None}
    return Row("PPO", "none", {"device": "cuda", "folder": str(folder)}), found | {"update_seconds": 2.0}


@pytest.mark.slow
def test_rows_run_on_the_cpu_and_are_written_down(tmp_path, capsys):
    """PPO itself, whose plan must hold against the bytes of live tensors; and what is skipped."""
    assert main(arguments(tmp_path, "PPO gpt2", "update trl_full", "fsdp2")) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "PPO gpt2 sdpa": "pass",
        "PPO gpt2 flash_attention_2": "skip",
        "update trl_full": "skip",
        "PPO smollm2 fsdp2": "skip",
    }
    found = rows["PPO gpt2 sdpa"]["found"]
    assert min(found["preflight_seconds"], found["update_seconds"], found["peak"]) > 0
    assert found["runs_on"] == "cpu" and found["first_approxkl"] == 0
    assert rows["PPO gpt2 flash_attention_2"]["note"] == "flash attention runs on GPUs"
    assert "nowhere/python: no such file" in rows["update trl_full"]["note"]
    for name in rows:
        assert f"| {name} |" in printed


@pytest.mark.slow
def test_a_contender_runs_where_it_is_told_to():
    assert run_updates({"row": "spine_top", "device": "cpu"})["update_seconds"] > 0


def test_a_contender_that_should_be_on_a_gpu_and_is_not_ends():
    """TRL 1.12's environment may have a torch without CUDA; on the CPU its seconds would mean nothing."""
    on_cpu = SimpleNamespace(device=torch.device("cpu"), use_cpu=False)
    with pytest.raises(RuntimeError, match="this process is on cpu: torch .* finds no GPU"):
        Turns(SCALES["cuda"].work, Clock(), 1, None).on_train_begin(on_cpu, None, None)


@pytest.mark.slow
def test_two_processes_are_launched_as_on_two_gpus(tmp_path):
    assert main(arguments(tmp_path, "smollm2 ddp")) == 0
    assert [row["status"] for row in json.loads((tmp_path / "report.json").read_text())["rows"]] == ["pass"]
    assert len(list(tmp_path.glob("PPO_smollm2_ddp/found_*.json"))) == 2


@pytest.mark.slow
def test_a_row_that_fails_hides_no_other(tmp_path, monkeypatch, capsys):
    rows = [
        planted("broken", tmp_path, "raise ValueError('planted')"),
        planted("endless", tmp_path, WAITS),
        Row("skipped", "none", skip="for a reason"),
        planted("fine", tmp_path, WRITES),
    ]
    monkeypatch.setattr(gpu, "all_rows", lambda *args: rows)
    monkeypatch.setitem(gpu.LIMITS, "cpu", 3)
    assert main(arguments(tmp_path)) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["status"] for row in report["rows"]] == ["fail", "fail", "skip", "pass"]
    notes = [row["note"] for row in report["rows"]]
    assert "ended with 1: ValueError: planted" in notes[0] and notes[1].startswith("not done in 3 s")
    assert not [each for each in psutil.process_iter(["cmdline"]) if SECONDS in (each.info["cmdline"] or [])]
    monkeypatch.setattr(gpu, "all_rows", lambda *args: rows[2:])
    assert main(arguments(tmp_path)) == 0


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (
            ["torch.OutOfMemoryError: CUDA out of memory.", "torch.distributed.ChildFailedError:"],
            "torch.OutOfMemoryError",
        ),
        (
            ["[rank1]: ValueError: planted", "[rank0]:[W] destroy_process_group() was not called"],
            "[rank1]: ValueError",
        ),
        (["Loading weights", "Killed"], "Killed"),
        ([], "it printed nothing"),
    ],
)
def test_the_cause_is_found_in_a_log(tmp_path, lines, cause):
    log = tmp_path / "log"
    log.write_text("\n".join(["Traceback (most recent call last):", *lines][bool(not lines) :]))
    assert tail(log).startswith(cause)


def test_no_row_begins_when_time_is_up(tmp_path):
    assert run(planted("late", tmp_path, WRITES), -1).note == "no time was left for it"
    assert not (tmp_path / "late").exists()


def test_what_an_earlier_run_found_does_not_count(tmp_path):
    assert run(planted("again", tmp_path, WRITES), 60).status == "pass"
    assert run(planted("again", tmp_path, "pass"), 60).status == "fail"


@pytest.mark.parametrize(
    ("asked", "change", "note"),
    [
        ("sdpa", {}, ""),
        ("sdpa", {"planned": 1.16e9}, "the plan's peak is off by +16%, at most 15% is allowed"),
        ("sdpa", {"planned": 0.84e9}, "the plan's peak is off by -16%, at most 15% is allowed"),
        ("sdpa", {"stopped": "the loss is nan"}, "training stopped: the loss is nan"),
        ("sdpa", {"runs_on": "cpu"}, "it ran on cpu"),
        ("sdpa", {"update_seconds": float("nan")}, "update_seconds is not finite"),
        ("flash_attention_2", {}, "attention is sdpa, and flash_attention_2 was asked for"),
        ("flash_attention_2", {"attention": "kernels-community/flash-attn2"}, ""),
    ],
)
def test_what_makes_a_row_fail(tmp_path, asked, change, note):
    row, found = ppo_row(tmp_path, asked)
    result = judge(row, [found | change])
    assert (result.status, result.note) == ("fail" if note else "pass", note)
    json.dumps(result.found, allow_nan=False)


def test_processes_are_put_together_by_the_worst(tmp_path):
    row, found = ppo_row(tmp_path)
    result = judge(row, [found, found | {"peak": 1.3e9, "update_seconds": 3.0}])
    assert result.found["peak"] == 1.3e9 and result.found["update_seconds"] == 3.0
    assert "off by -15%" in result.note


def test_the_table():
    found = {"preflight_seconds": 3.21, "update_seconds": 1.5, "planned": 2.2e9, "peak": 2e9, "plan_is_off": 0.1}
    lines = table([Result("PPO", "gpt2", "pass", found=found), Result("flash", "gpt2", "skip", "no GPU")]).splitlines()
    assert lines[2:] == [
        "| PPO | gpt2 | pass | 3.21 | 1.50 | 2.200 | 2.000 | +10% | – |  |",
        "| flash | gpt2 | skip | – | – | – | – | – | – | no GPU |",
    ]


def test_a_row_sees_as_many_gpus_as_it_has_processes(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    one = Row("one", "none", {"device": "cuda"})
    two = replace(one, processes=2)
    assert environment(one)["CUDA_VISIBLE_DEVICES"] == "0" and "DS_ACCELERATOR" not in environment(one)
    assert environment(two)["CUDA_VISIBLE_DEVICES"] == "0,1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,4")
    assert environment(one)["CUDA_VISIBLE_DEVICES"] == "5" and environment(two)["CUDA_VISIBLE_DEVICES"] == "5,3"


def test_live_bytes_peak_where_most_is_alive():
    module = nn.Linear(100, 10, bias=False)  # 4,000 bytes
    with Live(module) as live:
        assert live.bytes == 4_000
        long = torch.zeros(1_000)
        view = long[:10]
        del long  # the view keeps it
        assert live.bytes == 8_000
        del view
        torch.zeros(500)
        module(torch.zeros(2, 100))
    assert live.bytes == 4_000 and live.peak == 8_000


def test_without_a_gpu_one_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device is here"):
        main(argparse.Namespace(**{**vars(arguments(tmp_path)), "device": "cuda"}))
