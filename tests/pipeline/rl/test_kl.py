"""`pipeline.rl.kl`: both estimators by hand and in expectation, no trace of the padding, and the controller by hand."""

import math

import pytest
import torch
from torch import tensor

from pipeline.rl.advantages import token_rewards
from pipeline.rl.kl import adapted_kl_coef, kl_per_token


NAN, INF = math.nan, math.inf
MASK = tensor([[True, True, True], [True, False, False]])
LOGPROBS = tensor([[-1.0, -2.0, -3.0], [-1.0, NAN, INF]])
REFERENCE = tensor([[-2.0, -2.0, -1.0], [-1.0 - math.log(2), -INF, NAN]])


def test_k1_by_hand():
    # logprobs - reference: 1, 0, -2; log 2.
    expected = tensor([[1.0, 0.0, -2.0], [math.log(2), 0.0, 0.0]])
    torch.testing.assert_close(kl_per_token(LOGPROBS, REFERENCE, MASK), expected)


def test_k3_by_hand():
    # exp(-x) - 1 + x at x = 1: 1/e; 0: 0; -2: e^2 - 3; log 2: 1/2 - 1 + log 2.
    expected = tensor([[math.exp(-1), 0.0, math.exp(2) - 3], [math.log(2) - 0.5, 0.0, 0.0]])
    torch.testing.assert_close(kl_per_token(LOGPROBS, REFERENCE, MASK, estimator="k3"), expected)


def test_k3_of_a_small_ratio_is_not_lost_to_rounding():
    # x^2 / 2 for small x: 5e-9, where exp(-x) - 1 + x in float32 has steps of 6e-8.
    small = kl_per_token(tensor([[1e-4]]), tensor([[0.0]]), MASK[:1, :1], estimator="k3")
    assert small.item() == pytest.approx(5e-9, rel=0.05)


def test_both_are_the_kl_in_expectation():
    policy, reference = tensor([0.5, 0.3, 0.2]).double(), tensor([0.2, 0.2, 0.6]).double()
    # 0.5 log 2.5 + 0.3 log 1.5 + 0.2 log (1/3)
    kl = 0.5 * math.log(2.5) + 0.3 * math.log(1.5) - 0.2 * math.log(3)
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    for estimator in ("k1", "k3"):
        each = kl_per_token(policy.log()[None], reference.log()[None], everywhere, estimator=estimator)
        assert (each[0] * policy).sum().item() == pytest.approx(kl)


@pytest.mark.parametrize("junk", [-7.0, 1e30, NAN, INF, -INF])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_padding_changes_nothing(estimator, junk):
    clean = [x.masked_fill(~MASK, 0) for x in (LOGPROBS, REFERENCE)]
    expected = kl_per_token(*clean, MASK, estimator=estimator)
    rewards = token_rewards(tensor([1.0, 2.0]), *clean, MASK, kl_coef=0.5, kl_estimator=estimator)
    for places in ((0,), (1,), (0, 1)):
        dirty = [x.masked_fill(~MASK, junk) if i in places else x for i, x in enumerate(clean)]
        assert torch.equal(kl_per_token(*dirty, MASK, estimator=estimator), expected)
        found = token_rewards(tensor([1.0, 2.0]), *dirty, MASK, kl_coef=0.5, kl_estimator=estimator)
        assert torch.equal(found, rewards)
        assert torch.equal(found[~MASK], torch.zeros(2))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # at the target
        (6.6, 0.1 * (1 + 0.1 * 512 / 10_000)),  # a tenth above: e = 0.1
        (5.4, 0.1 * (1 - 0.1 * 512 / 10_000)),
        (600.0, 0.1 * (1 + 0.2 * 512 / 10_000)),  # e is held at 0.2
        (0.0, 0.1 * (1 - 0.2 * 512 / 10_000)),
        (-3.0, 0.1 * (1 - 0.2 * 512 / 10_000)),
    ],
)
def test_controller_by_hand(kl, expected):
    found = adapted_kl_coef(0.1, kl, target=6.0, horizon=10_000, batch_size=512)
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_controller_settles_at_its_target():
    """In a world where the KL is inversely proportional to the coefficient."""
    coefficient = 1.0
    for _ in range(300):
        coefficient = adapted_kl_coef(coefficient, 1 / coefficient, target=10.0, horizon=400, batch_size=64)
    assert 1 / coefficient == pytest.approx(10, rel=1e-3)
