"""`pipeline.rl.losses`: values and gradients by hand and by finite differences, and no trace of the padding."""

import math
from functools import partial

import pytest
import torch
from torch import tensor

from pipeline.rl.advantages import gae, token_rewards
from pipeline.rl.losses import approx_kl, policy_loss, text_loss, value_loss
from pipeline.rl.masking import masked_mean, masked_sums, whiten


NAN, INF = math.nan, math.inf
MASK = tensor([[True, True, True], [True, False, False]])
OLD = tensor([[-1.0, -2.0, -0.5], [-3.0, NAN, -INF]])


def random_batch(rows: int = 4, columns: int = 5) -> tuple[torch.Tensor, ...]:
    """Three tensors of random numbers with a spread of 0.5, and rows of lengths 2, 3, 4 and 5."""
    generator = torch.Generator().manual_seed(3)
    numbers = 0.5 * torch.randn(3, rows, columns, generator=generator, dtype=torch.float64)
    return *numbers, torch.arange(columns) < torch.arange(columns - rows + 1, columns + 1).unsqueeze(1)


def logprobs_at(ratios: list[list[float]]) -> torch.Tensor:
    """Log-probabilities whose ratios to OLD are `ratios` on the real tokens."""
    return (OLD + tensor(ratios).log()).requires_grad_()


def test_policy_loss_by_hand():
    logprobs = logprobs_at([[1.5, 0.5, 1.0], [0.9, 1.0, 1.0]])
    advantages = tensor([[2.0, 2.0, -1.0], [-4.0, NAN, INF]])
    loss, share = policy_loss(logprobs, OLD, advantages, MASK, clip=0.2)
    # A = 2 at ratio 1.5:  max(-3.0, -2 * 1.2) = -2.4, clipped
    # A = 2 at ratio 0.5:  max(-1.0, -2 * 0.8) = -1.0
    # A = -1 at ratio 1:   1.0
    # A = -4 at ratio 0.9: 3.6. Sum 1.2, over four tokens.
    assert loss.item() == pytest.approx(0.3)
    assert share.item() == 0.25
    loss.backward()
    # -A * ratio / 4 where it is not clipped: 0; -1.0 / 4; 1.0 / 4; 3.6 / 4.
    torch.testing.assert_close(logprobs.grad, tensor([[0.0, -0.25, 0.25], [0.9, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "clipped"),
    [
        (1.0, 1.5, -1.2, 0.0, 1.0),  # good, and likelier already: no further
        (1.0, 0.5, -0.5, -0.5, 0.0),  # good, yet rarer: back
        (-1.0, 1.5, 1.5, 1.5, 0.0),  # bad, yet likelier: back
        (-1.0, 0.5, 0.8, 0.0, 1.0),  # bad, and rarer already: no further
    ],
)
def test_clipping_stops_only_what_goes_further(advantage, ratio, loss, gradient, clipped):
    logprobs = tensor([[math.log(ratio)]], requires_grad=True)
    found, share = policy_loss(logprobs, tensor([[0.0]]), tensor([[advantage]]), MASK[:1, :1], clip=0.2)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert share.item() == clipped


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "clipped"),
    [
        (1.0, 1.5, -1.4, 0.0, 1.0),  # good: up to 1 + 0.4
        (1.0, 1.3, -1.3, -1.3, 0.0),  # beyond 1 + 0.2, which is not the bound here
        (1.0, 0.5, -0.5, -0.5, 0.0),
        (-1.0, 0.5, 0.8, 0.0, 1.0),  # bad: down to 1 - 0.2
        (-1.0, 2.0, 2.0, 2.0, 0.0),
        (-2.0, 9.0, 6.0, 0.0, 1.0),  # bad, and far likelier: as at a ratio of 3
        (1.0, 9.0, -1.4, 0.0, 1.0),  # the bound of 3 is for negative advantages alone
    ],
)
def test_clip_ranges_of_their_own_by_hand(advantage, ratio, loss, gradient, clipped):
    logprobs = tensor([[math.log(ratio)]], requires_grad=True)
    found, share = policy_loss(
        logprobs, tensor([[0.0]]), tensor([[advantage]]), MASK[:1, :1], clip=0.2, clip_high=0.4, dual_clip=3.0
    )
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert share.item() == clipped


