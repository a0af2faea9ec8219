"""`pipeline.checkpoints`: a run that was stopped and resumed leaves the same bytes, and nothing damaged is trusted."""

import json
from pathlib import Path

import pytest
from conftest import PROMPTS
from datasets import Dataset
from transformers import TrainerCallback

from pipeline.artifacts import finish_stage
from pipeline.samples import SampleTable


TEXTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15, 16, 17, 18], [19, 20, 21]]
CLOCK = ("time", "runtime", "per_second", "seconds")


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """Ends training when a step begins, as no handler would: what is not on disk by then is lost."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def files(folder: Path) -> dict[str, bytes]:
    """The weights that a run leaves, and what it has written of itself, without what a clock showed."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("adapter_*")}
    found = {name: data for name, data in found.items() if not name.startswith("checkpoint-")}
    metrics = json.loads((folder / "metrics.json").read_text())
    found["metrics"] = [without_clock(row) for row in metrics.pop("history")], without_clock(metrics)
    found["samples"] = (folder / "samples.jsonl").read_text() if (folder / "samples.jsonl").exists() else None
    return found


def without_clock(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.endswith(CLOCK)}


EVERYTHING = {
    "beta": 0.5, "kl_target": 1.0, "kl_horizon": 20, "whiten_rewards": True, "ptx_coef": 0.1, "texts": TEXTS,
    "max_approx_kl": 0.2, "critic_warmup_updates": 1, "held_out": PROMPTS[:2], "eval_strategy": "steps",
    "eval_steps": 3, "per_device_eval_batch_size": 2, "sample_updates": 1, "logging_steps": 2, "normalize_scores": True,
}  # fmt: skip


@pytest.fixture
def ppo_run(make_trainer, tmp_path):
    """Trains PPO in a folder of its own and finishes the stage: 3 updates of 4 steps, 2 updates a pass over prompts."""

    def run(name, kill=None, resume=None, **options):
        folder = tmp_path / name
        settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
        prompts = PROMPTS + [text.lower() for text in PROMPTS]
        trainer = make_trainer(prompts=prompts, output_dir=str(folder), **{**settings, **options})
        if options.get("sample_updates"):
            trainer.add_callback(SampleTable(trainer, Dataset.from_dict({"prompt": PROMPTS[:2]})))
        if kill is not None:
            trainer.add_callback(KillAt(kill))
            with pytest.raises(Killed):
                trainer.train(resume_from_checkpoint=resume)
            return None
        trainer.train(resume_from_checkpoint=resume)
        finish_stage(trainer, "backbone", trainer.summary())
        return files(folder)

    return run


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_ppo_resumes_to_the_bit_from_any_step(ppo_run, options, tmp_path):
    """At the end of an update (4, 8), of a pass over the prompts (8), of an epoch (2, 6), and within one."""
    expected = ppo_run("at once", **options)
    folder, resume = tmp_path / "in pieces", None
    for step in (1, 3, 4, 6, 8, 11):
        ppo_run("in pieces", kill=step, resume=resume, **options)
        assert sorted(path.name for path in folder.glob("checkpoint-*"))[-1:] and not (folder / ".staging").exists()
        resume = str(folder / f"checkpoint-{step}")
    found = ppo_run("in pieces", resume=resume, **options)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
