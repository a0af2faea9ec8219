"""Supervised fine-tuning, which makes the reference and the start of the policy.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.sft --config pipeline/recipes/demo/sft.yaml

Trains a LoRA adapter on the frozen backbone with TRL's SFTTrainer.
"""

import torch
from accelerate.logging import get_logger
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from trl import ModelConfig, SFTConfig, SFTTrainer, is_conversational

from data.texts import load_texts
from data.tokens import check_max_length
from pipeline.backbone.identity import fingerprint
from pipeline.backbone.loading import context_length, load_pretrained, train_in_float32
from pipeline.backbone.lora import LoraArguments, lora_config
from pipeline.runs.arguments import DataArguments
from pipeline.runs.changed_options import options_of
from pipeline.runs.checkpoints import Checkpointed
from pipeline.runs.command_line import parse
from pipeline.runs.launch import check_wrapper
from pipeline.runs.opening import open_run
from pipeline.runs.outputs import finish_stage
from pipeline.runs.rows import prepare_rows
from pipeline.runs.trainer_options import check_router_loss


logger = get_logger(__name__)


class SFT(Checkpointed, SFTTrainer):
    """SFT as TRL trains it, with Spine's checkpoints."""


OPTIONS = (DataArguments, LoraArguments, ModelConfig, SFTConfig)


def main(data: DataArguments, lora: LoraArguments, model: ModelConfig, args: SFTConfig) -> None:
    options = options_of(data, lora, model, args)
    checkpoint = open_run(args, model, options=options, leaves_reward=False, data=data.sources)
    parts = data.load(load_texts, args)
    source, train = parts["train"]
    if args.assistant_only_loss and not is_conversational(train[0]):
        raise ValueError(f"assistant_only_loss=True needs conversations, and {source} has texts. Leave it unset.")
    base, tokenizer = load_pretrained(model, trust_remote_code=args.trust_remote_code, pad_token=args.pad_token)
    check_max_length(args.max_length, context_length(base))
    check_router_loss(args, base.config)
    if type(base.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:  # say so now, not after SFT
        logger.warning(
            f"{model.model_name_or_path}: transformers has no sequence classifier for the family {base.config.model_type!r}. "
            f"pipeline.reward cannot train a reward model on this model. Give PPO reward functions instead (reward_funcs)."
        )
    # TRL drops a row whose whole completion is cut off.
    needs_rest = args.completion_only_loss is not False and args.truncation_mode == "keep_start"
    rows, report = prepare_rows(parts, tokenizer, data, max_length=args.max_length, needs_rest=needs_rest)
    identity = fingerprint(base)
    torch.manual_seed(args.seed)  # the adapter is drawn here
    trainer = SFT(
        model=base,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows.get("held_out"),
        processing_class=tokenizer,
        peft_config=lora_config(model, task_type="CAUSAL_LM", lora=lora, base=base),
    )
    if model.load_in_4bit:
        train_in_float32(trainer.model)
    check_wrapper(trainer)
    trainer.train(resume_from_checkpoint=checkpoint, options=options)
    metrics = trainer.evaluate() if "held_out" in rows else {}
    finish_stage(trainer, identity, {**metrics, "rows": report, "history": trainer.state.log_history})
    trainer.end()


if __name__ == "__main__":
    main(*parse(*OPTIONS))
