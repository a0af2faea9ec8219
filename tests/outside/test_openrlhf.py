"""Facts from the tests of OpenRLHF/OpenRLHF (README.md names them) as inputs for ours."""

from math import exp

import pytest
import torch
from torch import tensor

from pipeline.rl.importance import disagreement, importance_weights
from pipeline.rl.kl import kl_per_token
from pipeline.rl.losses import approx_kl, policy_loss, text_loss
from pipeline.rl.masking import masked_mean
from tests.outside.pieces import minibatches


def weighted(batches: list[dict], accumulation: int = 1) -> float:
    """Return what the pieces of a step add up to, each with the mean over its tokens of `returns` as its loss."""
    losses = [masked_mean(batch.returns, batch.completion_mask) * batch.share for batch in batches]
    return (sum(losses) / accumulation).item()


LOSS = tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0], [7.0, 0.0, 0.0]])
MASK = tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()


def test_processes_weigh_by_their_tokens():
    """Five tokens in one process, one in another; the backend averages their losses: the mean over six, 22 / 6."""
    each = [
        weighted(minibatches(MASK[rows], pieces=1, of_all=[6], processes=2, returns=LOSS[rows]))
        for rows in (slice(2), slice(2, 3))
    ]
    assert masked_mean(LOSS, MASK).item() == pytest.approx(22 / 6)
    assert sum(each) / 2 == pytest.approx(22 / 6)
    assert each == pytest.approx([15 / 6 * 2, 7 / 6 * 2])


def test_pieces_of_a_step_weigh_by_their_tokens():
    """Two tokens in one piece and five in the other: 28 / 7, and not the mean of 3 / 2 and 25 / 5."""
    loss = tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 4.0, 5.0], [6.0, 7.0, 0.0]])
    mask = tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()
    batches = minibatches(mask, pieces=2, accumulation=2, returns=loss)
    assert weighted(batches, accumulation=2) == pytest.approx(4)
    plain = sum(masked_mean(batch.returns, batch.completion_mask).item() for batch in batches) / 2
    assert plain == pytest.approx(3.25)


def test_texts_weigh_the_same_whatever_their_length():
    """Means of 2, 3 and 8: 13 / 3; so they do where two processes have two of them and one."""
    loss = tensor([[1.0, 3.0, 9.0], [2.0, 4.0, 0.0], [8.0, 0.0, 0.0]])
    mask = tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0]]).bool()
    assert text_loss(-loss, mask).item() == pytest.approx(13 / 3)
    parts = [text_loss(-loss[rows], mask[rows]).item() for rows in (slice(2), slice(2, 3))]
    assert (2 * parts[0] + parts[1]) / 3 == pytest.approx(13 / 3)


LOGPROBS = tensor([[-0.20, -0.40, -0.10], [-0.70, -0.30, -0.20], [-0.60, -0.10, -0.50]])
LOG_RATIOS = tensor([[0.03, -0.04, 0.01], [0.02, 0.05, -0.03], [0.04, 0.0, -0.02]])
ADVANTAGES = tensor([[1.0, -0.5, 0.0], [0.3, -1.2, 0.5], [1.5, 0.0, -0.7]])
HOLED = tensor([[1, 1, 0], [1, 1, 1], [1, 0, 1]]).bool()  # the third row has a hole


def test_policy_loss_of_all_and_of_two_processes():
    """No ratio leaves 1 ± 0.2, so each of the seven tokens adds -A * ratio."""
    terms = [
        [-1.0 * exp(0.03), 0.5 * exp(-0.04), -0.3 * exp(0.02), 1.2 * exp(0.05), -0.5 * exp(-0.03)],
        [-1.5 * exp(0.04), 0.7 * exp(-0.02)],
    ]
    old = LOGPROBS - LOG_RATIOS
    loss, share = policy_loss(LOGPROBS, old, ADVANTAGES, HOLED, clip=0.2)
    assert loss.item() == pytest.approx((sum(terms[0]) + sum(terms[1])) / 7, abs=1e-6) and share.item() == 0
    each = [
        policy_loss(LOGPROBS[rows], old[rows], ADVANTAGES[rows], HOLED[rows], clip=0.2)[0].item()
        for rows in (slice(2), slice(2, 3))
    ]
    assert each == pytest.approx([sum(terms[0]) / 5, sum(terms[1]) / 2], abs=1e-6)
    assert (5 * each[0] + 2 * each[1]) / 7 == pytest.approx(loss.item(), abs=1e-6)


def test_the_samplers_logprobs_do_not_enter_the_kl_of_the_policy():
    """New minus old is 0.1 and -0.3; old minus sampled is 1 for both tokens: a weight of e, within 0.1 and 10."""
    new, old, sampled = tensor([[-0.2, -0.4]]), tensor([[-0.3, -0.1]]), tensor([[-1.3, -1.1]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert kl_per_token(new, old, mask).mean().item() == pytest.approx(-0.1)  # theirs has the other sign
    assert approx_kl(new, old, mask).item() == pytest.approx((0.01 + 0.09) / 4)
    weights = importance_weights(old, sampled, mask, mode="token_truncate", clip_min=0.1, clip_max=10.0)
    torch.testing.assert_close(weights, torch.full((1, 2), exp(1)))
    found = disagreement(old, sampled, mask)
    assert found["difference"].item() == pytest.approx(1) and found["ratio"].item() == pytest.approx(exp(1))
    loss, _ = policy_loss(new, old, torch.ones(1, 2), mask, clip=0.2, weights=weights)
    # Ratios e^0.1, and e^-0.3, which is below 0.8 and so is clipped only where the advantage is negative.
    assert loss.item() == pytest.approx(-exp(1) * (exp(0.1) + exp(-0.3)) / 2, rel=1e-6)


def test_a_kl_is_not_clamped():
    far, zero, mask = tensor([[100.0]]), tensor([[0.0]]), tensor([[True]])
    assert kl_per_token(far, zero, mask).item() == 100
    assert kl_per_token(far, zero, mask, estimator="k3").item() == pytest.approx(99)  # e^-100 - 1 + 100
    assert approx_kl(far, zero, mask).item() == 5000  # half of the square
    loss, share = policy_loss(far, zero, torch.ones(1, 1), mask, clip=0.2)
    assert loss.item() == pytest.approx(-1.2) and share.item() == 1
