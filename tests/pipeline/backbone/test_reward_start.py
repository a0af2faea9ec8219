"""`pipeline.backbone.reward_start`: a reward adapter that begins as a policy's adapter, with a head of its own."""

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model, get_peft_model_state_dict
from trl import ModelConfig

from pipeline.backbone.adapter_tensors import HEAD
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.identity import fingerprint, write_identity
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.lora import LoraArguments
from pipeline.backbone.reward_start import reward_config, start_from
from pipeline.backbone.roles import Backbone


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def adapter_on(tiny, folder, **options) -> str:
    """A policy's adapter with random weights, saved by plain peft, with the scale 3."""
    base, _ = load_pretrained(ModelConfig(tiny))
    identity = fingerprint(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, lora_dropout=0.3, init_lora_weights=False, **options)
    torch.manual_seed(5)
    model = get_peft_model(base, config)
    # peft saves the frozen weights of a head that is adapted too.
    model.save_pretrained(folder, save_embedding_layers="lm_head" in options["target_modules"])
    write_identity(folder, base.config, identity)
    return str(folder)


def started(tiny, name, lora=None, **options):
    """A classifier that started from the adapter, and the adapter."""
    torch.manual_seed(0)
    model = ModelConfig(tiny, lora_dropout=0.0, **options)
    base, tokenizer = load_pretrained(model, head=True)
    policy = read_adapter(name, needs_head=False, base=base, tokenizer=tokenizer)
    classifier = get_peft_model(base, reward_config(policy, model, lora or LoraArguments(), base))
    start_from(classifier, policy)
    return classifier, policy


@pytest.mark.slow
@pytest.mark.parametrize(
    "modules",
    [
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "transformer.wte"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h", "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True, "rank_pattern": {"c_attn": 3}},
    ],
    ids=["layers", "embeddings", "the top layer", "the head too"],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_it_starts_as_the_policy_and_loads_everywhere(modules, tiny, tmp_path):
    name = adapter_on(tiny, tmp_path / "sft", **modules)
    classifier, policy = started(tiny, name)
    found = get_peft_model_state_dict(classifier, save_embedding_layers=False)
    expected = {key: of for key, of in policy.weights.items() if ".lora_" in key and "lm_head" not in key}
    assert found.keys() == expected.keys() | {HEAD}
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    torch.manual_seed(0)
    fresh, _ = load_pretrained(ModelConfig(tiny), head=True)
    assert torch.equal(found[HEAD], fresh.score.weight)
    trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert len(trained) == len(found) and all("lora_" in name or "score" in name for name in trained)
    config = classifier.peft_config["default"]
    assert (config.lora_alpha, config.lora_dropout) == (6, 0.0)

    with torch.no_grad():
        scores = classifier.eval()(input_ids=IDS).logits.squeeze(-1)
        assert not torch.allclose(scores, fresh.eval()(input_ids=IDS).logits.squeeze(-1))
        classifier.save_pretrained(tmp_path / "reward", save_embedding_layers=False)
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1).eval()
        loaded.config.pad_token_id = fresh.config.pad_token_id
        torch.testing.assert_close(loaded(input_ids=IDS).logits.squeeze(-1), scores)
        base, _ = load_pretrained(ModelConfig(tiny))
        backbone = Backbone(base, read_adapter(name, needs_head=False, base=base))
        backbone.add_role("reward", read_adapter(str(tmp_path / "reward"), needs_head=True, base=base))
        backbone.eval()
        torch.testing.assert_close(backbone.scores(IDS, torch.ones_like(IDS)), scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "lora", "message"),
    [
        ({"lora_r": 8}, None, "lora_r=8 describes a fresh adapter, but .* was saved with r=2"),
        ({"lora_alpha": 8}, None, "lora_alpha=8 describes a fresh adapter"),
        ({"lora_target_modules": ["c_fc"]}, None, r"lora_target_modules=.* describes a fresh adapter"),
        (
            {"lora_target_modules": ["c_attn"]},
            LoraArguments(lora_embeddings=True),
            "lora_embeddings=True describes a fresh adapter",
        ),
        ({}, LoraArguments(lora_top_layers=1), "lora_top_layers=1 describes a fresh adapter"),
    ],
)
def test_options_of_another_adapter_are_refused(options, lora, message, tiny, tmp_path):
    name = adapter_on(tiny, tmp_path / "sft", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ValueError, match=message):
        started(tiny, name, lora, **options)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_of_the_head_alone_is_no_start(tiny, tmp_path):
    name = adapter_on(tiny, tmp_path / "sft", target_modules=["lm_head"])
    with pytest.raises(ValueError, match="the adapter changes only the language model head.* Leave start_from_sft"):
        started(tiny, name)
