"""`pipeline.runs.terminal`: a line a person can read for each entry of the log, and bars with a useful time left."""

import re
from types import SimpleNamespace

import datasets
import pytest
import torch
from tqdm import tqdm
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from pipeline.runs import terminal
from pipeline.runs.terminal import Lines, duration, leave_out_bars, line, write_lines


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3600, "1 h 00 min"), (93_780, "26 h 03 min")],
)  # fmt: skip
def test_a_duration_in_words(seconds, words):
    assert duration(seconds) == words


PPO = {"loss": 0.04, "value": 0.39, "score": -0.1164, "kl": 0.997, "reward": -0.3, "completions/mean_length": 16.72}
EXPECTED = {
    "PPO": (PPO, {"left": 80.0, "kl_target": 9.0}, "score  -0.116  KL   1.00 of 9  length   16.7  1 min 20 s left"),
    "GRPO": (
        {"loss": 0.0, "reward": 1.5, "kl": 2.0, "completions/mean_length": 9.0},
        {"left": 5},
        "reward  +1.500  KL   2.00  length    9.0  5 s left",
    ),
    "SFT": ({"loss": 4.36, "mean_token_accuracy": 0.21715, "entropy": 4.6}, {}, "loss  4.3600  token accuracy 0.217"),
    "reward": ({"loss": 0.67, "accuracy": 0.58, "margin": 0.14}, {}, "loss  0.6700  accuracy 0.580  margin  +0.140"),
    "DPO": (
        {"loss": 0.69, "rewards/accuracies": 0.5, "rewards/margins": -0.01},
        {},
        "loss  0.6900  accuracy 0.500  margin  -0.010",
    ),
    "no number": ({"reward": None, "kl": float("nan")}, {}, "KL    nan"),
    "held out": (
        {"eval_loss": 5.04, "eval_mean_token_accuracy": 0.2, "epoch": 1.0},
        {"left": 9},
        "held out:  loss  5.0400  token accuracy 0.200",
    ),
}


@pytest.mark.parametrize(("logs", "options", "words"), EXPECTED.values(), ids=EXPECTED)
def test_a_line_has_the_figures_that_a_person_follows(logs, options, words):
    assert line(logs, 4, 144, **options) == f"step   4/144  {words}"


def test_the_last_line_says_how_long_training_took():
    logs = {"train_runtime": 418.06, "train_loss": 0.0066, "epoch": 0.26}
    assert line(logs, 144, 144) == "step 144/144: trained in 6 min 58 s"


def test_an_entry_without_such_a_figure_has_no_line():
    assert line({"epoch": 1.0, "mine": 3.0}, 1, 2) is None


def test_the_time_left_is_that_of_the_steps_of_this_process(monkeypatch, capsys):
    """A resumed run has the steps before it for nothing."""
    clock = iter((0.0, 4.0))
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    state = SimpleNamespace(global_step=100, max_steps=110, is_world_process_zero=True)
    lines = Lines(bars=True, lines=True)
    lines.on_train_begin(None, state, None)
    assert (lines.training_bar.n, lines.training_bar.initial) == (100, 100)
    state.global_step = 102
    lines.on_step_end(None, state, None)
    lines.on_log(SimpleNamespace(), state, None, logs={"loss": 1.0})
    assert capsys.readouterr().out == "step 102/110  loss  1.0000  16 s left\n"
    lines.on_train_end(None, state, None)


class Line(torch.nn.Module):
    """A model that a plain Trainer trains in no time."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, labels=None):
        return {"loss": (x * self.weight).square().mean()}


@pytest.fixture
def trained(tmp_path, capsys):
    """Trains three steps, with an evaluation at the end, and returns the trainer and what it printed."""

    def train(**options):
        options |= {"report_to": "none", "use_cpu": True, "label_names": ["x"]}
        args = TrainingArguments(str(tmp_path), max_steps=3, logging_steps=1, **options)
        rows = [{"x": torch.ones(1)} for _ in range(8)]
        trainer = Trainer(Line(), args, train_dataset=rows, eval_dataset=rows)
        write_lines(trainer)
        write_lines(trainer)  # as a second `train` of the same trainer does
        trainer.train()
        trainer.evaluate()
        return trainer, capsys.readouterr()

    verbosity = logging.get_verbosity()
    yield train
    logging.set_verbosity(verbosity)


def test_lines_go_to_one_stream_and_the_bar_to_the_other(trained):
    trainer, said = trained(disable_tqdm=False, save_strategy="no")
    *lines, last, held_out = [text for text in said.out.splitlines() if text.startswith("step")]
    assert len(lines) == 3 and all(re.fullmatch(r"step \d/3  loss  \d\.\d{4}  0 s left", text) for text in lines)
    assert last == "step 3/3: trained in 0 s" and held_out.startswith("step 3/3  held out:  loss")
    assert re.search(r"100%\|.* 3/3 \[", said.err)
    assert all({"loss", "grad_norm", "learning_rate", "epoch"} <= row.keys() for row in trainer.state.log_history[:3])


def test_without_bars_the_lines_stay(trained):
    _, said = trained(disable_tqdm=True, save_strategy="no")
    assert said.out.count("loss") == 4 and "{" not in said.out and "%|" not in said.err


def test_a_level_of_errors_alone_is_quiet(trained):
    _, said = trained(log_level="error", disable_tqdm=False, save_strategy="no")
    assert said.out == "" and "%|" not in said.err


def test_in_a_notebook_the_table_of_trainer_stays():
    trainer = SimpleNamespace(pop_callback=lambda kind: None, add_callback=pytest.fail)
    write_lines(trainer)


def test_ppo_writes_a_line_for_each_update(make_trainer, capsys):
    trainer = make_trainer(kl_target=6.0, kl_horizon=1000.0, logging_steps=4, max_steps=4)
    trainer.train()
    first, last = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(r"step 4/4  score +[+-]\d\.\d{3}  KL +-?\d\.\d{2} of 6  length +\d\.\d  0 s left", first)
    assert last.startswith("step 4/4: trained in ")
    assert len(trainer.state.log_history[0]) > 20  # the log keeps all


def test_bars_are_left_out_everywhere(capsys):
    from transformers.utils.logging import tqdm as bar

    try:
        leave_out_bars()
        assert list(bar(range(3))) == [0, 1, 2]
        assert datasets.Dataset.from_dict({"x": [1, 2]}).map(lambda row: row).num_rows == 2
        assert capsys.readouterr().err == ""
    finally:
        logging.enable_progress_bar()
        datasets.enable_progress_bars()
    list(bar(range(3)))
    assert "3/3" in capsys.readouterr().err


def test_a_bar_begins_no_line_of_an_error(capsys, monkeypatch):
    from pipeline.runs.errors import report

    monkeypatch.setenv("WORLD_SIZE", "1")
    bar = tqdm(total=10)
    bar.update(4)
    report(KeyError, KeyError("a"), None)
    assert "\nKeyError: 'a'\n" in capsys.readouterr().err and bar.disable
