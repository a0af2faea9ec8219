"""Turn scores into rewards, advantages and returns.

There are B completions of at most T tokens. `mask` (B, T) is True on real tokens. Real tokens stand at the left of each
row and padding at the right. The values under the padding change nothing.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.rl.kl import kl_per_token


def final_scores(
    scores: Float[Tensor, " B"],
    ended: Bool[Tensor, " B"],
    *,
    missing_eos_penalty: float | None,
    clip_range: list[float] | None,
) -> Float[Tensor, " B"]:
    """Return the scores that PPO rewards, (B,): first penalised where a completion has not `ended`, then clipped."""
    if missing_eos_penalty is not None:
        scores = scores - missing_eos_penalty * ~ended
    return scores.clamp(*clip_range) if clip_range else scores


def token_rewards(
    scores: Float[Tensor, " B"],
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
) -> Float[Tensor, "B T"]:
    """Return the reward of each token: the KL penalty, plus the score at the last real token.

        r_t = -kl_coef * kl_t + [t is the last real token] * score,  kl_t as in `pipeline.rl.kl.kl_per_token`

    Ziegler et al. 2019 (arXiv 1909.08593), eq. 2, with the penalty spread over tokens as in Stiennon et al. 2020.

    Args:
        scores: (B,), one for each completion.
        logprobs, ref_logprobs: (B, T), those of the policy that sampled and of the reference, in nats.

    Returns:
        (B, T), 0 on padding.
    """
    rewards = -kl_coef * kl_per_token(logprobs, ref_logprobs, mask, estimator=kl_estimator)
    last = (mask.sum(dim=1) - 1).clamp(min=0)
    scores = torch.where(mask.any(dim=1), scores, 0)
    return rewards.scatter_add(1, last.unsqueeze(1), scores.unsqueeze(1).to(rewards.dtype))


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
    value_lam: float | None = None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Return advantages and returns by generalised advantage estimation.

        delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma * lam * A_{t+1}
        return_t = A_t + V(s_t)

    Schulman et al. 2016 (arXiv 1506.02438), eqs. 11 and 16. The state after the last real token is terminal: its value
    and its advantage are 0.

    Args:
        rewards, values: (B, T); values[:, t] is the value of the state before token t.
        value_lam: lambda of the returns alone, where it differs: Yuan et al. 2025 (arXiv 2503.01491), decoupled GAE.

    Returns:
        advantages and returns, each (B, T), 0 on padding.
    """
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(values)
    following_value = following_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * following_advantage
        following_value, following_advantage = values[:, t], advantages[:, t]
    if value_lam is None or value_lam == lam:
        return advantages, advantages + values
    return advantages, gae(rewards, values, mask, gamma=gamma, lam=value_lam)[1]
