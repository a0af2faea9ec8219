"""RLOO, a baseline with PPO's backbone, start, reference, prompts and rewards, and no value function.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.rloo --config pipeline/recipes/baselines/rloo.yaml

REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740): the baseline of a completion is the mean reward of
the other completions of the same prompt. The trainer is TRL's, with Spine's checkpoints, sampling and checks of rewards.
"""

from trl import ModelConfig, RLOOConfig

from pipeline.rl.online import RLOO, train
from pipeline.runs.arguments import DataArguments, OnlineArguments
from pipeline.runs.command_line import parse
from reward_models.functions import RewardArguments


OPTIONS = (DataArguments, OnlineArguments, RewardArguments, ModelConfig, RLOOConfig)


def main(
    data: DataArguments, start: OnlineArguments, rewards: RewardArguments, model: ModelConfig, args: RLOOConfig
) -> None:
    train(RLOO, data, start, rewards, model, args)


if __name__ == "__main__":
    main(*parse(*OPTIONS))
