"""Losses of a reward model on pairs of completions. Scores are (B,): one for each pair's `chosen`, one for its `rejected`.

The model is Bradley and Terry's (1952): P(chosen is preferred) = sigmoid(chosen - rejected). A label is the probability that
it is to give: 1 says that everybody prefers `chosen`, 0.5 is a tie, 0 says that everybody prefers `rejected`.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def soft_labels(agreement: Float[Tensor, " B"], *, label_smoothing: float = 0.0) -> Float[Tensor, " B"]:
    """Return the label of each pair.

    p = (1 - eps) a + eps (1 - a)

    With a = 1 it is the conservative label 1 - eps. It holds if each rater's word is turned round with probability eps. This
    is the `label_smoothing` of TRL's DPO; Szegedy et al. 2016 (arXiv 1512.00567), section 7, would call it 2 eps. For reward
    models: Wang et al. 2024 (arXiv 2401.06080).

    Args:
        agreement: share of raters who prefer the chosen one, a, from 0 to 1. A rater who is undecided counts half.
        label_smoothing: eps, from 0 to below 0.5.
    """
    return agreement + label_smoothing * (1 - 2 * agreement)


def preference_loss(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    labels: Float[Tensor, " B"] | None = None,
    margin: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """Return the cross-entropy of the preferences against their labels, in nats, the mean over the pairs.

    L = mean_i -p_i log sigmoid(d_i) - (1 - p_i) log sigmoid(-d_i),  d_i = chosen_i - rejected_i - margin_i

    Christiano et al. 2017 (arXiv 1706.03741), section 2.2.3, where a tie is a label of 0.5. Without labels each p_i is 1,
    and L is eq. 1 of Ouyang et al. 2022 (arXiv 2203.02155). The margin is that of Llama 2 (Touvron et al. 2023, arXiv
    2307.09288), eq. 2; each margin_i is 0 where none is given. With margins of 0, L is least at d = log(p / (1 - p)), where
    its gradient, (sigmoid(d) - p) / B, is 0.
    """
    gaps = chosen - rejected if margin is None else chosen - rejected - margin
    if labels is None:
        return -logsigmoid(gaps).mean()
    return -(labels * logsigmoid(gaps) + (1 - labels) * logsigmoid(-gaps)).mean()


def centering_loss(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """Return the mean square of the two scores' sum, which keeps scores near 0.

    L = mean_i (chosen_i + rejected_i)^2

    Eisenstein et al. 2023 (arXiv 2312.09244), eq. 2; TRL weighs it with `center_rewards_coefficient`. A preference does not
    depend on it.
    """
    return torch.square(chosen + rejected).mean()
