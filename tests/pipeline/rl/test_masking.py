"""`pipeline.rl.masking`: statistics by hand, and nothing under the padding enters them."""

import math

import pytest
import torch

from pipeline.rl.masking import explained_variance, masked_mean, masked_sums, whiten


NAN, INF = math.nan, math.inf
MASK = torch.tensor([[True, True, False], [True, False, False]])
VALUES = torch.tensor([[1.0, 2.0, NAN], [4.0, INF, -INF]])  # real: 1, 2, 4


def random_batch(rows: int = 6, columns: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of mean 3 and spread 2, and rows of every length from 1 to `columns`."""
    values = 3 + 2 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return values, torch.arange(columns) < torch.tensor([1 + i % columns for i in range(rows)]).unsqueeze(1)


def test_mean_by_hand():
    # (1 + 2 + 4) / 3
    assert masked_mean(VALUES, MASK).item() == pytest.approx(7 / 3)


def test_mean_of_nothing_is_zero():
    assert masked_mean(VALUES, torch.zeros_like(MASK)).item() == 0


def test_mean_weighs_tokens_not_rows():
    # One row of mean 0 (two tokens) and one of mean 3 (one token): 3 / 3, not (0 + 3) / 2.
    assert masked_mean(torch.tensor([[-1.0, 1.0, 9.0], [3.0, 9.0, 9.0]]), MASK).item() == 1


@pytest.mark.parametrize("junk", [0.0, 1e30, NAN, INF, -INF])
def test_mean_has_no_gradient_under_padding(junk):
    values = VALUES.masked_fill(~MASK, junk).requires_grad_()
    masked_mean(values, MASK).backward()
    # Three real tokens: a third each.
    assert torch.equal(values.grad, torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]) / 3)


def test_sums_by_hand():
    # Three tokens; 1 + 2 + 4; 1 + 4 + 16.
    assert masked_sums(VALUES, MASK).tolist() == [3, 7, 21]


def test_sums_are_taken_in_double_precision():
    # 2^24 + 1 and 2^48 + 1 are no float32.
    sums = masked_sums(torch.tensor([[2.0**24, 1.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert sums.tolist() == [2, 2**24 + 1, 2**48 + 1]


def test_explained_variance_by_hand():
    returns = VALUES  # real: 1, 2, 4, of variance 42/9 - 1 * 7/9 = 14/9
    for values, explained in (
        ([[1.0, 2.0, NAN], [4.0, NAN, INF]], 1.0),
        ([[6.0, 7.0, NAN], [9.0, NAN, INF]], 1.0),  # a constant error
        ([[3.0, 3.0, NAN], [3.0, NAN, INF]], 0.0),
        ([[-1.0, -2.0, NAN], [-4.0, NAN, INF]], -3.0),  # errors 2, 4, 8: four times the variance
        ([[1.0, 2.0, NAN], [3.0, NAN, INF]], 6 / 7),  # errors 0, 0, 1, of variance 2/9
    ):
        errors = masked_sums(returns - torch.tensor(values), MASK)
        assert explained_variance(masked_sums(returns, MASK), errors).item() == pytest.approx(explained)


def test_explained_variance_of_a_constant_is_a_number():
    constant = masked_sums(torch.full((2, 3), 5.0), MASK)
    assert explained_variance(constant, constant).isfinite()


def test_sums_add_up_over_splits():
    values, mask = random_batch()
    parts = sum(masked_sums(v, m) for v, m in zip(values.split([1, 2, 3]), mask.split([1, 2, 3]), strict=True))
    torch.testing.assert_close(parts, masked_sums(values, mask))


def test_whiten_by_hand():
    # Mean 7/3; variance (1 + 4 + 16)/3 - 49/9 = 14/9, so std = sqrt(14)/3, and
    # (1 - 7/3) * 3/sqrt(14) = -4/sqrt(14), (2 - 7/3) * 3/sqrt(14) = -1/sqrt(14), (4 - 7/3) * 3/sqrt(14) = 5/sqrt(14).
    expected = torch.tensor([[-1.0690450, -0.2672612, 0.0], [1.3363062, 0.0, 0.0]])
    torch.testing.assert_close(whiten(VALUES, MASK, masked_sums(VALUES, MASK)), expected)


@pytest.mark.parametrize("offset", [0, 1e4])
def test_whitened_tokens_have_mean_0_and_variance_1(offset):
    values, mask = random_batch()
    values = values + offset
    real = whiten(values, mask, masked_sums(values, mask))[mask].double()
    assert real.mean().item() == pytest.approx(0, abs=1e-3)
    assert real.var(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_whitening_keeps_order_and_dtype():
    values, mask = random_batch()
    whitened = whiten(values, mask, masked_sums(values, mask))
    assert whitened.dtype == torch.float32
    assert torch.equal(whitened[mask].argsort(), values[mask].argsort())


def test_parts_whiten_as_the_whole_batch():
    values, mask = random_batch()
    sums = masked_sums(values[:2], mask[:2]) + masked_sums(values[2:], mask[2:])
    parts = torch.cat([whiten(values[:2], mask[:2], sums), whiten(values[2:], mask[2:], sums)])
    torch.testing.assert_close(parts, whiten(values, mask, masked_sums(values, mask)))


def test_equal_values_whiten_to_zero():
    values = torch.full((2, 3), 0.1)
    torch.testing.assert_close(whiten(values, MASK, masked_sums(values, MASK)), torch.zeros(2, 3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [float(3**power) for power in range(10, 21)])
def test_equal_values_of_any_size_whiten_to_numbers(value):
    # Rounding makes the difference of the two large squares negative for some of these.
    values, mask = torch.full((1, 999), value / 10), torch.ones(1, 999, dtype=torch.bool)
    assert whiten(values, mask, masked_sums(values, mask)).isfinite().all()


def test_nothing_real_whitens_to_zero():
    nothing = torch.zeros_like(MASK)
    assert torch.equal(whiten(VALUES, nothing, masked_sums(VALUES, nothing)), torch.zeros(2, 3))


@pytest.mark.parametrize("junk", [-7.0, 1e30, NAN, INF, -INF])
def test_padding_changes_nothing(junk):
    clean, mask = random_batch()
    clean = clean.masked_fill(~mask, 0)
    dirty = clean.masked_fill(~mask, junk)
    assert torch.equal(masked_mean(dirty, mask), masked_mean(clean, mask))
    sums = masked_sums(dirty, mask)
    assert torch.equal(sums, masked_sums(clean, mask))
    whitened = whiten(dirty, mask, sums)
    assert torch.equal(whitened, whiten(clean, mask, sums))
    assert torch.equal(whitened[~mask], torch.zeros((~mask).sum()))


def test_whiten_by_hand_with_the_mean_kept():
    # As above, with 7/3 added back.
    expected = torch.tensor([[1.2642883, 2.0660721, 0.0], [3.6696395, 0.0, 0.0]])
    torch.testing.assert_close(whiten(VALUES, MASK, masked_sums(VALUES, MASK), shift_mean=False), expected)


@pytest.mark.parametrize("offset", [0, 100])
def test_a_kept_mean_is_the_same_and_the_variance_1(offset):
    values, mask = random_batch()
    values = values + offset
    whitened = whiten(values, mask, masked_sums(values, mask), shift_mean=False)
    assert whitened.dtype == torch.float32
    assert whitened[mask].mean().item() == pytest.approx(values[mask].mean().item(), rel=1e-5)
    assert whitened[mask].double().var(correction=0).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("junk", [-7.0, 1e30, NAN, INF, -INF])
def test_padding_changes_nothing_where_the_mean_is_kept(junk):
    clean, mask = random_batch()
    clean = clean.masked_fill(~mask, 0)
    expected = whiten(clean, mask, masked_sums(clean, mask), shift_mean=False)
    dirty = clean.masked_fill(~mask, junk)
    whitened = whiten(dirty, mask, masked_sums(dirty, mask), shift_mean=False)
    assert torch.equal(whitened, expected)
    assert torch.equal(whitened[~mask], torch.zeros((~mask).sum()))


def test_equal_values_with_the_mean_kept_stay():
    values = torch.full((2, 3), 0.1)
    expected = torch.where(MASK, 0.1, 0.0)
    found = whiten(values, MASK, masked_sums(values, MASK), shift_mean=False)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_nothing_real_with_the_mean_kept_is_zero():
    nothing = torch.zeros_like(MASK)
    found = whiten(VALUES, nothing, masked_sums(VALUES, nothing), shift_mean=False)
    assert torch.equal(found, torch.zeros(2, 3))
