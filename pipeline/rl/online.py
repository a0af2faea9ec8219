"""Run the online trainers of TRL on a `Backbone`: all sample completions, call rewards and check rewards in the same way.

PPO builds on `Online` (`pipeline.rl.trainer`). RLOO and GRPO are TRL's trainers with `Online` before them.
"""

from collections.abc import Callable

import torch
from accelerate.utils import set_seed
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, ModelConfig, RLOOConfig, RLOOTrainer
from trl.models import unwrap_model_for_generation

from data.prompts import check_prompt_lengths, load_prompts, tokenize_prompts
from pipeline.backbone.architecture import without_dropout
from pipeline.backbone.loading import context_length
from pipeline.backbone.lora import LoraArguments
from pipeline.backbone.rewards import learned_rewards
from pipeline.backbone.roles import load_backbone
from pipeline.backbone.sampling import Sample, sample, sampling_options
from pipeline.runs.arguments import DataArguments, OnlineArguments
from pipeline.runs.changed_options import options_of
from pipeline.runs.checkpoints import Checkpointed
from pipeline.runs.launch import check_wrapper
from pipeline.runs.opening import open_run
from pipeline.runs.outputs import completions_sampled, finish_stage, rows_report
from pipeline.runs.trainer_options import check_router_loss
from reward_models.composite import Composite, undisturbed
from reward_models.functions import HIDDEN, PICTURES, RewardArguments, load_functions


class Online(Checkpointed):
    """Mixin for TRL's RLOO or GRPO trainer of a `Backbone`: sample and score as everywhere in Spine."""

    scores_every_row = False  # RLOO and GRPO leave a row without a score out of the baseline

    def __init__(self, reward_funcs: list[Callable], args: RLOOConfig | GRPOConfig, **kwargs):
        self.composite = Composite(reward_funcs, args.reward_weights)
        super().__init__(reward_funcs=self.composite.functions, args=args, **kwargs)

    @property
    def between_updates(self) -> bool:
        """Override `between_updates`: an update takes several steps, and its rollout belongs to these processes."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) == 0

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        """Override `_tokenize_prompts`: continue a prompt that ends in the assistant's turn, instead of closing the turn."""
        return tokenize_prompts(prompts, self.processing_class), None, {}

    def sample(self, prompt_ids: list[list[int]], *, keep_logprobs: bool = False) -> Sample:
        """Sample a completion for each prompt.

        This replaces TRL's call of `generate`, which takes every field that the trainer leaves unset from the model's own
        generation config.
        """
        (batch,) = sample(
            self.model,
            "policy",
            prompt_ids,
            self._tokenizer,
            max_completion_length=self.max_completion_length,
            temperature=self.temperature,
            batch_size=len(prompt_ids),
            options=sampling_options(self.args),
            keep_logprobs=keep_logprobs,
        )
        return batch

    def _sampled_rows(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Return the tokens of `sample`, from a model that may be wrapped."""
        checkpointing = {"gradient_checkpointing_kwargs": self.args.gradient_checkpointing_kwargs}
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator, **checkpointing):
            return self.sample(prompt_ids).rows()

    def _calculate_rewards(self, inputs: list[dict], prompts: list, completions: list, completion_ids: list) -> Tensor:
        """Override `_calculate_rewards`: raise the error of a reward function on every process, also if only one has it."""
        with undisturbed():
            columns = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        self.composite.total(columns, prompts, completions, all_scored=self.scores_every_row)
        return columns


class RLOO(Online, RLOOTrainer):
    """RLOO as TRL trains it, with Spine's checkpoints, sampling and rewards."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], images, multimodal_fields) -> list[list[int]]:
        """Override `_generate_single_turn`: sample with `sample`, and leave only vLLM to TRL."""
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        return self._sampled_rows(prompt_ids)


class GRPO(Online, GRPOTrainer):
    """GRPO as TRL trains it, with Spine's checkpoints, sampling and rewards."""

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images,
        multimodal_fields,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list | None]:
        """Override `_generate_single_turn`: sample with `sample`, and leave only vLLM to TRL."""
        if self.use_vllm:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        return self._sampled_rows(prompt_ids), None


def train(
    trainer_class: type[RLOO] | type[GRPO],
    data: DataArguments,
    start: OnlineArguments,
    rewards: RewardArguments,
    model: ModelConfig,
    args: RLOOConfig | GRPOConfig,
) -> None:
    """Train the policy role of a backbone with RLOO or GRPO, and save its adapter."""
    if args.chat_template_kwargs:
        raise ValueError(
            f"chat_template_kwargs={args.chat_template_kwargs!r} would not reach the reward model. Leave it unset, or set "
            f"it in the chat template of the model's tokenizer."
        )
    if args.use_transformers_continuous_batching:
        raise ValueError(
            "use_transformers_continuous_batching=True (once use_transformers_paged) is not supported. It samples with the "
            "model's own generation config, and with bf16 TRL rounds the adapters to bfloat16 permanently. Leave it unset."
        )
    options = options_of(data, start, rewards, model, args)
    checkpoint = open_run(
        args,
        model,
        options=options,
        policies=(start.sft_adapter,),
        rewards=rewards,
        leaves_reward=False,
        data=data.sources,
        shards=False,
    )
    prompts = load_prompts(data.dataset_name, data.dataset_train_split, drop=data.drop_bad_rows)
    functions = load_functions(rewards.reward_funcs, prompts, data.dataset_name)
    prompts = prompts.rename_columns({name: HIDDEN + name for name in PICTURES if name in prompts.column_names})
    torch.manual_seed(args.seed)  # a fresh adapter is drawn here
    backbone, tokenizer = load_backbone(
        model,
        start.sft_adapter,
        lora=LoraArguments(),
        trust_remote_code=args.trust_remote_code,
        pad_token=start.pad_token,
    )
    check_router_loss(args, backbone.get_base_model().config)
    prompts, found = check_prompt_lengths(
        prompts,
        tokenizer,
        context_length(backbone),
        args.max_completion_length,
        data.dataset_name,
        drop=data.drop_bad_rows,
    )
    rows = rows_report({"train": (data.dataset_name, found)})
    asked = args.generation_batch_size // args.num_generations
    if len(prompts) < asked:  # TRL samples each prompt once a pass, and drops a short last batch
        prompts = prompts.repeat(-(-asked // len(prompts)))

    trainer = trainer_class(
        model=backbone,  # TRL clones its policy adapter as the reference
        reward_funcs=learned_rewards(rewards, backbone, tokenizer) + functions,
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    if args.disable_dropout:
        without_dropout(backbone.get_base_model(), model.model_name_or_path)
    backbone.train_only("policy")  # adding adapters changes requires_grad
    set_seed(args.seed, device_specific=True)  # processes draw different completions
    check_wrapper(trainer)
    trainer.train(resume_from_checkpoint=checkpoint, options=options)
    summary = {"completions": completions_sampled(trainer), "rows": rows, "history": trainer.state.log_history}
    finish_stage(trainer, backbone.fingerprint, summary)
    trainer.end()
