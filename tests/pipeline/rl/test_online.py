"""RLOO and GRPO: completions are drawn by the one sampling path, and reward functions are checked."""

import pytest
import torch
from conftest import PROMPTS
from datasets import Dataset
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer, ModelConfig, RLOOConfig, RLOOTrainer

from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.roles import Backbone
from pipeline.rl.online import GRPO, RLOO
from reward_models.composite import RewardError
from reward_models.rules import get_length


pytestmark = pytest.mark.slow


KINDS = {"rloo": (RLOO, RLOOConfig, RLOOTrainer), "grpo": (GRPO, GRPOConfig, GRPOTrainer)}
# Fields with which chat models are shipped, or that change what is drawn.
FIELDS = {
    "min_new_tokens": 6,
    "suppress_tokens": list(range(2, 400)),
    "begin_suppress_tokens": list(range(2, 400)),
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 5.0,
    "typical_p": 0.1,
    "num_beams": 4,
    "return_dict_in_generate": True,
}
ROWS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]] * 4


@pytest.fixture
def make(tiny, sft_adapter, tokenizer, tmp_path):
    def make(stage, reward_funcs=None, steps=1):
        trainer, config, _ = KINDS[stage]
        base, _ = load_pretrained(ModelConfig(tiny))
        options = {
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 6,
            "max_steps": steps,
        }
        return trainer(
            model=Backbone(base, read_adapter(sft_adapter, base=base)),
            reward_funcs=reward_funcs or [get_length(3)],
            args=config(str(tmp_path), **options, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
        )

    return make


def drawn(trainer, method=None) -> list[list[int]]:
    torch.manual_seed(0)
    method = method or type(trainer)._generate_single_turn
    generations = (2,) if isinstance(trainer, GRPOTrainer) else ()
    found = method(trainer, ROWS, None, {}, *generations)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("stage", KINDS)
def test_without_a_generation_config_completions_are_those_of_trl(stage, make):
    trainer = make(stage)
    assert drawn(trainer) == drawn(trainer, KINDS[stage][2]._generate_single_turn)


@pytest.mark.parametrize("stage", KINDS)
def test_the_models_generation_config_has_no_say(stage, make):
    trainer = make(stage)
    plain, base = drawn(trainer), trainer.model.get_base_model()
    for field, value in FIELDS.items():
        base.generation_config = GenerationConfig(**{field: value}, eos_token_id=trainer.eos_token_ids)
        assert drawn(trainer) == plain, field


@pytest.mark.parametrize("stage", KINDS)
@pytest.mark.parametrize("output", [{0: 1.0}, [float("nan")], [1.0], "text", None], ids=str)
def test_a_reward_function_that_gives_no_rewards_ends_training(stage, output, make):
    def wrong(completions, **kwargs):
        return output

    with pytest.raises(RewardError, match=r"^reward function 'wrong' returned .* Nothing has been trained yet\.$"):
        make(stage, [wrong]).train()


@pytest.mark.parametrize("failure", [KeyError("solution"), SystemExit(0)], ids=repr)
@pytest.mark.parametrize("stage", KINDS)
def test_a_reward_function_that_fails_in_mid_training_leaves_a_checkpoint(stage, failure, make, tmp_path):
    calls = []

    def fails(completions, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise type(failure)(*failure.args)  # the parameter itself would keep the trainer with its traceback
        return list(map(float, range(len(completions))))

    with pytest.raises(
        RewardError, match=r"'fails' raised .* Correct the function and resume from .*checkpoint-2 with"
    ):
        make(stage, [fails], steps=4).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    trainer = make(stage, [fails], steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4 and len(calls) == 5
