"""TRL's RLOO on PPO's footing: the same backbone, start, reference, prompts and rewards, and no value function.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.rloo --config pipeline/recipes/baselines/rloo.yaml

REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740): the baseline of a completion is the mean reward of
the others to the same prompt. The trainer is TRL's own, with our checkpoints, sampling and checks of rewards.
"""

from collections.abc import Callable

import torch
from accelerate.utils import set_seed
from torch import Tensor
from trl import GRPOConfig, ModelConfig, RLOOConfig, RLOOTrainer
from trl.models import unwrap_model_for_generation

from data.prompts import check_prompt_lengths, load_prompts, tokenize_prompts
from pipeline.backbone.architecture import check_dropout_is_off, switch_off_dropout
from pipeline.backbone.identity import fingerprint
from pipeline.backbone.loading import context_length
from pipeline.backbone.lora import LoraArguments
from pipeline.backbone.rewards import learned_rewards
from pipeline.backbone.roles import backbone_copies, load_backbone
from pipeline.backbone.sampling import sample, sampling_options
from pipeline.runs.arguments import DataArguments, OnlineArguments
from pipeline.runs.checkpoints import Checkpointed, find_checkpoint
from pipeline.runs.command_line import parse
from pipeline.runs.folders import check_folders
from pipeline.runs.launch import check_launch, check_wrapper
from pipeline.runs.outputs import completions_sampled, finish_stage, rows_report
from reward_models.composite import Composite
from reward_models.functions import HIDDEN, PICTURES, RewardArguments, load_functions


class Online(Checkpointed):
    """Put before TRL's RLOO or GRPO trainer of a `Backbone`: completions are sampled, and reward functions are called and
    checked, as in PPO."""

    def __init__(self, reward_funcs: list[Callable], args: RLOOConfig | GRPOConfig, **kwargs):
        self.composite = Composite(reward_funcs, args.reward_weights)
        super().__init__(reward_funcs=self.composite.functions, args=args, **kwargs)

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        """Override `_tokenize_prompts`: a prompt that ends in the assistant's turn is continued, not closed."""
        return tokenize_prompts(prompts, self.processing_class), None, {}

    def _sample(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Sample a completion to each prompt as all of Spine does. TRL's `generate` would take from the model's own
        generation config every field that the trainer leaves unset."""
        checkpointing = {"gradient_checkpointing_kwargs": self.args.gradient_checkpointing_kwargs}
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator, **checkpointing):
            (batch,) = sample(
                self.model,
                "policy",
                prompt_ids,
                self._tokenizer,
                max_completion_length=self.max_completion_length,
                temperature=self.temperature,
                batch_size=len(prompt_ids),
                options=sampling_options(self.args),
            )
        return batch.rows()

    def _calculate_rewards(self, inputs: list[dict], prompts: list, completions: list, completion_ids: list) -> Tensor:
        """Override `_calculate_rewards`: raise on every process what a reward function did wrong on any."""
        columns = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        self.composite.total(columns, prompts, completions, all_scored=False)
        return columns


class RLOO(Online, RLOOTrainer):
    """TRL's, with our checkpoints, sampling and rewards."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], images, multimodal_fields) -> list[list[int]]:
        """Override `_generate_single_turn`: vLLM alone is left to TRL."""
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        return self._sample(prompt_ids)


def train(
    trainer_class: type[Online],
    data: DataArguments,
    start: OnlineArguments,
    rewards: RewardArguments,
    model: ModelConfig,
    args: RLOOConfig | GRPOConfig,
) -> None:
    """Train the policy role of a backbone with one of TRL's online trainers, and leave its adapter."""
    check_launch(args, shards=False)
    if args.chat_template_kwargs:
        raise ValueError(
            f"chat_template_kwargs={args.chat_template_kwargs!r} would not reach the reward model. Leave it unset, or write "
            f"it into the chat template of the model's tokenizer."
        )
    if args.use_transformers_continuous_batching:
        raise ValueError(
            "use_transformers_continuous_batching=True is not supported: it samples by the model's own generation config, "
            "and with bf16 TRL rounds the adapters to bfloat16 for good. Leave it unset."
        )
    check_folders(
        args.output_dir,
        model.model_name_or_path,
        policies=(start.sft_adapter,),
        rewards=rewards.reward_adapter,
        leaves_reward=False,
    )
    rewards.check_weights(args.reward_weights)
    checkpoint = find_checkpoint(args)
    prompts = load_prompts(data.dataset_name, data.dataset_train_split, drop=data.drop_bad_rows)
    functions = load_functions(rewards.reward_funcs, prompts, data.dataset_name)
    prompts = prompts.rename_columns({name: HIDDEN + name for name in PICTURES if name in prompts.column_names})
    torch.manual_seed(args.seed)  # a fresh adapter is drawn here
    backbone, tokenizer = load_backbone(
        model,
        start.sft_adapter,
        reach=LoraArguments(),
        trust_remote_code=args.trust_remote_code,
        pad_token=start.pad_token,
    )
    identity = fingerprint(backbone.get_base_model())
    context = context_length(backbone)
    prompts, found = check_prompt_lengths(
        prompts, tokenizer, context, args.max_completion_length, data.dataset_name, drop=data.drop_bad_rows
    )
    rows = rows_report({"train": (data.dataset_name, found)})
    asked = args.generation_batch_size // args.num_generations
    if len(prompts) < asked:  # TRL samples each prompt once a pass and drops a short last batch
        prompts = prompts.repeat(-(-asked // len(prompts)))

    trainer = trainer_class(
        model=backbone,  # TRL clones its policy adapter as the reference
        reward_funcs=learned_rewards(rewards, backbone, tokenizer) + functions,
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    if args.disable_dropout:
        switch_off_dropout(backbone)
        check_dropout_is_off(backbone.get_base_model(), model.model_name_or_path)
    backbone.train_only("policy")  # adding adapters toggles requires_grad
    set_seed(args.seed, device_specific=True)  # processes draw different completions
    check_wrapper(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    summary = {"backbone_copies": backbone_copies(backbone), "completions": completions_sampled(trainer)}
    finish_stage(trainer, identity, {**summary, "rows": rows, "history": trainer.state.log_history})
    trainer.end()


def main(
    data: DataArguments, start: OnlineArguments, rewards: RewardArguments, model: ModelConfig, args: RLOOConfig
) -> None:
    train(RLOO, data, start, rewards, model, args)


if __name__ == "__main__":
    main(*parse(DataArguments, OnlineArguments, RewardArguments, ModelConfig, RLOOConfig))
