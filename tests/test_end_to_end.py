"""Every stage as a user starts it, on a two-layer GPT-2; then each adapter in a fresh interpreter without our code."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trl import ModelConfig

from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.roles import Backbone


ROOT = Path(__file__).parents[1]
PAGES = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
# What README and docs say to type, by stage and recipe. Commands with more options are run in pipeline/test_recipes.py.
COMMANDS = {
    tuple(re.search(r"-m pipeline\.(\w+) --config pipeline/recipes/(\S+)", line).groups()): line
    for line in re.findall(r"^accelerate launch .*pipeline/recipes/\S+\.yaml$", PAGES, re.MULTILINE)
}
BASELINES = ("rloo", "grpo", "dpo")

PLAIN_PEFT = """
import sys, torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import save_file
from transformers import AutoTokenizer
folder, head, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1] if head == "no" else folder.removesuffix("/value"))
batch = tokenizer(["A film of wit", "It's dull", "One of the best of the year"], return_tensors="pt", padding=True)
ids, mask = batch["input_ids"], batch["attention_mask"]
with torch.no_grad():
    if head == "yes":
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
        save_file({"scores": model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)}, out)
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        prompt = ids[:1, :2]
        text = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        save_file({"logits": model(input_ids=ids, attention_mask=mask).logits, "text": text}, out)
