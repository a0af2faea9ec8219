"""`reward_models.losses`: values and gradients by hand and by finite differences, and TRL's loss where it has one."""

import inspect
from itertools import permutations
from math import exp, factorial, log

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from shapes import checked, wrong
from torch import tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from reward_models import losses
from reward_models.losses import (
    centering_loss,
    plackett_luce_loss,
    preference_loss,
    regression_loss,
    soft_labels,
)


def loss_of(gap: float, label: float, margin: float | None = None) -> float:
    """The loss of one pair whose scores are `gap` apart."""
    margins = None if margin is None else tensor([margin])
    return preference_loss(tensor([gap + 3.0]), tensor([3.0]), tensor([label]), margins).item()


def test_bradley_terry_by_hand():
    # sigmoid(log 3) = 3/4, sigmoid(0) = 1/2, sigmoid(-log 3) = 1/4
    chosen, rejected = tensor([1.0 + log(3), 2.0, 0.0]), tensor([1.0, 2.0, log(3)])
    expected = (log(4 / 3) + log(2) + log(4)) / 3
    assert preference_loss(chosen, rejected).item() == pytest.approx(expected)
    assert preference_loss(chosen, rejected, torch.ones(3)).item() == pytest.approx(expected)


def test_a_margin_by_hand():
    # The scores are 2 log 3 apart and must be log 3 apart: 3/4 is left.
    assert loss_of(2 * log(3), 1.0, log(3)) == pytest.approx(log(4 / 3))
    found = preference_loss(tensor([2 * log(3)]), tensor([0.0]), margin=tensor([log(3)]))
    assert found.item() == pytest.approx(log(4 / 3))


@pytest.mark.parametrize(
    ("gap", "label", "loss", "gradient"),
    [
        # P(chosen) = 3/4 in the first three. The gradient of the chosen score is P - label.
        (log(3), 1.0, log(4 / 3), -0.25),
        (log(3), 0.75, 0.75 * log(4 / 3) + 0.25 * log(4), 0.0),  # 3 of 4 raters: it is learned
        (log(3), 0.5, 0.5 * log(4 / 3) + 0.5 * log(4), 0.25),  # a tie draws the scores together
        (0.0, 0.5, log(2), 0.0),  # equal scores: a tie is learned
        (0.0, 0.0, log(2), 0.5),  # all prefer the rejected one
        (200.0, 1.0, 0.0, 0.0),
        (200.0, 0.9, 20.0, 0.1),  # far apart: the loss and its gradient are finite
        (-200.0, 0.9, 180.0, -0.9),
    ],
)
def test_soft_labels_by_hand(gap, label, loss, gradient):
    chosen, rejected = tensor([gap], requires_grad=True), tensor([0.0], requires_grad=True)
    found = preference_loss(chosen, rejected, tensor([label]))
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert chosen.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(-gradient, abs=1e-6)


def test_smoothed_labels_by_hand():
    agreement = tensor([1.0, 0.5, 0.75, 0.0])
    torch.testing.assert_close(soft_labels(agreement), agreement)
    # 0.8 of 0.75, and 0.2 of 0.25
    torch.testing.assert_close(soft_labels(agreement, label_smoothing=0.2), tensor([0.8, 0.5, 0.65, 0.2]))


def test_smoothing_is_that_of_dpo():
    """TRL's DPO: -(1 - eps) log sigmoid(d) - eps log sigmoid(-d), least where sigmoid(d) = 1 - eps."""
    label = soft_labels(torch.ones(1), label_smoothing=0.1).item()
    for gap in (-2.0, 0.3, 4.0):
        expected = 0.9 * log(1 + exp(-gap)) + 0.1 * log(1 + exp(gap))
        assert loss_of(gap, label) == pytest.approx(expected, rel=1e-5)
    best = loss_of(log(9), label)
    assert best < min(loss_of(log(9) - 0.1, label), loss_of(log(9) + 0.1, label))


def test_a_turned_pair_with_the_other_label_is_the_same():
    chosen, rejected, labels = tensor([0.3, -1.0]), tensor([0.9, 0.4]), tensor([0.7, 0.1])
    found = preference_loss(chosen, rejected, labels)
    torch.testing.assert_close(preference_loss(rejected, chosen, 1 - labels), found)
    torch.testing.assert_close(binary_cross_entropy_with_logits(chosen - rejected, labels), found)


def test_centering_by_hand():
    chosen = tensor([1.0, -2.0], requires_grad=True)
    found = centering_loss(chosen, tensor([2.0, 1.0]))
    found.backward()
    assert found.item() == 5.0  # (3^2 + 1^2) / 2
    torch.testing.assert_close(chosen.grad, tensor([3.0, -1.0]))


