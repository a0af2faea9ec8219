"""Measure how far the sampler and the trainer disagree, and correct for it with importance weights.

One program samples the completions (`generate` with its cache, or vLLM). Another learns from them (a pass over whole
sequences). Both compute the logprobs of the same policy, but rounding makes them differ. All tensors are (B, T), and `mask`
is True on real tokens. A sampled logprob is NaN where the sampler did not report it; it then counts as no difference.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.rl.masking import masked_mean


CLIP = 0.2  # PPO's own clipping would act on ratios beyond 1 ± this
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def log_ratios(
    logprobs: Float[Tensor, "B T"], sampled_logprobs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Return log(trained policy / sampling policy) of each token, in nats, (B, T); 0 on padding."""
    differences = logprobs.float() - sampled_logprobs.float()
    return differences.masked_fill(~mask | sampled_logprobs.isnan(), 0)


def importance_weights(
    logprobs: Float[Tensor, "B T"],
    sampled_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> Float[Tensor, "B T"]:
    """Return the weights of the tokens' policy loss that correct for the sampler, (B, T).

    The weight is w = pi(tokens) / mu(tokens), where pi is the trained policy and mu the sampler. The expectation of w * f
    under mu is then the expectation of f under pi. In the modes `token_*` each token has its own ratio. In the modes
    `sequence_*` all tokens of a completion have the product of their ratios. `*_truncate` moves a ratio beyond `clip_min`
    or `clip_max` to that bound (Espeholt et al. 2018, arXiv 1802.01561; Yao et al. 2025,
    fengyao.notion.site/off-policy-rl). `*_mask` sets it to 0. None means no bound. The names and the arithmetic are those
    of TRL's GRPOTrainer (`vllm_importance_sampling_*`).
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


def disagreement(
    logprobs: Float[Tensor, "B T"], sampled_logprobs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> dict[str, Float[Tensor, ""]]:
    """Return how far the sampled and the rescored logprobs of the real tokens differ.

    Returns:
        `difference` and `largest`: mean and largest absolute difference of a token, in nats. `ratio`: mean importance
        ratio of a token, 1 in expectation. `outside`: share of tokens whose ratio is beyond 1 ± 0.2. Each is ().
    """
    logs = log_ratios(logprobs, sampled_logprobs, mask)
    return {
        "difference": masked_mean(logs.abs(), mask),
        "largest": logs.abs().max(),
        "ratio": masked_mean(logs.exp(), mask),
        "outside": masked_mean(((logs.exp() - 1).abs() > CLIP).float(), mask),
    }
