"""Statistics over real tokens. `mask` is True on real tokens; other values never enter a result."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Return the mean of `values` where `mask` is True, both (B, T) -> (); 0 if no token is real."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def masked_sums(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "3"]:
    """Return count, sum and sum of squares of the real `values`, (B, T) -> (3,) in float64, which add up over processes."""
    real = values.masked_fill(~mask, 0).double()
    return torch.stack([mask.sum().double(), real.sum(), real.square().sum()])


def explained_variance(return_sums: Float[Tensor, "3"], error_sums: Float[Tensor, "3"]) -> Float[Tensor, ""]:
    """Return the share of the variance of the returns that the values explain: 1 - Var(R - V) / Var(R).

    1 is a perfect value function. 0 is one that knows no more than a constant. Below 0 it is worse than a constant.

    Args:
        return_sums, error_sums: the `masked_sums` of the returns R and of the errors R - V, over all processes.
    """
    count, total, squares = torch.stack([return_sums, error_sums], dim=1).unbind()
    variance, unexplained = (squares / count - (total / count).square()).clamp(min=1e-12).unbind()
    return torch.sub(1, unexplained / variance)


def whiten(
    values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], sums: Float[Tensor, "3"], *, shift_mean: bool = True
) -> Float[Tensor, "B T"]:
    """Return (values - mean) / std over real tokens, (B, T) -> (B, T); 0 on padding.

    `sums` are the `masked_sums` of the whole batch (all processes). Without `shift_mean` the mean is kept. The variance is
    the biased one, as in openai/lm-human-preferences, which removes the mean of advantages and keeps that of rewards.
    """
    count, total, squares = sums.unbind()
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0).to(values.dtype)