# ------------------------------------------------------------------------------------------------ rankings
def everything(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones(scores.shape, dtype=torch.bool)


def test_plackett_luce_by_hand():
    # Strengths 4, 2, 1: the best wins among 7 with 4/7, the second among 3 with 2/3. Two pairs: 3/4 and 1/2.
    scores = tensor([[log(4), log(2), 0.0], [log(3), 0.0, 99.0], [0.0, 0.0, float("nan")]])
    mask = tensor([[True, True, True], [True, True, False], [True, True, False]])
    expected = (log(7 / 4) + log(3 / 2) + log(4 / 3) + log(2)) / 3
    assert plackett_luce_loss(scores, mask).item() == pytest.approx(expected)
    assert plackett_luce_loss(scores[:1] + 5, mask[:1]).item() == pytest.approx(log(7 / 4) + log(3 / 2))  # no zero


def test_the_probabilities_of_all_orders_sum_to_one():
    """And the share of orders that begin with a completion is its softmax (Luce's choice)."""
    strengths = np.array([0.3, 2.0, 1.1, 0.6])
    probability = {}
    for order in permutations(range(4)):
        left, expected = list(order), 1.0
        for winner in order:
            expected *= strengths[winner] / strengths[left].sum()
            left.remove(winner)
        scores = tensor(np.log(strengths[list(order)])).unsqueeze(0)
        probability[order] = exp(-plackett_luce_loss(scores, everything(scores)).item())
        assert probability[order] == pytest.approx(expected, rel=1e-12)
    assert len(probability) == factorial(4) and sum(probability.values()) == pytest.approx(1, rel=1e-12)
    first = sum(p for order, p in probability.items() if order[0] == 2)
    assert first == pytest.approx(1.1 / 4.0, rel=1e-12)
    level = torch.zeros(1, 4)
    assert plackett_luce_loss(level, everything(level)).item() == pytest.approx(log(24))


def test_a_ranking_of_two_is_a_pair():
    chosen, rejected = NUMBERS[:2]
    ranked = torch.stack([chosen, rejected], dim=1)
    torch.testing.assert_close(plackett_luce_loss(ranked, everything(ranked)), preference_loss(chosen, rejected))


def test_the_order_of_a_ranking_counts():
    """Tell orders of three apart, unlike the sum over its pairs: 4, 2, 1 and 4, 1, 2 differ, and so do best and worst."""
    found = [
        plackett_luce_loss(tensor([[log(each) for each in strengths]]), torch.ones(1, 3, dtype=torch.bool)).item()
        for strengths in ((4, 2, 1), (4, 1, 2), (1, 2, 4))
    ]
    assert found == pytest.approx([log(7 / 4) + log(3 / 2), log(7 / 4) + log(3), log(7) + log(3)])


def test_padding_changes_neither_loss_nor_gradient():
    scores = tensor([[0.5, -1.0, 7.0, 7.0], [0.1, 0.2, 0.3, 0.4]], requires_grad=True)
    mask = tensor([[True, True, False, False], [True, True, True, True]])
    plackett_luce_loss(scores, mask).backward()
    own = [scores.detach()[:1, :2].clone().requires_grad_(), scores.detach()[1:].clone().requires_grad_()]
    (sum(plackett_luce_loss(each, everything(each)) for each in own) / 2).backward()
    torch.testing.assert_close(scores.grad[0], torch.cat([own[0].grad[0], torch.zeros(2)]))
    torch.testing.assert_close(scores.grad[1], own[1].grad[0])
    with torch.no_grad():
        scores[0, 2:] = float("nan")
    scores.grad = None
    plackett_luce_loss(scores, mask).backward()
    assert torch.isfinite(scores.grad).all() and scores.grad[0, 2:].tolist() == [0, 0]


def test_far_apart_scores_have_a_finite_loss():
    scores = tensor([[-200.0, 0.0, 200.0]], requires_grad=True)
    found = plackett_luce_loss(scores, everything(scores))
    found.backward()
    assert found.item() == pytest.approx(600.0)  # 400 for the best, 200 for the second
    torch.testing.assert_close(scores.grad, tensor([[-1.0, -1.0, 2.0]]))


# ------------------------------------------------------------------------------------------------ ratings
def test_regression_by_hand():
    scores = tensor([1.0, -2.0, 0.5], requires_grad=True)
    found = regression_loss(scores, tensor([0.0, -1.5, 0.5]))
    found.backward()
    assert found.item() == pytest.approx((1 + 0.25) / 3)
    torch.testing.assert_close(scores.grad, tensor([2.0, -1.0, 0.0]) / 3)


NUMBERS = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CASES = {
    "soft_labels": {"agreement": torch.full((5,), 0.7)},
    "preference_loss": {
        "chosen": torch.ones(5), "rejected": torch.zeros(5), "labels": torch.full((5,), 0.7), "margin": torch.ones(5)
    },
    "centering_loss": {"chosen": torch.ones(5), "rejected": torch.zeros(5)},
    "plackett_luce_loss": {"scores": torch.ones(5, 3), "mask": torch.ones(5, 3, dtype=torch.bool)},
    "regression_loss": {"scores": torch.ones(5), "ratings": torch.zeros(5)},
}  # fmt: skip


@pytest.mark.parametrize("labels", [None, NUMBERS[2].sigmoid()])
@pytest.mark.parametrize("margin", [None, NUMBERS[2]])
def test_gradients_match_finite_differences(labels, margin):
    chosen, rejected = NUMBERS[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: preference_loss(c, r, labels, margin), (chosen, rejected))
    assert torch.autograd.gradcheck(centering_loss, (chosen, rejected))


def test_gradients_of_rankings_and_ratings_match_finite_differences():
    scores = NUMBERS.clone().requires_grad_()
    mask = torch.arange(5) < tensor([[5], [2], [4]])
    assert torch.autograd.gradcheck(lambda of: plackett_luce_loss(of, mask), (scores,))
    assert torch.autograd.gradcheck(lambda of: regression_loss(of, NUMBERS[1]), (scores[0].detach().requires_grad_(),))


def test_every_loss_is_here():
    functions = {name for name, f in vars(losses).items() if inspect.isfunction(f) and f.__module__ == losses.__name__}
    assert functions == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_the_shapes_in_the_signature(name):
    function = checked(getattr(losses, name))
    function(**CASES[name])
    faults = list(wrong(getattr(losses, name), CASES[name]))
    assert len(faults) >= 3
    for argument, fault, value in faults:
        with pytest.raises(TypeCheckError):
            function(**CASES[name] | {argument: value})
            pytest.fail(f"{name} takes {argument} with {fault}")
