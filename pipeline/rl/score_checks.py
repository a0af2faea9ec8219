"""Check a reward model before PPO: the figures of the reward stage, and its scores of SFT's completions."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pipeline.backbone.roles import Backbone
from pipeline.rl.checks import BATCH, ROWS, Check, held, is_exact, padded, whole_pass
from pipeline.rl.config import PPOConfig
from reward_models.learned import score_rows


def reward_model_checks(metrics: dict[str, Any], args: PPOConfig) -> Iterator[Check]:
    """Check the figures that the reward stage measured on held-out pairs."""
    why = "Share of held-out pairs that the reward model orders as people do. 0.5 is chance."
    if "accuracy" not in metrics:
        note = (
            "The adapter's metrics.json is missing or has no accuracy: this reward model may be no better than chance."
        )
        yield Check("reward model's accuracy", None, f"at least {args.min_reward_accuracy:g}", "warning", note)
        return
    yield held(
        "reward model's accuracy",
        metrics["accuracy"],
        args.min_reward_accuracy,
        "refused",
        f"{why} Train it longer or on more pairs, or lower min_reward_accuracy.",
        least=True,
    )
    if "ece" not in metrics:
        return
    yield held(
        "reward model's calibration error",
        metrics["ece"],
        0.15,
        "warning",
        "Mean gap between how sure the model is and how often people agree. An overconfident model rewards small "
        "differences too much.",
    )


def score_checks(
    backbone: Backbone,
    role: str,
    prompt_rows: list[list[int]],
    completions: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
    progress: tqdm,
) -> Iterator[Check]:
    """Check a reward role's scores of the completions."""

    def score(ids: Tensor, mask: Tensor) -> Tensor:
        return backbone.scores(ids, mask, role)

    rows = [prompt + completion for prompt, completion in zip(prompt_rows, completions, strict=True)]
    device, pad_id = backbone.get_base_model().device, tokenizer.pad_token_id
    options = {"pad_token_id": pad_id, "device": device}
    scores = np.array(score_rows(score, rows, batch_size=BATCH, **options))
    progress.update(-(-len(rows) // BATCH) * whole_pass(args))
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    # From the shortest to the longest.
    few = sorted({by_length[round(i)] for i in np.linspace(0, len(rows) - 1, ROWS)})
    left = score(*padded([torch.tensor(rows[i]) for i in few], pad_id, "left", device)).cpu().numpy()
    alone = score_rows(score, [rows[i] for i in few], batch_size=1, **options)
    spread = float(scores.std())
    yield held(
        "scores vary on SFT completions",
        spread,
        1e-3,
        "refused",
        f"Standard deviation of the scores; their mean is {scores.mean():.3f}. If all are equal, there is nothing to learn.",
        least=True,
    )
    differences = np.abs([scores[few] - np.array(alone), left - np.array(alone)])
    yield held(
        "scores do not depend on batch and padding",
        float(differences.mean()) / max(1.0, spread),
        1e-3 if is_exact(args, backbone) else 0.1,
        "refused",
        "Mean difference between a text's score alone and its scores in batches padded at the right and at the left. The "
        "unit is the scores' standard deviation where that is above 1.",
    )
    lengths = np.array([len(row) for row in completions], dtype=float)
    related = float(np.corrcoef(lengths, scores)[0, 1]) if lengths.std() and spread else 0.0
    yield held(
        "scores are not lengths",
        abs(related),
        0.5,
        "warning",
        f"Size of the correlation of score and completion length ({related:+.2f}). A policy that optimises such a score "
        f"will write {'longer' if related > 0 else 'shorter'} texts before it writes better texts.",
    )
