"""The reward model, which predicts which of two completions people prefer.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.reward --config pipeline/recipes/demo/reward.yaml

Trains a LoRA adapter and a score head on the frozen backbone with TRL's RewardTrainer. Pairs of one ranking share a batch,
and each text is scored once. Then measures the reward model on held-out pairs: accuracy, the accuracy that people
reach, accuracy for each rating gap, and calibration.
"""

import math
from dataclasses import dataclass, field

import torch
from trl import ModelConfig, RewardConfig

from data.preferences import explicit_prompts, load_preferences
from data.prompts import check_prompt_lengths
from data.saving import save
from data.tokens import check_max_length
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.identity import fingerprint
from pipeline.backbone.loading import context_length, load_pretrained, train_in_float32
from pipeline.backbone.lora import LoraArguments, lora_config
from pipeline.backbone.rewards import measure
from pipeline.backbone.roles import load_backbone
from pipeline.runs.arguments import DataArguments
from pipeline.runs.changed_options import options_of
from pipeline.runs.checkpoints import Checkpointed
from pipeline.runs.command_line import parse
from pipeline.runs.launch import check_wrapper
from pipeline.runs.opening import open_run
from pipeline.runs.outputs import finish_stage, push
from pipeline.runs.rows import prepare_rows
from reward_models.calibration import reward_model_report
from reward_models.learned import score_rows
from reward_models.normalization import Normalization
from reward_models.ranking import RankingTrainer


@dataclass
class RewardModelArguments:
    """Options of the reward stage that TRL's RewardConfig does not have."""

    use_margin: bool = field(
        default=False,
        metadata={
            "help": "Subtract the `margin` column in the loss (Llama 2). Scores spread, and calibration gets worse."
        },
    )
    sft_adapter: str | None = field(
        default=None,
        metadata={"help": "Policy that PPO starts from: measure mean and deviation of its completions' scores."},
    )
    sft_completions: int = field(default=256, metadata={"help": "Number of completions of sft_adapter."})
    max_completion_length: int = field(default=64, metadata={"help": "Most tokens sampled for each of them."})


class RewardModel(Checkpointed, RankingTrainer):
    """RankingTrainer, with Spine's checkpoints."""


def held_out_report(trainer: RewardModel) -> dict:
    """Measure accuracy and calibration on the trainer's evaluation pairs.

    A text of several pairs is scored once. Processes share the texts.
    """
    rows, model = trainer.eval_dataset, trainer.model_wrapped  # only the wrapper can run a sharded model
    model.eval()

    def score(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with trainer.accelerator.autocast():
            return model(input_ids=ids, attention_mask=mask).logits.float().squeeze(-1)

    chosen, rejected = [list(map(tuple, rows[name])) for name in ("chosen_ids", "rejected_ids")]
    texts = list(dict.fromkeys(chosen + rejected))
    scores = score_rows(
        score,
        [list(text) for text in texts],
        pad_token_id=trainer.processing_class.pad_token_id,
        batch_size=trainer.args.per_device_eval_batch_size,
        device=trainer.accelerator.device,
        share=True,
    )
    score_of = dict(zip(texts, scores, strict=True))
    margins = [score_of[c] - score_of[r] for c, r in zip(chosen, rejected, strict=True)]
    if not all(map(math.isfinite, margins)):
        trainer.diverged = "A score of a held-out text is not finite"
        raise trainer.divergence()
    agreement, gaps = (rows[name] if name in rows.column_names else None for name in ("agreement", "margin"))
    return reward_model_report(margins, agreement=agreement, gaps=gaps)


def normalization_of(
    pairs: RewardModelArguments, model: ModelConfig, args: RewardConfig, prompts: list
) -> Normalization:
    """Measure mean and deviation of the trained adapter's scores on completions of the SFT policy."""
    backbone, tokenizer = load_backbone(
        model, pairs.sft_adapter, trust_remote_code=args.trust_remote_code, pad_token=args.pad_token
    )
    adapter = read_adapter(args.output_dir, needs_head=True, base=backbone.get_base_model(), tokenizer=tokenizer)
    backbone.add_role("reward", adapter)
    backbone.to(args.device).eval()
    return measure(backbone, prompts, tokenizer, seed=args.seed, max_completion_length=pairs.max_completion_length)


OPTIONS = (DataArguments, RewardModelArguments, LoraArguments, ModelConfig, RewardConfig)


def main(
    data: DataArguments, pairs: RewardModelArguments, lora: LoraArguments, model: ModelConfig, args: RewardConfig
) -> None:
    if args.train_sampling_strategy not in ("random", "group_by_length"):
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} is not supported: pairs of a ranking are batched "
            f"together. Set random or group_by_length."
        )
    options = options_of(data, pairs, lora, model, args)
    checkpoint = open_run(
        args, model, options=options, policies=(pairs.sft_adapter,), leaves_reward=True, data=data.sources
    )
    parts = data.load(load_preferences, args)
    source, train = parts["train"]
    if pairs.sft_adapter:  # completions of the prompts will be scored
        train = explicit_prompts(train, source, drop=data.drop_bad_rows)
    if not pairs.use_margin and "margin" in train.column_names:
        train = train.remove_columns("margin")
    parts["train"] = source, train
    torch.manual_seed(args.seed)  # the score head is drawn here
    base, tokenizer = load_pretrained(
        model, head=True, trust_remote_code=args.trust_remote_code, pad_token=args.pad_token
    )
    check_max_length(args.max_length, context_length(base))
    rows, report = prepare_rows(parts, tokenizer, data, max_length=args.max_length, drops=True, row="pair")
    identity = fingerprint(base)
    if pairs.sft_adapter:
        # Refuse an adapter that does not fit before training.
        read_adapter(pairs.sft_adapter, needs_head=False, base=base, tokenizer=tokenizer)
        # Draw at random, since pairs of one ranking follow each other.
        train = rows["train"]
        completed = train.shuffle(seed=args.seed).select(range(min(pairs.sft_completions, len(train))))
        limits = context_length(base), pairs.max_completion_length
        completed, _ = check_prompt_lengths(completed, tokenizer, *limits, source, drop=data.drop_bad_rows)
    trainer = RewardModel(
        model=base,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows.get("held_out"),
        processing_class=tokenizer,
        peft_config=lora_config(model, task_type="SEQ_CLS", lora=lora, base=base),
    )
    if model.load_in_4bit:
        train_in_float32(trainer.model)
    check_wrapper(trainer)
    trainer.train(resume_from_checkpoint=checkpoint, options=options)
    metrics = held_out_report(trainer) if "held_out" in rows else {}
    metrics |= {"rows": report, "history": trainer.state.log_history}
    finish_stage(trainer, identity, metrics, complete=not pairs.sft_adapter)
    accelerator, repository = trainer.accelerator, trainer.hub_model_id
    if pairs.sft_adapter:
        accelerator.free_memory()
        del trainer, base  # the backbone is loaded again, as a language model
        scale = normalization_of(pairs, model, args, completed["prompt"][:])
        if accelerator.is_main_process:
            save(args.output_dir, "adapter", scale.save, adds=True)
            push(args, repository)
    accelerator.end_training()  # as `Trainer.end`


if __name__ == "__main__":
    main(*parse(*OPTIONS))
