"""Combine the scores of several reward models into one, and say how far they disagree.

A policy finds what one reward model scores too high. Models that were trained apart err in different places, so what all of
them score high is more likely to be good (Coste et al. 2023, arXiv 2310.02743; Eisenstein et al. 2023, arXiv 2312.09244).
Members that share a backbone share errors too, and an ensemble does not remove those.

A preference fixes scores only up to a constant, so each member has a zero of its own. Before scores are compared, that zero
has to go. Eisenstein et al. pull each pair's scores towards 0 in training, which is `center_rewards_coefficient`. Here each
member's scores are brought to mean 0 and deviation 1 on completions of the same policy (`reward_models.normalization`), so
that no member decides by its scale alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models.calibration import reward_model_report
from reward_models.functions import COMBINATIONS
from reward_models.learned import LearnedReward, score_prompts


DISAGREEMENT = "/disagreement"  # end of the name of a column and of a figure


def combine(scores: Float[Tensor, "B M"], combination: str = "mean", *, std_coef: float = 1.0) -> Float[Tensor, " B"]:
    """Return one score for each completion, of M members.

        mean:            mean_m s_m
        min:             min_m s_m
        mean_minus_std:  mean_m s_m - c std_m s_m

    Coste et al. 2023 call `min` worst-case optimisation. Their uncertainty-weighted optimisation subtracts c times the
    variance. Here it is the deviation, which has the unit of a score.

    Raises:
        ValueError: the combination is not known.
    """
    if combination == "mean":
        return scores.mean(dim=1)
    if combination == "min":
        return scores.amin(dim=1)
    if combination == "mean_minus_std":
        return scores.mean(dim=1) - std_coef * disagreement(scores)
    raise ValueError(f"combination={combination!r} is not one of {', '.join(COMBINATIONS)}.")


def disagreement(scores: Float[Tensor, "B M"]) -> Float[Tensor, " B"]:
    """Return the deviation of the M members' scores of each completion: sqrt(mean_m (s_m - mean_m s_m)^2)."""
    return scores.std(dim=1, correction=0)


def pair_disagreement(first: Float[Tensor, "B M"], second: Float[Tensor, "B M"]) -> Float[Tensor, " B"]:
    """Return how far M members disagree about pairs, from their scores of both completions.

    It is the deviation over the members of the probability that the first is better, sigmoid(s_1 - s_2), so from 0 to 0.5.
    Members' zeros play no part. Pairs on which it is large are those to ask people about (Christiano et al. 2017, arXiv
    1706.03741, section 2.2.4, which takes the variance).
    """
    return disagreement((first - second).sigmoid())


def disagreement_in(extra: dict[str, list]) -> list[float] | None:
    """Return the disagreement of each row among the columns that reward functions logged; None without an ensemble.

    With several ensembles it is the mean of theirs.
    """
    columns = [values for name, values in extra.items() if name.endswith(DISAGREEMENT)]
    return torch.tensor(columns, dtype=torch.float64).mean(dim=0).tolist() if columns else None


def ensemble_report(held_out: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of an ensemble, and of each member, on the same held-out pairs.

    A pair's margin is the mean of the members' margins, so that members' zeros play no part.

    Args:
        held_out: `margins`, `agreement` and `gaps` of each member, as `reward_model_report` takes them.

    Returns:
        The figures of `reward_model_report`, and `members` (accuracy and ece of each), `disagreement` (mean deviation of the
        members' margins of a pair, in the unit of a score) and `unanimous` (share of the pairs on whose winner all agree).
    """
    margins = torch.tensor([member["margins"] for member in held_out], dtype=torch.float64).T  # (pairs, M)
    of_members = [reward_model_report(**member) for member in held_out]
    return {
        **reward_model_report(**held_out[0] | {"margins": combine(margins).tolist()}),
        "members": [{name: member[name] for name in ("accuracy", "ece")} for member in of_members],
        "disagreement": disagreement(margins).mean().item(),
        "unanimous": ((margins > 0).all(dim=1) | (margins < 0).all(dim=1)).double().mean().item(),
    }


class EnsembleReward(LearnedReward):
    """Score completions with several reward roles of one backbone, in one pass through the layers that they share.

    It logs `rewards/<name>/disagreement`, the mean over a batch, and a column for the table of completions.
    """

    def __init__(self, members: list[LearnedReward], name: str, combination: str = "mean", std_coef: float = 1.0):
        first = members[0]
        super().__init__(first.backbone, first.tokenizer, first.batch_size, role=first.role, name=name)
        self.members, self.combination, self.std_coef = members, combination, std_coef

    @property
    def adapters(self) -> dict[str, str | None]:
        """Return the role and the adapter's name of each member."""
        return {role: folder for member in self.members for role, folder in member.adapters.items()}

    def __call__(
        self,
        prompts: list,
        completion_ids: list[list[int]],
        known_scores: list[dict] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """Return the combined score of each completion; use the members' scores in `known_scores` if they are there."""
        scores = self.member_scores(prompts, completion_ids, known_scores)
        spread = disagreement(scores)
        if log_extra is not None:
            log_extra(self.__name__ + DISAGREEMENT, spread.tolist())
        if log_metric is not None:
            log_metric(f"rewards/{self.__name__}{DISAGREEMENT}", spread.mean().item())
        return combine(scores, self.combination, std_coef=self.std_coef).tolist()

    def member_scores(
        self, prompts: list, completion_ids: list[list[int]], known_scores: list[dict] | None = None
    ) -> Float[Tensor, "B M"]:
        """Return each member's score of each completion, with the member's own mean taken off."""
        roles = list(self.adapters)
        if known_scores and set(roles) <= known_scores[0].keys():
            rows = [[row[role] for role in roles] for row in known_scores]
        else:
            rows = score_prompts(self, prompts, completion_ids, roles)
        shifts = torch.tensor([member.shift for member in self.members], dtype=torch.float64)
        return torch.tensor(rows, dtype=torch.float64) - shifts
