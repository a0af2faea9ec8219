import asyncio
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import PROMPTS
from datasets import Dataset
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from trl import ModelConfig
from trl.trainer.utils import disable_dropout_in_model

from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.roles import Backbone
from pipeline.backbone.trunk import decoder_layers, first_adapted_layer
from pipeline.evaluation import EvaluationArguments, complete
from reward_models.composite import Composite
from reward_models.rules import get_regex


LINEAR = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
}
LINEAR["gemma2"] = LINEAR["llama"]


def base_model(name: str):
    torch.manual_seed(0)
    special = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=5, n_embd=32, n_head=2, initializer_range=0.2, **special))
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        shape = {"num_hidden_layers": 5, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.2}
        if name == "llama":
            model = LlamaForCausalLM(LlamaConfig(**shape, **heads, **special))
        else:  # every other layer sees two tokens back only
            config = Gemma2Config(
                **shape, **heads, **special, head_dim=8, sliding_window=2, attn_implementation="eager"
            )
            assert config.layer_types[:2] == ["sliding_attention", "full_attention"]
            model = Gemma2ForCausalLM(config)
    return model.requires_grad_(False).eval()


def make(name: str, top: int | None, value: str = "adapter") -> Backbone:
    model = base_model(name)
    pattern = decoder_layers(model)[1]
    layers = {"layers_to_transform": list(range(5))[-top:], "layers_pattern": pattern} if top else {}
    options = {"fan_in_fan_out": name == "gpt2", "init_lora_weights": False, **layers}
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LINEAR[name], **options)
    backbone = Backbone(model, config)
    backbone.add_value(init="policy", critic=value)
    torch.nn.init.normal_(backbone.heads["value"].weight)
    backbone.add_adapter("ref", config)
    backbone.train_only("policy", "value")
    return backbone.eval()


def batch():
    """Two left-padded prompts with right-padded completions of 4 and 2 tokens."""
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 1], [11, 12, 13, 14, 15, 1, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
    return ids, mask, ids[:, -4:], mask[:, -4:].bool()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(("top", "depth"), [(1, 4), (2, 3), (4, 1)])
@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_from_the_trunk_all_is_as_in_full(name, top, depth, critic):
    backbone = make(name, top, critic)
    backbone.share_trunk()
    assert backbone.trunk_depth == depth and not backbone.value_has_trunk
    ids, mask, completion, real = batch()
    trunk = backbone.trunk(ids, mask)
    assert trunk.shape == (2, 8, 32) and not trunk.requires_grad
    for role in ("policy", "reference"):
        full, short = (backbone.logprobs(role, ids, mask, completion, 0.7, t) for t in (None, trunk))
        torch.testing.assert_close(short[real], full[real], atol=1e-5, rtol=0)
    gradients = []
    for states in (None, trunk):
        logprobs, entropy, values = backbone(ids, mask, completion_ids=completion, trunk=states)
        ((logprobs + values.square()) * real).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None})
        backbone.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 2
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, atol=1e-5, rtol=1e-4)


def test_it_runs_the_layers_below_once_and_not_again():
    backbone = make("gpt2", 2)
    backbone.share_trunk()
    ids, mask, completion, _ = batch()
    ran = []
    for i, layer in enumerate(decoder_layers(backbone.get_base_model())[2]):
        layer.register_forward_hook(lambda *args, i=i: ran.append(i))
    trunk = backbone.trunk(ids, mask)
    assert ran == [0, 1, 2]
    ran.clear()
    backbone(ids, mask, completion_ids=completion, trunk=trunk)
    assert ran == [3, 4, 3, 4]  # policy, value


def test_a_model_is_whole_again_afterwards():
    backbone = make("llama", 2)
    backbone.share_trunk()
    ids, mask, completion, real = batch()
    names, before = list(backbone.state_dict()), backbone.logprobs("policy", ids, mask, completion)
    backbone.logprobs("policy", ids, mask, completion, trunk=backbone.trunk(ids, mask))
    with pytest.raises(RuntimeError):
        backbone.logprobs("policy", ids, mask, completion, trunk=torch.zeros(2, 8, 7))
    assert list(backbone.state_dict()) == names
    assert torch.equal(backbone.logprobs("policy", ids, mask, completion), before)


def test_an_adapter_of_all_layers_leaves_no_trunk():
    backbone = make("gpt2", None)
    backbone.share_trunk()
    assert backbone.trunk_depth == 0 and not backbone.value_has_trunk


