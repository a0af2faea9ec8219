"""`pipeline.rl.advantages`: rewards and advantages by hand, the estimator's two limits, and no trace of the padding."""

import math

import pytest
import torch

from pipeline.rl.advantages import gae, token_rewards


NAN, INF = math.nan, math.inf
JUNK = [-7.0, 1e30, NAN, INF, -INF]
MASK = torch.tensor([[True, True, True], [True, True, False]])


def random_batch(rows: int = 4, columns: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two tensors of random numbers, and rows of lengths 2, 3, 4 and 5."""
    first, second = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return first, second, torch.arange(columns) < torch.arange(columns - rows + 1, columns + 1).unsqueeze(1)


def test_token_rewards_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, NAN]])
    reference = torch.tensor([[-2.0, -2.0, -1.0], [-3.0, -1.0, INF]])
    rewards = token_rewards(torch.tensor([10.0, -3.0]), logprobs, reference, MASK, kl_coef=0.5)
    # Row 0: log-ratios 1, 0, -2 cost -0.5, 0, +1, and 10 comes to the third token: -0.5, 0, 11.
    # Row 1: log-ratios 2, 0 cost -1, 0, and -3 comes to the second: -1, -3, and nothing on the padding.
    assert rewards.tolist() == [[-0.5, 0.0, 11.0], [-1.0, -3.0, 0.0]]


def test_score_lands_on_the_last_real_token():
    mask = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
    same = torch.zeros(3, 3)
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0]), same, same, mask, kl_coef=1.0)
    assert rewards.tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 3]]


def test_leaving_the_reference_costs():
    # The policy is e times likelier than the reference to say this: one nat at 0.1 a nat.
    likelier = token_rewards(torch.zeros(1), torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), MASK[:1, :1], kl_coef=0.1)
    assert likelier.item() == pytest.approx(-0.1)
    rarer = token_rewards(torch.zeros(1), torch.tensor([[-2.0]]), torch.tensor([[-1.0]]), MASK[:1, :1], kl_coef=0.1)
    assert rarer.item() == pytest.approx(0.1)


def test_rewards_of_a_row_add_up_to_score_minus_kl():
    logprobs, reference, mask = random_batch()
    scores = torch.tensor([1.0, -2.0, 0.5, 0.0])
    rewards = token_rewards(scores, logprobs, reference, mask, kl_coef=0.2)
    for row, length in enumerate((2, 3, 4, 5)):
        kl = sum(logprobs[row, t].item() - reference[row, t].item() for t in range(length))
        assert rewards[row].sum().item() == pytest.approx(scores[row].item() - 0.2 * kl)


def test_a_row_without_tokens_gets_nothing():
    mask = torch.tensor([[False, False], [True, False]])
    rewards = token_rewards(torch.tensor([5.0, 6.0]), torch.ones(2, 2), torch.zeros(2, 2), mask, kl_coef=0.5)
    assert rewards.tolist() == [[0, 0], [5.5, 0]]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("other", JUNK)
def test_padding_does_not_reach_token_rewards(junk, other):
    logprobs, reference, mask = random_batch()
    scores = torch.arange(4.0)
    rewards = token_rewards(scores, logprobs, reference, mask, kl_coef=0.3)
    dirty = (logprobs.masked_fill(~mask, junk), reference.masked_fill(~mask, other))
    assert torch.equal(token_rewards(scores, *dirty, mask, kl_coef=0.3), rewards)
    assert torch.equal(rewards[~mask], torch.zeros(6))


def test_gae_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, NAN]])
    values = torch.tensor([[2.0, 4.0, 6.0], [1.0, 2.0, INF]])
    advantages, returns = gae(rewards, values, MASK, gamma=0.5, lam=0.5)
    # gamma * lam = 0.25.
    # Row 0, from the end: delta = 4 - 6 = -2, A = -2; delta = 2 + 0.5*6 - 4 = 1, A = 1 + 0.25*(-2) = 0.5;
    #                      delta = 1 + 0.5*4 - 2 = 1, A = 1 + 0.25*0.5 = 1.125.
    # Row 1, from the end: delta = 1 - 2 = -1, A = -1; delta = 3 + 0.5*2 - 1 = 3, A = 3 + 0.25*(-1) = 2.75.
    assert advantages.tolist() == [[1.125, 0.5, -2.0], [2.75, -1.0, 0.0]]
    # A + V: 1.125 + 2, 0.5 + 4, -2 + 6; 2.75 + 1, -1 + 2.
    assert returns.tolist() == [[3.125, 4.5, 4.0], [3.75, 1.0, 0.0]]


def test_returns_with_a_lambda_of_their_own():
    rewards, values, mask = random_batch()
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5, value_lam=1.0)
    assert torch.equal(advantages, gae(rewards, values, mask, gamma=0.9, lam=0.5)[0])
    assert torch.equal(returns, gae(rewards, values, mask, gamma=0.9, lam=1.0)[1])
    # With lambda 1 the returns are the discounted rewards to go, whatever the values.
    expected = sum(0.9**t * rewards[3, t].item() for t in range(5))
    assert returns[3, 0].item() == pytest.approx(expected)


def test_lambda_one_is_return_to_go_minus_value():
    rewards, values, mask = random_batch()
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    for row, length in enumerate((2, 3, 4, 5)):
        for t in range(length):
            to_go = sum(rewards[row, t:length].tolist())
            assert returns[row, t].item() == pytest.approx(to_go)
            assert advantages[row, t].item() == pytest.approx(to_go - values[row, t].item())


def test_lambda_zero_is_the_temporal_difference():
    rewards, values, mask = random_batch()
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    for row, length in enumerate((2, 3, 4, 5)):
        for t in range(length):
            following = values[row, t + 1].item() if t + 1 < length else 0.0
            error = rewards[row, t].item() + 0.9 * following - values[row, t].item()
            assert advantages[row, t].item() == pytest.approx(error)


def test_right_values_leave_no_advantage():
    # Rewards 1, 2, 4 at gamma 0.5 are worth 1 + 0.5*4 = 3, 2 + 0.5*4 = 4 and 4; whatever lambda is.
    for lam in (0.0, 0.3, 1.0):
        rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[3.0, 4.0, 4.0]])
        advantages, returns = gae(rewards, values, MASK[:1], gamma=0.5, lam=lam)
        assert advantages.tolist() == [[0, 0, 0]]
        assert returns.tolist() == values.tolist()


def test_returns_are_advantages_plus_values():
    rewards, values, mask = random_batch()
    advantages, returns = gae(rewards, values, mask, gamma=0.97, lam=0.8)
    assert torch.equal(returns[mask], (advantages + values)[mask])


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("other", JUNK)
def test_padding_does_not_reach_gae(junk, other):
    rewards, values, mask = random_batch()
    clean = gae(rewards, values, mask, gamma=0.97, lam=0.8)
    dirty = gae(rewards.masked_fill(~mask, junk), values.masked_fill(~mask, other), mask, gamma=0.97, lam=0.8)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[~mask], torch.zeros(6, dtype=torch.float64))


def test_a_row_is_worth_the_same_alone():
    first, second, mask = random_batch()
    scores = torch.arange(4.0)
    rewards = token_rewards(scores, first, second, mask, kl_coef=0.3)
    advantages, returns = gae(rewards, first, mask, gamma=0.97, lam=0.8)
    for row, length in enumerate((2, 3, 4, 5)):
        cut = (slice(row, row + 1), slice(0, length))  # its padding is cut off too
        alone = token_rewards(scores[cut[0]], first[cut], second[cut], mask[cut], kl_coef=0.3)
        assert torch.equal(alone, rewards[cut])
        alone = gae(rewards[cut], first[cut], mask[cut], gamma=0.97, lam=0.8)
        assert torch.equal(alone[0], advantages[cut])
        assert torch.equal(alone[1], returns[cut])


def test_arguments_are_left_as_they_were():
    rewards, values, mask = random_batch()
    before = rewards.clone(), values.clone()
    gae(rewards, values, mask, gamma=1.0, lam=0.9)
    token_rewards(torch.ones(4), rewards, values, mask, kl_coef=0.1)
    assert torch.equal(rewards, before[0]) and torch.equal(values, before[1])
