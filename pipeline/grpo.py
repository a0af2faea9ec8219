"""TRL's GRPO on PPO's footing: the same backbone, start, reference, prompts and rewards, and no value function.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.grpo --config pipeline/recipes/baselines/grpo.yaml

Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300): the advantage of a completion is its reward
less the mean of its prompt's group, over the group's deviation. The trainer is TRL's own, with our checkpoints.
"""

from trl import GRPOConfig, GRPOTrainer, ModelConfig

from pipeline.rloo import Online, train
from pipeline.runs.arguments import DataArguments, OnlineArguments
from pipeline.runs.command_line import parse
from reward_models.functions import RewardArguments


class GRPO(Online, GRPOTrainer):
    """TRL's, with our checkpoints, sampling and rewards."""

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images,
        multimodal_fields,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list | None]:
        """Override `_generate_single_turn`: vLLM alone is left to TRL."""
        if self.use_vllm:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        return self._sample(prompt_ids), None


def main(
    data: DataArguments, start: OnlineArguments, rewards: RewardArguments, model: ModelConfig, args: GRPOConfig
) -> None:
    train(GRPO, data, start, rewards, model, args)


if __name__ == "__main__":
    main(*parse(DataArguments, OnlineArguments, RewardArguments, ModelConfig, GRPOConfig))
