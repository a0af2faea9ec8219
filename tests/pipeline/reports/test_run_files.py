"""`pipeline.reports.run_files`: what a run has written so far, whether it goes on, and how long it takes yet."""

import json
import os
import socket
import subprocess
import time

import pytest

from pipeline.reports.run_files import find_runs, is_alive, read_run
from pipeline.runs.live_files import LOCK, LOG, SAMPLES


BEGAN = 1_700_000_000.0
STARTED = {"stage": "ppo", "max_steps": 10, "options": {"kl_target": 9.0}}


def lines(path, *rows, end=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def log(folder, *rows, step=0, **started):
    lines(folder / LOG, {"step": step, "time": BEGAN, "started": {**STARTED, **started}}, *rows)


def entry(step, **figures):
    return {"step": step, "time": BEGAN + 10 * step, "epoch": 0.1, **figures}


def lock(folder, pid=None, host=None, since=BEGAN - 60):
    words = time.strftime("%Y-%m-%d %H:%M:%S +0000", time.gmtime(since))
    holder = {"pid": pid or os.getpid(), "host": host or socket.gethostname(), "since": words}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(json.dumps(holder))


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_run_under_way(tmp_path):
    log(tmp_path, entry(2, score=1.0, kl=0.5), entry(4, score=2.0), {"step": 5, "time": BEGAN, "warning": "Look."})
    lock(tmp_path)
    lines(tmp_path / SAMPLES, {"step": 0, "prompt": "A", "completion": " film", "score": 0.5, "kl": 0.0})
    run = read_run(tmp_path)
    assert (run.stage, run.state, run.step, run.max_steps) == ("PPO", "running", 4, 10)
    assert run.seconds_left == 60.0  # 10 s a step
    assert run.points("score") == ([2, 4], [1.0, 2.0]) and run.names() == ["epoch", "score", "kl"]
    assert run.warnings == [(5, "Look.")] and run.options == {"kl_target": 9.0}
    assert run.samples[0]["completion"] == " film"


@pytest.mark.parametrize("half", ['{"step": 4, "sco', '{"step": 4, "score": 2.0}', "\x00"])
def test_half_a_line_is_no_row(half, tmp_path):
    log(tmp_path, entry(2, score=1.0))
    with (tmp_path / LOG).open("a") as file:
        file.write(half)
    assert read_run(tmp_path).points("score") == ([2], [1.0])
    with (tmp_path / LOG).open("a") as file:
        file.write("\n" if half.endswith("}") else 're": 2.0}\n')
    if half != "\x00":
        assert read_run(tmp_path).points("score") == ([2, 4], [1.0, 2.0])


def test_a_run_that_was_resumed(tmp_path):
    log(tmp_path, entry(2), {"step": 4, "time": BEGAN + 1000, "started": STARTED}, {**entry(6), "time": BEGAN + 1010})
    run = read_run(tmp_path)
    assert run.resumed == [4] and run.seconds_left == 20.0  # 5 s a step since then


def test_states(tmp_path, dead):
    def is_now(*rows, alive=None, since=BEGAN - 60, metrics=False):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        if rows:
            log(folder, *rows)
        if alive is not None:
            lock(folder, None if alive else dead, since=since)
        if metrics:
            lines(folder / "metrics.json", {"history": [{"step": 3, "loss": 1.0}], "seconds": 5.0})
        return read_run(folder).state

    end = {"step": 4, "time": BEGAN + 50, "ended": "finished"}
    assert is_now(entry(2), alive=True) == "running"
    assert is_now(entry(2), alive=False) == is_now(entry(2)) == "broken off"
    assert is_now(entry(2), end, alive=True) == "finished"  # it saves
    assert is_now(entry(2), end) == "finished"
    assert is_now(entry(2), {**end, "ended": "FloatingPointError: The loss is nan"}) == "ended"
    assert is_now(entry(2), end, alive=True, since=BEGAN + 99) == "starting"  # the next run
    assert is_now(entry(2), alive=True, since=BEGAN + 99) == "starting"
    assert is_now(alive=True) == "starting"
    assert is_now(metrics=True) == "finished"  # of an earlier release


def test_who_is_alive(dead):
    here = socket.gethostname()
    assert is_alive({"pid": os.getpid(), "host": here}) and not is_alive({"pid": dead, "host": here})
    assert is_alive({"pid": dead, "host": "elsewhere"}) and is_alive({"pid": 1, "host": here})
    assert not is_alive({})


def test_a_run_of_an_earlier_release(tmp_path):
    history = [{"step": 2, "loss/value": 1.0}, {"step": 4, "loss/value": 0.5}, {"loss/value": 3.0}]
    lines(tmp_path / "metrics.json", {"history": history, "warnings": ["exploding KL"], "seconds": 9.0})
    run = read_run(tmp_path)
    assert (run.stage, run.step, run.max_steps) == ("PPO", 4, 4) and run.points("loss/value") == ([2, 4], [1.0, 0.5])
    assert run.metrics["seconds"] == 9.0


def test_metrics_of_an_earlier_run_are_not_those_of_this_one(tmp_path):
    log(tmp_path, entry(2, loss=3.0))
    lines(tmp_path / "metrics.json", {"history": [{"step": 9, "loss": 1.0}], "accuracy": 0.9})
    assert read_run(tmp_path).metrics == {} and read_run(tmp_path).step == 2
    log(tmp_path, entry(2, loss=3.0), {"step": 2, "ended": "finished"})
    assert read_run(tmp_path).metrics["accuracy"] == 0.9


@pytest.mark.parametrize(
    ("figure", "stage"),
    [
        ("loss/value", "PPO"),
        ("rewards/margins", "DPO"),
        ("margin", "reward"),
        ("mean_token_accuracy", "SFT"),
        ("mine", None),
    ],
)
def test_the_stage_by_its_figures(figure, stage, tmp_path):
    lines(tmp_path / "metrics.json", {"history": [{"step": 1, figure: 0.5}]})
    assert read_run(tmp_path).stage == stage


def test_which_runs_are_in_a_folder(tmp_path):
    for name in ("demo/ppo", "demo/sft", "demo/reward", "demo/reward/member_0", "demo/mine"):
        log(tmp_path / name)
    lock(tmp_path / "demo/dpo")
    lines(tmp_path / "demo/table/metrics.json", {"criterion": 1})
    for name in ("demo/ppo/checkpoint-4", "demo/ppo/value", "demo/.saving", "a/b/c/too/deep"):
        log(tmp_path / name)
    found = [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)]
    assert found == ["demo/sft", "demo/reward", "demo/ppo", "demo/dpo", "demo/mine", "demo/reward/member_0"]
    assert find_runs(tmp_path / "demo/ppo") == [tmp_path / "demo/ppo"]


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no such folder. Name the output_dir of a stage"):
        find_runs(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no run is here. A stage writes training_log.jsonl and metrics.json"):
        find_runs(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file: a file. Name the output_dir of a stage"):
        find_runs(tmp_path / "file")


DAMAGE = {
    "no JSON": (LOG, "mine\n", rf"{LOG} line 1: not valid JSON"),
    "no step": (LOG, '{"loss": 1.0}\n', rf"{LOG} line 1: 'step' is missing"),
    "a step that is no number": (LOG, '{"step": "2"}\n', "'step' is '2', but must be a whole number"),
    "a start without a stage": (LOG, '{"step": 0, "started": {}}\n', r"'started'\['stage'\] is missing"),
    "a sample without a prompt": (SAMPLES, '{"step": 0, "completion": "a"}\n', "'prompt' is missing"),
    "metrics": ("metrics.json", '{"history": 3}', "metrics.json: 'history' is 3, but must be a list"),
}


@pytest.mark.parametrize(("name", "text", "message"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)
