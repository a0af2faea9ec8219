"""PPO's two clipped losses, its KL estimate, and the loss of PTX. All arguments are (B, T); `mask` is True on real tokens."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.rl.masking import masked_mean


LARGEST = 80.0  # log-ratio in nats; exp of it is a float32, also times an advantage


def policy_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    weights: Float[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the clipped surrogate loss, and the share of tokens on which a clipped branch is taken.

        L = mean_t w_t max(-A_t * rho_t, -A_t * clamp(rho_t, 1 - clip, 1 + clip)),  rho_t = exp(logprobs - old_logprobs)

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7, negated to be minimised. Where another program sampled
    the completions, `weights` w come from `pipeline.rl.importance.importance_weights`. Without `weights` each w_t is 1.

    Args:
        clip: the clip range of the ratio.
        clip_high: the range above 1 alone, where it differs: Yu et al. 2025 (arXiv 2503.14476), section 3.1.
        dual_clip: bound of the ratio where the advantage is negative: the loss of such a token is at most -A_t * dual_clip.
            A token at that bound has no gradient. Ye et al. 2020 (arXiv 1912.09729), the dual clip.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0)
    # Where a clip bounds the loss, it is the same for any large ratio. exp(89) is infinite in float32, and its gradient would
    # be 0 times infinity. A negative advantage times an infinite ratio is an infinite loss, and ends training.
    unbounded = advantages < 0 if dual_clip is None else torch.zeros_like(mask)
    ratio = torch.exp(torch.where(unbounded, log_ratio, log_ratio.clamp(max=LARGEST)))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss, is_clipped = torch.max(plain, clipped), clipped > plain
    if dual_clip is not None:
        most = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
        loss, is_clipped = torch.min(loss, most), is_clipped | (loss > most)
    return masked_mean(loss if weights is None else loss * weights, mask), masked_mean(is_clipped.float(), mask)


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the clipped value loss, and the share of tokens on which the clipped branch was the larger.

        L = 1/2 mean_t max((V_t - R_t)^2, (clamp(V_t, V_old - clip, V_old + clip) - R_t)^2)

    From openai/baselines ppo2, also in openai/lm-human-preferences.
    """
    # Clear the padding before the square: if it is masked only afterwards, its values can make the gradient NaN.
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    bounded = torch.clamp(values, old_values - clip, old_values + clip)
    plain, clipped = (values - returns).square(), (bounded - returns).square()
    return 0.5 * masked_mean(torch.max(plain, clipped), mask), masked_mean((clipped > plain).float(), mask)


def approx_kl(
    logprobs: Float[Tensor, "B T"], old_logprobs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Estimate the KL of the policy from the policy that sampled, in nats a token: the mean of (log rho)^2 / 2.

    This is Schulman's k2: http://joschu.net/blog/kl-approx.html
    """
    return 0.5 * masked_mean((logprobs - old_logprobs).masked_fill(~mask, 0).square(), mask)


def text_loss(logprobs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Return the loss of PTX: the negative log-likelihood of texts, in nats a token.

    The mean is taken within each text and then over texts. Added to PPO's loss with a coefficient, it keeps the policy a
    good model of these texts while it optimises the reward: Ouyang et al. 2022 (arXiv 2203.02155), eq. 2. Each text has
    the same weight, so that the way batches are cut does not change the loss. A text without tokens has none; without any
    text the loss is 0.
    """
    tokens = mask.sum(dim=1)
    of_texts = -(logprobs.masked_fill(~mask, 0).sum(dim=1) / tokens.clamp(min=1)).mean()
    return of_texts * (len(tokens) / (tokens > 0).sum().clamp(min=1))
