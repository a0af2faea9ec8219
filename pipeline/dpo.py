"""DPO, a baseline with PPO's backbone, start, reference and preference pairs, and no reward model.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.dpo --config pipeline/recipes/baselines/dpo.yaml

Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) learns directly from people's labels and
samples nothing. The trainer is TRL's, with Spine's checkpoints.
"""

from dataclasses import dataclass, field

import torch
from transformers import set_seed
from trl import DPOConfig, DPOTrainer, ModelConfig

from data.preferences import explicit_prompts, load_preferences
from data.tokens import check_max_length
from pipeline.backbone.architecture import without_dropout
from pipeline.backbone.loading import context_length
from pipeline.backbone.lora import LoraArguments
from pipeline.backbone.roles import load_backbone
from pipeline.runs.arguments import DataArguments, PolicyArguments
from pipeline.runs.changed_options import options_of
from pipeline.runs.checkpoints import Checkpointed
from pipeline.runs.command_line import parse
from pipeline.runs.launch import check_wrapper
from pipeline.runs.opening import open_run
from pipeline.runs.outputs import finish_stage
from pipeline.runs.rows import prepare_rows
from pipeline.runs.trainer_options import check_router_loss


@dataclass
class PairArguments(PolicyArguments):
    """The start of the policy, and the number of pairs that it learns from."""

    max_pairs: int | None = field(default=None, metadata={"help": "Number of pairs, drawn at random. Unset: all."})


class DPO(Checkpointed, DPOTrainer):
    """DPO as TRL trains it, with Spine's checkpoints."""


OPTIONS = (DataArguments, PairArguments, ModelConfig, DPOConfig)


def main(data: DataArguments, start: PairArguments, model: ModelConfig, args: DPOConfig) -> None:
    options = options_of(data, start, model, args)
    checkpoint = open_run(
        args, model, options=options, policies=(start.sft_adapter,), leaves_reward=False, data=data.sources
    )
    pairs = load_preferences(data.dataset_name, data.dataset_train_split, drop=data.drop_bad_rows)
    pairs = explicit_prompts(pairs, data.dataset_name, drop=data.drop_bad_rows)
    if start.max_pairs:  # pairs of one ranking follow each other
        pairs = pairs.shuffle(seed=args.seed).select(range(min(start.max_pairs, len(pairs))))
    parts = {"train": (data.dataset_name, pairs.select_columns(["prompt", "chosen", "rejected"]))}
    torch.manual_seed(args.seed)  # a fresh adapter is drawn here
    backbone, tokenizer = load_backbone(
        model,
        start.sft_adapter,
        lora=LoraArguments(),
        trust_remote_code=args.trust_remote_code,
        pad_token=args.pad_token,
    )
    check_router_loss(args, backbone.get_base_model().config)
    check_max_length(args.max_length, context_length(backbone))
    needs_rest = args.truncation_mode == "keep_start"
    rows, report = prepare_rows(parts, tokenizer, data, max_length=args.max_length, needs_rest=needs_rest, row="pair")
    trainer = DPO(
        model=backbone,  # TRL clones its policy adapter as the reference
        args=args,
        train_dataset=rows["train"],
        processing_class=tokenizer,
    )
    if args.disable_dropout:
        without_dropout(backbone.get_base_model(), model.model_name_or_path)
    backbone.train_only("policy")  # adding adapters changes requires_grad
    set_seed(args.seed)
    check_wrapper(trainer)
    trainer.train(resume_from_checkpoint=checkpoint, options=options)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    read = 2 * min(trainer.state.global_step * batch, len(trainer.train_dataset))
    summary = {"completions": read, "rows": report, "history": trainer.state.log_history}
    finish_stage(trainer, backbone.fingerprint, summary)
    trainer.end()


if __name__ == "__main__":
    main(*parse(*OPTIONS))
