"""What is promised of every architecture: logprobs, scores and states are those of the model's own forward, or it is
refused before anything is trained."""

import json
import math
from pathlib import Path

import pytest
import torch
from families import HIDDEN, LAYERS, VOCABULARY, tiny_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from trl import ModelConfig

from data.tokens import check_max_length
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.architecture import (
    LONG,
    SHORT,
    attention,
    check_dropout_is_off,
    check_model,
    head_is_all,
    probe,
    switch_off_dropout,
)
from pipeline.backbone.identity import fingerprint
from pipeline.backbone.loading import context_length, load_pretrained
from pipeline.backbone.lora import LoraArguments, lora_config
from pipeline.backbone.roles import Backbone
from pipeline.backbone.trunk import decoder_layers, trunk_fault


# Families whose forward changes logits after the head, or states before it, with the changes that neutralise that.
AFTER_THE_HEAD = {
    "gemma2": {"final_logit_softcapping": None},
    "cohere": {"logit_scale": 1.0},
    "granite": {"logits_scaling": 1.0},
}
PLAIN = ("gpt2", "llama", "qwen3", "mistral", "gpt_neox", "biogpt", "opt", "bloom", "mpt")


def backbone_of(base: PreTrainedModel, top: int | None = None) -> Backbone:
    """Return a backbone whose policy has learned something, on all layers or the top ones."""
    lora = LoraArguments(lora_top_layers=top or 2)
    model = ModelConfig("", lora_r=2, lora_target_modules="all-linear")
    config = lora_config(model, task_type="CAUSAL_LM", lora=lora if top else None, base=base)
    config.init_lora_weights = False
    backbone = Backbone(base, config)
    backbone.add_value(init="policy")
    return backbone.eval()


def own_logprobs(backbone: Backbone, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logprobs and entropies (1, S - 1) by the model's own forward of a row alone."""
    with backbone.role("policy"):
        every = backbone.get_base_model()(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)
    return every.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1), -(every.exp() * every).sum(dim=-1)


