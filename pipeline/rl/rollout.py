"""What one round of sampling leaves behind for the update: one frozen record, one shape a field."""

from typing import NamedTuple

import torch
from torch import Tensor


# The width of every pass is a multiple of so many tokens: torch's fused attention on a CPU then gives a token the same
# numbers to the bit in passes of different widths, as the ratio of exactly 1 wants it.
WIDTH = 16


class Rollout(NamedTuple):
    """B completions of at most T tokens to prompts of at most P tokens; P + T is a multiple of `WIDTH`.

    Prompts are padded at the left, completions at the right; masks are True on real tokens, and a completion's
    end-of-text token is real.
    """

    prompt_ids: Tensor  # (B, P) int64
    prompt_mask: Tensor  # (B, P) bool
    completion_ids: Tensor  # (B, T) int64
    completion_mask: Tensor  # (B, T) bool
    logprobs: Tensor  # (B, T) of the policy that sampled, in nats
    values: Tensor  # (B, T) value of the state before each token
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T) targets of the value function
    weights: Tensor | None = None  # (B, T) of the policy loss, where the sampler's logprobs are corrected for
    trunk: Tensor | None = None  # (B, P + T, D) states below the policy's adapter, where it leaves layers as they are
    value_trunk: Tensor | None = None  # (B, P + T, D) the same of the value, where its adapter begins lower


def row_lengths(prompt_mask: Tensor, completion_mask: Tensor) -> Tensor:
    """Real tokens of each row, (B, P) and (B, T) -> (B,)."""
    return prompt_mask.sum(dim=1) + completion_mask.sum(dim=1)


def columns(prompt_mask: Tensor, completion_mask: Tensor) -> tuple[int, int]:
    """Where a pass over these rows begins in the prompts' columns and ends in the completions': what lies beyond is padding
    in all of them. (B, P) and (B, T), together a multiple of `WIDTH` wide as what remains is, -> two numbers."""
    (_, prompts), (_, completions) = prompt_mask.shape, completion_mask.shape
    prompt, completion = (int(mask.sum(dim=1).max()) for mask in (prompt_mask, completion_mask))
    spare = (prompts + completions - prompt - completion) // WIDTH * WIDTH
    right = min(completions - completion, spare)
    return min(prompts - prompt, spare - right), completions - right


def trimmed(rows: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Fields of a `Rollout` for some rows, without the columns that are padding in all of them."""
    begin, end = columns(rows["prompt_mask"], rows["completion_mask"])
    whole = rows["prompt_mask"].shape[1] + end

    def cut(name: str, field: Tensor) -> Tensor:
        if name.startswith("prompt"):
            return field[:, begin:]
        return field[:, begin:whole] if name.endswith("trunk") else field[:, :end]

    return {name: field if field is None else cut(name, field) for name, field in rows.items()}


def sorted_steps(order: Tensor, lengths: Tensor, size: int) -> Tensor:
    """An order of rows (N,) in which each `size` that follow each other stay together, the shortest first: cut to pieces,
    each piece has rows of about one length (`lengths`, (N,))."""
    return torch.cat([step[lengths[step].argsort(stable=True)] for step in order.split(size)])
