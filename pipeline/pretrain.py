"""Pretrain a small model and its own tokenizer from scratch: the embedded backbone, a GPT-2; or an encoder, a BERT.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.pretrain --config pipeline/recipes/backbone.yaml

It reads the training split of the embedded ratings (texts only), and writes config, weights, tokenizer and model card to
`backbone_dir`. The weights are stored in float16. They load as float32, as config.json states.

GPT-2 learns to predict the next token. BERT learns to fill in masked ones (Devlin et al. 2019, arXiv 1810.04805), 15% of
them; `pipeline.reward` then makes a reward model of it.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from data.human_ratings import load_split
from data.json_files import read_json, write_json
from data.listing import file_digest
from data.saving import save
from pipeline.backbone.encoder import new_encoder, train_word_pieces
from pipeline.runs.changed_options import changed_options, options_of
from pipeline.runs.command_line import parse
from pipeline.runs.folders import check_ours, check_output_dir, check_path
from pipeline.runs.launch import check_launch, check_wrapper
from pipeline.runs.manifest import ORDER
from pipeline.runs.output_lock import lock_for_training
from pipeline.runs.ownership import FILES, former_files
from pipeline.runs.resumed_options import ResumesOptions
from pipeline.runs.terminal import write_lines


RECORD = "options.json"  # of a checkpoint, which has no manifest here
EOS, PAD = "<|endoftext|>", "<|pad|>"


@dataclass
class BackboneConfig:
    """Shape of the model, and the folder it is written to."""

    backbone_dir: str = "data/backbone"
    model_type: Literal["gpt2", "bert"] = "gpt2"
    vocab_size: int = 8192
    n_positions: int = 128
    n_layer: int = 4
    n_embd: int = 256
    n_head: int = 4
    dropout: float = 0.2

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}. Change one of them.")
        if self.n_positions < 2:
            raise ValueError(
                f"n_positions={self.n_positions}: a text of one token has nothing to predict. Set it to 2 or more."
            )


def check_options(args: TrainingArguments, options: dict) -> dict | None:
    """Return the changed options that take effect if the run resumes (`changed_options`). Raises its errors, and a ValueError
    for an option that the order of the batches depends on."""
    checkpoint = args.resume_from_checkpoint
    if not checkpoint:
        return {}
    path = Path(checkpoint) / RECORD
    record = read_json(path) if path.is_file() else {}
    for name, then in record.get("order", {}).items():
        if (now := getattr(args, name, then)) != then:
            raise ValueError(
                f"{checkpoint}: written with {name}={then!r}, and this run has {name}={now!r}, which changes the order of the "
                f"batches. Set {name} as it was, or start a new run."
            )
    return changed_options(checkpoint, args, options, record)


class Pretraining(ResumesOptions, Trainer):
    """Trainer, which records its options and takes up those that have changed since the checkpoint it resumes from."""

    def train_with(self, options: dict, changed: dict | None) -> None:
        self._options, self._changed = options, changed
        self._say_changes(self.args.resume_from_checkpoint)
        write_lines(self)
        self.train(resume_from_checkpoint=self.args.resume_from_checkpoint)

    def _save_checkpoint(self, model, trial) -> None:
        """Override `_save_checkpoint`: record the options."""
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            order = {name: getattr(self.args, name) for name in ORDER if hasattr(self.args, name)}
            write_json(folder / RECORD, {"step": self.state.global_step, "order": order, "options": self._options})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        ours = self._hyperparameters()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            for load, name in (
                (self.optimizer.load_state_dict, OPTIMIZER_NAME),
                (self._load_schedule, SCHEDULER_NAME),
            ):
                load(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))
        self._take_up_hyperparameters(ours)
        self._take_up_state()


def train_tokenizer(texts: list[str], vocab_size: int, n_positions: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer as in GPT-2, with a pad token that is not the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        unk_token=EOS,
        pad_token=PAD,
        model_max_length=n_positions,
        clean_up_tokenization_spaces=False,
    )


def new_model(shape: BackboneConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return a model of this shape with random weights."""
    if shape.model_type == "bert":
        sizes = {"n_positions": shape.n_positions, "n_layer": shape.n_layer, "n_embd": shape.n_embd}
        return new_encoder(tokenizer, **sizes, n_head=shape.n_head, dropout=shape.dropout)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=shape.n_positions,
            n_layer=shape.n_layer,
            n_embd=shape.n_embd,
            n_head=shape.n_head,
            # The function of GPT-2 in one kernel: it saves an eighth of a step on a CPU.
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=shape.dropout,
            embd_pdrop=shape.dropout,
            attn_pdrop=shape.dropout,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def collator(tokenizer: PreTrainedTokenizerFast, seed: int | None = None) -> DataCollatorForLanguageModeling:
    """Return the collator that sets the tokens to predict: the masked ones if the tokenizer has a mask, else all."""
    return DataCollatorForLanguageModeling(tokenizer, mlm=tokenizer.mask_token is not None, seed=seed)


