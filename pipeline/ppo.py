"""PPO, with policy, reference, reward and value as adapters on one backbone.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.ppo --config pipeline/recipes/demo/ppo.yaml

Saves the policy adapter in `output_dir`, and the value adapter with its head in `output_dir/value`.
"""

from dataclasses import asdict

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from datasets import Dataset
from trl import ModelConfig

from data.prompts import check_prompt_lengths, load_prompts
from data.texts import load_texts, tokenize_texts
from data.tokens import Counts
from pipeline.backbone.loading import context_length
from pipeline.backbone.lora import LoraArguments
from pipeline.backbone.rewards import learned_rewards
from pipeline.backbone.roles import load_backbone
from pipeline.rl.config import OF_TOKENS, OPTIONS, PPOConfig
from pipeline.rl.preflight import preflight
from pipeline.rl.sample_table import SampleTable
from pipeline.rl.trainer import PPOTrainer
from pipeline.runs.arguments import DataArguments, PolicyArguments, TextArguments
from pipeline.runs.changed_options import options_of
from pipeline.runs.command_line import parse
from pipeline.runs.launch import check_wrapper
from pipeline.runs.opening import open_run
from pipeline.runs.outputs import finish_stage, rows_report
from pipeline.runs.rows import prepare_rows
from reward_models.composite import load_judge
from reward_models.functions import RewardArguments, load_functions


logger = get_logger(__name__)


def load_held_out(data: DataArguments, args: PPOConfig) -> Dataset | None:
    """Read the first `eval_prompts` prompts for the evaluation during training; None if there is none.

    Raises:
        ValueError: there are no held-out prompts; or an error of `load_prompts`.
    """
    if args.eval_strategy == "no" and not args.eval_on_start:
        return None
    if data.eval_source is None:
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value!r}, eval_on_start={args.eval_on_start} need held-out prompts, and "
            f"{data.dataset_name} has none. Name a dataset of prompts in eval_dataset_name."
        )
    prompts = load_prompts(data.eval_source, data.dataset_eval_split, drop=data.drop_bad_rows)
    return prompts.select(range(min(args.eval_prompts, len(prompts))))


def main(
    data: DataArguments,
    start: PolicyArguments,
    texts: TextArguments,
    rewards: RewardArguments,
    lora: LoraArguments,
    model: ModelConfig,
    args: PPOConfig,
) -> None:
    if args.use_vllm and model.load_in_4bit:
        raise ValueError(
            "use_vllm=True with load_in_4bit=True is not supported: vLLM gets weights with the policy merged in, and it "
            "cannot be merged into 4-bit weights. Leave one of the two unset."
        )
    options = options_of(data, start, texts, rewards, lora, model, args)
    checkpoint = open_run(
        args,
        model,
        options=options,
        policies=(start.sft_adapter,),
        rewards=rewards,
        leaves_reward=False,
        data=(*data.sources, texts.ptx_dataset_name),
        shards=not args.use_vllm,
    )
    prompts = load_prompts(data.dataset_name, data.dataset_train_split, drop=data.drop_bad_rows)
    held_out = load_held_out(data, args)
    functions = load_functions(rewards.reward_funcs, prompts, data.dataset_name)
    judge = load_judge(args.judge, prompts, data.dataset_name)
    torch.manual_seed(args.seed)  # a fresh adapter is drawn here
    backbone, tokenizer = load_backbone(
        model, start.sft_adapter, lora=lora, trust_remote_code=args.trust_remote_code, pad_token=args.pad_token
    )
    context = context_length(backbone)
    limits, drop = (tokenizer, context, args.max_completion_length), data.drop_bad_rows
    counts: dict[str, tuple[str, Counts]] = {}
    prompts, found = check_prompt_lengths(prompts, *limits, data.dataset_name, drop=drop)
    counts["train"] = data.dataset_name, found
    if held_out is not None:
        assert data.eval_source is not None  # `load_held_out` has read it
        held_out, found = check_prompt_lengths(held_out, *limits, data.eval_source, drop=drop)
        counts["held_out"] = data.eval_source, found
    report, ptx_rows = rows_report(counts), None
    if texts.ptx_dataset_name:
        parts = {"texts": (texts.ptx_dataset_name, load_texts(texts.ptx_dataset_name, texts.ptx_dataset_split))}
        most = int(min(texts.ptx_max_length, context))
        rows, of_texts = prepare_rows(parts, tokenizer, data, max_length=most)
        report |= of_texts
        ptx_rows = tokenize_texts(rows["texts"], tokenizer, most)
    if len(prompts) < args.generation_batch_size:  # TRL samples each prompt once a pass, and drops a short last batch
        prompts = prompts.repeat(-(-args.generation_batch_size // len(prompts)))

    learned = learned_rewards(rewards, backbone, tokenizer)
    trainer = PPOTrainer(
        backbone=backbone,
        reward_funcs=learned + functions,
        args=args,
        train_dataset=prompts,
        eval_dataset=held_out,
        processing_class=tokenizer,
        texts=ptx_rows,
    )
    if not model.load_in_4bit:  # a 4-bit model is already on its device
        backbone.to(args.device)  # under FSDP and DeepSpeed Trainer moves it only when training begins
    trainer.check_changes(checkpoint, options)  # before the preflight, which takes long
    adapters = {role: str(folder) for reward in learned for role, folder in reward.adapters.items()}
    vllm = trainer.vllm_generation if args.use_vllm else None
    with trainer.gathered_weights(), trainer.accelerator.autocast():
        checks = preflight(backbone, prompts["prompt"][:], tokenizer, args, adapters, vllm)
    for check in checks:
        if check.result == "warning":
            logger.warning(str(check))
    if args.sample_updates:
        fixed = prompts.select(range(min(args.sample_prompts, len(prompts))))
        trainer.add_callback(SampleTable(trainer, fixed, judge))
    set_seed(args.seed, device_specific=True)  # processes draw different completions
    check_wrapper(trainer)
    told = [asdict(check) for check in checks]
    trainer.train(resume_from_checkpoint=checkpoint, options=options, preflight=told)
    seen = {name: getattr(args, name) for name in OF_TOKENS} | {"normalize_scores": rewards.normalize_scores}
    summary = {"preflight": told, **trainer.summary(), "rows": report, "options": seen}
    finish_stage(trainer, backbone.fingerprint, summary)
    trainer.end()


if __name__ == "__main__":
    main(*parse(*OPTIONS))
