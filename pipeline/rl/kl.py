"""The KL of the policy from its reference, and the controller of the KL coefficient."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def kl_per_token(
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    estimator: str = "k1",
) -> Float[Tensor, "B T"]:
    """Return the sampled KL of the policy from the reference at each token, in nats, (B, T); 0 on padding.

    With x = logprobs - ref_logprobs: k1 = x is unbiased and can be negative. k3 = exp(-x) - 1 + x is unbiased, is never
    negative, and varies less (http://joschu.net/blog/kl-approx.html).
    """
    log_ratio = (logprobs - ref_logprobs).masked_fill(~mask, 0)
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, batch_size: int) -> float:
    """Return the KL coefficient after an update whose mean KL was `kl` nats a sequence.

        e = clip(kl / target - 1, -0.2, 0.2);  coefficient *= 1 + e * batch_size / horizon

    This is a proportional controller in log space: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2. `horizon` and
    `batch_size` count sequences.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * batch_size / horizon)