def test_a_dual_clip_bounds_what_the_first_clip_leaves():
    """A token at both bounds counts once, and padding never."""
    logprobs = logprobs_at([[9.0, 9.0, 1.0], [0.1, 9.0, 9.0]])
    advantages = tensor([[-1.0, 1.0, 1.0], [-1.0, NAN, -INF]])
    loss, share = policy_loss(logprobs, OLD, advantages, MASK, clip=0.2, dual_clip=2.0)
    # 2.0; -1.2; -1.0; 0.8. Sum 0.6, over four tokens, of which three are clipped.
    assert loss.item() == pytest.approx(0.15)
    assert share.item() == 0.75
    loss.backward()
    torch.testing.assert_close(logprobs.grad, tensor([[0.0, 0.0, -0.25], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("log_ratio", [80.0, 89.0, 1e4])
@pytest.mark.parametrize(("advantage", "loss"), [(2.0, -2.4), (0.0, 0.0)])
def test_a_ratio_beyond_float32_that_is_clipped_has_a_gradient_of_0(advantage, loss, log_ratio):
    logprobs = tensor([[log_ratio, 0.0]], requires_grad=True)
    mask, advantages = tensor([[True, True]]), tensor([[advantage, 0.0]])
    found, share = policy_loss(logprobs, tensor([[0.0, 0.0]]), advantages, mask, clip=0.2)
    found.backward()
    assert found.item() == pytest.approx(loss / 2)
    assert logprobs.grad.tolist() == [[0.0, 0.0]]
    assert share.item() == (0.5 if advantage else 0.0)


@pytest.mark.parametrize("log_ratio", [70.0, 85.0, 89.0, 1e4])
def test_a_dual_clip_bounds_a_ratio_beyond_float32(log_ratio):
    logprobs = tensor([[log_ratio]], requires_grad=True)
    found, _ = policy_loss(logprobs, tensor([[0.0]]), tensor([[-2.0]]), tensor([[True]]), clip=0.2, dual_clip=3.0)
    found.backward()
    assert found.item() == 6.0 and logprobs.grad.item() == 0


@pytest.mark.parametrize("log_ratio", [70.0, 85.0, 89.0])
def test_a_ratio_that_is_not_clipped_is_never_bounded(log_ratio):
    """Let a bad token become likelier. Beyond float32 its loss is infinite, which ends training, and not NaN."""
    logprobs = tensor([[log_ratio]], requires_grad=True)
    found, _ = policy_loss(logprobs, tensor([[0.0]]), tensor([[-2.0]]), tensor([[True]]), clip=0.2)
    found.backward()
    exact = 2 * math.exp(log_ratio) if log_ratio < 88 else INF
    assert found.item() == pytest.approx(exact) and logprobs.grad.item() == pytest.approx(exact)


def test_first_epoch_is_the_plain_policy_gradient():
    old, advantages, _, mask = random_batch()
    logprobs = old.clone().requires_grad_()
    loss, share = policy_loss(logprobs, old, advantages, mask, clip=0.2)
    loss.backward()
    # 2 + 3 + 4 + 5 = 14 real tokens.
    assert loss.item() == pytest.approx(-sum(advantages[mask].tolist()) / 14)
    assert share.item() == 0
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages / 14, 0))


def test_value_loss_by_hand():
    values = tensor([[1.5, 0.5, 1.1], [3.0, NAN, NAN]], requires_grad=True)
    old = tensor([[1.0, 1.0, 1.0], [0.0, INF, NAN]])
    returns = tensor([[2.0, 1.0, 2.0], [0.0, NAN, INF]])
    loss, share = value_loss(values, old, returns, MASK, clip=0.2)
    # V 1.5 from 1.0, R 2: 0.5^2 = 0.25, bounded to 1.2: 0.8^2 = 0.64, the larger
    # V 0.5 from 1.0, R 1: 0.5^2 = 0.25, bounded to 0.8: 0.2^2 = 0.04
    # V 1.1 from 1.0, R 2: within bounds, 0.9^2 = 0.81
    # V 3.0 from 0.0, R 0: 3^2 = 9, bounded to 0.2: 0.04. Half of (0.64 + 0.25 + 0.81 + 9) / 4 = 10.7 / 8.
    assert loss.item() == pytest.approx(1.3375)
    assert share.item() == 0.25


def test_value_gradient_by_hand():
    # The tokens of the test above. (V - R) / 4 where the bound does not hold: 0, -0.5 / 4, -0.9 / 4, 3 / 4.
    values = tensor([[1.5, 0.5, 1.1], [3.0, 0.0, 0.0]], requires_grad=True)
    old, returns = tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), tensor([[2.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    value_loss(values, old, returns, MASK, clip=0.2)[0].backward()
    torch.testing.assert_close(values.grad, tensor([[0.0, -0.125, -0.225], [0.75, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient", "clipped"),
    [
        (0.5, 1.0, 0.32, 0.0, 1.0),  # has moved up 0.5, towards 1: as if at 0.2, and no further
        (0.5, -1.0, 1.125, 1.5, 0.0),  # has moved up, away from -1: back
        (-0.5, -1.0, 0.32, 0.0, 1.0),  # has moved down, towards -1: as if at -0.2
        (-0.5, 1.0, 1.125, -1.5, 0.0),  # has moved down, away from 1: back
        (0.1, 1.0, 0.405, -0.9, 0.0),  # within bounds
    ],
)
def test_value_is_held_only_where_it_goes_further(value, target, loss, gradient, clipped):
    values = tensor([[value]], requires_grad=True)
    found, share = value_loss(values, tensor([[0.0]]), tensor([[target]]), MASK[:1, :1], clip=0.2)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(gradient)
    assert share.item() == clipped


def test_right_values_have_no_loss():
    values, _, _, mask = random_batch()
    loss, share = value_loss(values, values, values, mask, clip=0.2)
    assert loss.item() == 0 and share.item() == 0


def test_approx_kl_by_hand():
    # Log-ratios 1, -2, 0 and 3: half of (1 + 4 + 0 + 9) / 4.
    found = approx_kl(OLD + tensor([[1.0, -2.0, 0.0], [3.0, 0.0, 0.0]]), OLD, MASK)
    assert found.item() == pytest.approx(1.75)


LOSSES = {"policy": partial(policy_loss, clip=0.2), "value": partial(value_loss, clip=0.2)}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_match_finite_differences(name):
    new, old, target, mask = random_batch()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, old, target, mask)[0], new.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_finite_differences_see_both_branches(name):
    # Otherwise the test above would show little.
    new, old, target, mask = random_batch()
    assert 0.1 < LOSSES[name](new, old, target, mask)[1].item() < 0.9


@pytest.mark.parametrize("junk", [-7.0, 1e30, NAN, INF, -INF])
@pytest.mark.parametrize("places", [(0,), (1,), (2,), (0, 1, 2)], ids=["new", "old", "target", "all"])
@pytest.mark.parametrize("name", [*LOSSES, "kl"])
def test_padding_changes_no_loss(name, places, junk):
    *clean, mask = random_batch()
    dirty = [x.masked_fill(~mask, junk) if i in places else x for i, x in enumerate(clean)]
    if name == "kl":
        assert torch.equal(approx_kl(*dirty[:2], mask), approx_kl(*clean[:2], mask))
    else:
        for a, b in zip(LOSSES[name](*dirty, mask), LOSSES[name](*clean, mask), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["policy", "value"])
@pytest.mark.parametrize("junk", [-7.0, 1e30, NAN, INF, -INF])
def test_padding_has_no_gradient_and_changes_none(name, junk):
    *clean, mask = random_batch()
    gradients = []
    for filler in (0.0, junk):
        new, old, target = (x.masked_fill(~mask, filler) for x in clean)
        LOSSES[name](new.requires_grad_(), old, target, mask)[0].backward()
        gradients.append(new.grad)
    assert torch.equal(gradients[1], gradients[0])
    assert torch.equal(gradients[1][~mask], torch.zeros(6, dtype=torch.float64))
    assert gradients[1][mask].count_nonzero() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_has_the_same_terms_alone(name):
    new, old, target, mask = random_batch()
    whole = LOSSES[name](new.requires_grad_(), old, target, mask)
    whole[0].backward()
    totals = torch.zeros(2, dtype=torch.float64)
    for row, length in enumerate((2, 3, 4, 5)):
        cut = (slice(row, row + 1), slice(0, length))  # its padding is cut off too
        alone = new[cut].detach().requires_grad_()
        terms = LOSSES[name](alone, old[cut], target[cut], mask[cut])
        terms[0].backward()
        torch.testing.assert_close(alone.grad * length, new.grad[cut] * 14)
        totals += tensor([terms[0].item(), terms[1].item()], dtype=torch.float64) * length
    torch.testing.assert_close(totals / 14, tensor([x.item() for x in whole], dtype=torch.float64))


def test_nothing_real_is_no_loss():
    new, old, target, mask = random_batch()
    nothing = torch.zeros_like(mask)
    for loss in LOSSES.values():
        found = loss(new.requires_grad_(), old, target, nothing)
        assert [x.item() for x in found] == [0, 0]
        found[0].backward()
        assert not new.grad.any()
    assert approx_kl(new, old, nothing).item() == 0


# ------------------------------------------------------------------------------------------------ texts
TEXT = tensor([[-1.0, -2.0, -6.0], [-4.0, NAN, INF]])


def test_text_loss_by_hand():
    # (1 + 2 + 6) / 3 = 3 in the first text, 4 in the second: 3.5, each text weighing the same.
    assert text_loss(TEXT, MASK).item() == 3.5


def test_text_loss_of_parts_is_that_of_the_whole():
    logprobs, _, _, mask = random_batch()
    parts = [text_loss(x, m) for x, m in zip(logprobs.split(1), mask.split(1), strict=True)]
    torch.testing.assert_close(sum(parts) / 4, text_loss(logprobs, mask))


@pytest.mark.parametrize("junk", [-7.0, 1e30, NAN, INF, -INF])
def test_padding_changes_no_text_loss_and_no_gradient(junk):
    clean, _, _, mask = random_batch()
    losses, gradients = [], []
    for filler in (0.0, junk):
        logprobs = clean.masked_fill(~mask, filler).requires_grad_()
        losses.append(text_loss(logprobs, mask))
        losses[-1].backward()
        gradients.append(logprobs.grad)
    assert torch.equal(losses[1], losses[0]) and torch.equal(gradients[1], gradients[0])
    # Rows of 2, 3, 4 and 5 tokens, each a quarter of the loss.
    expected = torch.where(mask, -1 / (4 * mask.sum(dim=1, keepdim=True)), 0).double()
    torch.testing.assert_close(gradients[0], expected)


def test_a_text_without_a_token_to_predict_is_left_out_of_the_mean():
    logprobs = tensor([[NAN, NAN], [-1.0, -3.0], [-4.0, NAN]], requires_grad=True)
    mask = tensor([[False, False], [True, True], [True, False]])
    loss = text_loss(logprobs, mask)
    loss.backward()
    assert loss.item() == 3.0  # of 2 and 4
    assert logprobs.grad.tolist() == [[0.0, 0.0], [-0.25, -0.25], [-0.5, 0.0]]
    assert text_loss(tensor([[NAN]]), tensor([[False]])).item() == 0.0


# ------------------------------------------------------------------------------------------------ all together
def test_from_scores_to_the_loss_by_hand():
    """Two completions of three tokens and one, through every function of the maths."""
    logprobs, reference = (
        tensor([[-6.0, -1.0, -1.0], [-1.0, NAN, NAN]]),
        tensor([[-1.0, -3.0, -2.0], [-3.0, NAN, NAN]]),
    )
    old_values = tensor([[1.0, 2.0, 0.5], [1.0, NAN, NAN]])
    # logprobs - reference: -5, 2, 1; 2. At half a point a nat: 2.5, -1, -0.5; -1. The scores come to the last token.
    rewards = token_rewards(tensor([4.0, 1.0]), logprobs, reference, MASK, kl_coef=0.5)
    assert rewards.tolist() == [[2.5, -1.0, 3.5], [0.0, 0.0, 0.0]]
    # gamma 1, lambda 0.5, from the end: delta 3.5 - 0.5 = 3; delta -1 + 0.5 - 2 = -2.5, A = -2.5 + 0.5 * 3 = -1;
    # delta 2.5 + 2 - 1 = 3.5, A = 3.5 + 0.5 * (-1) = 3. The other row: 0 - 1 = -1.
    advantages, returns = gae(rewards, old_values, MASK, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[3.0, -1.0, 3.0], [-1.0, 0.0, 0.0]]
    assert returns.tolist() == [[4.0, 1.0, 3.5], [0.0, 0.0, 0.0]]
    # Mean (3 - 1 + 3 - 1) / 4 = 1, variance (4 + 4 + 4 + 4) / 4 = 4.
    advantages = whiten(advantages, MASK, masked_sums(advantages, MASK))
    torch.testing.assert_close(advantages, tensor([[1.0, -1.0, 1.0], [-1.0, 0.0, 0.0]]))

    ratios = tensor([[1.5, 0.5, 1.0], [0.9, NAN, NAN]])
    policy, policy_clipped = policy_loss(logprobs + ratios.log(), logprobs, advantages, MASK, clip=0.2)
    # A = 1 at 1.5: max(-1.5, -1.2) = -1.2, clipped; A = -1 at 0.5: max(0.5, 0.8) = 0.8, clipped; -1; 0.9.
    assert policy.item() == pytest.approx((-1.2 + 0.8 - 1 + 0.9) / 4)
    assert policy_clipped.item() == 0.5
    values = tensor([[2.0, 1.9, 0.5], [0.5, NAN, NAN]])
    value, value_clipped = value_loss(values, old_values, returns, MASK, clip=0.2)
    # 2 from 1, R 4: held at 1.2, 2.8^2 = 7.84 > 2^2; 1.9 from 2, R 1: 0.9^2 = 0.81; 0.5, R 3.5: 9;
    # 0.5 from 1, R 0: held at 0.8, 0.64 > 0.25.
    assert value.item() == pytest.approx((7.84 + 0.81 + 9 + 0.64) / 8)
    assert value_clipped.item() == 0.5
    entropy = masked_mean(tensor([[1.0, 2.0, 3.0], [2.0, NAN, NAN]]), MASK)  # 8 / 4
    texts = text_loss(TEXT, MASK)  # 3.5
    # -0.125 + 0.1 * 2.28625 - 0.01 * 2 + 0.5 * 3.5
    assert (policy + 0.1 * value - 0.01 * entropy + 0.5 * texts).item() == pytest.approx(1.833625)


def test_gradients_of_a_two_step_toy_match_finite_differences():
    """Two steps with three actions, a logit for each state and action, and a value for each state."""
    generator = torch.Generator().manual_seed(0)
    logits, text_logits = torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64)  # 3 rows, 2 steps
    actions = torch.randint(3, (3, 2, 1), generator=generator)
    mask = tensor([[True, True], [True, True], [True, False]])
    noise, values, old_values = torch.randn(3, 3, 2, generator=generator, dtype=torch.float64)
    scores = torch.randn(3, generator=generator, dtype=torch.float64)

    def logprobs_of(logits):
        return logits.log_softmax(dim=-1).gather(-1, actions).squeeze(-1)

    old = logprobs_of(logits) + 0.3 * noise
    rewards = token_rewards(scores, old, old - noise, mask, kl_coef=0.5, kl_estimator="k3")
    advantages, returns = gae(rewards, old_values, mask, gamma=0.9, lam=0.8)
    advantages = whiten(advantages, mask, masked_sums(advantages, mask))

    def loss(logits, values, text_logits):
        logprobs = logits.log_softmax(dim=-1)
        entropy = masked_mean(-(logprobs * logprobs.exp()).sum(dim=-1), mask)
        policy, _ = policy_loss(logprobs_of(logits), old, advantages, mask, clip=0.2)
        value, _ = value_loss(values, old_values, returns, mask, clip=0.2)
        return policy + 0.5 * value - 0.1 * entropy + 0.7 * text_loss(logprobs_of(text_logits), mask)

    given = [x.requires_grad_() for x in (logits.detach().clone(), values.clone(), text_logits.detach().clone())]
    assert torch.autograd.gradcheck(loss, given)
    loss(*given).backward()
    for x in given:
        assert x.grad[mask].count_nonzero() > 0 and not x.grad[~mask].any()
