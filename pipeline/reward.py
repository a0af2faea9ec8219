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

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, RewardConfig

from data.prompts import check_prompt_lengths
from data.tokens import check_max_length
from pipeline.backbone.adapters import Adapter, read_adapter
from pipeline.backbone.classifier_adapters import classifier_lora
from pipeline.backbone.classifiers import Classifier, RewardModelConfig, has_own_head, load_classifier
from pipeline.backbone.identity import fingerprint
from pipeline.backbone.loading import context_length, load_pretrained, train_in_float32
from pipeline.backbone.lora import LoraArguments, lora_config
from pipeline.backbone.reward_start import reward_config, start_from
from pipeline.backbone.rewards import measure
from pipeline.backbone.roles import load_backbone
from pipeline.runs.changed_options import options_of
from pipeline.runs.command_line import parse
from pipeline.runs.ensembles import finish_ensemble, in_turn, open_ensemble
from pipeline.runs.launch import check_wrapper
from pipeline.runs.mixture import FORMATS, RewardDataArguments
from pipeline.runs.opening import open_run
from pipeline.runs.outputs import add_to_unfinished, finish_stage, seconds_running, unfinished
from pipeline.runs.reward_arguments import RewardModelArguments
from pipeline.runs.reward_training import RewardModel, held_out_margins
from pipeline.runs.rows import prepare_own_pairs, prepare_rows
from reward_models.calibration import reward_model_report
from reward_models.normalization import Normalization
from reward_models.pretrained import longest_text


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


class Prepared(NamedTuple):
    """The base of a reward model, before it gets its adapter, and the rows as tokens.

    Attributes:
        classifier: the base with its own head; None where the base is the policy's backbone.
        rows: `train`, and `held_out` where there is such a dataset.
        report: what became of the rows of each, for metrics.json.
        identity: the fingerprint of the base.
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    classifier: Classifier | None
    rows: dict[str, Dataset]
    report: dict[str, Any]
    identity: str


def check_options(pairs: RewardModelArguments, model: RewardModelConfig, args: RewardConfig) -> None:
    """Refuse options that training a reward model cannot follow, before anything is loaded.

    Raises:
        ValueError: there is such an option.
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
    if not model.use_peft:
        pairs.check_own(model, args)


def load_parts(data: RewardDataArguments, pairs: RewardModelArguments, args: RewardConfig) -> dict[str, tuple]:
    """Return the rows of `train` and `held_out` as they are written, each with the name of its source.

    Raises:
        ValueError: a row, a column or an option does not fit the loss.
        OSError: a file cannot be read.
    """
    rows_of = FORMATS[pairs.loss_type]
    parts = data.load(rows_of.load, args)
    pairs.check_columns(parts, args)
    source, train = parts["train"]
    if pairs.sft_adapter:  # completions of the prompts will be scored
        train = rows_of.with_prompts(train, source, drop=data.drop_bad_rows)
    if not pairs.use_margin and "margin" in train.column_names:
        train = train.remove_columns("margin")
    return parts | {"train": (source, train)}


def prepare(
    parts: dict[str, tuple],
    data: RewardDataArguments,
    pairs: RewardModelArguments,
    model: RewardModelConfig,
    args: RewardConfig,
    *,
    own: bool,
) -> Prepared:
    """Load the base and write the rows in its tokens.

    Args:
        parts: what `load_parts` returned.
        own: whether the base is a model of its own, which no policy shares.
    """
    torch.manual_seed(args.seed)  # the score head is drawn here
    source_of = {"trust_remote_code": args.trust_remote_code, "pad_token": args.pad_token}
    if own:
        classifier = load_classifier(model, **source_of)
        base, tokenizer = classifier.model, classifier.tokenizer
        check_max_length(args.max_length, longest_text(base, tokenizer))
        rows, report = prepare_own_pairs(parts, tokenizer, data, max_length=args.max_length)
        return Prepared(base, tokenizer, classifier, rows, report, fingerprint(base, learned=classifier.learned))
    base, tokenizer = load_pretrained(model, head=True, **source_of)
    check_max_length(args.max_length, context_length(base))
    row = FORMATS[pairs.loss_type].row
    rows, report = prepare_rows(parts, tokenizer, data, max_length=args.max_length, drops=True, row=row)
    return Prepared(base, tokenizer, None, rows, report, fingerprint(base))


def read_policy(
    sft_adapter: str,
    given: Prepared,
    source: str,
    data: RewardDataArguments,
    pairs: RewardModelArguments,
    args: RewardConfig,
) -> tuple[Adapter, list]:
    """Return the adapter of SFT, and the prompts whose completions by it will be scored.

    Args:
        source: the name of the training dataset, for messages.

    Raises:
        ValueError: the adapter does not fit the base, or a prompt is too long.
    """
    base, tokenizer, train = given.base, given.tokenizer, given.rows["train"]
    policy = read_adapter(sft_adapter, needs_head=False, base=base, tokenizer=tokenizer)
    # Draw at random, since pairs of one ranking follow each other.
    completed = train.shuffle(seed=args.seed).select(range(min(pairs.sft_completions, len(train))))
    limits = context_length(base), pairs.max_completion_length
    completed, _ = check_prompt_lengths(completed, tokenizer, *limits, source, drop=data.drop_bad_rows)
    return policy, completed["prompt"][:]


def make_trainer(
    given: Prepared,
    start: Adapter | None,
    earlier: float,
    pairs: RewardModelArguments,
    lora: LoraArguments,
    model: RewardModelConfig,
    args: RewardConfig,
) -> RewardModel:
    """Return the trainer, with a new adapter on the base, or with all weights of the base to be trained.

    Args:
        start: the policy's adapter that the reward adapter starts from, if any.
        earlier: see `train_adapter`.
    """
    base = given.base
    if not model.use_peft:
        config = None
        base.requires_grad_(True)
    elif given.classifier:
        config = classifier_lora(given.classifier, model, lora)
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
        train_dataset=given.rows["train"],
        eval_dataset=given.rows.get("held_out"),
        processing_class=given.tokenizer,
        peft_config=config,
    )
    if model.load_in_4bit:
        train_in_float32(trainer.model)
    if start:
        start_from(trainer.model, start)
    return trainer


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
    check_options(pairs, model, args)
    options = options_of(data, pairs, lora, model, args)
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
    parts = load_parts(data, pairs, args)
    given = prepare(parts, data, pairs, model, args, own=own)
    start: Adapter | None = None
    prompts: list = []
    if pairs.sft_adapter:
        policy, prompts = read_policy(pairs.sft_adapter, given, parts["train"][0], data, pairs, args)
        start = policy if pairs.start_from_sft else None
    trainer = make_trainer(given, start, earlier, pairs, lora, model, args)
    check_wrapper(trainer)
    trainer.train(resume_from_checkpoint=checkpoint, options=options)
    held_out = held_out_margins(trainer) if "held_out" in given.rows else {}
    metrics: dict[str, Any] = reward_model_report(**held_out) if held_out else {}
    if trainer.rating_scale:
        metrics["rating_scale"] = asdict(trainer.rating_scale)
    metrics |= {"rows": given.report, "history": trainer.state.log_history}
    finish_stage(trainer, given.identity, metrics, folder=unfinished(args) if pairs.sft_adapter else None)
    accelerator, repository = trainer.accelerator, trainer.hub_model_id
    if pairs.sft_adapter:
        accelerator.free_memory()
        del trainer, given  # the backbone is loaded again, as a language model
        trained = unfinished(args)
        try:
            scale = normalization_of(trained, pairs, model, args, prompts)
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
