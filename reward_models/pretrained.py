"""Use a pretrained classifier of any architecture as a reward function: BERT, a reward model of the hub, one of your own.

Such a model has weights and a tokenizer of its own, so it scores the texts, written anew for it. A reward adapter on the
policy's backbone (`reward_adapter`) scores the sampled tokens themselves, and costs less.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed

from data.embedded import find_embedded
from data.saving import check_saved
from reward_models.learned import score_rows


logger = get_logger(__name__)


def get_model(
    name: str,
    label: str | None = None,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    completion_only: bool = False,
    probability: bool = False,
    dtype: str = "auto",
    device: str | None = None,
) -> Callable:
    """Make a reward function of a sequence classifier that transformers or peft loads.

    The score of a model with one output is that output. The score of a label is its log odds, log p / (1 - p): like the
    score of a reward model, it has no bounds, and differences of it mean the same everywhere.

    A text is the prompt and the completion. A conversation is written with the chat template of the classifier's tokenizer.
    Of a text that is too long the end is scored, and a warning says so once.

    Args:
        name: hub id or folder of the model.
        label: the label whose log odds are the score, such as POSITIVE; for a model with several labels.
        batch_size: texts a pass.
        max_length: most tokens of a text; None is what model and tokenizer allow.
        completion_only: score the completion without its prompt.
        probability: return p, in 0..1, instead of the log odds; of a single output its sigmoid.
        dtype: the precision of the weights; auto is that of the files.
        device: device of the model, such as cpu; None is that of training.

    Raises:
        ValueError: it is an adapter; the files lack the head or other weights; or there is no such label, or several and
            none is named.
        OSError: there is no such model.
    """
    name = find_embedded(name)
    model = _load(name, dtype)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return scorer(
        model,
        tokenizer,
        name,
        label,
        batch_size=batch_size,
        max_length=max_length,
        completion_only=completion_only,
        probability=probability,
        device=device,
    )


def scorer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    label: str | None = None,
    *,
    batch_size: int,
    max_length: int | None = None,
    completion_only: bool = False,
    probability: bool = False,
    device: str | None = None,
) -> Callable:
    """Make a reward function of a classifier in memory, which it freezes; its options are those of `get_model`.

    Raises:
        ValueError: there is no such label, or several and none is named.
    """
    tokenizer.truncation_side = "left"
    model.to(device or PartialState().device).eval().requires_grad_(False)
    index = label_index(model.config, label, name)
    if tokenizer.pad_token_id is None:
        batch_size = 1
        logger.warning(f"{name}: the tokenizer has no pad token, so texts are scored one by one. Set pad_token there.")
    else:
        model.config.pad_token_id = tokenizer.pad_token_id
    longest = min(max_length or math.inf, longest_text(model, tokenizer))
    told: set[str] = set()

    def score_batch(ids: Tensor, mask: Tensor) -> Tensor:
        found = log_odds(model(input_ids=ids, attention_mask=mask).logits.float(), index, model.config.problem_type)
        return found.sigmoid() if probability else found

    def score(prompts: list, completions: list, **kwargs) -> list[float]:
        rows = text_rows(tokenizer, prompts, completions, completion_only=completion_only, name=name)
        if cut := sum(len(row) > longest for row in rows):
            rows = text_rows(
                tokenizer, prompts, completions, completion_only=completion_only, name=name, max_length=int(longest)
            )
            if not told:
                told.add(name)
                logger.warning(
                    f"{name}: {cut} of {len(rows)} texts are longer than {longest} tokens, and only their ends are scored."
                )
        return score_rows(
            score_batch, rows, pad_token_id=tokenizer.pad_token_id or 0, batch_size=batch_size, device=model.device
        )

    score.__name__ = Path(name).name
    return score


def _load(name: str, dtype: str) -> PreTrainedModel:
    """Load a classifier whole, or raise a ValueError that names what its files lack."""
    if (Path(name).expanduser() / "adapter_config.json").is_file():
        raise ValueError(
            f"{name} is the folder of an adapter. Name it in reward_adapter if it shares the policy's backbone, or else write "
            f"pipeline.backbone.rewards.get_reward_adapter(folder={name!r})."
        )
    if Path(name).expanduser().is_dir():
        check_saved(name, "model")
    with loaded_whole():
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    if lacking := sorted(found["missing_keys"]):
        raise ValueError(
            f"{name}: {len(lacking)} tensors of {type(model).__name__} are missing from its files (first: {lacking[0]}), so "
            f"it cannot score. Name a model that was trained to classify, or train one with pipeline.reward."
        )
    return model


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Load a model whole in every process, also under ZeRO-3, while the code inside runs.

    Under ZeRO-3 transformers would shard the model as it loads. Then its fingerprint could not be read, and no adapters and
    heads could be made on it. accelerate shards what trains when training begins. The `zero3_init_flag: false` of
    accelerate does not reach transformers.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def label_index(config: PretrainedConfig, label: str | None, name: str) -> int:
    """Return the output whose score is wanted.

    Raises:
        ValueError: there is no such label, or several labels and none is named.
    """
    labels = [config.id2label[i] for i in range(config.num_labels)]
    if label is None and len(labels) == 1:
        return 0
    if label not in labels:
        named = "label is not set" if label is None else f"label={label!r} is not one of its labels"
        raise ValueError(f"{name}: {named}. Set label to one of {', '.join(map(repr, labels))}.")
    return labels.index(label)


def log_odds(logits: Tensor, index: int, problem_type: str | None = None) -> Tensor:
    """Return log p / (1 - p) of the output `index`, (B, outputs) -> (B,).

    With several outputs p is their softmax, so the log odds are the logit minus the log-sum-exp of the others. With one
    output, or labels that do not exclude each other, they are the logit itself.
    """
    if logits.shape[1] == 1 or problem_type == "multi_label_classification":
        return logits[:, index]
    others = torch.cat([logits[:, :index], logits[:, index + 1 :]], dim=1)
    return logits[:, index] - others.logsumexp(dim=1)


def text_rows(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list,
    completions: list,
    *,
    completion_only: bool,
    name: str,
    max_length: int | None = None,
) -> list[list[int]]:
    """Return the token ids of each text or conversation as its classifier reads it; cut to their ends with `max_length`.

    Raises:
        ValueError: there are conversations, and the tokenizer has no chat template.
    """
    # `verbose` would say of each text that it is long, also if it is cut next.
    options = {"truncation": max_length is not None, "max_length": max_length, "verbose": False}
    if isinstance(completions[0], str):
        texts = completions if completion_only else [a + b for a, b in zip(prompts, completions, strict=True)]
    elif completion_only:
        texts = [completion[0]["content"] for completion in completions]
    else:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{name}: its tokenizer has no chat template to write a conversation with. Set completion_only=True to score "
                f"the reply alone."
            )
        conversations = [a + b for a, b in zip(prompts, completions, strict=True)]
        texts = tokenizer.apply_chat_template(conversations, tokenize=False)
        options["add_special_tokens"] = False  # the template writes them
    return tokenizer(texts, **options)["input_ids"]


def longest_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return how many tokens model and tokenizer take at once; infinity if neither has a bound.

    RoBERTa and its kin count positions from the pad token's id on, so the first of their position embeddings have no use.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    skipped = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return min(tokenizer.model_max_length, positions - max(skipped, default=0))
