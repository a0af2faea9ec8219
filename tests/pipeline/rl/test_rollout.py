"""`pipeline.rl.rollout`: what a pass over some rows leaves out."""

from dataclasses import fields

import pytest
import torch
from jaxtyping import TypeCheckError
from shapes import checked, wrong

from pipeline.rl.rollout import Rollout, columns, minibatches, row_lengths, sorted_steps


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


# ------------------------------------------------------------------------------------ shapes in signatures
def record() -> dict:
    """Tensors of every field of a rollout of 4 rows: P = 24, T = 8, D = 3."""
    prompt_mask, mask = masks([5, 2, 3, 1], [3, 8, 1, 8], 24)
    mask = mask[:, :8]
    tokens = ("logprobs", "values", "advantages", "returns", "weights")
    return {
        "prompt_ids": torch.ones(4, 24, dtype=torch.long),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.ones(4, 8, dtype=torch.long),
        "completion_mask": mask,
        **{name: torch.ones(4, 8) for name in tokens},
        "trunk": torch.ones(4, 32, 3),
        "value_trunk": torch.ones(4, 32, 3),
        "share": torch.tensor(0.5),
    }


def make_checked(tensors: dict) -> None:
    checked(Rollout.__init__)(object.__new__(Rollout), **tensors)


def test_a_rollout_and_its_minibatches_have_the_shapes_of_the_record():
    """Also without the fields that may be None."""
    assert record().keys() == {field.name for field in fields(Rollout)}
    make_checked(record())
    make_checked({name: x for name, x in record().items() if name not in ("weights", "trunk", "value_trunk", "share")})
    for piece in checked(minibatches)(Rollout(**record()), torch.tensor([3, 1, 0, 2]), pieces=2, accumulation=2):
        make_checked(vars(piece))


@pytest.mark.parametrize(
    ("argument", "fault", "value"), [pytest.param(*w, id=f"{w[0]}, {w[1]}") for w in wrong(Rollout.__init__, record())]
)
def test_a_wrong_shape_is_refused(argument, fault, value):
    with pytest.raises(TypeCheckError):
        make_checked(record() | {argument: value})


FUNCTIONS = {
    row_lengths: {name: record()[name] for name in ("prompt_mask", "completion_mask")},
    columns: {name: record()[name] for name in ("prompt_mask", "completion_mask")},
    sorted_steps: {"order": torch.arange(4), "lengths": torch.arange(4), "size": 2},
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_functions_of_a_rollout_refuse_wrong_shapes(function):
    checked(function)(**FUNCTIONS[function])
    for argument, fault, value in wrong(function, FUNCTIONS[function]):
        with pytest.raises(TypeCheckError):
            checked(function)(**FUNCTIONS[function] | {argument: value})
            pytest.fail(f"{function.__name__} takes {argument} with {fault}")
