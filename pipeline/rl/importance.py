"""What the sampler and the trainer disagree about, and its correction by importance weights.

Completions are sampled by one program (`generate` with its cache, or vLLM) and learned from by another (a pass over whole
sequences). Both compute the logprobs of one policy, and rounding makes them differ. All tensors are (B, T), `mask` is True
on real tokens, and a sampled logprob of NaN is one that the sampler did not tell: it counts as no difference.
"""

import torch
from torch import Tensor

from pipeline.rl.masking import masked_mean


CLIP = 0.2  # ratios beyond 1 ± this are those that PPO's own clipping would act on
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def log_ratios(logprobs: Tensor, sampled_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return log(policy as it is trained / policy as it sampled) of each token, in nats, (B, T); 0 on padding."""
    differences = logprobs.float() - sampled_logprobs.float()
    return differences.masked_fill(~mask | sampled_logprobs.isnan(), 0)


def importance_weights(
    logprobs: Tensor,
    sampled_logprobs: Tensor,
    mask: Tensor,
    *,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> Tensor:
    """Return the weight of each token's policy loss that corrects for the sampler, (B, T).

    The weight is w = pi(tokens) / mu(tokens), where pi is the policy as it is trained and mu the sampler: an expectation
    under mu of w * f is one under pi of f. In the modes `token_*` each token has a ratio of its own, in `sequence_*` all
    tokens of a completion have the product of theirs. `*_truncate` brings ratios beyond `clip_min` and `clip_max` to
    these bounds (Espeholt et al. 2018, arXiv 1802.01561; Yao et al. 2025, fengyao.notion.site/off-policy-rl), `*_mask`
    sets them to 0. A bound of None bounds nothing. The names and the arithmetic are those of TRL's GRPOTrainer
    (`vllm_importance_sampling_*`).
    """
    logs = log_ratios(logprobs, sampled_logprobs, mask)
    level, _, constraint = mode.partition("_")
    if level == "sequence":
        logs = logs.sum(dim=1, keepdim=True).expand_as(logs)
    ratios = logs.exp()
    if constraint == "truncate":
        return ratios.clamp(min=clip_min, max=clip_max) if (clip_min, clip_max) != (None, None) else ratios
    low, high = -torch.inf if clip_min is None else clip_min, torch.inf if clip_max is None else clip_max
    return ratios.masked_fill((ratios < low) | (ratios > high), 0)


def disagreement(logprobs: Tensor, sampled_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return how far apart the sampled and the rescored logprobs of the real tokens are.

    Returns:
        `difference` and `largest`: mean and largest absolute difference of a token, in nats; `ratio`: mean importance
        ratio of a token, 1 in expectation; `outside`: share of tokens whose ratio is beyond 1 ± 0.2. Each ().
    """
    logs = log_ratios(logprobs, sampled_logprobs, mask)
    return {
        "difference": masked_mean(logs.abs(), mask),
        "largest": logs.abs().max(),
        "ratio": masked_mean(logs.exp(), mask),
        "outside": masked_mean(((logs.exp() - 1).abs() > CLIP).float(), mask),
    }
