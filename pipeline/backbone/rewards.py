"""Use reward adapters: as roles of the policy's backbone, or on one of their own; and measure the scale of their scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm
from trl import ModelConfig

from data.prompts import tokenize_prompts
from pipeline.backbone.adapter_config import read_adapter_config
from pipeline.backbone.adapter_tensors import WEIGHTS, read_header
from pipeline.backbone.adapters import adapter_folder, is_of_classifier, read_adapter
from pipeline.backbone.classifier_adapters import read_classifier_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.roles import Backbone
from pipeline.backbone.sampling import gathered, sample
from reward_models.functions import RewardArguments
from reward_models.learned import LearnedReward, score_rows
from reward_models.normalization import Normalization, read_normalization
from reward_models.pretrained import scorer


def learned_rewards(
    rewards: RewardArguments, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> list[LearnedReward]:
    """Add each reward adapter as a role of the backbone (`reward`, `reward_2`, ...), and return the rewards.

    Each role has a head of its own. Each reward is named after the folder of its adapter. With `normalize_scores`, the head
    in memory gives scores of deviation 1, and a value that starts from it has the same scale.

    Raises the errors of `read_adapter` and `read_normalization`.
    """
    learned = []
    for number, folder in enumerate(rewards.reward_adapter, 1):
        role = "reward" if number == 1 else f"reward_{number}"
        backbone.add_role(
            role, read_adapter(folder, needs_head=True, base=backbone.get_base_model(), tokenizer=tokenizer)
        )
        shift = 0.0
        if rewards.normalize_scores:
            scale = read_normalization(adapter_folder(folder))
            backbone.role_head(role).weight.data /= scale.std
            shift = scale.mean / scale.std
        learned.append(LearnedReward(backbone, tokenizer, role=role, name=Path(folder).absolute().name, shift=shift))
    return learned


def get_reward_adapter(
    folder: str,
    *,
    model: str | None = None,
    dtype: str | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> Callable:
    """Make a reward function of a reward adapter on another model than the policy's: a larger backbone, or an encoder.

    That model has a tokenizer of its own. So the decoded completions are scored, each as one that has ended.

    Args:
        folder: folder or hub id of the adapter.
        model: its base model; None is the one that the adapter names.
        dtype: the precision of the base; None is that of its files.
        batch_size: texts a pass.
        device: device of the model, such as cpu; None is that of training.

    Raises the errors of `load_pretrained` and `read_adapter`, or those of `read_classifier_adapter`.
    """
    found = adapter_folder(folder)
    if (found / WEIGHTS).is_file() and is_of_classifier(found, read_header(found / WEIGHTS)):
        classifier, own = read_classifier_adapter(folder, found, model=model, dtype=dtype)
        return scorer(classifier, own, str(Path(folder).absolute()), batch_size=batch_size, device=device)
    named = read_adapter_config(folder, found)["base_model_name_or_path"]
    base, tokenizer = load_pretrained(ModelConfig(model or named, dtype=dtype))
    adapter = read_adapter(folder, needs_head=True, base=base, tokenizer=tokenizer)
    with torch.random.fork_rng(devices=[]):  # peft draws weights, which the adapter's replace
        backbone = Backbone(base, adapter)  # the policy role is not used
        backbone.add_role("reward", adapter)
    backbone.requires_grad_(False).to(device or PartialState().device).eval()
    learned = LearnedReward(backbone, tokenizer, batch_size, name=Path(folder).absolute().name)

    def score(prompts: list, completions: list, **kwargs) -> list[float]:
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return learned(prompts, [row + [tokenizer.eos_token_id] for row in rows])

    score.__name__ = learned.__name__
    return score


def measure(
    backbone: Backbone,
    prompts: list,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    max_completion_length: int,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> Normalization:
    """Measure the mean and deviation of the reward role's scores on completions of the policy role.

    One completion is sampled for each prompt. Processes share the work.

    Raises:
        FloatingPointError: a score is not finite.
    """
    prompt_ids = tokenize_prompts(prompts, tokenizer)
    options: dict[str, Any] = {
        "max_completion_length": max_completion_length,
        "temperature": temperature,
        "batch_size": batch_size,
    }
    batches = sample(backbone, "policy", prompt_ids, tokenizer, **options, share_seed=(seed,))
    state = PartialState()
    total = -(-len(prompt_ids) // (batch_size * state.num_processes))
    name = "completions for the scale of the scores"
    with tqdm(batches, total=total, desc=name, unit="batch", disable=not state.is_main_process) as progress:
        parts = [(batch.first, batch.rows()) for batch in progress]
    (completions,) = gathered(parts)
    scores = score_rows(
        backbone.scores,
        [prompt + completion for prompt, completion in zip(prompt_ids, completions, strict=True)],
        pad_token_id=tokenizer.pad_token_id,
        batch_size=batch_size,
        device=backbone.get_base_model().device,
        share=True,
        bar="their scores",
    )
    if not np.isfinite(scores).all():
        raise FloatingPointError(
            "A score of the reward adapter on the SFT policy's completions is not finite, so the adapter cannot be used. "
            "Train it anew with a lower learning_rate."
        )
    return Normalization(float(np.mean(scores)), float(np.std(scores)), len(scores))
