"""PPO's two clipped losses and what may join them. All arguments are (B, T); `mask` is True on real tokens."""

import torch
from torch import Tensor

from pipeline.rl.masking import masked_mean


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate loss, and the share of tokens on which the clipped branch was the larger.

    L = mean_t w_t max(-A_t * rho_t, -A_t * clamp(rho_t, 1 - clip, 1 + clip)),  rho_t = exp(logprobs - old_logprobs)

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7, negated to be minimised. `weights` w are those of
    `pipeline.rl.importance.importance_weights` where the completions were sampled by another program; 1 without them.
    """
    ratio = torch.exp((logprobs - old_logprobs).masked_fill(~mask, 0))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.max(plain, clipped)
    return masked_mean(loss if weights is None else loss * weights, mask), masked_mean((clipped > plain).float(), mask)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float
) -> tuple[Tensor, Tensor]:
    """Clipped value loss, and the share of tokens on which the clipped branch was the larger.

    L = 1/2 mean_t max((V_t - R_t)^2, (clamp(V_t, V_old - clip, V_old + clip) - R_t)^2)

    From openai/baselines ppo2, also in openai/lm-human-preferences.
    """
    # Padding is cleared before the square: masked afterwards, what stands there could still make the gradient NaN.
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    bounded = torch.clamp(values, old_values - clip, old_values + clip)
    plain, clipped = (values - returns).square(), (bounded - returns).square()
    return 0.5 * masked_mean(torch.max(plain, clipped), mask), masked_mean((clipped > plain).float(), mask)


def approx_kl(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Schulman's k2 estimate of the KL of the policy from the one that sampled, nats a token: mean of (log rho)^2 / 2.

    http://joschu.net/blog/kl-approx.html
    """
    return 0.5 * masked_mean((logprobs - old_logprobs).masked_fill(~mask, 0).square(), mask)


def text_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """PTX: the negative log-likelihood of texts, in nats a token, averaged within each text and then over texts.

    Added to PPO's loss with a coefficient, it keeps the policy a model of these texts while it chases the reward:
    Ouyang et al. 2022 (arXiv 2203.02155), eq. 2. Each text weighs the same, so that batches may be cut anywhere.
    """
    return -(logprobs.masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()
