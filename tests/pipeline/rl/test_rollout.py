"""`pipeline.rl.rollout`: what a pass over some rows leaves out."""

import pytest
import torch

from pipeline.rl.rollout import Rollout, columns, row_lengths, sorted_steps


def masks(prompts: list[int], completions: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of rows with so many real tokens, each (B, width)."""
    places = torch.arange(width)
    left = torch.stack([places >= width - count for count in prompts])
    return left, torch.stack([places < count for count in completions])


@pytest.mark.parametrize(
    ("prompts", "completions", "width", "expected"),
    [
        # 24 + 24 columns; the longest 5 and 11 make 16, so 32 go: 13 at the right, 19 at the left
        ([5, 2], [3, 11], 24, (19, 11)),
        # 5 and 12 make 17, which 32 holds: 16 go, 12 of them at the right
        ([5, 2], [3, 12], 24, (4, 12)),
        # 5 and 3 make 8: of the 32 to go 21 are at the right
        ([5, 2], [3, 3], 24, (11, 3)),
        ([24, 2], [3, 24], 24, (0, 24)),
        ([1, 1], [1, 1], 8, (0, 8)),
    ],
)
def test_columns_by_hand(prompts, completions, width, expected):
    assert columns(*masks(prompts, completions, width)) == expected


def test_trimming_leaves_all_real_tokens_in_their_places():
    prompt_mask, mask = masks([5, 2], [3, 12], 32)  # 17 real at most: 32 of 64 columns stay
    ids = torch.arange(128).view(2, 64)
    prompt_ids, completion_ids = ids.split(32, dim=1)
    states = ids.unsqueeze(2).expand(2, 64, 3)
    tokens = [completion_ids.float() + number for number in range(4)]
    rollout = Rollout(prompt_ids, prompt_mask, completion_ids, mask, *tokens, trunk=states)
    cut = rollout.trimmed()
    assert cut.prompt_ids.shape == (2, 20) and cut.completion_ids.shape == (2, 12)
    assert cut.value_trunk is None and cut.trunk.shape == (2, 32, 3)
    for name in ("prompt_ids", "prompt_mask"):
        assert torch.equal(getattr(cut, name), getattr(rollout, name)[:, 12:])
    for name in ("completion_ids", "completion_mask", "logprobs", "values", "advantages", "returns"):
        assert torch.equal(getattr(cut, name), getattr(rollout, name)[:, :12])
    assert torch.equal(cut.trunk[..., 0], torch.cat([cut.prompt_ids, cut.completion_ids], dim=1))
    assert row_lengths(cut.prompt_mask, cut.completion_mask).tolist() == [8, 14]


def test_steps_keep_their_rows_and_sort_them():
    order, lengths = torch.tensor([5, 0, 3, 1, 4, 2]), torch.tensor([9, 7, 6, 2, 8, 1])
    # of rows 5 0 3 the lengths are 1 9 2; of 1 4 2 they are 7 8 6
    assert sorted_steps(order, lengths, 3).tolist() == [5, 3, 0, 2, 1, 4]
    assert sorted_steps(order, torch.ones(6), 3).tolist() == order.tolist()
