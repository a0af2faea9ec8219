"""A real pretrained model in the precision that people use: SmolLM2 in bfloat16 passes the preflight and trains, and planted
faults do not. Random models are too flat to show rounding."""

import pytest
import torch
from datasets import Dataset
from test_preflight import (
    by_name,
    with_a_layer_left_out,
    with_another_sampler,
    with_no_temperature_in_sampling,
    with_no_temperature_in_scoring,
    with_pads_attended,
)
from trl import ModelConfig

from data.pip_files import fetch
from pipeline.backbone.gguf import RELEASE
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.lora import LoraArguments, lora_config
from pipeline.backbone.roles import Backbone
from pipeline.rl.config import PPOConfig
from pipeline.rl.preflight import preflight
from pipeline.rl.trainer import PPOTrainer
from reward_models.rules import sentiment


PROMPTS = [
    *(
        "The film is",
        "A",
        "It's a quiet and thoughtful story about",
        "One of the best",
        "This is not",
        "An",
        "For all its",
    ),
    *(
        "Not",
        "If you",
        "I",
        "There's something about the way that",
        "Too",
        "As a thriller",
        "Even",
        "Here's a",
        "What",
    ),
]


@pytest.fixture(scope="module")
def fetched():
    try:
        fetch(RELEASE)
    except ConnectionError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")


@pytest.fixture
def make_real_trainer(fetched, tmp_path):
    """Makes a PPO trainer of SmolLM2 in bfloat16, whose policy is a random adapter of the top 4 layers."""

    def make(attention: str, **options) -> PPOTrainer:
        model = ModelConfig("smollm2", dtype="bfloat16", attn_implementation=attention, lora_r=8)
        base, tokenizer = load_pretrained(model)
        torch.manual_seed(0)
        lora = LoraArguments(lora_top_layers=4)
        backbone = Backbone(base, lora_config(model, task_type="CAUSAL_LM", lora=lora, base=base))
        backbone.policy_is_bare = False
        with torch.no_grad():
            for name, parameter in backbone.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        settings = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 8,
            "steps_per_generation": 2,
            "num_iterations": 1,
            "max_steps": 2,
            "max_completion_length": 16,
            "temperature": 0.7,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "bf16": True,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        return PPOTrainer(
            backbone=backbone,
            reward_funcs=[sentiment],
            args=PPOConfig(**settings | options),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
        )

    return make


def checked(trainer):
    with trainer.gathered_weights(), trainer.accelerator.autocast():
        return preflight(trainer.model, PROMPTS, trainer.processing_class, trainer.args)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ppo_in_bfloat16(make_real_trainer, attention):
    """The preflight passes, an update starts at a ratio of exactly 1 and a KL of exactly 0, and the policy moves."""
    trainer = make_real_trainer(attention)
    found = by_name(checked(trainer))
    assert {check.result for check in found.values()} == {"passed"}
    assert found["dropout is off"].measured == found["KL is 0 at step 0"].measured == 0
    assert 0 < found["sampled and rescored logprobs agree"].measured < 0.08
    assert found["importance ratios start near 1"].measured < 0.06

    before = [parameter.clone() for parameter in trainer.model.role_parameters("policy")]
    trainer.train()
    first, second = (row for row in trainer.state.log_history if "approxkl" in row)
    assert first["approxkl"] == first["clipfrac/policy"] == first["kl"] == 0 and second["approxkl"] > 0
    assert first["sampling/sampling_logp_difference/mean"] < 0.08
    assert first["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.05)
    after = trainer.model.role_parameters("policy")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_faults_are_refused_in_bfloat16_too(make_real_trainer):
    """In fused attention, whose rounding is the largest."""
    trainer = make_real_trainer("sdpa")
    for spoil, name in (
        (with_pads_attended, "importance ratios start near 1"),
        (with_no_temperature_in_scoring, "importance ratios start near 1"),
        (with_no_temperature_in_sampling, "tokens are drawn from the policy"),
        (with_another_sampler, "importance ratios start near 1"),
        (with_a_layer_left_out, "sampling and scoring run the same adapters"),
    ):
        kept = [(part, dict(vars(part))) for part in (trainer.model, *trainer.model.modules())]
        spoil(trainer)
        with pytest.raises(ValueError, match="^PPO is refused before it starts") as caught:
            checked(trainer)
        assert name in str(caught.value), spoil.__name__
        for part, attributes in kept:
            vars(part).clear()
            vars(part).update(attributes)
