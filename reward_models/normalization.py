"""Scores in units of the SFT policy: mean 0 and deviation 1 on its completions (Ziegler et al. 2019, section 2.1).

A reward model is trained on differences, so its scale and zero are arbitrary, and with them what a KL coefficient
means. The two numbers are stored beside the adapter, not in its head: the head keeps its calibration.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.prompts import tokenize_prompts
from pipeline.backbone.roles import Backbone
from pipeline.backbone.sampling import gathered, sample
from pipeline.runs.folders import adapter_folder, read_json, write_json
from reward_models.learned import score_rows


FILE = "score_normalization.json"


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of a reward adapter's scores on completions of the SFT policy."""

    mean: float
    std: float
    completions: int

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / FILE, asdict(self))


def read_normalization(folder: str) -> Normalization:
    """What `pipeline.reward` stored beside a reward adapter (a folder or a hub id).

    Raises:
        ValueError: there is none, or its numbers are of no use.
    """
    path = adapter_folder(folder) / FILE
    if not path.is_file():
        raise ValueError(
            f"normalize_scores: {folder} has no {FILE}. Train the reward model with --sft_adapter, which measures its "
            f"scores on that policy's completions, or set normalize_scores: false."
        )
    try:
        found = Normalization(**read_json(path))
    except TypeError as error:
        raise ValueError(f"{path}: it must hold mean, std and completions; measure them anew.") from error
    known = all(isinstance(number, (int, float)) for number in (found.mean, found.std))  # null: it was not finite
    if not known or not np.isfinite([found.mean, found.std]).all() or found.std <= 0:
        raise ValueError(f"{path}: mean {found.mean} and std {found.std} are no scale of scores; measure them anew.")
    return found


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
    """Sample a completion to each prompt as the policy role, and score it as the reward role; processes share the work."""
    prompt_ids = tokenize_prompts(prompts, tokenizer)
    options = {"max_completion_length": max_completion_length, "temperature": temperature, "batch_size": batch_size}
    batches = sample(backbone, "policy", prompt_ids, tokenizer, **options, share_seed=(seed,))
    (completions,) = gathered([(batch.first, batch.rows()) for batch in batches])
    scores = score_rows(
        backbone.scores,
        [prompt + chosen for prompt, chosen in zip(prompt_ids, completions, strict=True)],
        pad_token_id=tokenizer.pad_token_id,
        batch_size=batch_size,
        device=backbone.get_base_model().device,
        share=True,
    )
    if not np.isfinite(scores).all():
        raise FloatingPointError(
            "A score of the reward adapter on the SFT policy's completions is not finite: the adapter is of no use. Train it "
            "anew with a lower learning_rate."
        )
    return Normalization(float(np.mean(scores)), float(np.std(scores)), len(scores))
