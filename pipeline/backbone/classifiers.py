"""Load a classifier that is trained as a reward model of its own: an encoder of any family, or all weights of a decoder.

It shares no backbone, so it need not do what a backbone must. It has its own tokenizer, which writes texts in training as it
does later for `reward_models.pretrained`. A decoder's tokenizer is set to end each text, as an encoder's does.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig

from data.quoting import escaped
from data.tokens import added_tokens
from pipeline.backbone.adapters import load_tokenizer
from pipeline.backbone.architecture import all_finite, check_finite
from pipeline.backbone.loading import check_model_folder, ends_of, fuse_gelu, pad_with
from pipeline.backbone.model_files import check_vocabulary, model_config, read_weights, without_weights
from pipeline.backbone.padding import choose_pad_token, set_pad_token


PROBES = ("It", "It is a quiet triumph.")  # texts of different lengths


@dataclass
class RewardModelConfig(ModelConfig):
    """ModelConfig, where LoRA is on unless it is switched off."""

    use_peft: bool = field(
        default=True,
        metadata={"help": "Train a LoRA adapter. False: train all weights, and save a model of its own."},
    )


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier with one score, its tokenizer, and the modules whose weights training must learn.

    `learned` are the head, and what else of the model its files do not hold (BERT's pooler), by their full names. LoRA trains
    them whole.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    learned: tuple[str, ...]


def has_own_head(model: ModelConfig, *, trust_remote_code: bool = False) -> bool:
    """Tell whether the classifiers of a model's family keep their head elsewhere than in `score`, as encoders do.

    The classifier is built from its config, without weights. A family that has none counts as False: `load_pretrained` says
    what is wrong.

    Raises the errors of `model_config`.
    """
    _, _, config = model_config(model, trust_remote_code=trust_remote_code)
    try:
        built = without_weights(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, config)
    except Exception:  # the code of each family raises errors of its own
        return False
    return not isinstance(getattr(built, "score", None), nn.Linear)


def load_classifier(
    model: ModelConfig, *, trust_remote_code: bool = False, pad_token: str | None = None
) -> Classifier:
    """Load a sequence classifier with one score, and its tokenizer, from a hub id, a folder, a GGUF file or `smollm2`.

    The files may be those of a language model, of a bare encoder or of a classifier. A head with other outputs is drawn anew.
    A head in `score` then starts at N(0, 1/sqrt(D + 1)), as in `load_pretrained`; other heads start as transformers draws
    them.

    Raises the errors of `check_model_folder`, `model_config`, `read_weights`, `check_finite`, `check_vocabulary`,
    `set_pad_token` and `check_scores`, and:
        ValueError: a quantised base is asked for; layers are missing from the files; or the tokenizer has no token to pad
            with, or cannot end texts.
    """
    for option in ("load_in_4bit", "load_in_8bit"):
        if getattr(model, option):
            raise ValueError(
                f"{option}=True is only for a decoder that is trained with LoRA. Leave it unset, or name such a model."
            )
    check_model_folder(model.model_name_or_path, classifies=True)
    name, source, config = model_config(model, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(name, **source)
    if pad_token is not None:
        set_pad_token(tokenizer, pad_token, name)
    options: dict[str, Any] = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    with _without_report():
        base, found = read_weights(AutoModelForSequenceClassification, name, config, num_labels=1, **source, **options)
    learned, drawn = _learned(base, found, name)
    if drawn:
        PartialState().print(
            f"{name}: its files have no weights of {', '.join(sorted(drawn))}, so they are drawn at random."
        )
    check_finite(base, name)
    check_vocabulary(base, tokenizer, name)
    if "score" in drawn and isinstance(base.score, nn.Linear):
        nn.init.normal_(base.score.weight, std=(base.score.in_features + 1) ** -0.5)
    if pad_token is None:
        choose_pad_token(tokenizer, ends_of(base, name, model.model_revision))
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{name}: the tokenizer has no token to pad with. Name one of its special tokens in pad_token."
        )
    pad_with(base, tokenizer.pad_token_id)
    end_texts(tokenizer, name)
    check_scores(base, tokenizer, name)
    return Classifier(fuse_gelu(base).requires_grad_(False), tokenizer, name, learned)


@contextmanager
def _without_report() -> Iterator[None]:
    """Leave out transformers' report that the files of a language model lack a classifier's head."""
    reporter = logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(_is_no_report)
    try:
        yield
    finally:
        reporter.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in str(record.msg)


def _learned(base: PreTrainedModel, found: dict, name: str) -> tuple[tuple[str, ...], set[str]]:
    """Return the modules that training must learn, and those of them whose weights were drawn.

    Args:
        found: transformers' report of loading.

    Raises:
        ValueError: the files lack tensors of the encoder itself, or hold others.
    """
    trunk = f"{base.base_model_prefix}."
    missing = set(found["missing_keys"]) | {key for key, *_ in found["mismatched_keys"]}
    of_layers = sorted(key for key in missing if key.startswith(trunk) and ".pooler." not in f".{key}")
    unknown = sorted(key for key in found["unexpected_keys"] if key.startswith(trunk))
    for problem, keys in (
        ("are missing from its files, or have another shape there", of_layers),
        ("in its files belong to no part of the model", unknown),
    ):
        if keys:
            raise ValueError(
                f"{name}: {len(keys)} tensors of {type(base).__name__} {problem} (first: {escaped(keys[0])}). Copy the model "
                f"anew, or correct `architectures` in config.json."
            )
    drawn = {key.rpartition(".")[0] for key in missing}
    head = {
        part
        for part, module in base.named_children()
        if f"{part}." != trunk and any(True for _ in module.parameters())
    }
    return tuple(sorted(head | {part for part in drawn if part.startswith(trunk)})), drawn


def end_texts(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Have a tokenizer write its end-of-text token after each text, unless it writes a token there itself, as BERT's does.

    The setting is saved with the tokenizer. So whoever scores a text with the model writes it as in training.

    Raises:
        ValueError: the tokenizer does not do it.
    """
    before, after = added_tokens(tokenizer)
    if after or tokenizer.eos_token is None:
        return
    if hasattr(tokenizer, "add_eos_token"):
        tokenizer.add_bos_token, tokenizer.add_eos_token = bool(before), True
    if added_tokens(tokenizer) != (before, [tokenizer.eos_token_id]):
        raise ValueError(
            f"{name}: {type(tokenizer).__name__} cannot be set to end texts with {tokenizer.eos_token!r}, so a reward model "
            f"would not see where a text ends. Save a tokenizer there whose post-processor writes it."
        )


