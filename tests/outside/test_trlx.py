"""Facts from the tests of CarperAI/trlx (README.md names them) as inputs for ours."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig

from data.texts import tokenize_texts
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.roles import Backbone
from pipeline.rl.config import PPOConfig
from pipeline.rl.kl import adapted_kl_coef
from pipeline.rl.masking import masked_sums, whiten
from reward_models.composite import Composite
from tests.outside.pieces import minibatches


STREAM = [
    torch.arange(100.0),
    torch.ones(100),
    torch.arange(10.0).exp(),
    torch.tensor([-10.0, -1.0, 0.0, 1.0, 10.0]),
]


def test_moments_of_a_stream_are_those_of_the_whole():
    """Theirs divide by n - 1, ours by n."""
    parts = [masked_sums(x.unsqueeze(0), torch.ones(1, len(x), dtype=torch.bool)) for x in STREAM]
    count, total, squares = sum(parts)
    whole = torch.cat(STREAM).double()
    assert count == len(whole) == 215
    mean, variance = total / count, squares / count - (total / count).square()
    assert mean.item() == pytest.approx(whole.mean().item(), rel=1e-6)
    unbiased = (variance * count / (count - 1)).sqrt()
    assert unbiased.item() == pytest.approx(whole.std().item(), rel=1e-6)
    for part in STREAM:  # each as it is whitened, with the moments of all
        row, mask = part.unsqueeze(0), torch.ones(1, len(part), dtype=torch.bool)
        expected = (part.double() - whole.mean()) / whole.std(correction=0)
        torch.testing.assert_close(whiten(row, mask, sum(parts))[0].double(), expected, atol=1e-5, rtol=1e-5)


# Theirs are made by hypothesis: lists of any texts, joined by a space. These are some that it finds.
TEXTS = ["", "0", " ", "0 0", "  ", "\n 0", "é ü", "𐀀 \U0001f600", "\x00", "a\x85b \u2028", "漢字 かな", "0" * 40]


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("max_length", [2, 5, 16, 512])
@pytest.mark.parametrize("prompt", [None, "", "0 "])
def test_a_text_ends_and_is_cut_at_the_right(text, max_length, prompt, tokenizer):
    row = {"text": text} if prompt is None else {"prompt": prompt, "completion": text}
    (ids,) = tokenize_texts(Dataset.from_list([row]), tokenizer, max_length)
    whole = [*tokenizer((prompt or "") + text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert ids == whole[:max_length] and len(ids) <= max_length
    assert tokenizer.decode(whole[:-1]) == (prompt or "") + text


def test_every_row_is_in_one_minibatch():
    """32 rows, 8 at a time, in minibatches of 4; their fields stay together."""
    numbers = torch.arange(32.0).unsqueeze(1).expand(32, 3)
    found = minibatches(torch.ones(32, 3).bool(), pieces=8, logprobs=numbers, values=numbers + 100)
    assert [len(batch.logprobs) for batch in found] == [4] * 8
    assert torch.cat([batch.logprobs for batch in found]).tolist() == numbers.tolist()
    assert all(torch.equal(batch.values, batch.logprobs + 100) for batch in found)


def test_minibatches_of_3_of_8_are_refused():
    """Theirs makes a last one of 2 rows."""
    with pytest.raises(ValueError, match=r"generation_batch_size \(8\) must be divisible by .* \(3\)"):
        PPOConfig("x", use_cpu=True, bf16=False, generation_batch_size=8, per_device_train_batch_size=3)


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (60.0, 1 + 0.2 * 128 / 10_000), (0.0, 1 - 0.2 * 128 / 10_000)])
def test_the_controller_of_their_recipe(kl, factor):
    found = adapted_kl_coef(0.05, kl, target=6.0, horizon=10_000, batch_size=128)
    assert found == pytest.approx(0.05 * factor, rel=1e-12)


def test_a_reward_may_be_a_count():
    composite = Composite([lambda completions, **kwargs: [text.count("dog") for text in completions]])
    completions = [" dog and the dog", " cat", " dog"]
    (function,) = composite.functions
    gave = function(prompts=["The"] * 3, completions=completions)
    assert gave == [2.0, 0.0, 1.0] and all(isinstance(reward, float) for reward in gave)


# ------------------------------------------------------------------------------------------------ models
SHAPE = {"vocab_size": 30, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3}
BLOCKS = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
MODELS = {
    "gpt2": GPT2Config(n_embd=16, n_layer=4, n_head=2, n_positions=32, **SHAPE),
    "pythia": GPTNeoXConfig(**BLOCKS, intermediate_size=32, max_position_embeddings=32, **SHAPE),
    "opt": OPTConfig(**BLOCKS, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16, **SHAPE),
}
MODULES = {"gpt2": "c_attn", "pythia": "query_key_value", "opt": "q_proj"}


def fresh(name: str) -> Backbone:
    """A random model, whose top two layers have a fresh adapter."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    layers = {"layers_to_transform": [2, 3], "layers_pattern": "h" if name == "gpt2" else "layers"}
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=[MODULES[name]], fan_in_fan_out=name == "gpt2", **layers)
    return Backbone(base, lora).eval()


