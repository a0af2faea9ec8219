"""`pipeline.runs.training_log`: the log on disk is the trainer's, whole at any moment, and a resumed run repeats nothing."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
from conftest import PROMPTS
from distributed_worker import KillAt, Killed
from transformers import TrainerCallback

from pipeline.runs import training_log
from pipeline.runs.live_files import LOG, whole_lines
from pipeline.runs.ownership import is_training_log, not_ours
from pipeline.runs.training_log import TrainingLog, finite


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in whole_lines(folder / LOG)]


def figures(rows: list[dict]) -> list[dict]:
    """The entries of the trainer's log, without the time that is added to them."""
    other = {"started", "warning", "ended"}
    return [{name: value for name, value in row.items() if name != "time"} for row in rows if not other & row.keys()]


def state(step=0, history=(), zero=True):
    return SimpleNamespace(
        global_step=step, max_steps=8, is_world_process_zero=zero, log_history=[dict(row) for row in history]
    )


@pytest.fixture
def log(tmp_path) -> TrainingLog:
    return TrainingLog(tmp_path, {"stage": "sft", "options": {"seed": 0}})


FIRST, SECOND = {"loss": 2.0, "epoch": 0.5, "step": 2}, {"loss": 1.5, "epoch": 1.0, "step": 4}


def begin(log, **options):
    log.on_train_begin(None, state(**options), None)


def write(log, *entries):
    for entry in entries:
        log.on_log(None, state(history=[entry]), None)


def test_a_row_for_each_entry(log, tmp_path):
    begin(log)
    write(log, FIRST, {**SECOND, "kl": float("nan"), "reward": None})
    log.warn(5, "The KL explodes.")
    started, first, second, warning = rows_of(tmp_path)
    assert started["started"] == {"stage": "sft", "options": {"seed": 0}, "max_steps": 8} and started["step"] == 0
    assert figures([first]) == [FIRST] and figures([second]) == [{**SECOND, "reward": None}]
    assert warning["warning"] == "The KL explodes." and warning["step"] == 5
    assert started["time"] <= first["time"] <= warning["time"] <= started["time"] + 60


def test_what_is_not_finite_is_left_out():
    assert finite({"a": float("inf"), "b": float("-inf"), "c": float("nan"), "d": 1.0, "e": None, "f": "x"}) == {
        "d": 1.0,
        "e": None,
        "f": "x",
    }


def test_a_new_run_begins_a_new_file(log, tmp_path):
    begin(log)
    write(log, FIRST)
    begin(log)
    assert [set(row) for row in rows_of(tmp_path)] == [{"step", "time", "started"}]
    assert not (tmp_path / ".staging").exists()


@pytest.mark.parametrize("ending", ["", '{"step": 9, "lo', '{"step": 9, "loss": 1.0}\n'])
def test_a_resumed_run_keeps_what_its_checkpoint_knows(ending, log, tmp_path):
    """Half a line, and entries and warnings beyond the checkpoint, are left out."""
    begin(log)
    write(log, FIRST)
    log.warn(2, "early")
    write(log, SECOND)
    log.warn(5, "late")
    write(log, {"loss": 9.0, "epoch": 1.5, "step": 6})
    log.add({"step": 6, "ended": "Killed"})
    with (tmp_path / LOG).open("a") as file:
        file.write(ending)
    before = rows_of(tmp_path)
    begin(log, step=4, history=[FIRST, SECOND])
    write(log, {"loss": 1.2, "epoch": 1.5, "step": 6})
    rows = rows_of(tmp_path)
    assert figures(rows) == [FIRST, SECOND, {"loss": 1.2, "epoch": 1.5, "step": 6}]
    assert [row["time"] for row in rows if row.get("loss") in (2.0, 1.5)] == [
        row["time"] for row in before if row.get("loss") in (2.0, 1.5)
    ]
    assert [row["warning"] for row in rows if "warning" in row] == ["early"]
    assert [row["step"] for row in rows if "started" in row] == [0, 4] and "started" in rows[0]
    assert not [row for row in rows if "ended" in row]
    begin(log, step=4, history=[FIRST, SECOND])  # twice from one checkpoint
    assert [row["step"] for row in rows_of(tmp_path) if "started" in row] == [0, 4]


def test_a_checkpoint_from_elsewhere_brings_its_log(log, tmp_path):
    begin(log, step=4, history=[FIRST, SECOND])
    rows = rows_of(tmp_path)
    assert figures(rows) == [FIRST, SECOND] and "started" in rows[0] and rows[0]["step"] == 4
    assert is_training_log(tmp_path / LOG)