def tokenize(texts: list[str], tokenizer, n_positions: int) -> Dataset:
    """Return one row a text: its tokens and the end-of-text token, from position 0, as in later prompts."""
    end = tokenizer.eos_token or ""  # a BERT's tokenizer ends texts itself
    rows = tokenizer([text + end for text in texts], truncation=True, max_length=n_positions)["input_ids"]
    return Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})


@torch.no_grad()
def held_out_loss(model, dataset: Dataset, tokenizer, batch_size: int) -> tuple[float, float]:
    """Return -log p of a split in nats a token and in nats a byte; the latter compares vocabularies.

    Both cover all tokens except the first of each text, which is not predicted. Trainer.evaluate counts that token too, and
    weighs each batch of similar lengths by its number of texts, not of tokens. Its figure is 6% lower here.

    Of a masked language model they cover masked tokens alone, the same ones each time.
    """
    collate = collator(tokenizer, seed=0)
    first = 0 if collate.mlm else 1
    nats = tokens = 0
    for batch in DataLoader(dataset.select_columns("input_ids"), batch_size, collate_fn=collate):
        predicted = (batch["labels"][:, first:] != -100).sum().item()
        nats += model(**batch).loss.item() * predicted
        tokens += predicted
    texts = tokenizer.batch_decode([row[1:] for row in dataset["input_ids"]], skip_special_tokens=True)
    return nats / tokens, nats / sum(len(text.encode()) for text in texts)


def model_card(shape: BackboneConfig, args: TrainingArguments, losses: dict[str, tuple], facts: dict) -> str:
    """Return the model card, with its recipe, the losses on held-out texts and the hash of the weights."""
    rows = "\n".join(
        f"| {split} | {token:.3f} | {math.exp(token):.1f} | {byte:.3f} |" for split, (token, byte) in losses.items()
    )
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The embedded backbone

A GPT-2 of {shape.n_layer} layers, {shape.n_embd} wide, {shape.n_head} heads, {facts["parameters"]:,} parameters, with a byte-level BPE
vocabulary of {facts["vocab_size"]:,} and a context of {shape.n_positions} tokens. It exists so that the whole pipeline runs on one laptop
without a model hub; it writes review snippets and nothing else.

- **Data**: the texts (not the ratings) of the training split of Hutto & Gilbert, *VADER* (ICWSM 2014), from the
  source distribution of vaderSentiment 3.3.2 (MIT licence): {facts["texts"]:,} snippets, {facts["tokens"]:,} tokens.
- **Recipe**: `make backbone`, that is `pipeline/recipes/backbone.yaml`: {args.num_train_epochs:g} epochs, batch {args.train_batch_size}, AdamW at
  {args.learning_rate:g} with a {args.lr_scheduler_type.value} schedule, weight decay {args.weight_decay:g}, dropout {shape.dropout:g}, {"bf16 autocast" if args.bf16 else "fp32"}, seed {args.seed},
  {facts["steps"]:,} steps; the epoch with the lowest validation loss is kept.
- **Weights**: stored in float16, loaded as float32.
- `model.safetensors` sha256 `{facts["sha256"]}`

