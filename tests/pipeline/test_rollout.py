"""`pipeline.rollout`: what a pass over some rows leaves out."""

import pytest
import torch

from pipeline.rollout import Rollout, columns, row_lengths, sorted_steps, trimmed


def masks(prompts: list[int], completions: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of rows with so many real tokens, each (B, width)."""
    places = torch.arange(width)
    left = torch.stack([places >= width - count for count in prompts])
    return left, torch.stack([places < count for count in completions])


@pytest.mark.parametrize(
    ("prompts", "completions", "width", "expected"),
    [
        # 20 + 20 columns; the longest 5 and 11 make 16, so 24 go: 9 at the right, 15 at the left
        ([5, 2], [3, 11], 20, (15, 11)),
        # 5 and 12 make 17, which 32 holds: of 40 columns 8 go, at the right
        ([5, 2], [3, 12], 20, (0, 12)),
        # 5 and 18 make 23: of the 8 to go only 2 are at the right
        ([5, 2], [3, 18], 20, (6, 18)),
        ([20, 2], [3, 20], 20, (0, 20)),
        # 6 + 6 columns are fewer than 16
        ([1, 1], [1, 1], 6, (0, 6)),
    ],
)
def test_columns_by_hand(prompts, completions, width, expected):
    assert columns(*masks(prompts, completions, width)) == expected


def test_trimming_leaves_all_real_tokens_in_their_places():
    prompt_mask, mask = masks([5, 2], [3, 12], 30)  # 17 real at most, 32 of 60 columns stay
    ids = torch.arange(120).view(2, 60)
    prompt_ids, completion_ids = ids.split(30, dim=1)
    states = ids.unsqueeze(2).expand(2, 60, 3)
    tokens = [completion_ids.float() + number for number in range(4)]
    rollout = Rollout(prompt_ids, prompt_mask, completion_ids, mask, *tokens, trunk=states)._asdict()
    cut = trimmed(rollout)
    assert cut["prompt_ids"].shape == (2, 20) and cut["completion_ids"].shape == (2, 12)
    assert cut["value_trunk"] is None and cut["trunk"].shape == (2, 32, 3)
    for name in ("prompt_ids", "prompt_mask"):
        assert torch.equal(cut[name], rollout[name][:, 10:])
    for name in ("completion_ids", "completion_mask", "logprobs", "values", "advantages", "returns"):
        assert torch.equal(cut[name], rollout[name][:, :12])
    assert torch.equal(cut["trunk"][..., 0], torch.cat([cut["prompt_ids"], cut["completion_ids"]], dim=1))
    assert row_lengths(cut["prompt_mask"], cut["completion_mask"]).tolist() == [8, 14]


def test_steps_keep_their_rows_and_sort_them():
    order, lengths = torch.tensor([5, 0, 3, 1, 4, 2]), torch.tensor([9, 7, 6, 2, 8, 1])
    # of rows 5 0 3 the lengths are 1 9 2; of 1 4 2 they are 7 8 6
    assert sorted_steps(order, lengths, 3).tolist() == [5, 3, 0, 2, 1, 4]
    assert sorted_steps(order, torch.ones(6), 3).tolist() == order.tolist()
