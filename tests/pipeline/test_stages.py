"""Stages in this process: the backbone stays as it was, and wrong inputs fail with one error before any training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trl import ModelConfig, RewardConfig, SFTConfig

from pipeline import evaluation, ppo, reward, sft
from pipeline.backbone import HEAD, WEIGHTS, load_pretrained
from pipeline.configs import DataArguments, PPOConfig, RewardModelArguments, parse
from reward_models.composite import RewardArguments


TYPES = {
    "sft": (DataArguments, ModelConfig, SFTConfig),
    "reward": (DataArguments, RewardModelArguments, ModelConfig, RewardConfig),
    "ppo": (DataArguments, ppo.RoleArguments, RewardArguments, ModelConfig, PPOConfig),
}
MODULES = {"sft": sft, "reward": reward, "ppo": ppo}


@pytest.fixture
def run(tiny, sft_adapter, reward_adapter, tmp_path):
    def run(stage, **options):
        defaults = {"model_name_or_path": tiny, "output_dir": str(tmp_path / "out"), "max_steps": 2}
        if stage == "ppo":
            defaults |= {"sft_adapter": sft_adapter, "reward_adapter": reward_adapter, "max_completion_length": 4}
        recipe = f"pipeline/recipes/demo/{stage}.yaml"
        flags = [word for key, value in {**defaults, **options}.items() for word in (f"--{key}", str(value))]
        MODULES[stage].main(*parse(*TYPES[stage], args=["--config", recipe, *flags]))

    return run


@pytest.fixture
def no_training(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr("transformers.Trainer.train", fail)


PAIRS = [{"prompt": "A", "chosen": " fine film.", "rejected": " poor film."} for _ in range(64)]


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_the_backbone_is_bit_identical_after_the_stage(stage, run, tiny, monkeypatch, tmp_path):
    """And the adapter has changed: something did train."""
    kept = {}
    original = MODULES[stage].finish_stage

    def finish(trainer, identity, metrics):
        kept.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        original(trainer, identity, metrics)

    monkeypatch.setattr(MODULES[stage], "finish_stage", finish)
    data = {"dataset_name": write(tmp_path / "pairs.jsonl", PAIRS)} if stage == "reward" else {}
    run(stage, **data)
    base, _ = load_pretrained(ModelConfig(tiny))
    trained = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in kept.items()
        if "lora_" not in name and "score" not in name and "heads" not in name
    }
    expected = dict(base.named_parameters())
    if stage == "reward":
        expected.pop("lm_head.weight", None)
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    moved = [
        p.abs().max() for name, p in kept.items() if "lora_B" in name and (".default." in name or ".value." in name)
    ]
    assert min(moved) > 0


BAD_PAIRS = {
    "a missing column": ([{"prompt": "A", "chosen": " b"}], r"no column 'rejected'"),
    "an empty completion": (
        [*PAIRS, {"prompt": "A", "chosen": " ", "rejected": " b"}],
        r"row 65 .*'chosen' must not be empty",
    ),
    "equal completions": ([{"prompt": "A", "chosen": " b", "rejected": " b"}], r"row 1 .*must differ from 'chosen'"),
}


@pytest.mark.parametrize("rows, message", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_preferences(rows, message, run, no_training, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("reward", dataset_name=write(tmp_path / "pairs.jsonl", rows))
    assert not (tmp_path / "out").exists()


def test_malformed_json_names_the_line(run, no_training, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIRS[0]) + "\n" + '{"prompt": "A", "chosen"\n')
    with pytest.raises(ValueError, match=r"pairs.jsonl line 2: not valid JSON"):
        run("reward", dataset_name=path)


def test_a_prompt_longer_than_the_context(run, no_training, tmp_path):
    rows = [{"prompt": "A"}, {"prompt": "word " * 150}]
    with pytest.raises(ValueError, match=r"row 2 .* exceeds the model's context of 128.*lower max_completion_length"):
        run("ppo", dataset_name=write(tmp_path / "prompts.jsonl", rows))


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_rows_longer_than_the_context(stage, run, no_training):
    with pytest.raises(ValueError, match="max_length=129 exceeds the model's context of 128 tokens"):
        run(stage, max_length=129)


def test_a_typo_suggests_the_nearest_key(run, no_training):
    with pytest.raises(ValueError, match=r"unknown key 'learning_rat'. Did you mean learning_rate\?"):
        run("ppo", learning_rat=1e-4)


def test_a_model_without_a_tokenizer(run, no_training, tiny, tmp_path):
    bare = Path(shutil.copytree(tiny, tmp_path / "bare"))
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="bare: the model folder has no tokenizer"):
        run("sft", model_name_or_path=bare)


def test_a_reward_adapter_without_its_head(run, no_training, reward_adapter, tmp_path):
    folder = Path(shutil.copytree(reward_adapter, tmp_path / "headless"))
    tensors = load_file(folder / WEIGHTS)
    del tensors[HEAD]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match="headless: .* holds no score head"):
        run("ppo", reward_adapter=folder)


def test_a_reward_adapter_of_another_base(run, no_training, tiny, tmp_path):
    other, tokenizer = load_pretrained(ModelConfig(tiny))
    other.transformer.wte.weight.data.mul_(2)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on another base"):
        run("ppo", model_name_or_path=tmp_path / "other")


def test_a_run_without_any_reward(run, no_training):
    with pytest.raises(ValueError, match="Name a reward: set reward_adapter, reward_funcs or both"):
        run("ppo", reward_adapter="")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("reward_models.rules.containz", "cannot import 'reward_models.rules.containz'"),
        ("reward_models.rules.contains", r"missing a required argument: 'contains'.*rows\.jsonl \(needle\)"),
        ("reward_models.rules.get_length(tokens=3)", "unexpected keyword argument 'tokens'"),
    ],
)
def test_a_reward_function_that_cannot_be_called(function, message, run, no_training, tmp_path):
    """Said before the model is read: there is none."""
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "A", "needle": "b"}])
    with pytest.raises(ValueError, match=message):
        run("ppo", reward_funcs=function, dataset_name=rows, model_name_or_path=tmp_path / "no model")


async def shortness(completions, log_metric, **kwargs):
    log_metric("called", 1.0)
    return [-len(completion) for completion in completions]


@pytest.mark.slow
def test_evaluation_weighs_the_rewards_of_ppo(
    tiny, sft_adapter, reward_adapter, other_reward_adapter, tmp_path, monkeypatch
):
    """Two adapters, an async function and one made from options, in a recipe that both stages can read."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reward_adapter, "kind")
    shutil.copytree(other_reward_adapter, "brief")
    rewards = f"""
model_name_or_path: {tiny}
sft_adapter: {sft_adapter}
dataset_name: {write(tmp_path / "rows.jsonl", [{"prompt": text} for text in ("A", "The film", "It's", "Not")])}
reward_adapter: [kind, brief]
reward_funcs: [{__name__}.shortness, "reward_models.rules.get_length(target=3)"]
reward_weights: [1.0, -2.0, 0.5, 4.0]
max_completion_length: 4
"""
    training = "per_device_train_batch_size: 4\nmax_steps: 2\nnum_iterations: 1\nlogging_steps: 1\n"
    training += "output_dir: ppo\nreport_to: none\nuse_cpu: true\nbf16: false\nsave_strategy: 'no'\n"
    (tmp_path / "ppo.yaml").write_text(rewards + training)
    (tmp_path / "evaluation.yaml").write_text(rewards + "ppo_adapter: ppo\noutput_dir: out\n")
    ppo.main(*parse(*TYPES["ppo"], args=["--config", "ppo.yaml"]))
    types = (evaluation.EvaluationArguments, RewardArguments, ModelConfig)
    evaluation.main(*parse(*types, args=["--config", "evaluation.yaml"]))

    log = json.loads(Path("ppo/metrics.json").read_text())["history"]
    report = json.loads(Path("out/report.json").read_text())
    names = ("kind", "brief", "shortness", "length")
    logged = [row | {name: row[f"rewards/{name}/mean"] for name in names} for row in log if "score" in row]
    reported = [report[role]["rewards"] | {"score": report[role]["score"]} for role in ("sft", "ppo")]
    assert len(logged) == 2
    for means in logged + reported:
        score = means["kind"] - 2 * means["brief"] + 0.5 * means["shortness"] + 4 * means["length"]
        assert means["score"] == pytest.approx(score, abs=1e-3)
        assert means["kind"] != means["brief"] and means["shortness"] < 0 <= means["length"] <= 1