def test_a_damaged_line_is_named(log, tmp_path):
    begin(log)
    with (tmp_path / LOG).open("a") as file:
        file.write("mine\n")
    with pytest.raises(ValueError, match=rf"{LOG} line 2: not valid JSON .* Delete the line, or the whole file"):
        begin(log, step=2)


def test_other_processes_write_nothing(log, tmp_path):
    begin(log, zero=False)
    write(log, FIRST)
    log.warn(1, "no")
    assert not (tmp_path / LOG).exists()


def test_a_full_disk_ends_the_log_and_not_the_training(log, tmp_path, caplog):
    begin(log)
    log.path = type(log.path)("/dev/full")
    write(log, FIRST, SECOND)
    (message,) = caplog.messages
    assert message.startswith(
        "/dev/full could not be written (No space left on device). It ends here. Training goes on"
    )


def test_a_row_that_is_cut_short_is_taken_back(log, tmp_path, monkeypatch):
    """Else the next row would be the rest of its line."""
    begin(log)
    write(log, FIRST)
    whole, original = (tmp_path / LOG).read_bytes(), type(log.path).open

    class Short:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def write(self, text):
            return self.file.write(text[:10])

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(type(log.path), "open", lambda *args, **kwargs: Short(original(*args, **kwargs)))
    write(log, SECOND)
    assert (tmp_path / LOG).read_bytes() == whole


def test_a_file_that_cannot_be_begun_is_an_error(log, monkeypatch):
    def fail(path, lines):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(training_log, "write_anew", fail)
    with pytest.raises(OSError, match=rf"{LOG} cannot be written \(Permission denied\). Free some space, or change"):
        begin(log)


OURS = {
    '{"step": 0, "time": 1.0, "started": {}}\n': True,
    "": True,  # cut off
    '{"step": 0, "ti': True,
    '{"step": 0, "loss": 1.0}\n': False,
    '{"level": "info"}\n': False,
    "[1]\n": False,
    "{}\n": False,
    "notes": False,
}


@pytest.mark.parametrize(("text", "ours"), OURS.items())
def test_whose_the_file_is(text, ours, tmp_path):
    (tmp_path / LOG).write_text(text)
    assert is_training_log(tmp_path / LOG) == ours
    assert not_ours(tmp_path, [LOG]) == ([] if ours else [LOG])


# ------------------------------------------------------------------------------------------ in training
@pytest.mark.slow
def test_the_log_of_ppo(make_trainer, tmp_path, monkeypatch):
    """All of its figures, its warnings, its preflight and its end."""
    check = {"name": "n", "measured": 0.5, "bound": "at most 1", "result": "warning", "why": "w"}
    trainer = make_trainer(kl_target=6.0, kl_horizon=1000.0)
    said = iter([["The KL explodes."]])
    monkeypatch.setattr(trainer.health, "observe", lambda **measured: next(said, []))
    trainer.train(preflight=[check])
    rows = rows_of(tmp_path)
    assert figures(rows) == trainer.state.log_history and len(figures(rows)) == 9
    about = rows[0]["started"]
    assert about["stage"] == "ppo" and about["max_steps"] == 8 and about["preflight"] == [check]
    assert about["options"]["kl_target"] == 6.0 and about["options"]["max_completion_length"] == 6
    assert [(row["step"], row["warning"]) for row in rows if "warning" in row] == [(1, "The KL explodes.")]
    assert rows[-1]["ended"] == "finished" and rows[-1]["step"] == 8


class Signal(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["signal", "death", "reward"])
def test_how_it_ended_and_went_on(end, make_trainer, tmp_path):
    """The warning of a step that is taken again is told once."""
    calls = []

    def failing(completions, **kwargs):
        calls.append(0)
        if end == "reward" and len(calls) == 2:
            raise RuntimeError("no answer")
        return [float(len(completion)) for completion in completions]

    options = {"save_strategy": "steps", "save_steps": 1, "reward_funcs": [failing], "prompts": PROMPTS}
    trainer = make_trainer(**options)
    if end == "signal":
        trainer.add_callback(Signal())
    if end == "death":
        trainer.add_callback(KillAt(5))
    with pytest.raises((SystemExit, Killed, ValueError)):
        trainer.train()
    step, words = {
        "signal": (4, "stopped by SIGTERM after step 4"),
        "death": (5, "Killed: "),
        "reward": (4, "RewardError: reward function 'failing' raised RuntimeError: no answer"),
    }[end]
    last = rows_of(tmp_path)[-1]
    assert last["ended"].startswith(words), last
    again = make_trainer(**options)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    rows = rows_of(tmp_path)
    assert figures(rows) == again.state.log_history
    assert [row["step"] for row in rows if "started" in row] == [0, step]
    assert [row["ended"] for row in rows if "ended" in row] == ["finished"]
