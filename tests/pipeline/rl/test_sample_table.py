"""`pipeline.rl.sample_table`: the table is what the policy writes, and training does not notice it."""

import asyncio
import json
import sys
import types

import pandas as pd
import pytest
import torch
from datasets import Dataset

from pipeline.rl.sample_table import SampleTable
from reward_models.composite import Composite


pytestmark = pytest.mark.slow


ASKED = ["The film", "It's a", "One of the best"]


def with_table(trainer, prompts=ASKED, judge=None):
    table = SampleTable(trainer, Dataset.from_dict({"prompt": prompts}), judge)
    trainer.add_callback(table)
    return table


def read(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_training_is_the_same_with_and_without_it(make_trainer, tmp_path):
    results = []
    for table in (False, True):
        trainer = make_trainer(sample_updates=1)
        if table:
            with_table(trainer)
        trainer.train()
        rows = [{k: v for k, v in row.items() if "time" not in k} for row in trainer.state.log_history[:-1]]
        results.append((trainer.model.state_dict(), rows))
    (plain, log), (tabled, logged) = results
    assert log == logged
    assert all(torch.equal(plain[name], tabled[name]) for name in plain)
    assert len(read(tmp_path)) == 9


def words(completions, **kwargs):
    return [float(len(completion.split())) for completion in completions]


def test_rows(make_trainer, tmp_path):
    trainer = make_trainer(reward_funcs=[words], reward_weights=[2.0], sample_updates=1, learning_rate=0.1)
    with_table(trainer, judge=Composite([words, words]))
    (tmp_path / "samples.jsonl").write_text("an older run\n")
    trainer.train()
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == [0] * 3 + [4] * 3 + [8] * 3
    assert [row["prompt"] for row in rows] == ASKED * 3
    for row in rows:
        assert row.keys() == {"step", "prompt", "completion", "score", "kl", "judge"}
        assert row["score"] == 2 * len(row["completion"].split())
        assert row["judge"] == row["score"] == 2 * len(row["completion"].split())
        assert (row["kl"] == 0) == (row["step"] == 0)


@pytest.mark.parametrize(("updates", "steps"), [(1, {0, 4, 8}), (2, {0, 8}), (3, {0})])
def test_every_so_many_updates(make_trainer, tmp_path, updates, steps):
    trainer = make_trainer(sample_updates=updates)
    with_table(trainer, ["A"])
    trainer.train()
    assert {row["step"] for row in read(tmp_path)} == steps


def test_the_same_policy_writes_the_same_again(make_trainer, tmp_path):
    trainer = make_trainer(sample_updates=1, learning_rate=0.0)
    with_table(trainer)
    trainer.train()
    rows = [{**row, "step": 0} for row in read(tmp_path)]
    assert rows[:3] == rows[3:6] == rows[6:]


def test_async_rewards_run_in_one_event_loop(make_trainer, tmp_path):
    loops = set()

    async def client(completions, **kwargs):
        loops.add(asyncio.get_running_loop())
        return [1.0] * len(completions)

    trainer = make_trainer(reward_funcs=[client], sample_updates=1)
    with_table(trainer)
    trainer.train()
    assert len(read(tmp_path)) == 9 and len(loops) == 1


def test_a_reward_that_fails_here_fails_here(make_trainer):
    def failing(completions, trainer_state, **kwargs):
        raise RuntimeError("no answer")

    trainer = make_trainer(reward_funcs=[failing], sample_updates=1)
    table = with_table(trainer)
    with pytest.raises(ValueError, match="reward function 'failing' raised RuntimeError: no answer"):
        table._rows(0)
    assert not trainer.composite._failures


def test_trackers_get_it_as_a_table(make_trainer, monkeypatch):
    given = []
    for name in ("trackio", "wandb"):
        module = types.SimpleNamespace(
            Table=lambda dataframe, name=name: (name, dataframe), log=lambda what: given.append(what["samples"])
        )
        monkeypatch.setitem(sys.modules, name, module)
    trainer = make_trainer(sample_updates=1)
    table = with_table(trainer)
    frame = pd.DataFrame([{"step": 0, "prompt": "A"}])
    table._report(0, frame)
    assert given == []  # report_to names none
    trainer.args.report_to = ["trackio", "wandb"]
    table._report(0, frame)
    assert [name for name, _ in given] == ["trackio", "wandb"]
    assert all(dataframe is frame for _, dataframe in given)


def test_conversations(make_trainer):
    def answers(prompts, completions, **kwargs):
        return [float(completion[0]["role"] == "assistant") for completion in completions]

    trainer = make_trainer(reward_funcs=[answers])
    trainer.processing_class.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    asked = [[{"role": "user", "content": "Hi"}]]
    (row,) = SampleTable(trainer, Dataset.from_dict({"prompt": asked}))._rows(0)
    assert row["prompt"] == asked[0] and isinstance(row["completion"], str) and row["score"] == 1


def test_it_leaves_the_mode_as_it_was(make_trainer):
    trainer = make_trainer()
    table = SampleTable(trainer, Dataset.from_dict({"prompt": ASKED}))
    for training in (True, False):
        trainer.model.train(training)
        table._rows(0)
        assert trainer.model.training is training
