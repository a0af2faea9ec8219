"""The reward model, which predicts which of two completions people prefer.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.reward --config pipeline/recipes/demo/reward.yaml

Trains a LoRA adapter and a score head on the frozen backbone with TRL's RewardTrainer, on pairs, rankings or ratings, of one
dataset or several. Pairs of one ranking share a batch, and each text is scored once. Labels may be shares of raters, and
smoothed; the adapter may start from that of SFT. Then measures the reward model on held-out pairs: accuracy, the accuracy
that people reach, accuracy for each rating gap, and calibration. With `num_members` it trains an ensemble of adapters, one by
one.

An encoder, such as BERT, is a model of its own: it gets a LoRA adapter that no policy shares. With `use_peft: false` all
weights of an encoder or a decoder are trained, and a whole model is saved.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from trl import ModelConfig, RewardConfig

from data.listing import json_digest
from data.prompts import check_prompt_lengths
from data.tokens import check_max_length
from pipeline.backbone.adapters import Adapter, read_adapter
from pipeline.backbone.classifier_adapters import classifier_lora
from pipeline.backbone.classifiers import RewardModelConfig, has_own_head, load_classifier
from pipeline.backbone.identity import digest, fingerprint
from pipeline.backbone.loading import context_length, load_pretrained, train_in_float32
from pipeline.backbone.lora import LoraArguments, lora_config
from pipeline.backbone.reward_start import reward_config, start_from
from pipeline.backbone.rewards import measure
from pipeline.backbone.roles import load_backbone
from pipeline.runs.changed_options import options_of
from pipeline.runs.checkpoints import Checkpointed
from pipeline.runs.command_line import parse
from pipeline.runs.ensembles import finish_ensemble, in_turn, open_ensemble
from pipeline.runs.launch import check_wrapper
from pipeline.runs.mixture import FORMATS, RewardDataArguments
from pipeline.runs.opening import open_run
from pipeline.runs.outputs import add_to_unfinished, finish_stage, seconds_running, unfinished
from pipeline.runs.reward_arguments import RewardModelArguments
from pipeline.runs.rows import prepare_own_pairs, prepare_rows
from reward_models.calibration import reward_model_report
from reward_models.learned import score_rows
from reward_models.listwise import comparisons
from reward_models.normalization import Normalization
from reward_models.pretrained import longest_text
from reward_models.ranking import RankingTrainer


class RewardModel(Checkpointed, RankingTrainer):
    """RankingTrainer, with Spine's checkpoints.

    Args:
        start: the policy's adapter that the reward adapter starts from, if any.
        earlier: seconds of this process that earlier members of an ensemble took.
    """

    def __init__(self, *args, start: Adapter | None = None, earlier: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.start, self.earlier = start, earlier
        self.seconds_before = -earlier

    def load_training_state(self, state: dict) -> None:
        """Override `load_training_state`: do not count the time of earlier members."""
        super().load_training_state(state)
        self.seconds_before -= self.earlier

    def contents(self) -> dict[str, Any]:
        """Override `contents`: a run that started from a policy resumes with the same one."""
        found = super().contents()
        if self.start:
            found["frozen"] = json_digest([found["frozen"], digest(sorted(self.start.weights.items()))])
        return found


def held_out_margins(trainer: RewardModel) -> dict[str, Any]:
    """Score the trainer's evaluation rows as pairs, and return the columns that `reward_model_report` takes.

    A text of several pairs is scored once. Processes share the texts.
    """
    rows, model = trainer.eval_dataset, trainer.model_wrapped  # only the wrapper can run a sharded model
    model.eval()

    def score(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with trainer.accelerator.autocast():
            return model(input_ids=ids, attention_mask=mask).logits.float().squeeze(-1)

    chosen, rejected, agreement, gaps = comparisons(rows)
    texts = list(dict.fromkeys(chosen + rejected))
    scores = score_rows(
        score,
        [list(text) for text in texts],
        pad_token_id=trainer.processing_class.pad_token_id,
        batch_size=trainer.args.per_device_eval_batch_size,
        device=trainer.accelerator.device,
        share=True,
        bar="scores of held-out pairs",
    )
    score_of = dict(zip(texts, scores, strict=True))
    margins = [score_of[c] - score_of[r] for c, r in zip(chosen, rejected, strict=True)]
    if not all(map(math.isfinite, margins)):
        trainer.diverged = "A score of a held-out text is not finite"
        raise trainer.divergence()
    return {"margins": margins, "agreement": agreement, "gaps": gaps}


def normalization_of(
    folder: Path, pairs: RewardModelArguments, model: ModelConfig, args: RewardConfig, prompts: list
) -> Normalization:
    """Measure mean and deviation of the scores of the adapter in a folder on completions of the SFT policy."""
    backbone, tokenizer = load_backbone(
        model, pairs.sft_adapter, trust_remote_code=args.trust_remote_code, pad_token=args.pad_token
    )
    adapter = read_adapter(str(folder), needs_head=True, base=backbone.get_base_model(), tokenizer=tokenizer)
    backbone.add_role("reward", adapter)
    backbone.to(args.device).eval()
    return measure(backbone, prompts, tokenizer, seed=args.seed, max_completion_length=pairs.max_completion_length)


OPTIONS = (RewardDataArguments, RewardModelArguments, LoraArguments, RewardModelConfig, RewardConfig)


def train_adapter(
    data: RewardDataArguments,
    pairs: RewardModelArguments,
    lora: LoraArguments,
    model: RewardModelConfig,
    args: RewardConfig,
    earlier: float = 0.0,
) -> tuple[Accelerator, dict[str, Any]]:
    """Train a reward model and save it.

    Args:
        earlier: seconds of this process that earlier members of an ensemble took.

    Returns:
        Its accelerator, and its scores of the held-out pairs (`held_out_margins`); empty if there are none.
    """
    if args.train_sampling_strategy not in ("random", "group_by_length"):
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} is not supported: pairs of a ranking are batched "
            f"together. Set random or group_by_length."
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor!r} has no effect on pairs. Set label_smoothing."
        )
    options = options_of(data, pairs, lora, model, args)
    if not model.use_peft:
        pairs.check_own(model, args)
    checkpoint = open_run(
        args,
        model,
        options=options,
        policies=(pairs.sft_adapter,),
        leaves_reward=True,
        data=data.sources,
        whole=not model.use_peft,
    )
    own = not model.use_peft or has_own_head(model, trust_remote_code=args.trust_remote_code)
    if own:
        pairs.check_own(model, args)
    rows_of = FORMATS[pairs.loss_type]
    parts = data.load(rows_of.load, args)
    pairs.check_columns(parts, args)
    source, train = parts["train"]
    if pairs.sft_adapter:  # completions of the prompts will be scored
        train = rows_of.with_prompts(train, source, drop=data.drop_bad_rows)
    if not pairs.use_margin and "margin" in train.column_names:
        train = train.remove_columns("margin")
    parts["train"] = source, train
    torch.manual_seed(args.seed)  # the score head is drawn here
    source_of = {"trust_remote_code": args.trust_remote_code, "pad_token": args.pad_token}
    if own:
        classifier = load_classifier(model, **source_of)
        base, tokenizer = classifier.model, classifier.tokenizer
        check_max_length(args.max_length, longest_text(base, tokenizer))
        rows, report = prepare_own_pairs(parts, tokenizer, data, max_length=args.max_length)
        identity = fingerprint(base, learned=classifier.learned)
    else:
        base, tokenizer = load_pretrained(model, head=True, **source_of)
        check_max_length(args.max_length, context_length(base))
        rows, report = prepare_rows(parts, tokenizer, data, max_length=args.max_length, drops=True, row=rows_of.row)
        identity = fingerprint(base)
    start = None
    if pairs.sft_adapter:
        # Refuse an adapter that does not fit before training.
        policy = read_adapter(pairs.sft_adapter, needs_head=False, base=base, tokenizer=tokenizer)
        start = policy if pairs.start_from_sft else None
        # Draw at random, since pairs of one ranking follow each other.
        train = rows["train"]
        completed = train.shuffle(seed=args.seed).select(range(min(pairs.sft_completions, len(train))))
        limits = context_length(base), pairs.max_completion_length
        completed, _ = check_prompt_lengths(completed, tokenizer, *limits, source, drop=data.drop_bad_rows)
    if not model.use_peft:
        config = None
        base.requires_grad_(True)
    elif own:
        config = classifier_lora(classifier, model, lora)
    elif start:
        config = reward_config(start, model, lora, base)
    else:
        config = lora_config(model, task_type="SEQ_CLS", lora=lora, base=base)
    trainer = RewardModel(
        start=start,
        earlier=earlier,
        use_margin=pairs.use_margin,
        use_agreement=pairs.use_agreement,
        label_smoothing=pairs.label_smoothing,
        model=base,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows.get("held_out"),
        processing_class=tokenizer,
        peft_config=config,
    )
    if model.load_in_4bit:
        train_in_float32(trainer.model)
    if start:
        start_from(trainer.model, start)
    check_wrapper(trainer)
    trainer.train(resume_from_checkpoint=checkpoint, options=options)
    held_out = held_out_margins(trainer) if "held_out" in rows else {}
    metrics: dict[str, Any] = reward_model_report(**held_out) if held_out else {}
    if trainer.rating_scale:
        metrics["rating_scale"] = asdict(trainer.rating_scale)
    metrics |= {"rows": report, "history": trainer.state.log_history}
    finish_stage(trainer, identity, metrics, folder=unfinished(args) if pairs.sft_adapter else None)
    accelerator, repository = trainer.accelerator, trainer.hub_model_id
    if pairs.sft_adapter:
        accelerator.free_memory()
        del trainer, base  # the backbone is loaded again, as a language model
        trained = unfinished(args)
        try:
            scale = normalization_of(trained, pairs, model, args, completed["prompt"][:])
        except Exception as error:
            error.add_note(
                f"The adapter is trained, and lies in {trained}. Copy it before you start another run here."
            )
            raise
        if accelerator.is_main_process:
            add_to_unfinished(args, scale.save, repository)
    return accelerator, held_out


def main(
    data: RewardDataArguments,
    pairs: RewardModelArguments,
    lora: LoraArguments,
    model: RewardModelConfig,
    args: RewardConfig,
) -> None:
    if pairs.num_members == 1:
        accelerator, _ = train_adapter(data, pairs, lora, model, args)
    else:
        open_ensemble(args, model, pairs.num_members, policies=(pairs.sft_adapter,), data=data.sources)
        held_out, earlier = [], 0.0
        for of_member in in_turn(args, pairs.num_members):
            accelerator, found = train_adapter(data, pairs, lora, model, of_member, earlier)
            held_out += [found] if found else []
            earlier = seconds_running()
        if args.should_save:
            finish_ensemble(args, pairs.num_members, held_out)
    accelerator.end_training()  # as `Trainer.end`


if __name__ == "__main__":
    main(*parse(*OPTIONS))
