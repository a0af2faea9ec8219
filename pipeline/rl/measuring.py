"""Measure sampled completions under every role, in as few passes as possible (step 2 of an update)."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.backbone.roles import Backbone
from pipeline.rl.rollout import columns, row_lengths


class Measured(NamedTuple):
    """Results of the roles on B completions of at most T tokens to prompts of at most P tokens."""

    logprobs: Tensor  # (B, T) of the policy, in nats
    ref_logprobs: Tensor  # (B, T) of the reference
    values: Tensor  # (B, T) value of the state before each token
    trunk: Tensor | None  # (B, P + T, D), as in `Rollout`
    value_trunk: Tensor | None  # (B, P + T, D)
    scores: dict[str, Tensor]  # (B,) of each of the `reward_roles`


def measure(
    backbone: Backbone,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float,
    batch_size: int,
    reward_roles: list[str],
    policy: str = "policy",
    reference: str = "reference",
    value: str = "value",
) -> Measured:
    """Run policy, reference, value and `reward_roles` over prompts (B, P) and completions (B, T).

    `policy`, `reference` and `value` name these roles on a backbone that has several. The `reward_roles` must start from the
    trunk. Rows of about the same length share a pass, `batch_size` at a time. Call this in the precision of training
    (`accelerator.autocast`).
    """
    order = row_lengths(prompt_mask, completion_mask).argsort(stable=True)
    batches = []
    for rows in order.split(batch_size):
        begin, end = columns(prompt_mask[rows], completion_mask[rows])
        completions, after = completion_ids[rows, :end], completion_mask.shape[1] - end
        ids = torch.cat([prompt_ids[rows, begin:], completions], dim=1)
        mask = torch.cat([prompt_mask[rows, begin:], completion_mask[rows, :end]], dim=1)
        trunk = backbone.trunk(ids, mask) if backbone.trunk_depth else None
        value_trunk = backbone.trunk(ids, mask, "value") if backbone.value_has_trunk else None
        logprobs, ref_logprobs = (
            backbone.logprobs(role, ids, mask, completions, temperature, trunk) for role in (policy, reference)
        )
        values = backbone.values(ids, mask, end, trunk if value_trunk is None else value_trunk, role=value)
        scores = [*backbone.member_scores(ids, mask, reward_roles, trunk).T] if reward_roles else []
        of_tokens = [F.pad(x, (0, after)) for x in (logprobs, ref_logprobs, values)]
        states = [x if x is None else F.pad(x, (0, 0, begin, after)) for x in (trunk, value_trunk)]
        batches.append((*of_tokens, *states, *scores))
    back = order.argsort()
    tensors: list[Any] = [None if x[0] is None else torch.cat(x)[back] for x in zip(*batches, strict=True)]
    logprobs, ref_logprobs, values, trunk, value_trunk, *scores = tensors
    return Measured(logprobs, ref_logprobs, values, trunk, value_trunk, dict(zip(reward_roles, scores, strict=True)))