@pytest.mark.parametrize("family", [*AFTER_THE_HEAD, *PLAIN])
@torch.no_grad()
def test_logprobs_are_the_models_own(family, monkeypatch):
    """In pieces, padded at either side, and from the trunk where there is one."""
    monkeypatch.setattr("pipeline.backbone.logprobs.LOGITS", 3 * VOCABULARY)
    base = tiny_model(family)
    assert head_is_all(base) is (family in PLAIN)
    check_model(base, family)
    backbone = backbone_of(base, top=2)
    ids, mask = probe(base)
    for row, real in zip(ids, mask.bool(), strict=True):
        own, entropy = own_logprobs(backbone, row[real].unsqueeze(0))
        backbone.share_trunk()
        for trunk in (None, backbone.trunk(row[None], real[None]) if backbone.trunk_depth else None):
            found = backbone.logprobs_and_entropy("policy", row[None], real[None].long(), row[None, 1:], trunk=trunk)
            for ours, theirs in zip(found, (own, entropy), strict=True):
                torch.testing.assert_close(ours[:, real[1:] & real[:-1]], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", AFTER_THE_HEAD)
def test_what_follows_the_head_has_gradients_of_its_own(family):
    base = tiny_model(family)
    backbone = backbone_of(base)
    ids, mask = probe(base)
    hidden = backbone.hidden_states("policy", ids[:1], mask[:1]).detach().requires_grad_()
    logprobs, _ = backbone._token_logprobs("policy", hidden[:, :-1], ids[:1, 1:], 0.7)
    logprobs.sum().backward()
    found = hidden.grad.clone()
    hidden.grad = None
    every = (backbone._logits(hidden[0, :-1]) / 0.7).log_softmax(dim=-1)
    every.gather(-1, ids[0, 1:].unsqueeze(-1)).sum().backward()
    torch.testing.assert_close(found, hidden.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", AFTER_THE_HEAD)
def test_a_switch_that_does_nothing_leaves_the_head_alone(family):
    assert head_is_all(tiny_model(family, **AFTER_THE_HEAD[family]))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_is_refused(family):
    with pytest.raises(ValueError, match=r"cannot be the backbone. Use a decoder-only language model"):
        check_model(tiny_model(family), family)


class Blind(nn.Module):
    """Let a decoder see no mask, so that padding counts as tokens."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return self.decoder(input_ids=input_ids, **kwargs)


def test_a_model_that_counts_padding_is_refused():
    base = tiny_model("llama")
    base.model = Blind(base.model)
    base.set_input_embeddings = None
    base.get_input_embeddings = lambda: base.model.decoder.embed_tokens
    with pytest.raises(ValueError, match="padding at the left change what it says"):
        check_model(base, "blind")


class Forgetful(nn.Module):
    """Let a decoder lose its cache's first token, as a family does whose mask in generation is not that of a whole text."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if input_ids is not None and input_ids.shape[1] == 1:
            attention_mask = attention_mask.clone()
            attention_mask[:, LONG - SHORT] = 0
        return self.decoder(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


def test_a_model_that_draws_from_other_logits_is_refused():
    base = tiny_model("llama")
    base.model = Forgetful(base.model)
    base.get_input_embeddings = lambda: base.model.decoder.embed_tokens
    with pytest.raises(ValueError, match="draws tokens from other logits .with its cache. than it gives"):
        check_model(base, "forgetful")


@pytest.mark.parametrize(
    ("family", "options", "length"),
    [
        ("gpt2", {}, 64),
        ("mpt", {}, 64),
        ("bloom", {}, math.inf),
        ("bloom", {"seq_length": 2048}, 2048),
        ("mamba", {}, math.inf),
        ("recurrent_gemma", {}, math.inf),
    ],
)
def test_the_context_is_what_the_config_says_or_has_no_bound(family, options, length):
    context = context_length(tiny_model(family, **options))
    assert context == length
    check_max_length(64, context)
    with pytest.raises(ValueError, match="max_length=None allows rows of any length"):
        check_max_length(None, context)


# ------------------------------------------------------------------------------------------ the trunk
@pytest.mark.parametrize("family", ["gemma4_text", "gemma3n_text"])
def test_a_trunk_that_is_not_the_full_pass_is_not_shared(family, caplog):
    backbone = backbone_of(tiny_model(family, num_kv_shared_layers=0), top=2)
    backbone.share_trunk()
    assert backbone.trunk_depth == 0
    assert "layers run in every pass" in caplog.text


def test_a_trunk_that_cannot_be_tried_leaves_the_model_whole():
    """Jamba computes its layers' kinds and refuses to be told them."""
    base = tiny_model("jamba")
    ids, mask = probe(base)
    assert trunk_fault(base, 1, ids, **attention(base, mask)).startswith("AttributeError")
    assert len(decoder_layers(base)[2]) == LAYERS


@pytest.mark.parametrize("family", ["gemma3", "got_ocr2"])
def test_a_tower_with_as_many_layers_is_not_the_decoder(family):
    base = tiny_model(family)
    towers = [part for name, part in base.named_modules() if "vision" in name and isinstance(part, nn.ModuleList)]
    assert any(len(part) == LAYERS for part in towers)
    assert decoder_layers(base)[2] not in towers
    ids, mask = probe(base)
    assert trunk_fault(base, LAYERS - 2, ids, **attention(base, mask)) is None


@pytest.mark.parametrize(
    ("family", "depth", "fault"),
    [
        ("gemma4_unified_text", 2, None),
        ("gemma4_unified_text", 3, "KeyError"),
        ("gemma4_unified_text", 4, "KeyError"),
        ("gemma4_text", 2, "RuntimeError"),  # each layer has an input of its own for each token
        ("gemma3n_text", 2, "IndexError"),
    ],
)
def test_layers_that_reuse_keys_start_from_a_trunk_below_those_alone(family, depth, fault):
    """The upper two of six layers, sliding and full in turn, reuse keys and values of layers 2 and 3."""
    kinds = ["sliding_attention", "full_attention"] * 3
    base = tiny_model(family, num_hidden_layers=6, layer_types=kinds, num_kv_shared_layers=2)
    check_model(base, family)
    ids, mask = probe(base)
    assert str(trunk_fault(base, depth, ids, **attention(base, mask))).split(":")[0] == str(fault)


@torch.no_grad()
def test_embeddings_narrower_than_the_layers_share_a_trunk():
    backbone = backbone_of(tiny_model("opt"), top=2)
    assert backbone.hidden_size == 16 != HIDDEN
    backbone.share_trunk()
    assert backbone.trunk_depth == LAYERS - 2
    ids, mask = probe(backbone.get_base_model())
    assert backbone.values(ids, mask, 4).shape == (3, 4)


# ------------------------------------------------------------------------------------------ dropout
@pytest.mark.parametrize("family", ["opt", "biogpt", "falcon", "llama", "gpt2", "mixtral"])
def test_dropout_of_every_kind_is_switched_off(family):
    model = tiny_model(family)
    with pytest.raises(ValueError, match="disable_dropout=True leaves something random"):
        check_dropout_is_off(model, family)
    switch_off_dropout(model)
    state = torch.get_rng_state()
    check_dropout_is_off(model, family)
    assert torch.equal(torch.get_rng_state(), state) and not model.training


# ------------------------------------------------------------------------------------------ whole or not at all
@pytest.fixture
def saved(tmp_path, tiny):
    """Save a tiny model with the embedded tokenizer; `change` edits its tensors."""

    def save(family="llama", change=lambda tensors: None, **options) -> str:
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        tokenizer.save_pretrained(tmp_path)
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        tiny_model(family, vocab_size=len(tokenizer), **special, **options).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return str(tmp_path)

    return save


LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), r"1 tensors of \w+ are missing from its files \(first: lm_head.weight"),
        (lambda t: t.pop(LAYER), rf"1 tensors of \w+ are missing from its files \(first: {LAYER}"),
        (
            lambda t: t.update({LAYER: t[LAYER][:7].clone()}),
            rf"1 tensors of \w+ in its files differ in shape from config\.json \(first: {LAYER} \(7, 32\), not",
        ),
        (
            lambda t: t.update({LAYER.replace("1", "9"): t[LAYER].clone()}),
            r"1 tensors of \w+ in its files belong to no part of the model \(first: m",
        ),
        (
            lambda t: t.update({"model.adapter.weight": torch.ones(2)}),
            r"1 tensors of \w+ in its files belong to no part of the model \(first: model.a",
        ),
    ],
    ids=["head", "missing", "shape", "layer", "unknown"],
)
@pytest.mark.parametrize("head", [False, True], ids=["language model", "classifier"])
def test_a_model_is_loaded_whole_or_not_at_all(change, message, head, saved):
    folder = saved(change=change, tie_word_embeddings=False)
    if head and "lm_head" in message:  # a reward model needs no head to write with
        assert load_pretrained(ModelConfig(folder), head=True)
        return
    with pytest.raises(ValueError, match=message):
        load_pretrained(ModelConfig(folder), head=head)


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_is_loaded_whatever_its_head(tied, saved):
    folder = saved(tie_word_embeddings=tied)
    assert ("lm_head.weight" in load_file(Path(folder) / "model.safetensors")) is not tied
    language, _ = load_pretrained(ModelConfig(folder))
    classifier, _ = load_pretrained(ModelConfig(folder), head=True)
    trunk, head = fingerprint(language).split("+")
    assert fingerprint(classifier) == trunk
    language.lm_head.weight.data[3] += 1
    assert (fingerprint(language).split("+")[0] == trunk) is not tied
    assert fingerprint(language).split("+")[1] != head


