"""A base in 4 bits (QLoRA): bitsandbytes computes on one on CPUs too."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from trl import ModelConfig

from pipeline import evaluation, ppo, reward, sft
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.identity import IDENTITY, fingerprint
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.lora import LoraArguments
from pipeline.backbone.roles import Backbone, load_backbone
from pipeline.plan import in_4_bits, roles, state
from pipeline.rl.config import PPOConfig
from pipeline.runs.command_line import parse
from reward_models.functions import RewardArguments
from tests.backbone_copies import backbone_copies


pytest.importorskip("bitsandbytes")

TYPES = {
    "sft": sft.OPTIONS,
    "reward": reward.OPTIONS,
    "ppo": ppo.OPTIONS,
    "evaluation": evaluation.OPTIONS,
}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request, tokenizer_of_the_default, tmp_path_factory) -> str:
    """A random model of two layers: GPT-2, whose layers are Conv1D and whose head is tied, or Llama."""
    folder, tokenizer = str(tmp_path_factory.mktemp(request.param)), tokenizer_of_the_default
    tokenizer.save_pretrained(folder)
    special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    special |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer), "initializer_range": 0.2}
    torch.manual_seed(0)
    if request.param == "gpt2":
        made = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=128, **special))
    else:
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape |= {"num_key_value_heads": 1, "max_position_embeddings": 128, "tie_word_embeddings": False}
        made = LlamaForCausalLM(LlamaConfig(**shape, **special))
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer_of_the_default():
    return AutoTokenizer.from_pretrained(Path(__file__).parents[3] / "data" / "backbone")


def model(folder: str, **options) -> ModelConfig:
    return ModelConfig(folder, **{"load_in_4bit": True, "lora_target_modules": "all-linear", "lora_r": 4, **options})


def make(folder: str, top: int | None = None) -> Backbone:
    """Policy and value with weights, dropout off."""
    backbone, _ = load_backbone(model(folder), None, lora=LoraArguments(lora_top_layers=top))
    backbone.add_value(init="policy")
    backbone.train_only("policy", "value")
    for parameter in backbone.role_parameters("policy", "value"):
        nn.init.normal_(parameter, std=0.05)
    return backbone.eval()


@pytest.fixture
def batch():
    ids = torch.randint(2, 4000, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    return ids, mask


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft corrects it, and says so
def test_a_policy_is_what_plain_peft_has_on_the_same_base(folder, batch, tmp_path):
    backbone, (ids, mask) = make(folder), batch
    backbone.save_role("policy", tmp_path)
    base, _ = load_pretrained(model(folder))
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
        bare = backbone.logprobs(None, ids, mask, ids[:, 6:])
        ours = backbone.logprobs("policy", ids, mask, ids[:, 6:])
    expected = expected[:, 5:-1].gather(-1, ids[:, 6:, None]).squeeze(-1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert (ours - bare).abs().max() > 1e-2
    # And on the base unquantised, where GPT-2's layers lie the other way round: what is there to be merged.
    AutoPeftModelForCausalLM.from_pretrained(tmp_path).merge_and_unload()


def test_from_the_trunk_all_is_as_in_full(folder, batch):
    backbone, (ids, mask) = make(folder, top=1), batch
    full = backbone(ids, mask, ids[:, 6:])
    sum(x.sum() for x in full).backward()
    gradients = [p.grad.clone() for p in backbone.role_parameters("policy", "value")]
    backbone.zero_grad()
    backbone.share_trunk()
    assert backbone.trunk_depth == 1
    short = backbone(ids, mask, ids[:, 6:], trunk=backbone.trunk(ids, mask))
    sum(x.sum() for x in short).backward()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(short, full, strict=True))
    for ours, theirs in zip(backbone.role_parameters("policy", "value"), gradients, strict=True):
        assert torch.equal(ours.grad, theirs) and theirs.abs().max() > 0


def test_a_pass_without_gradients_leaves_those_of_the_next(folder, batch):
    """On CPUs with bfloat16 products bitsandbytes would have repacked the weights for it, and gradients would end there."""
    backbone, (ids, mask) = make(folder), batch
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with torch.no_grad():
        sampled = backbone.logprobs("policy", ids, mask, ids[:, 6:])
    logprobs = backbone.logprobs("policy", ids, mask, ids[:, 6:])
    torch.testing.assert_close(logprobs, sampled, atol=1e-5, rtol=0)
    logprobs.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in backbone.role_parameters("policy"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.slow
def test_what_is_quantised_and_what_trains(folder):
    backbone, base = make(folder), load_pretrained(model(folder), head=True)[0]
    for head in (base.score, backbone.get_base_model().get_output_embeddings(), *backbone.heads.values()):
        assert type(head) is nn.Linear and head.weight.dtype == torch.float32
    assert base.is_loaded_in_4bit and {p.dtype for p in base.parameters()} == {torch.float32, torch.uint8}
    assert {p.dtype for p in backbone.parameters() if p.requires_grad} == {torch.float32}
    copies = backbone_copies(backbone)
    second, _ = load_pretrained(model(folder))
    assert backbone_copies(backbone) == pytest.approx(copies + 1) and second is not None


def test_an_adapter_fits_the_base_as_it_was_loaded(folder, tmp_path):
    backbone = make(folder)
    backbone.save_role("policy", tmp_path)
    assert json.loads((tmp_path / IDENTITY).read_text())["precision"] == "4-bit nf4"
    head, _ = load_pretrained(model(folder), head=True)
    nested, _ = load_pretrained(model(folder, use_bnb_nested_quant=True))
    assert fingerprint(backbone.get_base_model()) == fingerprint(nested) == backbone.fingerprint
    assert backbone.fingerprint.startswith(fingerprint(head))
    read_adapter(str(tmp_path), base=head)
    for options, precision in (
        ({"load_in_4bit": False}, "not quantised"),
        ({"bnb_4bit_quant_type": "fp4"}, "4-bit fp4"),
    ):
        other, _ = load_pretrained(model(folder, **options))
        with pytest.raises(
            ValueError, match=rf"\(4-bit nf4, .* \({precision}, .* load_in_4bit and bnb_4bit_quant_type"
        ):
            read_adapter(str(tmp_path), base=other)


@pytest.mark.parametrize("nested", [False, True])
def test_the_plan_counts_what_is_held(folder, nested):
    options = model(folder, use_bnb_nested_quant=nested)
    settings = PPOConfig(output_dir="out", use_cpu=True, bf16=False, steps_per_generation=1)
    planned = roles(RewardArguments(reward_adapter=["runs/reward"]), LoraArguments(), options, settings, policy=None)
    whole = next(item.bytes for item in state(planned) if item.who == "backbone")
    base, _ = load_pretrained(options)
    held = {name: tensor.nbytes for name, tensor in base.state_dict().items() if tensor.data_ptr()}
    if base.config.tie_word_embeddings:
        del held["lm_head.weight"]
    # The tables of the codes and the shapes, 1.4 KB a layer's weight, do not grow with it.
    fixed = sum(n for name, n in held.items() if "quant_map" in name or "quant_state" in name)
    saved, largest = in_4_bits(planned, nested=nested)
    assert whole - saved == sum(held.values()) - fixed
    assert largest == 4 * 64 * (256 if "gpt2" in folder else 128)


@pytest.mark.slow
def test_stages_train_on_a_base_that_stays_as_it_is(folder, tmp_path, monkeypatch):
    """From SFT to evaluation, with the layers below the adapters run once a rollout."""
    kept = {}

    def run(stage, **options):
        module = import_module(f"pipeline.{stage}")
        if stage != "evaluation":
            finish = import_module("pipeline.runs.outputs").finish_stage

            def look(trainer, identity, metrics, **options):
                if stage == "ppo":
                    assert backbone_copies(trainer.model) == pytest.approx(1.0)
                kept[stage] = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
                finish(trainer, identity, metrics, **options)

            monkeypatch.setattr(module, "finish_stage", look)
            options |= {"max_steps": 2, "bf16": False, "lora_top_layers": 1, "per_device_train_batch_size": 4}
        if stage != "sft":
            options |= {"sft_adapter": str(tmp_path / "sft"), "max_completion_length": 4}
        options |= {"model_name_or_path": folder, "output_dir": str(tmp_path / stage), "load_in_4bit": True}
        flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        module.main(*parse(*TYPES[stage], args=["--config", f"pipeline/recipes/demo/{stage}.yaml", *flags]))
        return json.loads(
            (tmp_path / stage / ("report.json" if stage == "evaluation" else "metrics.json")).read_text()
        )

    pairs = [{"prompt": "A", "chosen": " fine film.", "rejected": " poor film."} for _ in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run("sft")
    run("reward", dataset_name=str(tmp_path / "pairs.jsonl"), sft_completions=4)
    adapters = {"reward_adapter": str(tmp_path / "reward")}
    run("ppo", **adapters, steps_per_generation=2)
    run("evaluation", **adapters, policy_adapter=str(tmp_path / "ppo"), max_prompts=4)

    base, _ = load_pretrained(model(folder))
    for stage, tensors in kept.items():
        ours = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
            for name, tensor in tensors.items()
            if "lora_" not in name and "score" not in name and "heads" not in name
        }
        expected = base.state_dict()
        if stage == "reward":
            expected.pop("lm_head.weight")
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
        trained = [n for n in tensors if "lora_B" in n and (".default." in n or ".value." in n)]
        assert trained and all(tensors[name].abs().max() > 0 for name in trained)
