import re
from pathlib import Path

import pytest
import torch
from families import tiny_model
from transformers import AutoConfig, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config
from trl import ModelConfig

from pipeline.backbone.architecture import switch_off_dropout
from pipeline.backbone.lora import LoraArguments
from pipeline.backbone.roles import load_backbone
from pipeline.plan import LAYOUTS, Item, PlanArguments, _kept, activations, peak, phases, plan, roles, state, table
from pipeline.rl.config import PPOConfig
from pipeline.runs.arguments import PolicyArguments
from pipeline.runs.command_line import parse
from reward_models.functions import RewardArguments


pytestmark = pytest.mark.slow


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "pipeline" / "recipes"
LINEAR = ["c_attn", "c_proj", "c_fc"]
REWARDS = RewardArguments(reward_adapter=["runs/reward"])


def config(**options) -> PPOConfig:
    settings = {"output_dir": "out", "use_cpu": True, "bf16": False, "per_device_train_batch_size": 2}
    settings |= {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_completion_length": 6}
    return PPOConfig(**{**settings, **options})


def model(tiny: str, **options) -> ModelConfig:
    return ModelConfig(tiny, lora_r=4, lora_target_modules=LINEAR, **options)


def test_state_by_hand(tiny):
    """Two layers of 32 units, r = 4: an adapter has 2 * 4 * (4 + 2 + 5 + 5) * 32 numbers, a head 32."""
    backbone = roles(REWARDS, LoraArguments(), model(tiny), config(), policy="runs/sft")
    bytes_of = {(item.who, item.kind): item.bytes for item in state(backbone)}
    lora, head = 4 * 2 * 4 * 16 * 32, 4 * 32
    vocabulary = AutoConfig.from_pretrained(tiny).vocab_size
    layer = 12 * 32**2 + 13 * 32  # weights and biases of four projections, two norms
    assert bytes_of == {
        ("backbone", "weights"): 4 * (vocabulary * 32 + 128 * 32 + 2 * layer + 2 * 32),
        ("policy", "weights"): lora,
        ("policy", "gradients"): lora,
        ("policy", "optimizer"): 2 * lora,
        ("reference", "weights"): lora,
        ("reward", "weights"): lora + head,
        ("value", "weights"): lora + head,
        ("value", "gradients"): lora + head,
        ("value", "optimizer"): 2 * (lora + head),
    }


def test_a_fresh_policy_and_a_critic_that_is_a_head(tiny):
    fresh = roles(REWARDS, LoraArguments(), model(tiny), config(critic="head"), policy=None)
    bytes_of = {(item.who, item.kind): item.bytes for item in state(fresh)}
    assert ("reference", "weights") not in bytes_of
    assert bytes_of["value", "weights"] == 4 * 32 and bytes_of["value", "optimizer"] == 8 * 32


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("top", [None, 1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_activations_are_what_autograd_keeps(tiny, top, bf16, attention):
    """Planned without weights, measured on the model itself."""
    args, lora, of_recipe = config(), LoraArguments(lora_top_layers=top), model(tiny, attn_implementation=attention)
    planned = roles(REWARDS, lora, of_recipe, args, policy="runs/sft")
    real, _ = load_backbone(of_recipe, None, lora=lora)
    real.add_value(init="policy")
    real.train_only("policy", "value")
    real.share_trunk()
    real.eval()  # dropout is off in PPO
    ids, mask = torch.ones(3, 16, dtype=torch.long), torch.ones(3, 16, dtype=torch.bool)
    mask[0, :2] = False  # as in any batch but a lucky one
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        trunk = real.trunk(ids, mask) if top else None
        with _kept() as sizes:
            passes = [real.hidden_states(role, ids, mask, trunk) for role in ("policy", "value")]
    measured = sum(sizes.values()) + sum(hidden.nbytes for hidden in passes)
    assert activations(planned, 3, 10, 6, bf16=bf16) == pytest.approx(measured, rel=0.01)


def test_layer_norms_keep_float32_under_autocast_on_a_gpu(tiny):
    """A norm's input in float32 instead of bfloat16, in two layers with two norms, the last norm's and its output: 6 times 2
    bytes more for each of 32 units, of 48 tokens and 2 roles."""

    def planned(device: str) -> int:
        backbone = roles(REWARDS, LoraArguments(), model(tiny, dtype="bfloat16"), config(), policy=None)
        return activations(backbone, 3, 10, 6, bf16=True, device=device)

    assert planned("cuda") - planned("cpu") == pytest.approx(
        6 * 2 * 32 * 48 * 2, rel=0.15
    )  # and statistics of each row
    with pytest.raises(ValueError, match="device='tpu' is not one of cuda, cpu"):
        PlanArguments(device="tpu")


def test_the_cache_is_what_sampling_fills(tiny):
    planned = roles(REWARDS, LoraArguments(), model(tiny), config(), policy=None)
    items = {(item.who, item.kind): item.bytes for item in phases(planned, config(), 10)}
    real, _ = load_backbone(model(tiny), None)
    cache = real.get_base_model()(input_ids=torch.ones(8, 16, dtype=torch.long)).past_key_values
    assert items["sampling", "KV cache"] == sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


@pytest.mark.parametrize("family", ["opt", "mpt", "gemma2", "gpt_bigcode", "gemma4_text"])
def test_widths_and_caches_of_other_families(family, tiny, tmp_path):
    """OPT's embeddings are narrower than its layers; MPT names sizes otherwise; Gemma-2's cache has windows, BigCode's one
    head of keys; Gemma-4's upper layers keep none and cannot start from a trunk."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(tmp_path)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    shared = {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    own = shared | {"vocab_size_per_layer_input": len(tokenizer)} if family == "gemma4_text" else {}
    tiny_model(family, vocab_size=len(tokenizer), **special, **own).save_pretrained(tmp_path)
    of_recipe, lora = (
        ModelConfig(str(tmp_path), lora_r=4, lora_target_modules="all-linear"),
        LoraArguments(lora_top_layers=2),
    )
    planned = roles(REWARDS, lora, of_recipe, config(), policy=None)
    items = {(item.who, item.kind): item.bytes for item in phases(planned, config(), 10)}
    real, _ = load_backbone(of_recipe, None, lora=lora)
    real.add_value(init="policy")
    switch_off_dropout(real)
    real.share_trunk()
    ids, mask = torch.ones(8, 16, dtype=torch.long), torch.ones(8, 16, dtype=torch.long)
    mask[0, :2] = 0
    assert planned.trunk_depth == real.trunk_depth
    trunk = real.trunk(ids, mask) if real.trunk_depth else None
    assert items.get(("rollout", "trunk cache")) == (trunk.nbytes if real.trunk_depth else None)
    assert planned.heads["reward"].weight.shape == real.heads["value"].weight.shape
    cache = real.get_base_model()(input_ids=ids, use_cache=True).past_key_values
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert items["sampling", "KV cache"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    real.train_only("policy", "value")
    with _kept() as sizes:
        passes = [
            real.train().hidden_states(role, ids[:2], mask[:2], trunk if trunk is None else trunk[:2])
            for role in ("policy", "value")
        ]
    measured = sum(sizes.values()) + sum(hidden.nbytes for hidden in passes)
    assert items["training", "activations"] == pytest.approx(measured, rel=0.02)


def test_layouts_and_peak(tiny):
    asked = PlanArguments(prompt_tokens=10, processes=4)
    planned = plan(PolicyArguments(), REWARDS, LoraArguments(), model(tiny), config(), asked)
    assert list(planned) == list(LAYOUTS)
    bytes_of = {layout: {(i.who, i.kind): i.bytes for i in items} for layout, items in planned.items()}
    for layout, kinds in (("DDP", ()), ("ZeRO-2", ("gradients", "optimizer")), ("ZeRO-3", ("weights", "optimizer"))):
        for kind in ("weights", "gradients", "optimizer"):
            whole = bytes_of["DDP"]["policy", kind]
            if kind in kinds or layout == "DDP":
                assert bytes_of[layout]["policy", kind] == whole // (4 if kind in kinds else 1)
    assert ("sampling", "gathered weights") in bytes_of["FSDP"].keys() - bytes_of["ZeRO-2"].keys()
    items = [Item("backbone", "weights", 10), Item("sampling", "KV cache", 5), Item("training", "activations", 3)]
    assert peak(items) == 15 and peak([*items, Item("training", "logits", 4)]) == 17
    assert table({"DDP": items}).splitlines()[-1] == "| **peak** |  | **0.00** |"


LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    tie_word_embeddings=False,
)
QWEN_HALF_B = Qwen2Config(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=32_768,
    tie_word_embeddings=True,
)
PUBLISHED = {"gpt2": GPT2Config(), "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25), "llama-8b": LLAMA_8B}
PUBLISHED["qwen2.5-0.5b-chat"] = QWEN_HALF_B


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_what_it_takes(name, tmp_path):
    """The model's config stands in for the hub's."""
    PUBLISHED[name].save_pretrained(tmp_path)
    recipe = RECIPES / name / "ppo.yaml"
    kinds = (PolicyArguments, RewardArguments, LoraArguments, ModelConfig, PPOConfig, PlanArguments)
    given = ["--config", str(recipe), "--model_name_or_path", str(tmp_path), "--use_cpu", "true"]
    text = recipe.read_text()
    stripped = tmp_path / "ppo.yaml"  # the dataset's arguments have no part in the plan
    stripped.write_text("\n".join(line for line in text.splitlines() if not line.startswith(("dataset_", "drop_"))))
    given[1] = str(stripped)
    planned = plan(*parse(*kinds, args=given))
    (said,) = re.findall(r"^# 8 GPUs, ([\d.]+) GB each under DDP with prompts of 512 tokens", text, re.MULTILINE)
    assert f"{peak(planned['DDP']) / 1e9:.1f}" == said
    for said, flags in re.findall(r"^# ([\d.]+) GB with `(.+?)`", text, re.MULTILINE):
        planned = plan(*parse(*kinds, args=[*given, *flags.split()]))
        assert list(planned) == ["DDP", "ZeRO-2"] and f"{peak(planned['DDP']) / 1e9:.1f}" == said
