"""The minibatches that PPO cuts from a rollout, without a model."""

from types import SimpleNamespace

import torch
from torch import Tensor

from pipeline.rl.rollout import Rollout
from pipeline.rl.trainer import PPOTrainer


def minibatches(
    mask: Tensor,
    *,
    pieces: int,
    accumulation: int = 1,
    of_all: list[int] | None = None,
    processes: int = 1,
    **fields: Tensor,
) -> list[Rollout]:
    """Cut a rollout of one process into `pieces`, as PPO does in an epoch whose order is that of the rows.

    Args:
        mask: (B, T) of the completions; each prompt is one token.
        of_all: tokens of each optimizer step in all `processes`, where there are several.
        fields: (B, T) of `Rollout`; what is not given is zero.
    """
    rows = len(mask)
    ids, zeros = torch.zeros(rows, 1, dtype=torch.long), torch.zeros(mask.shape)
    tokens = ("logprobs", "values", "advantages", "returns")
    rollout = Rollout(
        prompt_ids=ids,
        prompt_mask=ids == 0,
        completion_ids=zeros.long(),
        completion_mask=mask,
        **{name: fields.get(name, zeros) for name in tokens},
    )
    args = SimpleNamespace(
        steps_per_generation=pieces,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=rows // pieces,
    )

    def reduce(tokens: Tensor, reduction: str) -> Tensor:
        return tokens if of_all is None else torch.tensor(of_all, dtype=tokens.dtype)

    trainer = SimpleNamespace(
        args=args,
        accelerator=SimpleNamespace(reduce=reduce, num_processes=processes),
        _order=torch.arange(rows),
        _rollout=rollout,
    )
    return PPOTrainer._minibatches(trainer)
