"""The record of one round of sampling, from the sampled tokens to the minibatches that the loss reads."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


# The width of every pass is a multiple of this many tokens. torch's fused attention on a CPU then gives a token the same
# values to the bit in passes of different widths, so that importance ratios start at exactly 1.
WIDTH = 16


@dataclass(frozen=True)
class Rollout:
    """B completions of at most T tokens to prompts of at most P tokens; P + T is a multiple of `WIDTH`.

    Prompts are padded at the left, completions at the right. Masks are True on real tokens, and a completion's
    end-of-text token is real.
    """

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    completion_ids: Int[Tensor, "B T"]
    completion_mask: Bool[Tensor, "B T"]
    logprobs: Float[Tensor, "B T"]  # under the policy that sampled, in nats
    values: Float[Tensor, "B T"]  # value of the state before each token
    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]  # targets of the value function
    weights: Float[Tensor, "B T"] | None = None  # of the policy loss, which correct for the sampler; None is 1
    # States below the policy's adapter, if it changes only the top layers.
    trunk: Float[Tensor, "B P+T D"] | None = None
    value_trunk: Float[Tensor, "B P+T D"] | None = None  # the same for the value, if its adapter begins lower
    share: Float[Tensor, ""] | None = None  # weight of a minibatch in its optimizer step; None is 1

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def rows(self, index: Int[Tensor, " N"] | slice) -> "Rollout":
        """Return the rows of `index`, in its order."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "share"}
        rows: dict[str, Any] = {name: x if x is None else x[index] for name, x in tensors.items()}
        return Rollout(**rows)

    def trimmed(self) -> "Rollout":
        """Return the same rows without the columns that are padding in all of them."""
        begin, end = columns(self.prompt_mask, self.completion_mask)
        whole = slice(begin, self.prompt_mask.shape[1] + end)
        return replace(
            self,
            prompt_ids=self.prompt_ids[:, begin:],
            prompt_mask=self.prompt_mask[:, begin:],
            completion_ids=self.completion_ids[:, :end],
            completion_mask=self.completion_mask[:, :end],
            logprobs=self.logprobs[:, :end],
            values=self.values[:, :end],
            advantages=self.advantages[:, :end],
            returns=self.returns[:, :end],
            weights=None if self.weights is None else self.weights[:, :end],
            trunk=None if self.trunk is None else self.trunk[:, whole],
            value_trunk=None if self.value_trunk is None else self.value_trunk[:, whole],
        )


def row_lengths(prompt_mask: Bool[Tensor, "B P"], completion_mask: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Count the real tokens of each row."""
    return prompt_mask.sum(dim=1) + completion_mask.sum(dim=1)


def columns(prompt_mask: Bool[Tensor, "B P"], completion_mask: Bool[Tensor, "B T"]) -> tuple[int, int]:
    """Find the columns that a pass over these rows needs, as two numbers.

    The pass begins at the first number in the prompts and ends before the second number in the completions. All other
    columns are padding in every row. The remaining width is a multiple of `WIDTH`, as P + T is.
    """
    (_, prompts), (_, completions) = prompt_mask.shape, completion_mask.shape
    prompt, completion = (int(mask.sum(dim=1).max()) for mask in (prompt_mask, completion_mask))
    spare = (prompts + completions - prompt - completion) // WIDTH * WIDTH
    right = min(completions - completion, spare)
    return min(prompts - prompt, spare - right), completions - right


def sorted_steps(order: Int[Tensor, " B"], lengths: Int[Tensor, " B"], size: int) -> Int[Tensor, " B"]:
    """Sort each group of `size` consecutive rows of `order` by their `lengths`, the shortest first.

    If a group is then cut into pieces, each piece has rows of about the same length, and needs little padding.
    """
    return torch.cat([step[lengths[step].argsort(stable=True)] for step in torch.split(order, size)])


def minibatches(rollout: Rollout, order: Int[Tensor, " B"], *, pieces: int, accumulation: int) -> list[Rollout]:
    """Cut a rollout, with its rows in `order`, into `pieces` of equal size.

    `accumulation` pieces make an optimizer step. Each piece of a step holds rows of about the same length, and is trimmed
    to the columns that it needs.
    """
    size = len(rollout) // pieces
    if accumulation > 1:
        lengths = row_lengths(rollout.prompt_mask, rollout.completion_mask).cpu()
        order = sorted_steps(order, lengths, accumulation * size)
    return [rollout.rows(order[start : start + size]).trimmed() for start in range(0, pieces * size, size)]
