"""`pipeline.merge`: the plain model is the adapter on its base, loads without peft, and gets a folder of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_adapter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from trl import ModelConfig

from data.json_files import write_json
from data.listing import read_listing
from pipeline import merge
from pipeline.backbone import plain
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.merging import merged_weights
from pipeline.backbone.roles import Backbone
from pipeline.merge import licence_of, main
from reward_models.normalization import Normalization


EMBEDDED = str(ROOT / "data" / "backbone")
TEXTS = ["The film is a quiet triumph.", "It's dull", "One of the best of the year, and long"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    """A random policy adapter on the embedded backbone, with the figures and the card that PPO leaves."""
    folder = Path(make_adapter(EMBEDDED, tmp_path_factory.mktemp("run") / "ppo", head=False, seed=5))
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    history = [
        {"loss": 0.1, "score": 0.5, "kl": 3.25, "rewards/taste/mean": 0.5, "completions/mean_length": 9, "step": 4}
    ]
    rows = {"train": {"source": "films", "rows": 3, "kept": 3, "cut": 0, "dropped": 0, "longest": 7}}
    write_json(folder / "metrics.json", {"history": history, "rows": rows, "seconds": 12.5})
    (folder / "README.md").write_text("---\nlibrary_name: transformers\ntags:\n- trl\n- ppo\n---\n# Card\n")
    return str(folder)


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> str:
    folder = make_adapter(EMBEDDED, tmp_path_factory.mktemp("run") / "reward", head=True, seed=6)
    Normalization(mean=0.5, std=2.0, completions=8).save(folder)
    write_json(Path(folder) / "metrics.json", {"accuracy": 0.875, "ece": 0.02, "pairs": 4000, "seconds": 3.0})
    return folder


@pytest.fixture(scope="module")
def merged(policy, reward, tmp_path_factory) -> dict[str, Path]:
    """The folders of both merged models."""
    folders = {name: tmp_path_factory.mktemp("merged") / name for name in ("policy", "reward")}
    main([policy, str(folders["policy"])])
    main([reward, str(folders["reward"])])
    return folders


def backbone_of(adapter: str, role: str) -> Backbone:
    base, _ = load_pretrained(ModelConfig(EMBEDDED))
    backbone = Backbone(base, read_adapter(adapter, base=base))
    if role == "reward":
        backbone.add_role("reward", read_adapter(adapter, needs_head=True, base=base))
    return backbone.eval()


def token_logprobs(model, batch) -> torch.Tensor:
    """Logprobs of the tokens after the first, with 0 in the place of padding."""
    with torch.no_grad():
        logits = model(**batch).logits.float()[:, :-1].log_softmax(dim=-1)
    logprobs = logits.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return logprobs * batch["attention_mask"][:, 1:]


@pytest.mark.slow
def test_a_merged_policy_has_the_logprobs_of_the_adapter(policy, merged):
    model = AutoModelForCausalLM.from_pretrained(merged["policy"]).eval()
    assert model.dtype == torch.float32 and not any("lora" in name for name in model.state_dict())
    batch = AutoTokenizer.from_pretrained(merged["policy"])(TEXTS, return_tensors="pt", padding=True)
    backbone = backbone_of(policy, "policy")
    ours = token_logprobs(model, batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    theirs = backbone.logprobs("policy", ids, mask, ids[:, 1:]) * mask[:, 1:]
    base = backbone.logprobs(None, ids, mask, ids[:, 1:]) * mask[:, 1:]
    assert (ours - theirs).abs().max() < 1e-5 < 1e-2 < (ours - base).abs().max()


def test_a_merged_reward_model_has_the_scores_of_the_adapter(reward, merged):
    model = AutoModelForSequenceClassification.from_pretrained(merged["reward"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged["reward"])
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        ours = model(**batch).logits.squeeze(-1)
    theirs = backbone_of(reward, "reward").scores(batch["input_ids"], batch["attention_mask"])
    assert (ours - theirs).abs().max() < 1e-5 and ours.std() > 1e-3


def test_a_folder_holds_a_model_and_nothing_of_an_adapter(merged):
    names = {path.name for path in merged["policy"].iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json"}
    assert names == {*wanted, "tokenizer_config.json", "saved_files.json"}
    assert {entry["kind"] for entry in read_listing(merged["policy"]).values()} == {"model"}
    config = json.loads((merged["policy"] / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["dtype"] == "float32"
    generation = GenerationConfig.from_pretrained(merged["policy"])
    assert (generation.eos_token_id, generation.pad_token_id) == (0, 1)
    load_pretrained(ModelConfig(str(merged["policy"])))  # the next run's model_name_or_path


def test_the_card_has_data_figures_licence_and_what_it_was_made_from(merged):
    card = (merged["policy"] / "README.md").read_text()
    head, _, text = card.removeprefix("---\n").partition("---\n")
    assert "license: apache-2.0" in head and "pipeline_tag: text-generation" in head and "- ppo" in head
    for piece in ("`backbone` after PPO", "| train | films | 3 |", "| KL to the reference (nats a sequence) | 3.25 |"):
        assert piece in text
    assert "The rewards were taste." in text and "rank 4, alpha 8" in text and "nats a token (KL)" in text
    card = (merged["reward"] / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "| accuracy on held-out pairs | 87.5% |" in card
    assert "mean 0.500 and the standard deviation 2.000" in card
    for text in (card, (merged["policy"] / "README.md").read_text()):
        assert str(ROOT) not in text  # paths of this machine


def test_the_report_beside_a_run_counts_if_it_is_of_this_run(policy, tmp_path):
    figures = {"score": 1.0, "kl": 2.0, "distinct_2": 0.5}
    report = {"sft": figures, "policy": {**figures, "score": 1.5}, "seconds": {"policy": 12.5}}
    metrics, adapter = {"seconds": 12.5}, tmp_path / "ppo"
    assert merge.report_of(adapter, metrics, None) is None
    write_json(tmp_path / "report.json", report)
    assert merge.report_of(adapter, metrics, None)["policy"]["score"] == 1.5
    assert merge.report_of(adapter, {"seconds": 13.0}, None) is None
    with pytest.raises(
        ValueError, match="reports another run than .*ppo .its policy trained for 12.5 s, this one for 13.0 s"
    ):
        merge.report_of(adapter, {"seconds": 13.0}, str(tmp_path / "report.json"))
    facts = merge.Merged("m", "owner/base", None, "ppo", False, True, None, {})
    card = merge.model_card(facts, metrics, report)
    assert "| reward model score | 1.000 | 1.500 |" in card and "base_model: owner/base" in card and "role" in card


def test_an_adapter_on_tied_embeddings_unties_them(tiny, tmp_path):
    """The head keeps the base's weights, and the embeddings get the adapter's."""
    base, tokenizer = load_pretrained(ModelConfig(tiny))
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["transformer.wte"], init_lora_weights=False)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    expected = token_logprobs(model.eval(), batch)
    main([str(tmp_path / "adapter"), str(tmp_path / "merged")])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert saved.config.tie_word_embeddings is False
    assert (token_logprobs(saved, batch) - expected).abs().max() < 1e-5


def test_weights_are_merged_in_float32_and_rounded_once(tiny, sft_adapter):
    base, _ = load_pretrained(ModelConfig(tiny, dtype="bfloat16"))
    adapter = read_adapter(sft_adapter, base=base)
    before = base.transformer.h[0].mlp.c_fc.weight.clone()
    plain._attach(base, adapter)
    name = "transformer.h.0.mlp.c_fc"
    whole, found = (
        dict(merged_weights(base, "default", "policy", dtype=dtype))[f"{name}.weight"]
        for dtype in (torch.float32, torch.bfloat16)
    )
    a, b = (adapter.weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    scale = adapter.config.lora_alpha / adapter.config.r
    assert torch.equal(whole, before.float() + (b @ a).T * scale)
    assert torch.equal(found, whole.bfloat16())
    assert not torch.equal(found, before + ((b @ a).T * scale).bfloat16())  # an adapter in bfloat16 is rounded before
    assert torch.equal(base.transformer.h[0].mlp.c_fc.base_layer.weight, before)


def test_another_precision_is_that_of_the_files_and_the_config(policy, tmp_path, capsys):
    main([policy, str(tmp_path / "merged"), "--dtype", "bfloat16", "--license", "mit"])
    assert {of.dtype for of in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "license: mit" in (tmp_path / "merged" / "README.md").read_text()
    assert "GPT2LMHeadModel, bfloat16, 1" in capsys.readouterr().out


def test_a_model_that_is_not_the_adapter_is_not_saved(policy, tmp_path, monkeypatch):
    def unmerged(base, *args, **options):
        return [(name.replace(".base_layer", ""), p) for name, p in base.named_parameters() if "lora_" not in name]

    monkeypatch.setattr(plain, "merged_weights", unmerged)
    with pytest.raises(
        ValueError, match="the merged model differs from the adapter on its base by .* It is not saved"
    ):
        main([policy, str(tmp_path / "merged")])
    assert not [path for path in (tmp_path / "merged").iterdir() if path.name != "_run.lock"]


def test_a_merge_replaces_an_earlier_one_and_keeps_what_is_not_its_own(sft_adapter, tmp_path):
    out = tmp_path / "merged"
    main([sft_adapter, str(out)])
    (out / "notes.txt").write_text("mine")
    (out / "README.md").write_text("my own card")
    main([sft_adapter, str(out), "--dtype", "bfloat16"])
    assert (out / "notes.txt").read_text() == "mine" and (out / "README.md.kept-1").read_text() == "my own card"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def somebody_elses(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def no_adapter(policy: Path, out: Path) -> list[str]:
    return [str(policy.parent), str(out)]


def of_quantised_weights(policy: Path, out: Path) -> list[str]:
    copy = Path(shutil.copytree(policy, out.parent / "quantised"))
    identity = json.loads((copy / "backbone.json").read_text())
    write_json(copy / "backbone.json", {**identity, "precision": "4-bit nf4"})
    return [str(copy), str(out)]


REFUSED = {
    "an output folder of somebody else's": (
        lambda policy, out: somebody_elses(out) or [str(policy), str(out)],
        "holds config.json, and no merged model of Spine",
    ),
    "the adapter's own folder": (
        lambda policy, out: [str(policy), str(policy)],
        "the merge reads this folder. Name another one.",
    ),
    "the base's own folder": (
        lambda policy, out: [str(policy), EMBEDDED],
        "the merge reads this folder. Name another one.",
    ),
    "a folder of adapters": (no_adapter, r"no adapter. Name one of .*ppo\."),
    "a base that is gone": (
        lambda policy, out: [str(policy), str(out), "--model_name_or_path", "/nowhere"],
        "there is no such folder. Correct the path.",
    ),
    "another base": (
        lambda policy, out: [str(policy), str(out), "--model_name_or_path", "TINY"],
        "the adapter was trained on another base",
    ),
    "quantised weights": (of_quantised_weights, "trained on 4-bit nf4 weights"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_everything_as_it_is(words, message, policy, tiny, tmp_path):
    given = [tiny if word == "TINY" else word for word in words(Path(policy), tmp_path / "merged")]
    there = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises((ValueError, OSError), match=message):
        main(given)
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "_run.lock"}
    assert left == there


def test_the_hub_gets_the_model_and_nothing_of_spines_own(sft_adapter, tmp_path, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(merge, "create_repo", lambda name, **options: asked.update(made=name, **options))
    monkeypatch.setattr(merge, "upload_folder", lambda **options: asked.update(options) or "https://hub/me/films")
    main([sft_adapter, str(tmp_path / "out"), "--push_to_hub", "me/films", "--private"])
    assert (asked["made"], asked["private"], asked["repo_id"]) == ("me/films", True, "me/films")
    assert asked["folder_path"] == str(tmp_path / "out") and "saved_files.json" in asked["ignore_patterns"]
    assert 'model="me/films"' in (tmp_path / "out" / "README.md").read_text()
    assert "Uploaded: https://hub/me/films" in capsys.readouterr().out


def test_a_repository_that_cannot_be_made_is_said_before_the_model_is_loaded(sft_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "load_with_adapter", pytest.fail)
    with pytest.raises(
        ValueError, match="--push_to_hub me//films: there is no such repository, and it cannot be made"
    ):
        main([sft_adapter, str(tmp_path / "out"), "--push_to_hub", "me//films"])


def test_the_licence_is_that_of_the_bases_card(tmp_path):
    assert licence_of(EMBEDDED) == licence_of("smollm2") == "apache-2.0"
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")  # no YAML
    assert licence_of(str(tmp_path)) is None