@torch.no_grad()
def check_scores(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Check that a classifier gives a text the same finite score alone and in a batch, padded at the right.

    Raises:
        ValueError: it does not, or it does not run.
    """
    rows = [tokenizer(text)["input_ids"] for text in PROBES]
    longest = max(map(len, rows))
    padded = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
    real = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    training = base.training
    base.eval()
    try:
        alone = torch.cat([base(input_ids=torch.tensor([row], device=base.device)).logits for row in rows])
        ids, mask = (torch.tensor(of, device=base.device) for of in (padded, real))
        together = base(input_ids=ids, attention_mask=mask).logits
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{name}: {type(base).__name__} does not score texts ({type(error).__name__}: {escaped(reason, 300)}). Name "
            f"another model."
        ) from error
    base.train(training)
    problem = None
    if alone.shape != (len(rows), 1):
        problem = f"gives outputs of the shape {tuple(alone.shape)}, not one score a text"
    elif not all_finite([alone, together]):
        problem = "gives scores that are not finite, so its weights are too large or damaged"
    elif (alone - together).abs().max() > (1e-3 if base.dtype == torch.float32 else 0.25):
        problem = "lets padding change its scores"
    if problem:
        raise ValueError(
            f"{name}: {type(base).__name__} {problem}, so it cannot be a reward model. Name another model."
        )
