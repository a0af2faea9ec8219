"""Stages in this process: what they train, what they leave, and that the backbone stays as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import trl
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import Trainer
from trl import ModelConfig

from pipeline import best_of_n, dpo, evaluation, grpo, ppo, reward, rloo, sft, tables
from pipeline.backbone.adapter_tensors import HEAD
from pipeline.backbone.adapters import WEIGHTS, read_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.rl import online
from pipeline.runs import outputs
from pipeline.runs.command_line import parse
from tests.backbone_copies import backbone_copies


MODULES = {"sft": sft, "reward": reward, "ppo": ppo, "rloo": rloo, "grpo": grpo, "dpo": dpo}
MODULES |= {"best_of_n": best_of_n, "evaluation": evaluation}
TYPES = {name: module.OPTIONS for name, module in MODULES.items()}


def _words(value) -> list[str]:
    return [str(entry) for entry in (value if isinstance(value, list) else [value])]


@pytest.fixture
def run(tiny, sft_adapter, reward_adapter, tmp_path):
    def run(stage, **options):
        defaults = {"model_name_or_path": tiny, "output_dir": str(tmp_path / "out")}
        if stage in ("sft", "reward", "ppo", "rloo", "grpo", "dpo"):
            defaults["max_steps"] = 2
        if stage in ("ppo", "rloo", "grpo", "best_of_n", "evaluation"):
            defaults |= {"reward_adapter": reward_adapter, "max_completion_length": 4, "normalize_scores": False}
        if stage != "sft":
            defaults["sft_adapter"] = sft_adapter
        folder = "baselines" if stage in ("rloo", "grpo", "dpo") else "demo"
        recipe = f"pipeline/recipes/{folder}/{stage}.yaml"
        flags = [word for key, value in {**defaults, **options}.items() for word in (f"--{key}", *_words(value))]
        MODULES[stage].main(*parse(*TYPES[stage], args=["--config", recipe, *flags]))

    return run


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

    def finish(trainer, identity, metrics, **options):
        if stage == "ppo":
            assert backbone_copies(trainer.model) == 1.0
        kept.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        original(trainer, identity, metrics, **options)

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


@pytest.mark.slow
def test_the_reward_model_starts_from_the_sft_policy(run, tiny, sft_adapter, tmp_path, monkeypatch):
    """It trains a copy; the policy's folder stays; and it resumes with the same policy only."""
    started, original = {}, reward.start_from

    def start(model, policy):
        original(model, policy)
        started.update({name: p.clone() for name, p in get_peft_model_state_dict(model).items()})

    monkeypatch.setattr(reward, "start_from", start)
    rows = [row | {"agreement": 0.75} for row in PAIRS]
    options = {
        "dataset_name": write(tmp_path / "pairs.jsonl", rows), "lora_embeddings": False, "start_from_sft": True,
        "use_agreement": True, "label_smoothing": 0.1, "sft_completions": 4, "max_completion_length": 4,
        "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "warmup_steps": 0,
    }  # fmt: skip
    before = weights(sft_adapter)
    run("reward", **options)
    assert before.keys() == started.keys() - {HEAD}
    assert all(torch.equal(started[name], before[name]) for name in before)
    found = weights(tmp_path / "out")
    assert found.keys() == started.keys() and not any(torch.equal(found[name], started[name]) for name in found)
    assert weights(sft_adapter).keys() == before.keys()
    base, tokenizer = load_pretrained(ModelConfig(tiny))
    read_adapter(str(tmp_path / "out"), needs_head=True, base=base, tokenizer=tokenizer)
    other = shutil.copytree(sft_adapter, tmp_path / "other")
    save_file({name: 2 * tensor for name, tensor in before.items()}, other / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="checkpoint-2: written with another backbone, SFT adapter"):
        run("reward", **options, sft_adapter=other, resume_from_checkpoint="auto", max_steps=3)
    moved = shutil.copytree(sft_adapter, tmp_path / "moved")
    run("reward", **options, sft_adapter=moved, resume_from_checkpoint="auto", max_steps=3)


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
    (tmp_path / "evaluation.yaml").write_text(rewards + "policy_adapter: ppo\noutput_dir: out\n")
    ppo.main(*parse(*TYPES["ppo"], args=["--config", "ppo.yaml"]))
    evaluation.main(*parse(*evaluation.OPTIONS, args=["--config", "evaluation.yaml"]))

    log = json.loads(Path("ppo/metrics.json").read_text())["history"]
    report = json.loads(Path("out/report.json").read_text())
    names = ("kind", "brief", "shortness", "length")
    logged = [row | {name: row[f"rewards/{name}/mean"] for name in names} for row in log if "score" in row]
    reported = [report[role]["rewards"] | {"score": report[role]["score"]} for role in ("sft", "policy")]
    assert len(logged) == 2
    for means in logged + reported:
        score = means["kind"] - 2 * means["brief"] + 0.5 * means["shortness"] + 4 * means["length"]
        assert means["score"] == pytest.approx(score, abs=1e-3)
        assert means["kind"] != means["brief"] and means["shortness"] < 0 <= means["length"] <= 1