def test_a_head_that_the_config_ties_and_the_files_do_not_is_refused(saved):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    folder = saved(change=change, tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match="config.json ties lm_head.weight to another tensor .* Set tie_word_embeddings"
    ):
        load_pretrained(ModelConfig(folder))


@pytest.mark.parametrize("kind", ["TokenClassification", "QuestionAnswering", "MultipleChoice"])
def test_a_folder_of_another_task_is_no_backbone(kind, saved):
    folder = saved()
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps(config | {"architectures": [f"LlamaFor{kind}"]}))
    for head in (False, True):
        with pytest.raises(ValueError, match=f"holds a classifier .LlamaFor{kind}., which has no language model head"):
            load_pretrained(ModelConfig(folder), head=head)


@pytest.mark.parametrize("lost", ["lm_head.weight", LAYER])
def test_a_tensor_that_no_shard_holds_is_missed(lost, saved):
    folder = Path(saved(tie_word_embeddings=False))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    del tensors[lost]
    names, where = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with pytest.raises(ValueError, match=rf"1 tensors of \w+ are missing from its files \(first: {lost}"):
        load_pretrained(ModelConfig(str(folder)))


def test_a_classifiers_folder_is_no_backbone(saved, tmp_path):
    folder = saved()
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder)
    for head in (False, True):
        with pytest.raises(
            ValueError, match="holds a classifier .LlamaForSequenceClassification., which has no language model head"
        ):
            load_pretrained(ModelConfig(folder), head=head)


@pytest.mark.parametrize("family", ["biogpt", "gpt_neox", "opt"])
def test_no_adapter_of_all_linear_layers_reaches_the_head(family):
    base = tiny_model(family)
    backbone = backbone_of(base, top=2)
    assert not hasattr(base.get_output_embeddings(), "lora_A")
    assert backbone.layers_below_policy() == LAYERS - 2


def test_an_adapter_of_another_head_is_refused_and_an_older_one_read(saved, tmp_path):
    folder = saved(tie_word_embeddings=False)
    base, _ = load_pretrained(ModelConfig(folder))
    backbone = Backbone(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    adapter = tmp_path / "adapter"
    backbone.save_role("policy", adapter)
    other, _ = load_pretrained(ModelConfig(folder))
    assert read_adapter(str(adapter), base=other)
    other.lm_head.weight.data[3] += 1
    with pytest.raises(ValueError, match="trained on another base"):
        read_adapter(str(adapter), base=other)
    record = (adapter / "backbone.json").read_text()
    (adapter / "backbone.json").write_text(record.replace("+" + fingerprint(base).split("+")[1], ""))
    assert read_adapter(str(adapter), base=other)
