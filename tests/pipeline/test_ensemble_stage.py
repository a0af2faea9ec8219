"""`num_members`: an ensemble is as many runs as it has members, each as it would be alone, and every stage takes it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import TrainerCallback

from pipeline import best_of_n, evaluation, grpo, ppo, reward, rloo
from pipeline.backbone.adapters import WEIGHTS
from pipeline.backbone.members import MANIFEST, members_of
from pipeline.runs.command_line import parse
from reward_models.normalization import read_normalization


pytestmark = pytest.mark.slow
MODULES = {"reward": reward, "ppo": ppo, "rloo": rloo, "grpo": grpo, "best_of_n": best_of_n, "evaluation": evaluation}
TRAINING = {
    "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none",
    "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
WORDS = ("a quiet triumph.", "a long yawn.", "warm and funny.", "cold and dull.", "not for me.", "worth it.")
PAIRS = [
    {"prompt": "The film is", "chosen": " " + good, "rejected": " " + bad, "agreement": 0.75}
    for good in WORDS[::2]
    for bad in WORDS[1::2]
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    rows = {"pairs": PAIRS, "prompts": [{"prompt": text} for text in ("A", "The film", "It's", "Not")]}
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: str(folder / f"{name}.jsonl") for name in rows}


@pytest.fixture(scope="module")
def run(tiny, sft_adapter, files):
    def run(stage, **options):
        defaults = {"model_name_or_path": tiny, "sft_adapter": sft_adapter, "max_completion_length": 4}
        if stage == "reward":
            defaults |= {**TRAINING, "dataset_name": files["pairs"], "eval_dataset_name": files["pairs"]}
            defaults |= {"sft_completions": 4, "lora_r": 2, "gradient_checkpointing": False, "max_length": 32}
        else:
            defaults |= {"dataset_name": files["prompts"], "normalize_scores": True, "reward_weights": [2.0]}
        if stage in ("ppo", "rloo", "grpo"):
            defaults |= TRAINING
        flags = [word for key, value in {**defaults, **options}.items() for word in (f"--{key}", *words(value))]
        MODULES[stage].main(*parse(*MODULES[stage].OPTIONS, args=flags))

    return run


def words(value) -> list[str]:
    return list(map(str, value if isinstance(value, list) else [value]))


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stage") / "reward"
    run("reward", output_dir=folder, num_members=2, seed=3)
    return folder


def test_each_member_is_the_run_of_its_seed(run, trained, tmp_path):
    members = [Path(name) for name in members_of(str(trained))]
    assert [member.name for member in members] == ["member_0", "member_1"]
    run("reward", output_dir=tmp_path / "alone", seed=4)
    alone, member = tmp_path / "alone", members[1]
    assert (alone / WEIGHTS).read_bytes() == (member / WEIGHTS).read_bytes() != (members[0] / WEIGHTS).read_bytes()
    assert read_normalization(alone) == read_normalization(member)
    figures = [
        {k: v for k, v in metrics(folder).items() if k in ("accuracy", "ece", "rows")} for folder in (alone, member)
    ]
    assert figures[0] == figures[1]
    found = metrics(trained)
    assert [(one["folder"], one["seed"]) for one in found["members"]] == [("member_0", 3), ("member_1", 4)]
    assert [one["accuracy"] for one in found["members"]] == [metrics(member)["accuracy"] for member in members]
    assert found["pairs"] == len(PAIRS) and 0 <= found["unanimous"] <= 1 and found["disagreement"] > 0
    seconds = [metrics(member)["seconds"] for member in members]
    assert found["seconds"] == pytest.approx(sum(seconds), abs=0.11)
    assert 0 < seconds[1] < 60  # of the member, not of the process

    model = AutoPeftModelForSequenceClassification.from_pretrained(str(member), num_labels=1)
    assert torch.equal(
        model.base_model.model.score.modules_to_save["default"].weight,
        load_file(member / WEIGHTS)["base_model.model.score.weight"],
    )


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, seed, step):
        self.seed, self.step = seed, step

    def on_step_begin(self, args, state, control, **kwargs):
        if args.seed == self.seed and state.global_step == self.step:
            raise Killed


def test_an_ensemble_goes_on_where_it_was_killed(run, trained, tmp_path, monkeypatch):
    folder, check = tmp_path / "out", reward.check_wrapper
    shutil.copytree(trained, folder)  # an earlier ensemble, of other data
    options = {"output_dir": folder, "num_members": 2, "seed": 3, "save_strategy": "steps", "save_steps": 1}

    def check_and_kill(trainer):
        check(trainer)
        trainer.add_callback(KillAt(4, 1))

    monkeypatch.setattr(reward, "check_wrapper", check_and_kill)
    with pytest.raises(Killed):
        run("reward", **options, learning_rate=2e-2)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"member_0: not the member that \S+ names\. A run with num_members has begun"
    ):
        members_of(str(folder))
    steps = []
    monkeypatch.setattr(KillAt, "on_step_begin", lambda self, args, state, control, **kwargs: steps.append(args.seed))
    monkeypatch.setattr(reward, "check_wrapper", check_and_kill)
    run("reward", **options, learning_rate=2e-2, resume_from_checkpoint="auto")
    assert steps == [4]  # the second member's second step
    run("reward", output_dir=tmp_path / "whole", num_members=2, seed=3, learning_rate=2e-2)
    for member in ("member_0", "member_1"):
        assert (folder / member / WEIGHTS).read_bytes() == (tmp_path / "whole" / member / WEIGHTS).read_bytes()
    listed = [json.loads((one / MANIFEST).read_text()) for one in (folder, tmp_path / "whole")]
    assert listed[0] == listed[1]


def test_every_stage_takes_an_ensemble(run, trained, sft_adapter, tmp_path):
    options = {"reward_adapter": str(trained), "reward_combination": "min"}
    sampled = {"sample_updates": 1, "sample_prompts": 2, "min_reward_accuracy": 0, "num_iterations": 1}
    run("ppo", output_dir=tmp_path / "ppo", **options, **sampled)
    log = [row for row in metrics(tmp_path / "ppo")["history"] if "score" in row]
    assert len(log) == 2
    for row in log:
        assert row["rewards/ensemble/disagreement"] > 0
        assert row["score"] == pytest.approx(2 * row["rewards/ensemble/mean"], abs=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(row["disagreement"] > 0 for row in rows)
    names = [check["name"] for check in metrics(tmp_path / "ppo")["preflight"]]
    assert {"scores vary on SFT completions", "scores vary on SFT completions (reward_2)"} <= set(names)

    run("evaluation", output_dir=tmp_path / "report", policy_adapter=tmp_path / "ppo", batch_size=2, **options)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["sft"]["disagreement"] > 0 and report["policy"]["disagreement"] > 0
    assert report["reward_model"]["accuracy"] == metrics(trained)["accuracy"]
    assert "| disagreement of the reward models |" in (tmp_path / "report" / "report.md").read_text()
    run(
        "evaluation", output_dir=tmp_path / "one", policy_adapter=tmp_path / "ppo", reward_adapter=trained / "member_0"
    )
    assert "disagreement" not in json.loads((tmp_path / "one" / "report.json").read_text())["sft"]
    assert "disagreement" not in (tmp_path / "one" / "report.md").read_text()

    run("best_of_n", output_dir=tmp_path / "best", n=[1, 2], **options)
    for stage in ("rloo", "grpo"):
        run(stage, output_dir=tmp_path / stage, num_generations=2, **options)
        log = [row for row in metrics(tmp_path / stage)["history"] if "reward" in row]
        assert log and all(row["rewards/ensemble/disagreement"] > 0 for row in log)
