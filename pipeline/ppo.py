"""PPO against the reward: policy, reference, reward and value are adapters on one backbone.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.ppo --config pipeline/recipes/demo/ppo.yaml

Leaves the policy adapter in `output_dir` and the value adapter with its head in `output_dir/value`.
"""

from dataclasses import asdict, dataclass, field

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from trl import ModelConfig

from data.prompts import check_prompt_lengths, load_prompts
from data.texts import load_texts, tokenize_texts
from data.tokens import prepare_tokens
from pipeline.backbone.identity import fingerprint
from pipeline.backbone.loading import context_length
from pipeline.backbone.lora import LoraArguments
from pipeline.backbone.rewards import learned_rewards
from pipeline.backbone.roles import load_backbone
from pipeline.rl.config import PPOConfig
from pipeline.rl.preflight import preflight
from pipeline.rl.sample_table import SampleTable
from pipeline.rl.trainer import PPOTrainer
from pipeline.runs.arguments import DataArguments, PolicyArguments
from pipeline.runs.checkpoints import find_checkpoint
from pipeline.runs.command_line import parse
from pipeline.runs.folders import check_folders
from pipeline.runs.launch import check_launch, check_wrapper
from pipeline.runs.outputs import finish_stage, rows_report
from reward_models.functions import RewardArguments, load_functions


logger = get_logger(__name__)


@dataclass
class RoleArguments(PolicyArguments):
    """Where the policy starts, and what it is not to forget."""

    ptx_dataset_name: str | None = field(
        default=None, metadata={"help": "Texts of the language-model loss (ptx_coef)."}
    )
    ptx_dataset_split: str = field(default="train", metadata={"help": "Split of them (a single file has none)."})
    ptx_max_length: int = field(default=1024, metadata={"help": "Tokens that they are cut at."})


def main(
    data: DataArguments,
    roles: RoleArguments,
    rewards: RewardArguments,
    reach: LoraArguments,
    model: ModelConfig,
    args: PPOConfig,
) -> None:
    check_launch(args, shards=not args.use_vllm)
    if args.use_vllm and model.load_in_4bit:
        raise ValueError(
            "use_vllm=True with load_in_4bit=True is not supported: vLLM is sent weights that the policy is merged into, "
            "and those in 4 bits cannot take it. Leave one of the two unset."
        )
    check_folders(
        args.output_dir,
        model.model_name_or_path,
        policies=(roles.sft_adapter,),
        rewards=rewards.reward_adapter,
        leaves_reward=False,
    )
    rewards.check_weights(args.reward_weights)
    checkpoint = find_checkpoint(args)
    prompts = load_prompts(data.dataset_name, data.dataset_train_split, drop=data.drop_bad_rows)
    functions = load_functions(rewards.reward_funcs, prompts, data.dataset_name)
    torch.manual_seed(args.seed)  # a fresh adapter is drawn here
    backbone, tokenizer = load_backbone(
        model, roles.sft_adapter, reach=reach, trust_remote_code=args.trust_remote_code, pad_token=args.pad_token
    )
    identity, context = fingerprint(backbone.get_base_model()), context_length(backbone)
    counts, fits, drop = {}, (tokenizer, context, args.max_completion_length), data.drop_bad_rows
    prompts, found = check_prompt_lengths(prompts, *fits, data.dataset_name, drop=drop)
    counts["train"] = data.dataset_name, found
    held_out = None
    if args.eval_strategy != "no":
        if data.eval_source is None:
            raise ValueError(
                f"eval_strategy={args.eval_strategy.value!r}: {data.dataset_name} has no held-out prompts; name some in "
                f"eval_dataset_name."
            )
        held_out = load_prompts(data.eval_source, data.dataset_eval_split, drop=data.drop_bad_rows)
        held_out = held_out.select(range(min(args.eval_prompts, len(held_out))))
        held_out, found = check_prompt_lengths(held_out, *fits, data.eval_source, drop=drop)
        counts["held_out"] = data.eval_source, found
    texts = None
    if roles.ptx_dataset_name:
        rows = load_texts(roles.ptx_dataset_name, roles.ptx_dataset_split)
        rows, lengths = prepare_tokens(rows, tokenizer, roles.ptx_dataset_name)
        most = min(roles.ptx_max_length, context)
        counts["texts"] = roles.ptx_dataset_name, lengths.counts(most)
        counts["texts"][1].check(roles.ptx_dataset_name, most, data.min_kept)
        texts = tokenize_texts(rows, tokenizer, most)
    report = rows_report(counts)
    if len(prompts) < args.generation_batch_size:  # TRL samples each prompt once a pass and drops a short last batch
        prompts = prompts.repeat(-(-args.generation_batch_size // len(prompts)))

    learned = learned_rewards(rewards, backbone, tokenizer)
    trainer = PPOTrainer(
        backbone=backbone,
        reward_funcs=learned + functions,
        args=args,
        train_dataset=prompts,
        eval_dataset=held_out,
        processing_class=tokenizer,
        texts=texts,
    )
    if not model.load_in_4bit:  # which was loaded where it is to be
        backbone.to(args.device)  # under FSDP and DeepSpeed Trainer leaves it where it is until training begins
    adapters = {reward.role: folder for reward, folder in zip(learned, rewards.reward_adapter, strict=True)}
    vllm = trainer.vllm_generation if args.use_vllm else None
    with trainer.whole(), trainer.accelerator.autocast():
        checks = preflight(backbone, prompts["prompt"][:], tokenizer, args, adapters, vllm)
    for check in checks:
        if check.result == "warning":
            logger.warning(str(check))
    if args.sample_updates:
        trainer.add_callback(SampleTable(trainer, prompts.select(range(min(args.sample_prompts, len(prompts))))))
    set_seed(args.seed, device_specific=True)  # processes draw different completions
    check_wrapper(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    summary = {"preflight": [asdict(check) for check in checks], **trainer.summary(), "rows": report}
    finish_stage(trainer, identity, summary)
    trainer.end()


if __name__ == "__main__":
    main(*parse(DataArguments, RoleArguments, RewardArguments, LoraArguments, ModelConfig, PPOConfig))
