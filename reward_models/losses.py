"""Losses of a reward model on pairs, rankings and ratings of completions.

Scores of pairs are (B,): one for each pair's `chosen`, one for its `rejected`. The model is Bradley and Terry's (1952):
P(chosen is preferred) = sigmoid(chosen - rejected). A label is the probability that it is to give: 1 says that everybody
prefers `chosen`, 0.5 is a tie, 0 says that everybody prefers `rejected`.

Scores of rankings are (B, K), and their model is Plackett's and Luce's, of which Bradley and Terry's is the case K = 2.
"""

import torch
from jaxtyping import Bool, Float
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


def plackett_luce_loss(scores: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, ""]:
    """Return the negative log-likelihood of rankings, in nats, the mean over the rankings.

        L = mean_i -sum_k log(exp(s_ik) / sum_(j >= k) exp(s_ij))

    The best completion wins among all, the second among the others, and so on (Luce 1959; Plackett 1975). It is the K-wise
    maximum likelihood of Zhu et al. 2023 (arXiv 2301.11270), section 4. A ranking of two is a pair, and L its
    `preference_loss`. At equal scores L is log K!, since all orders are as likely.

    Args:
        scores: scores of the completions of each ranking, the best first.
        mask: True on completions; False on the padding at the end of shorter rankings.
    """
    places = scores.shape[1]
    left = mask.unsqueeze(1) & torch.ones(places, places, dtype=torch.bool, device=scores.device).triu()
    of_left = scores.unsqueeze(1).masked_fill(~left, -torch.inf).logsumexp(dim=-1)  # -inf where no completion is left
    return torch.where(mask, of_left - scores, 0.0).sum(dim=1).mean()


def regression_loss(scores: Float[Tensor, " B"], ratings: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """Return the mean square of the differences between scores and ratings.

        L = mean_i (s_i - r_i)^2

    Ratings are those of people, of mean 0 and deviation 1. L is then the share of their variance that is not explained.
    """
    return torch.square(scores - ratings).mean()