def test_a_value_that_begins_lower_has_a_trunk_of_its_own():
    """It is frozen there, and from its states all is as in full: values, and gradients of what still trains."""
    backbone = make("gpt2", 2)
    options = {"fan_in_fan_out": True, "init_lora_weights": False}
    deep = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["wte", "c_attn"], **options)
    backbone.delete_adapter("value")
    backbone.add_adapter("value", deep)
    assert first_adapted_layer(backbone.get_base_model(), "value") == 0
    backbone.train_only("policy", "value")
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    backbone.share_trunk()
    assert backbone.trunk_depth == 3 and backbone.value_has_trunk
    frozen = trained - {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert len(frozen) == 2 + 2 * 3  # of the embeddings and three layers
    assert all(".value" in name and (".wte." in name or any(f".h.{i}." in name for i in range(3))) for name in frozen)
    ids, mask, completion, real = batch()
    trunk, own = backbone.trunk(ids, mask), backbone.trunk(ids, mask, "value")
    assert not torch.equal(trunk, own)
    results = []
    for states in ({}, {"trunk": trunk, "value_trunk": own}):
        logprobs, _, values = backbone(ids, mask, completion_ids=completion, **states)
        ((logprobs + values.square()) * real).sum().backward()
        results.append([logprobs[real], values[real], *(p.grad for p in backbone.parameters() if p.grad is not None)])
        backbone.zero_grad()
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("top", [None, 2])
def test_checkpointed_layers_are_computed_again_as_the_role_they_ran_as(name, top):
    """From the trunk and in full: gradients are the same numbers, and the layers have run twice."""
    backbone = make(name, top).train()
    disable_dropout_in_model(backbone)
    backbone.share_trunk()
    ids, mask, completion, real = batch()
    trunk = backbone.trunk(ids, mask) if top else None
    gradients, ran = [], []
    attention = decoder_layers(backbone.get_base_model())[2][-1].get_submodule(
        "attn" if name == "gpt2" else "self_attn"
    )
    attention.register_forward_hook(lambda *args: ran.append(len(gradients)))
    for checkpointing in (False, True):
        if checkpointing:
            backbone.gradient_checkpointing_enable({"use_reentrant": True})  # which TRL sets under ZeRO-3
        logprobs, entropy, values = backbone(ids, mask, completion_ids=completion, trunk=trunk)
        with backbone.role("reference"):  # whatever is active by then
            ((logprobs + values.square()) * real).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None})
        backbone.zero_grad()
    assert ran == [0, 0, 1, 1, 1, 1]
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 2
    assert all(torch.equal(gradients[1][parameter], gradient) for parameter, gradient in gradients[0].items())


@pytest.mark.parametrize("entered", ["outside", "inside"])
def test_checkpointed_layers_cast_again_as_they_did(entered):
    """Under autocast, whether the role became active before it, as in TRL's RLOO and GRPO, or in it, as in PPO.

    The dropout of the adapters shows it: its mask has the type of its input.
    """
    backbone = make("gpt2", None).train()
    disable_dropout_in_model(backbone)
    for layer in backbone.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.lora_dropout["default"] = nn.Dropout(0.5)
    ids, mask, _, _ = batch()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            backbone.gradient_checkpointing_enable()
        torch.manual_seed(0)
        inside = backbone.role("policy") if entered == "inside" else nullcontext()
        with torch.autocast("cpu", torch.bfloat16), inside:
            logits = backbone(input_ids=ids, attention_mask=mask).logits
        logits.float().square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None})
        backbone.zero_grad()
    assert len(gradients[0]) > 2
    assert all(torch.equal(gradients[1][parameter], gradient) for parameter, gradient in gradients[0].items())


def test_a_layer_recomputed_by_its_call_starts_from_the_trunk_again(monkeypatch):
    """As in transformers 5.10, which checkpoints the call of a layer, hooks included, and not its forward alone."""
    backbone = make("gpt2", 2)
    backbone.share_trunk()
    ids, mask, completion, real = batch()
    trunk, gradients = backbone.trunk(ids, mask), []
    for recomputes in (False, True):
        if recomputes:
            monkeypatch.setattr(
                GPT2Block,
                "__call__",
                lambda layer, *args, **kwargs: checkpoint(
                    partial(nn.Module.__call__, layer, **kwargs), *args, use_reentrant=False
                ),
            )
        logprobs = backbone.logprobs("policy", ids, mask, completion, trunk=trunk)
        with backbone.role("policy"):
            (logprobs * real).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None})
        backbone.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 2
    assert all(torch.equal(gradients[1][parameter], gradient) for parameter, gradient in gradients[0].items())


@pytest.mark.parametrize("of_reference", [[1], [0, 1]], ids=["as the policy", "lower"])
def test_evaluation_measures_the_same_from_the_trunk(of_reference, tiny, tokenizer):
    """A reference that begins below the policy runs in full."""

    def config(layers: list[int]) -> LoraConfig:
        options = {"layers_to_transform": layers, "layers_pattern": "h", "init_lora_weights": False}
        return LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **options
        )

    torch.manual_seed(0)
    backbone = Backbone(load_pretrained(ModelConfig(tiny))[0], config([1]))
    backbone.add_adapter("ref", config(of_reference))
    backbone.eval()
    prompts, composite = Dataset.from_dict({"prompt": PROMPTS}), Composite([get_regex("e")])
    args = EvaluationArguments(output_dir="", policy_adapter="", max_completion_length=6, batch_size=4)
    ran, found = [], []
    decoder_layers(backbone.get_base_model())[2][0].register_forward_hook(lambda *of: ran.append(len(found)))
    with asyncio.Runner() as runner:
        for share in (False, True):
            if share:
                backbone.share_trunk()
            found.append(complete("policy", backbone, prompts, tokenizer, composite, None, runner, args))
    full, short = found
    assert backbone.trunk_depth == 1 and full.ids == short.ids
    tried = 2  # `share_trunk` runs it so often to see that a pass can start from there
    assert ran.count(0) - (ran.count(1) - tried) == (4 if of_reference == [1] else 2)  # of two batches
    assert min(map(abs, full.kl)) > 1e-3
    assert short.kl == pytest.approx(full.kl, abs=1e-4) and short.nll == pytest.approx(full.nll, abs=1e-4)
