"""`pipeline.rl.importance`: what sampler and trainer disagree about, by hand, and its correction."""

import math

import pytest
import torch

from pipeline.rl.importance import MODES, disagreement, importance_weights, log_ratios
from pipeline.rl.losses import policy_loss


NAN = math.nan
MASK = torch.tensor([[True, True, False], [True, True, True]])
SAMPLED = torch.tensor([[-1.0, -2.0, NAN], [-1.0, NAN, -3.0]])
# Ratios of the real tokens: 2 and 1/2; 4, unknown (1) and 1/10.
LOGPROBS = SAMPLED.nan_to_num(-9.0) + torch.tensor([[2.0, 0.5, 7.0], [4.0, 7.0, 0.1]]).log()
PLAIN = {"clip_min": None, "clip_max": None}


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_log_ratios_by_hand():
    close(log_ratios(LOGPROBS, SAMPLED, MASK).exp(), [[2.0, 0.5, 1.0], [4.0, 1.0, 0.1]])


@pytest.mark.parametrize(
    ("mode", "bounds", "expected"),
    [
        ("token_truncate", PLAIN, [[2.0, 0.5, 1.0], [4.0, 1.0, 0.1]]),
        ("token_truncate", {"clip_min": 0.25, "clip_max": 3.0}, [[2.0, 0.5, 1.0], [3.0, 1.0, 0.25]]),
        ("token_mask", {"clip_min": 0.25, "clip_max": 3.0}, [[2.0, 0.5, 1.0], [0.0, 1.0, 0.0]]),
        ("token_mask", {"clip_min": None, "clip_max": 3.0}, [[2.0, 0.5, 1.0], [0.0, 1.0, 0.1]]),
        ("sequence_truncate", {"clip_min": 0.5, "clip_max": None}, [[1.0] * 3, [0.5] * 3]),
        ("sequence_mask", PLAIN, [[1.0] * 3, [0.4] * 3]),
        ("sequence_mask", {"clip_min": 0.5, "clip_max": 3.0}, [[1.0] * 3, [0.0] * 3]),
    ],
)
def test_importance_weights_by_hand(mode, bounds, expected):
    close(importance_weights(LOGPROBS, SAMPLED, MASK, mode=mode, **bounds), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bounds", [(None, 3.0), (0.3, 1.5), (0.2, None)])
def test_weights_are_those_of_trl(mode, bounds):
    """The arithmetic of GRPOTrainer 1.16, as it stands in `_generate_and_score_completions`."""
    low, high = bounds
    torch.manual_seed(0)
    sampled = -torch.rand(6, 5)
    logprobs, mask = sampled + 0.7 * torch.randn(6, 5), torch.rand(6, 5) > 0.3
    logs = torch.nan_to_num((logprobs - sampled) * mask, nan=0.0)
    ratio = torch.exp(logs.sum(dim=-1, keepdim=True) if mode.startswith("sequence") else logs)
    if mode.endswith("truncate"):
        theirs = torch.clamp(ratio, min=low, max=high)
    else:
        floor, ceiling = -math.inf if low is None else low, math.inf if high is None else high
        theirs = ratio.masked_fill((ratio < floor) | (ratio > ceiling), 0.0)
    ours = importance_weights(logprobs, sampled, mask, mode=mode, clip_min=low, clip_max=high)
    torch.testing.assert_close(ours, theirs.expand_as(ours))


def test_a_wrong_sampler_is_corrected():
    """The expected gradient under another sampler is that under the policy, with weights alone."""
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5], requires_grad=True)
    other, score = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([1.0, -2.0, 0.5, 3.0])
    policy = logits.log_softmax(-1)

    def gradient(shares, weights):
        """Of the loss over all four tokens, each as often as `shares` says."""
        tokens = torch.arange(4).unsqueeze(0)
        logprobs, advantages = policy[tokens], (score * shares * 4).unsqueeze(0)
        loss = policy_loss(
            logprobs, logprobs.detach(), advantages, torch.ones(1, 4, dtype=torch.bool), clip=0.2, weights=weights
        )[0]
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    right = gradient(policy.detach().exp(), None)
    options = {"mode": "token_truncate", "clip_min": None, "clip_max": None}
    mask = torch.ones(1, 4, dtype=torch.bool)
    weights = importance_weights(policy.detach().unsqueeze(0), other.log().unsqueeze(0), mask, **options)
    torch.testing.assert_close(gradient(other, weights), right)
    assert not torch.allclose(gradient(other, None), right, atol=0.1)


def test_disagreement_by_hand():
    found = {name: x.item() for name, x in disagreement(LOGPROBS, SAMPLED, MASK).items()}
    logs = [math.log(2), math.log(2), math.log(4), 0, math.log(10)]
    assert found == pytest.approx(
        {"difference": sum(logs) / 5, "largest": math.log(10), "ratio": (2 + 0.5 + 4 + 1 + 0.1) / 5, "outside": 4 / 5}
    )