@pytest.mark.slow
def test_conversations_are_evaluated(run, tiny, sft_adapter, tokenizer, tmp_path):
    chatty = shutil.copytree(tiny, tmp_path / "chatty")
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    tokenizer.save_pretrained(chatty)
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How was *it*?"}]
    rows = write(tmp_path / "rows.jsonl", [{"prompt": asked}] * 2)
    run(
        "evaluation",
        model_name_or_path=chatty,
        policy_adapter=sft_adapter,
        dataset_name=rows,
        pairwise_judge=f"{__name__}.prefers_longer",
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pairwise"].keys() == {"judge", "win_rate", "consistent", "undecided"}
    assert "| system: Be kind.<br>user: How was \\*it\\*? |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [True, False])
def test_what_is_pushed_is_whole_and_holds_no_pickle(scaled, run, sft_adapter, tmp_path, monkeypatch):
    def init(trainer, **kwargs):
        trainer.hub_model_id = "owner/reward"

    pushed = []
    monkeypatch.setattr(Trainer, "init_hf_repo", init)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda *args, **kwargs: pushed.append("too early"))
    monkeypatch.setattr(
        outputs,
        "upload_folder",
        lambda **given: pushed.append((given, {p.name for p in (tmp_path / "out").iterdir()})),
    )
    adapter = {"sft_adapter": sft_adapter if scaled else "", "sft_completions": 4, "max_completion_length": 4}
    run("reward", dataset_name=write(tmp_path / "pairs.jsonl", PAIRS), push_to_hub=True, **adapter)
    ((given, files),) = pushed
    assert given["repo_id"] == "owner/reward" and given["folder_path"] == str(tmp_path / "out")
    assert files >= {"adapter_model.safetensors", "README.md", "backbone.json", "metrics.json"}
    assert ("score_normalization.json" in files) == scaled
    assert "*.bin" in given["ignore_patterns"]


