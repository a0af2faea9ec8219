"""GRPO, a baseline with PPO's backbone, start, reference, prompts and rewards, and no value function.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.grpo --config pipeline/recipes/baselines/grpo.yaml

Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300): the advantage of a completion is its reward
minus the mean of its prompt's group, divided by the group's deviation. The trainer is TRL's, with Spine's checkpoints,
sampling and checks of rewards.
"""

from trl import GRPOConfig, ModelConfig

from pipeline.rl.online import GRPO, train
from pipeline.runs.arguments import DataArguments, OnlineArguments
from pipeline.runs.command_line import parse
from reward_models.functions import RewardArguments


OPTIONS = (DataArguments, OnlineArguments, RewardArguments, ModelConfig, GRPOConfig)


def main(
    data: DataArguments, start: OnlineArguments, rewards: RewardArguments, model: ModelConfig, args: GRPOConfig
) -> None:
    train(GRPO, data, start, rewards, model, args)


if __name__ == "__main__":
    main(*parse(*OPTIONS))