| held-out texts | loss (nats a token) | perplexity | nats a byte |
|---|---|---|---|
{rows}

The snippets are opinions of 2013 and earlier, rude ones among them; the model repeats what it has read.
"""  # noqa: E501 (the text of the card keeps its own line breaks)


def encoder_card(shape: BackboneConfig, args: TrainingArguments, losses: dict[str, tuple], facts: dict) -> str:
    """Return the model card of an encoder, with the loss on masked tokens of held-out texts."""
    found = ", ".join(f"{token:.3f} nats on the {split} split" for split, (token, _) in losses.items())
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: fill-mask
---
# A small encoder

A BERT of {shape.n_layer} layers, {shape.n_embd} wide, {shape.n_head} heads, {facts["parameters"]:,} parameters, with a lower-case WordPiece
vocabulary of {facts["vocab_size"]:,} and a context of {shape.n_positions} tokens. It exists to be trained as a reward model by `pipeline.reward`
without a model hub.

- **Data**: the texts (not the ratings) of the training split of Hutto & Gilbert, *VADER* (ICWSM 2014), from the
  source distribution of vaderSentiment 3.3.2 (MIT licence): {facts["texts"]:,} snippets, {facts["tokens"]:,} tokens.
- **Recipe**: `pipeline.pretrain`: {args.num_train_epochs:g} epochs, batch {args.train_batch_size}, AdamW at {args.learning_rate:g} with a
  {args.lr_scheduler_type.value} schedule, dropout {shape.dropout:g}, seed {args.seed}, {facts["steps"]:,} steps; 15% of the tokens are masked.
- **Loss** of masked tokens: {found}.
- **Weights**: stored in float16, loaded as float32.
- `model.safetensors` sha256 `{facts["sha256"]}`
"""  # noqa: E501 (the text of the card keeps its own line breaks)


def main(shape: BackboneConfig, args: TrainingArguments) -> None:
    check_launch(args)
    for folder, names in ((args.output_dir, ()), (shape.backbone_dir, FILES["model"])):
        check_path(folder)
        check_output_dir(folder)
        check_ours(folder, names)
    if args.resume_from_checkpoint and not Path(args.resume_from_checkpoint).is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint={args.resume_from_checkpoint!r}: no such folder. Correct the path."
        )
    lock_for_training(args)
    options = options_of(shape, args)
    changed = check_options(args, options)
    set_seed(args.seed)
    texts = {split: [s.text for s in load_split(split)] for split in ("train", "validation", "test")}
    train = train_word_pieces if shape.model_type == "bert" else train_tokenizer
    tokenizer = train(texts["train"], shape.vocab_size, shape.n_positions)
    datasets = {split: tokenize(rows, tokenizer, shape.n_positions) for split, rows in texts.items()}
    model = new_model(shape, tokenizer)
    config = model.config
    trainer = Pretraining(
        model=model,
        args=args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        data_collator=collator(tokenizer),
    )
    check_wrapper(trainer)
    trainer.train_with(options, changed)

    if not trainer.is_world_process_zero():
        return
    model.half()

    def write(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        config.dtype, config.use_cache = torch.float32, True  # Trainer switches the cache off for training
        config.save_pretrained(folder)
        # The card states the loss of the stored weights, so it is measured on the weights after loading them.
        stored = type(model).from_pretrained(folder)
        losses = {
            split: held_out_loss(stored, datasets[split], tokenizer, args.per_device_eval_batch_size)
            for split in ("validation", "test")
        }
        facts = {
            "parameters": stored.num_parameters(),
            "vocab_size": len(tokenizer),
            "texts": len(texts["train"]),
            "tokens": sum(datasets["train"]["length"]),
            "steps": trainer.state.max_steps,
            "sha256": file_digest(folder / "model.safetensors"),
        }
        card = encoder_card if shape.model_type == "bert" else model_card
        (folder / "README.md").write_text(card(shape, args, losses, facts), encoding="utf-8")

    save(shape.backbone_dir, "model", write, former=former_files(shape.backbone_dir, "model"))


if __name__ == "__main__":
    main(*parse(BackboneConfig, TrainingArguments))