assert not {"pipeline", "reward_models", "data"} & set(sys.modules)
"""


def launch(stage, recipe, *options):
    """Run the command that README or docs have for this stage and recipe, with more options."""
    words = COMMANDS[stage, recipe].split()[2:]
    command = [sys.executable, "-m", "accelerate.commands.launch", *words, *map(str, options)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def digest(folder):
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def demo(tiny, tmp_path_factory):
    """Folder of a whole tiny demo, and what each stage printed."""
    out = tmp_path_factory.mktemp("demo")
    base = ["--model_name_or_path", tiny, "--seed", 3]
    short = [*base, "--logging_steps", 1, "--max_steps"]
    before = digest(tiny)
    printed = {
        "sft": launch("sft", "demo/sft.yaml", *short, 2, "--output_dir", out / "sft"),
        "reward": launch("reward", "demo/reward.yaml", *short, 2, "--output_dir", out / "reward",
                         "--sft_adapter", out / "sft", "--max_completion_length", 6),
        "reward_eval": launch("reward_eval", "demo/reward_eval.yaml", *base, "--max_pairs", 400, "--reward_adapter",
                              out / "reward", "--save_temperature", "false", "--output_dir", out / "reward_eval"),
        "ppo": launch("ppo", "demo/ppo.yaml", *short, 8, "--num_iterations", 2, "--max_completion_length", 6,
                      "--min_reward_accuracy", 0, "--output_dir", out / "ppo", "--sft_adapter", out / "sft",
                      "--reward_adapter", out / "reward"),
        "evaluation": launch("evaluation", "demo/evaluation.yaml", *base, "--output_dir", out, "--max_prompts", 64,
                             "--max_completion_length", 6, "--sft_adapter", out / "sft",
                             "--reward_adapter", out / "reward", "--policy_adapter", out / "ppo"),
    }  # fmt: skip
    assert digest(tiny) == before
    return out, printed


@pytest.mark.slow
def test_the_report_holds_what_the_readme_promises(demo):
    out, printed = demo
    report = json.loads((out / "report.json").read_text())
    for policy in ("sft", "policy"):
        assert report[policy].keys() >= {"score", "judge", "kl", "distinct_2", "perplexity", "mean_length"}
    assert report["sft"]["kl"] == 0
    for name in ("judge_gain", "win_rate"):
        assert report[name]["low"] <= report[name]["mean"] <= report[name]["high"]
    assert report["judge_gain"]["mean"] == pytest.approx(report["policy"]["judge"] - report["sft"]["judge"])
    assert report["reward_model"].keys() >= {"accuracy", "human_ceiling", "ece"}
    assert 0.88 < report["reward_model"]["human_ceiling"] < 0.92
    assert report["seed"] == 3
    assert report["seconds"].keys() == {"sft", "reward", "policy", "evaluation"}
    text = (out / "report.md").read_text()
    for picture in re.findall(r"\]\((\S+\.png)\)", text):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG"
    assert text.count(".png)") == 4
    assert len(report["preflight"]) == 13 and "## Before training" in text
    for stage in ("sft", "reward", "ppo", "evaluation"):
        assert re.search(r"\d+%\|", printed[stage].stderr), f"{stage} shows no progress bar"


@pytest.mark.slow
def test_the_evaluation_of_the_reward_model(demo):
    out, printed = demo
    found = json.loads((out / "reward_eval" / "reward_eval.json").read_text())
    assert [one["source"].partition(":")[2] for one in found["datasets"]] == ["", "products", "tweets", "editorials"]
    for one in found["datasets"]:
        assert one["pairs"] == 400 and one["accuracy"]["low"] < one["accuracy"]["mean"] < one["accuracy"]["high"]
    text = (out / "reward_eval" / "reward_eval.md").read_text()
    for picture in re.findall(r"\]\((\S+\.png)\)", text):
        assert (out / "reward_eval" / picture).read_bytes()[:4] == b"\x89PNG"
    assert "reward_eval.md: accuracy 0." in printed["reward_eval"].stdout.splitlines()[-1]


@pytest.mark.slow
def test_every_stage_leaves_standard_artifacts(demo):
    out, _ = demo
    for folder in ("sft", "reward", "ppo"):
        names = {path.name for path in (out / folder).iterdir()}
        assert names >= {
            "adapter_config.json",
            "adapter_model.safetensors",
            "README.md",
            "metrics.json",
            "backbone.json",
        }
        card = (out / folder / "README.md").read_text()
        assert card.startswith("---") and folder.upper() in card.upper()
    assert (out / "ppo" / "value" / "adapter_model.safetensors").exists()
    history = json.loads((out / "ppo" / "metrics.json").read_text())["history"]
    assert history[0]["kl"] == 0 and history[0]["approxkl"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["sft", "ppo", "reward", "ppo/value"])
def test_adapters_load_in_a_fresh_interpreter_without_our_code(demo, tiny, folder, tmp_path):
    out, _ = demo
    head = folder in ("reward", "ppo/value")
    command = [sys.executable, "-c", PLAIN_PEFT, str(out / folder), "yes" if head else "no", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    theirs = load_file(tmp_path / "out")

    base, tokenizer = load_pretrained(ModelConfig(tiny))
    backbone = Backbone(base, read_adapter(str(out / ("sft" if head else folder)), base=base)).eval()
    batch = tokenizer(["A film of wit", "It's dull", "One of the best of the year"], return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        if head:
            backbone.add_role("reward", read_adapter(str(out / folder), needs_head=True, base=base))
            torch.testing.assert_close(backbone.scores(ids, mask), theirs["scores"], atol=1e-5, rtol=0)
            return
        with backbone.role("policy"):
            logits = backbone(input_ids=ids, attention_mask=mask).logits
            prompt = ids[:1, :2]
            text = backbone.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
            )
    real = mask.bool()
    torch.testing.assert_close(logits[real], theirs["logits"][real], atol=1e-5, rtol=0)
    assert text.tolist() == theirs["text"].tolist()


@pytest.mark.slow
def test_baselines_of_the_demo(demo, tiny, tmp_path):
    """As `make baselines` runs them: each is trained and evaluated as PPO was, and stands in one table."""
    out, _ = demo
    common = ["--model_name_or_path", tiny, "--sft_adapter", out / "sft"]
    rewards, short = ["--reward_adapter", out / "reward"], ["--max_completion_length", 6]
    prompts = [*short, "--max_prompts", 32]
    launch("best_of_n", "demo/best_of_n.yaml", *common, *rewards, *prompts, "--n", 1, 2, "--report", out / "report.json",
           "--output_dir", tmp_path / "best_of_n")  # fmt: skip
    for name in BASELINES:
        online = [] if name == "dpo" else [*rewards, *short]
        launch(name, f"baselines/{name}.yaml", *common, *online, "--max_steps", 2, "--output_dir", tmp_path / name)
        launch("evaluation", "demo/evaluation.yaml", *common, *rewards, *prompts, "--policy_adapter", tmp_path / name,
               "--policy_name", name, "--output_dir", tmp_path / name / "evaluation")  # fmt: skip
        text = (tmp_path / name / "evaluation" / "report.md").read_text()
        assert f"| metric | SFT | {name} |" in text and "PPO" not in text
    command = [sys.executable, "-m", "pipeline.tables", "baselines", str(tmp_path), str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    table = {row["method"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    assert list(table) == ["SFT", "PPO", "RLOO", "GRPO", "DPO", "best of 2"]
    # PPO made 8 steps: 2 updates of 2 epochs of 2 minibatches. The others are in their first update, or 16 pairs a step.
    assert [row.get("completions") for row in table.values()] == [None, 128, 64, 64, 64, 0]


def test_no_command_of_readme_and_docs_is_left_out():
    demo = [(stage, f"demo/{stage}.yaml") for stage in ("sft", "reward", "reward_eval", "ppo", "evaluation")]
    baselines = [("best_of_n", "demo/best_of_n.yaml"), *((name, f"baselines/{name}.yaml") for name in BASELINES)]
    # All of these are run in this file.
    assert sorted(COMMANDS) == sorted([*demo, ("ppo", "hello_world/ppo.yaml"), *baselines])


@pytest.mark.slow
def test_hello_world(tmp_path):
    """The rule reward of the hello_world recipe: nearly every completion of "Hello" comes to contain "world"."""
    launch("ppo", "hello_world/ppo.yaml", "--max_steps", 120, "--output_dir", tmp_path)  # of 160, at a constant rate
    base, tokenizer = load_pretrained(ModelConfig(str(ROOT / "data" / "backbone")))
    backbone = Backbone(base, read_adapter(str(tmp_path), base=base)).eval()
    prompt = tokenizer(["Hello"] * 200, return_tensors="pt")
    torch.manual_seed(0)
    sample = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "pad_token_id": tokenizer.pad_token_id}
    with backbone.role("policy"):
        after = tokenizer.batch_decode(backbone.generate(**prompt, **sample), skip_special_tokens=True)
    with backbone.role(None):
        before = tokenizer.batch_decode(backbone.generate(**prompt, **sample), skip_special_tokens=True)
    assert sum("world" in text for text in before) < 20
    assert sum("world" in text for text in after) >= 190
