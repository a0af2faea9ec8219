r"""Score texts with an ensemble of reward models, and see where its members disagree.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.reward \
        --config pipeline/recipes/demo/reward.yaml --output_dir runs/ensemble --num_members 3 --max_steps 110
    python examples/ensemble.py

The first command trains three adapters in two minutes, from the SFT adapter of `make demo`. All of them run on one backbone.
"""

import sys

from trl import ModelConfig

from pipeline.backbone.rewards import learned_rewards
from pipeline.backbone.roles import load_backbone
from reward_models.functions import RewardArguments


folder, model = sys.argv[1:] or ("runs/ensemble", "data/backbone")
prompt = "The film"
completions = [" is a quiet triumph.", " is a long yawn.", " is not half as bad as they say.", " has a beginning."]

backbone, tokenizer = load_backbone(ModelConfig(model), policy=None)
options = RewardArguments(reward_adapter=[folder], reward_combination="mean_minus_std", normalize_scores=True)
(ensemble,) = learned_rewards(options, backbone.eval(), tokenizer)
tokens = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in completions]
prompts = [prompt] * len(completions)

members = ensemble.member_scores(prompts, tokens)  # (completions, members)
scores = ensemble(prompts, tokens)  # as PPO calls it, with `reward_adapter` and `reward_combination` in its recipe
for text, row, score in zip(completions, members.tolist(), scores, strict=True):
    print(f"{prompt}{text:36} members {' '.join(f'{one:+.2f}' for one in row)}  mean less deviation {score:+.2f}")
