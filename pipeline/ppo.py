"""PPO against the reward: policy, reference, reward and value are adapters on one backbone.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.ppo --config pipeline/recipes/demo/ppo.yaml

Leaves the policy adapter in `output_dir` and the value adapter with its head in `output_dir/value`.
"""

from dataclasses import dataclass, field

import torch
from trl import ModelConfig

from data.prompts import check_prompt_lengths, load_prompts
from pipeline.artifacts import finish_stage
from pipeline.backbone import Backbone, fingerprint, load_pretrained, read_adapter
from pipeline.configs import DataArguments, PPOConfig, lora_config, parse
from pipeline.ppo_trainer import PPOTrainer
from reward_models.composite import RewardArguments, learned_rewards, load_functions


@dataclass
class RoleArguments:
    """Where the policy starts."""

    sft_adapter: str | None = field(
        default=None, metadata={"help": "Adapter the policy starts from and is held to; unset: the bare backbone."}
    )


def main(
    data: DataArguments, roles: RoleArguments, rewards: RewardArguments, model: ModelConfig, args: PPOConfig
) -> None:
    prompts = load_prompts(data.dataset_name, data.dataset_train_split)
    functions = load_functions(rewards.reward_funcs, prompts, data.dataset_name)
    base, tokenizer = load_pretrained(model, trust_remote_code=args.trust_remote_code)
    context = base.config.get_text_config().max_position_embeddings
    check_prompt_lengths(prompts, tokenizer, context, args.max_completion_length, data.dataset_name)
    if len(prompts) < args.generation_batch_size:  # TRL samples each prompt once a pass and drops a short last batch
        prompts = prompts.repeat(-(-args.generation_batch_size // len(prompts)))

    torch.manual_seed(args.seed)  # a fresh adapter is drawn here
    identity = fingerprint(base)
    policy = (
        read_adapter(roles.sft_adapter, base=base) if roles.sft_adapter else lora_config(model, task_type="CAUSAL_LM")
    )
    backbone = Backbone(base, policy)
    trainer = PPOTrainer(
        backbone=backbone,
        reward_funcs=learned_rewards(rewards.reward_adapter, backbone, tokenizer) + functions,
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    finish_stage(trainer, identity, trainer.summary())


if __name__ == "__main__":
    main(*parse(DataArguments, RoleArguments, RewardArguments, ModelConfig, PPOConfig))