# ------------------------------------------------------------------------------------ baselines
def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rloo", "grpo", "dpo"])
def test_a_baseline_trains_the_policy_alone_and_leaves_a_standard_adapter(
    method, run, tiny, sft_adapter, reward_adapter, tmp_path, monkeypatch
):
    module, kept = online if method in ("rloo", "grpo") else MODULES[method], {}
    original = module.finish_stage

    def finish(trainer, identity, metrics, **options):
        kept["trainer"] = trainer
        assert backbone_copies(trainer.model) == 1.0
        original(trainer, identity, metrics, **options)

    monkeypatch.setattr(module, "finish_stage", finish)
    data = {"dataset_name": write(tmp_path / "pairs.jsonl", PAIRS), "max_pairs": 48} if method == "dpo" else {}
    run(method, logging_steps=1, **data)

    out, backbone, start = tmp_path / "out", kept["trainer"].model, weights(sft_adapter)
    assert {path.name for path in out.iterdir()} >= {"README.md", "metrics.json", "backbone.json", "tokenizer.json"}
    assert not any(path.is_dir() for path in out.iterdir())  # no reference, no reward beside the policy
    assert method in (out / "README.md").read_text().lower()
    read_adapter(str(out), base=backbone.get_base_model())
    trained = weights(out)
    assert trained.keys() == start.keys()
    assert all(not torch.equal(trained[name], start[name]) for name in start)
    backbone.save_role("reference", tmp_path / "reference")
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(tmp_path / "reference").items())
    if method != "dpo":
        backbone.save_role("reward", tmp_path / "reward")
        expected = weights(reward_adapter)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "reward").items())
    base, _ = load_pretrained(ModelConfig(tiny))
    now = {name.replace(".base_layer", ""): p for name, p in backbone.get_base_model().named_parameters()}
    assert all(torch.equal(now[name], parameter) for name, parameter in base.named_parameters())

    metrics = json.loads((out / "metrics.json").read_text())
    # 2 steps are of one update of 64 completions; or of 16 pairs each, 2 completions a pair.
    assert metrics["completions"] == 64
    first = metrics["history"][0]  # policy and reference are still one: log 2, and no KL
    assert first["loss" if method == "dpo" else "kl"] == pytest.approx(0.693147 if method == "dpo" else 0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", ["RLOOTrainer", "GRPOTrainer"])
def test_trl_scores_the_tokens_at_the_positions_they_were_sampled_at(trainer_class, run, monkeypatch):
    """Its logprobs of left-padded prompts are those of `Backbone.logprobs`, which the sampled ones equal."""
    differences = []
    original = getattr(trl, trainer_class)._generate_and_score_completions

    def compare(trainer, inputs):
        rollout = original(trainer, inputs)
        ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
        mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
        chosen, real = rollout["completion_ids"], rollout["completion_mask"].bool()
        assert not rollout["prompt_mask"].all()
        with torch.no_grad():
            theirs = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, chosen.shape[1])[0]
            ours = trainer.model.logprobs("policy", ids, mask, chosen)
        differences.append((theirs - ours)[real].abs().max())
        return rollout

    monkeypatch.setattr(getattr(trl, trainer_class), "_generate_and_score_completions", compare)
    run(trainer_class[:4].lower())
    assert max(differences) < 1e-4


def prefers_longer(prompts, first, second):
    """A pairwise judge of replies: it asks that each is a message."""
    contents = [[text[0]["content"] for text in texts] for texts in (first, second)]
    return [0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(*contents, strict=True)]


@pytest.mark.slow
def test_without_a_judge_reports_show_the_rest(run, sft_adapter, tmp_path):
    options = {"policy_adapter": sft_adapter, "max_prompts": 8}
    run("evaluation", judge="reward_models.rules.sentiment", output_dir=str(tmp_path / "judged"), **options)
    run("evaluation", judge="", output_dir=str(tmp_path / "plain"), **options)
    judged, plain = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("judged", "plain"))
    assert judged.keys() - plain.keys() == {"judge", "judge_gain", "win_rate"}
    assert judged["sft"].keys() - plain["sft"].keys() == {"judge"}
    assert judged["policy"]["score"] == plain["policy"]["score"] and -1 <= judged["policy"]["judge"] <= 1
    text = (tmp_path / "plain" / "report.md").read_text()
    assert "judge" not in text and "KL to the reference" in text and "distinct-2" in text and "## Samples" in text
    run("best_of_n", n=[1, 2], max_prompts=8, judge="", output_dir=str(tmp_path / "best"))
    rows = json.loads((tmp_path / "best" / "best_of_n.json").read_text())["rows"]
    assert all("judge" not in row and "score" in row for row in rows)


