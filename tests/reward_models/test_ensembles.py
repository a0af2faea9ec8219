"""`reward_models.ensembles`: the maths by hand, what an ensemble logs, and what a recipe may not combine."""

import math
from types import SimpleNamespace

import pytest
import torch
from jaxtyping import TypeCheckError
from shapes import checked

from reward_models import ensembles
from reward_models.calibration import reward_model_report
from reward_models.ensembles import (
    EnsembleReward,
    combine,
    disagreement,
    disagreement_in,
    ensemble_report,
    pair_disagreement,
)
from reward_models.functions import RewardArguments
from reward_models.learned import LearnedReward


# Two completions under three members. Deviations by hand: sqrt((1 + 1 + 4) / 3) = sqrt(2), and sqrt((4 + 1 + 9) / 3).
SCORES = torch.tensor([[1.0, 1.0, 4.0], [-2.0, 1.0, 3.0]], dtype=torch.float64)
SPREAD = [math.sqrt(2), math.sqrt(((-2 - 2 / 3) ** 2 + (1 - 2 / 3) ** 2 + (3 - 2 / 3) ** 2) / 3)]


@pytest.mark.parametrize(
    ("combination", "std_coef", "expected"),
    [
        ("mean", 1.0, [2, 2 / 3]),
        ("min", 1.0, [1, -2]),
        ("mean_minus_std", 1.0, [2 - SPREAD[0], 2 / 3 - SPREAD[1]]),
        ("mean_minus_std", 0.5, [2 - SPREAD[0] / 2, 2 / 3 - SPREAD[1] / 2]),
        ("mean_minus_std", 0.0, [2, 2 / 3]),
    ],
)
def test_scores_are_combined(combination, std_coef, expected):
    assert combine(SCORES, combination, std_coef=std_coef).tolist() == pytest.approx(expected)


def test_disagreement():
    assert disagreement(SCORES).tolist() == pytest.approx(SPREAD)
    assert disagreement(torch.ones(2, 4)).tolist() == [0, 0]
    assert disagreement(SCORES + torch.tensor([[7.0], [-7.0]])).tolist() == pytest.approx(SPREAD)  # of a completion


def test_disagreement_about_pairs_by_hand():
    """Margins 0 and log 3 are probabilities 1/2 and 3/4, whose deviation is 1/8; equal margins agree, whatever the zero."""
    log3 = torch.tensor(3.0).log().item()
    first = torch.tensor([[1.0, 5.0], [log3, 7.0], [50.0, -50.0]])
    second = torch.tensor([[0.0, 4.0], [0.0, 7.0], [-50.0, 50.0]])
    assert pair_disagreement(first, second).tolist() == pytest.approx([0.0, 0.125, 0.5])
    with pytest.raises(TypeCheckError):
        checked(pair_disagreement)(first, second[:2])


def test_an_unknown_combination_is_refused():
    with pytest.raises(ValueError, match="combination='median' is not one of mean, min, mean_minus_std"):
        combine(SCORES, "median")


@pytest.mark.parametrize("name", ["combine", "disagreement"])
def test_shapes(name):
    function = checked(getattr(ensembles, name))
    assert function(SCORES).shape == (2,)
    with pytest.raises(TypeCheckError):
        function(SCORES[0])


def test_an_ensembles_figures_by_hand():
    """Margins 2, -1, 1 and 0, 3, -3 have the means 1, 1, -1: two of three pairs are right, where each member has 2 and 1.5."""
    agreement, gaps = [1.0, 0.75, 0.5], [1.0, 2.0, 3.0]
    columns = {"agreement": agreement, "gaps": gaps}
    held_out = [{"margins": [2.0, -1.0, 1.0], **columns}, {"margins": [0.0, 3.0, -3.0], **columns}]
    found = ensemble_report(held_out)
    together = reward_model_report([1.0, 1.0, -1.0], **columns)
    assert {name: found[name] for name in together} == together and found["accuracy"] == pytest.approx(2 / 3)
    assert [member["accuracy"] for member in found["members"]] == pytest.approx([2 / 3, 1.5 / 3])
    assert [member["ece"] for member in found["members"]] == [reward_model_report(**one)["ece"] for one in held_out]
    assert found["disagreement"] == pytest.approx((1 + 2 + 2) / 3)
    assert found["unanimous"] == 0  # a margin of 0 prefers neither
    same = ensemble_report([held_out[0], {**held_out[0], "margins": [4.0, -0.5, 0.1]}])
    assert same["unanimous"] == 1


