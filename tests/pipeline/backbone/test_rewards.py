"""`pipeline.backbone.rewards`: a reward adapter on a backbone of its own gives the scores that it gives as a role."""

import json
import shutil

import pytest
import torch
from trl import ModelConfig

from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.rewards import get_reward_adapter, learned_rewards
from pipeline.backbone.roles import Backbone
from reward_models.functions import RewardArguments


PROMPTS, COMPLETIONS = ["The film", "It's a", "One of"], [" is a quiet triumph.", " yawn", " the best films of all"]


def test_scores_are_those_of_the_role(tiny, sft_adapter, reward_adapter):
    base, tokenizer = load_pretrained(ModelConfig(tiny))
    backbone = Backbone(base, read_adapter(sft_adapter, needs_head=False, base=base))
    (role,) = learned_rewards(RewardArguments(reward_adapter=[reward_adapter]), backbone, tokenizer)
    ids = [row + [tokenizer.eos_token_id] for row in tokenizer(COMPLETIONS, add_special_tokens=False)["input_ids"]]
    expected = role(PROMPTS, ids)
    before = torch.get_rng_state()
    for batch_size in (1, 32):
        score = get_reward_adapter(reward_adapter, batch_size=batch_size)
        found = score(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[7]] * 3)
        assert found == pytest.approx(expected, abs=1e-5)
    assert torch.equal(torch.get_rng_state(), before)
    assert max(expected) - min(expected) > 1e-3
    replies = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    assert score(prompts=PROMPTS, completions=replies) == pytest.approx(expected, abs=1e-5)


def test_a_policy_has_no_score(sft_adapter):
    with pytest.raises(ValueError, match="head"):
        get_reward_adapter(sft_adapter)


def test_an_adapter_that_names_no_base(reward_adapter, tmp_path):
    folder = shutil.copytree(reward_adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    (folder / "saved_files.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="model_name_or_path is not set"):
        get_reward_adapter(str(folder))


def test_an_adapter_that_was_trained_with_another_pad_token(reward_adapter, tokenizer, tmp_path):
    folder = shutil.copytree(reward_adapter, tmp_path / "adapter")
    identity = folder / "backbone.json"
    identity.write_text(json.dumps(json.loads(identity.read_text()) | {"pad_token_id": tokenizer.eos_token_id}))
    given = {"prompts": ["The film", "A"], "completions": [" is fine.", " bore."]}
    with pytest.raises(ValueError, match="the adapter was trained with"):
        get_reward_adapter(str(folder))
    assert len(set(get_reward_adapter(str(folder), pad_token=tokenizer.eos_token)(**given))) == 2