@pytest.mark.slow
def test_best_of_n(run, tmp_path):
    run("best_of_n", n=[1, 3], max_prompts=40)
    result = json.loads((tmp_path / "out" / "best_of_n.json").read_text())
    one, three = result["rows"]
    assert (one["n"], three["n"], result["prompts"]) == (1, 3, 40)
    assert one["kl"] == 0 and three["kl"] == pytest.approx(1.098612 - 2 / 3, abs=1e-6)
    assert three["score"] > one["score"]
    assert one["judge_gain"] == {"mean": 0, "low": 0, "high": 0}
    assert three["judge_gain"]["mean"] == pytest.approx(three["judge"] - one["judge"])
    assert one["win_rate"]["low"] <= 0.5 <= one["win_rate"]["high"]
    assert 1 <= one["mean_length"] <= 4
    assert (tmp_path / "out" / "best_of_n.md").read_text().count("\n") == 4
    assert (tmp_path / "out" / "best_of_n.png").read_bytes()[:4] == b"\x89PNG"


def report_of(folder: Path, judge: float, seconds: float) -> None:
    interval = {"mean": judge, "low": judge - 0.1, "high": judge + 0.1}
    policy = {"judge": judge, "kl": 4.0, "distinct_2": 0.5, "score": 1.0}
    report = {"sft": policy, "policy": policy, "judge_gain": interval, "win_rate": interval, "completions": 64}
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({**report, "seconds": {"policy": seconds, "evaluation": 1.0}}))


def test_the_table_of_baselines(tmp_path):
    demo, folder = tmp_path / "demo", tmp_path / "baselines"
    with pytest.raises(FileNotFoundError, match="report.json: no such file. Run `make demo` first"):
        tables.baselines(folder, demo)
    report_of(demo, 0.25, 100.0)
    with pytest.raises(FileNotFoundError, match="rloo/evaluation/report.json: no such file. Run `make baselines`"):
        tables.baselines(folder, demo)
    for number, method in enumerate(("rloo", "grpo", "dpo")):
        report_of(folder / method / "evaluation", 0.5, 200.0 + number)
    rows = [{"n": n, "score": 2.0, "kl": 0.5, "distinct_2": 0.75, "judge": 0.1} for n in (1, 16)]
    (folder / "best_of_n").mkdir()
    (folder / "best_of_n" / "best_of_n.json").write_text(json.dumps({"rows": rows, "seconds": 9.0}))
    tables.baselines(folder, demo)
    table = json.loads((folder / "table.json").read_text())
    assert [row["method"] for row in table] == ["SFT", "PPO", "RLOO", "GRPO", "DPO", "best of 16"]
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[3] == "| PPO | 64 | +0.250 [+0.150, +0.350] | 25.0% [15.0%, 35.0%] | 4.00 | 0.500 | +1.00 | 100 |"
    assert lines[6].startswith("| DPO | 64 |") and lines[6].endswith("| 202 |")
    assert lines[7] == "| best of 16 | 0 | – | – | 0.50 | 0.750 | +2.00 | – |"


def test_the_table_of_ablations(tmp_path):
    for seed, gain in ((0, 0.5), (1, 0.25)):
        folder = tmp_path / "critic=head" / str(seed)
        report_of(folder, gain, 100.0)
        updates = [{"loss/value": number, "approxkl": 0.01 * number} for number in range(1, 9)]
        (folder / "ppo").mkdir()
        (folder / "ppo" / "metrics.json").write_text(json.dumps({"history": [*updates, {"train_runtime": 1.0}]}))
    with pytest.raises(
        FileNotFoundError, match="critic=adapter: the folder has no <seed>/report.json. Run `make ablations`"
    ):
        tables.ablations(tmp_path, "critic=head", "critic=adapter")
    tables.ablations(tmp_path, "critic=head")
    *_, last, _, note = (tmp_path / "table.md").read_text().splitlines()
    assert last == (
        "| `critic=head` | 2 | +0.38 [+0.25, +0.50] | 38% [25%, 50%] | 4.0 [4.0, 4.0] | 0.50 [0.50, 0.50] | "
        "1.50 [1.50, 1.50] | 0.0150 [0.0150, 0.0150] |"
    )
    assert note == tables.ABLATIONS_NOTE
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert [run["seed"] for run in row["runs"]] == [0, 1]
