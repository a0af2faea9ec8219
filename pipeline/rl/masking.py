"""Statistics over real tokens. `mask` is True on real tokens; what stands elsewhere never enters a result."""

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask`, both (B, T) -> (). 0 when nothing is real."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def masked_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of `values` (B, T) where `mask` -> (3,) in float64: they add up over processes."""
    real = values.masked_fill(~mask, 0).double()
    return torch.stack([mask.sum().double(), real.sum(), real.square().sum()])


def whiten(values: Tensor, mask: Tensor, sums: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(values - mean) / std over real tokens, (B, T) -> (B, T); 0 on padding. Without `shift_mean` the mean stays.

    `sums` are `masked_sums` of the whole batch (all processes). The variance is the biased one, as in
    openai/lm-human-preferences, which whitens advantages with the mean removed and rewards with the mean kept.
    """
    count, total, squares = sums
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0).to(values.dtype)
