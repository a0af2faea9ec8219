"""What one round of sampling leaves behind for the update: one frozen record, one shape a field."""

from typing import NamedTuple

from torch import Tensor


class Rollout(NamedTuple):
    """B completions of at most T tokens to prompts of at most P tokens.

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
    trunk: Tensor | None = None  # (B, P + T, D) states below the policy's adapter, where it leaves layers as they are
    value_trunk: Tensor | None = None  # (B, P + T, D) the same of the value, where its adapter begins lower
