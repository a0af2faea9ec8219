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
from pipeline.backbone.adapters import Adapter, adapter_folder, is_of_classifier, read_adapter
from pipeline.backbone.classifier_adapters import read_classifier_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.members import learned_of, members_of
from pipeline.backbone.roles import Backbone
from pipeline.backbone.sampling import gathered, sample
from reward_models.ensembles import EnsembleReward
from reward_models.functions import RewardArguments
from reward_models.learned import LearnedReward, score_rows
from reward_models.normalization import Normalization, read_normalization
from reward_models.pretrained import scorer


def learned_rewards(
    rewards: RewardArguments, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> list[LearnedReward]:
    """Add each reward adapter as a role of the backbone (`reward`, `reward_2`, ...), and return the rewards.

    Each role has a head of its own. Each reward is named after the folder of its adapter, or of its ensemble; one that
    `reward_combination` makes of all adapters is called `ensemble`. With `normalize_scores`, the head in memory gives scores
    of deviation 1, and a value that starts from it has the same scale.

    Raises the errors of `learned_of`, `read_adapter` and `read_normalization`, and:
        ValueError: two members of an ensemble are the same adapter.
    """
    learned: list[LearnedReward] = []
    number = 0
    for reward in learned_of(rewards):
        members, adapters = [], []
        for folder in reward.adapters:
            number += 1
            role = "reward" if number == 1 else f"reward_{number}"
            adapter = read_adapter(folder, needs_head=True, base=backbone.get_base_model(), tokenizer=tokenizer)
            backbone.add_role(role, adapter)
            shift = 0.0
            if rewards.normalize_scores:
                scale = read_normalization(adapter_folder(folder))
                backbone.role_head(role).weight.data /= scale.std
                shift = scale.mean / scale.std
            members.append(LearnedReward(backbone, tokenizer, role=role, name=reward.name, shift=shift, folder=folder))
            adapters.append(adapter)
        if reward.combination is None:
            learned += members
            continue
        check_different(adapters)
        count = 1 + sum(other.__name__ == reward.name for other in learned)
        name = reward.name if count == 1 else f"{reward.name}_{count}"  # as `Composite` names the second of a name
        learned.append(EnsembleReward(members, name, reward.combination, rewards.reward_std_coef))
    return learned


def check_different(adapters: list[Adapter]) -> None:
    """Check that no two members of an ensemble are the same adapter: they would always agree.

    Raises:
        ValueError: two are.
    """
    for number, one in enumerate(adapters):
        for other in adapters[:number]:
            if one.weights.keys() != other.weights.keys():
                continue
            if all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items()):
                raise ValueError(
                    f"{one.source} and {other.source} are the same adapter, and two members of an ensemble that always agree "
                    f"are one. Name adapters that were trained with different seeds, data or layers."
                )


def get_reward_adapter(
    folder: str,
    *,
    model: str | None = None,
    dtype: str | None = None,
    batch_size: int = 32,
    device: str | None = None,
    pad_token: str | None = None,
    normalize_scores: bool = False,
    reward_combination: str | None = None,
) -> Callable:
    """Make a reward function of a reward adapter on another model than the policy's: a larger backbone, or an encoder.

    That model has a tokenizer of its own. So the decoded completions are scored, each as one that has ended.

    Args:
        folder: folder or hub id of the adapter, or of an ensemble of adapters.
        model: its base model; None is the one that the adapter names.
        dtype: the precision of the base; None is that of its files.
        batch_size: texts a pass.
        device: device of the model, such as cpu; None is that of training.
        pad_token: the pad token that the adapter was trained with, where that is not the tokenizer's own.
        normalize_scores, reward_combination: as in a recipe.

    Raises the errors of `load_pretrained` and `learned_rewards`, or those of `read_classifier_adapter`.
    """
    found = adapter_folder(folder)
    if (found / WEIGHTS).is_file() and is_of_classifier(found, read_header(found / WEIGHTS)):
        classifier, own = read_classifier_adapter(folder, found, model=model, dtype=dtype)
        return scorer(classifier, own, str(Path(folder).absolute()), batch_size=batch_size, device=device)
    rewards = RewardArguments([folder], normalize_scores=normalize_scores, reward_combination=reward_combination)
    member = members_of(folder)[0]
    named = read_adapter_config(member, adapter_folder(member))["base_model_name_or_path"]
    base, tokenizer = load_pretrained(ModelConfig(model or named, dtype=dtype), pad_token=pad_token)
    with torch.random.fork_rng(devices=[]):  # peft draws weights, which the adapter's replace
        # The policy role is not used.
        backbone = Backbone(base, read_adapter(member, needs_head=True, base=base, tokenizer=tokenizer))
        (learned,) = learned_rewards(rewards, backbone, tokenizer)
    backbone.requires_grad_(False).to(device or PartialState().device).eval()
    learned.batch_size = batch_size

    def score(prompts: list, completions: list, **kwargs) -> list[float]:
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        logs = {name: kwargs[name] for name in ("log_extra", "log_metric") if name in kwargs}
        return learned(prompts, [row + [tokenizer.eos_token_id] for row in rows], **logs)

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