IDS = torch.tensor([[0, 5, 17, 8], [0, 0, 3, 29]])  # padded at the left
ATTEND = (IDS != 0).long()


@pytest.mark.parametrize("name", MODELS)
def test_an_untrained_policy_is_its_reference_to_the_bit(name):
    """With two layers unfrozen, from the shared states below them as in full."""
    backbone = fresh(name)
    backbone.share_trunk()
    assert backbone.trunk_depth == 2
    with torch.no_grad():
        trunk = backbone.trunk(IDS, ATTEND)
        policy, reference = (
            backbone.logprobs_and_entropy(role, IDS, ATTEND, IDS[:, 1:], 1.0, trunk) for role in ("policy", None)
        )
        states = [backbone.hidden_states(role, IDS, ATTEND, trunk) for role in ("policy", None)]
    assert all(torch.equal(a, b) for a, b in zip(policy, reference, strict=True))
    assert torch.equal(*states) and states[0].std() > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_what_is_below_the_policy_is_frozen(name):
    backbone = fresh(name)
    backbone.add_value()
    backbone.train_only("policy", "value")
    trained = [key for key, parameter in backbone.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in key or key == "heads.value.weight" for key in trained)
    assert not any(f".{layer}." in key for key in trained for layer in (0, 1))


def test_a_large_number_in_the_value_head_is_saved_as_it_is(tmp_path):
    backbone = fresh("gpt2")
    backbone.add_value()
    backbone.heads["value"].weight.data[0, 3] = 6000053.33
    backbone.save_role("value", tmp_path)
    adapter = read_adapter(str(tmp_path), needs_head=True)
    assert adapter.head[0, 3].item() == torch.tensor(6000053.33).item() == 6000053.5  # the nearest float32
    assert torch.equal(adapter.head, backbone.heads["value"].weight)


def test_a_vocabulary_of_two():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=2, n_embd=8, n_layer=1, n_head=2, n_positions=8, eos_token_id=None, initializer_range=1.0
    )
    base = AutoModelForCausalLM.from_config(config).eval()
    backbone = Backbone(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    ids = torch.tensor([[0, 1, 0], [0, 1, 1]])
    with torch.no_grad():
        logprobs, entropy = backbone.logprobs_and_entropy("policy", ids, torch.ones_like(ids), ids[:, 1:])
    p, q = logprobs[:, 1].exp().tolist()
    assert p + q == pytest.approx(1, abs=1e-6) and abs(p - q) > 0.01
    assert entropy[:, 1].tolist() == pytest.approx(
        [-(p * logprobs[0, 1].item() + q * logprobs[1, 1].item())] * 2, abs=1e-6
    )