class Roles:
    """Stands for a backbone: the score of role i is i + 1 times the sum of a row's tokens."""

    training = True

    def __init__(self):
        self.calls = 0

    def member_scores(self, input_ids, attention_mask, roles):
        self.calls += 1
        assert not self.training
        factors = torch.tensor([1.0 + ["reward", "reward_2", "reward_3"].index(role) for role in roles])
        return (input_ids * attention_mask).sum(dim=1, keepdim=True) * factors

    def train(self, mode=True):
        self.training = mode

    def eval(self):
        self.training = False

    def get_base_model(self):
        return SimpleNamespace(device="cpu")


def ensemble(tokenizer, combination="mean", shifts=(0.0, 1.0, 2.0)):
    roles = Roles()
    members = [
        LearnedReward(roles, tokenizer, role=role, shift=shift, folder=f"runs/{role}")
        for role, shift in zip(("reward", "reward_2", "reward_3"), shifts, strict=True)
    ]
    return roles, EnsembleReward(members, "trio", combination)


def test_members_are_scored_together_and_each_has_its_own_zero(tokenizer):
    roles, reward = ensemble(tokenizer, "min")
    extra, metrics = {}, {}
    prompts, ids = ["", ""], [[5, 6], [7]]
    empty = sum(tokenizer("")["input_ids"])  # what a prompt without text adds
    scores = [[n * (total + empty) - n + 1 for n in (1, 2, 3)] for total in (11, 7)]
    found = reward(prompts=prompts, completion_ids=ids, log_extra=extra.__setitem__, log_metric=metrics.__setitem__)
    assert found == pytest.approx(list(map(min, scores)))
    assert roles.calls == 1 and roles.training
    spread = disagreement(torch.tensor(scores, dtype=torch.float64)).tolist()
    assert extra == {"trio/disagreement": pytest.approx(spread)}
    assert metrics == {"rewards/trio/disagreement": pytest.approx(sum(spread) / 2)}
    assert reward.adapters == {role: f"runs/{role}" for role in ("reward", "reward_2", "reward_3")}
    known = [{"reward": 1.0, "reward_2": 5.0, "reward_3": -4.0}, {"reward": 2.0, "reward_2": 1.0, "reward_3": 9.0}]
    assert reward(prompts=prompts, completion_ids=ids, known_scores=known) == [-6, 0] and roles.calls == 1
    part = [{"reward": 1.0}, {"reward": 2.0}]  # of one member alone: all are scored
    assert reward(prompts=prompts, completion_ids=ids, known_scores=part) == found and roles.calls == 2


def test_disagreement_of_logged_columns():
    assert disagreement_in({}) is None
    assert disagreement_in({"other": ["a"]}) is None
    assert disagreement_in({"a/disagreement": [1.0, 2.0], "other": [7, 7]}) == [1, 2]
    assert disagreement_in({"a/disagreement": [1.0, 2.0], "b/disagreement": [3.0, 6.0]}) == [2, 4]


TWO = {"reward_adapter": ["a", "b"], "normalize_scores": True}
REFUSED = {
    "unknown": ({**TWO, "reward_combination": "median"}, r"'median' is not one of mean, min, mean_minus_std"),
    "no adapter": (
        {"reward_funcs": "reward_models.rules.contains", "reward_combination": "mean"},
        r"reward_combination='mean' combines reward adapters\. Name them",
    ),
    "zeros that differ": (
        {**TWO, "reward_combination": "min", "normalize_scores": False},
        r"'min' compares the members' scores, and each member has a zero.*Set normalize_scores: true",
    ),
    "scales that differ": (
        {**TWO, "reward_combination": "mean_minus_std", "normalize_scores": False},
        r"'mean_minus_std' compares the members'",
    ),
    "a coefficient of nothing": (
        {**TWO, "reward_combination": "min", "reward_std_coef": 0.5},
        r"reward_std_coef=0\.5 has no effect without reward_combination: mean_minus_std",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_combined(options, message):
    with pytest.raises(ValueError, match=message):
        RewardArguments(**options)


def test_an_ensemble_has_one_weight():
    rewards = RewardArguments(**TWO, reward_funcs=["f"], reward_combination="min")
    rewards.check_weights([1.0, 2.0])
    with pytest.raises(ValueError, match=r"has 3 weights for 2 rewards, ensemble, f\. Give each"):
        rewards.check_weights([1.0, 2.0, 3.0])
