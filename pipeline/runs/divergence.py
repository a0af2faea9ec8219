"""What ends a training that has diverged: a loss, a gradient or a weight that is not finite.

Trainer itself would log such a loss as 0.0 (`logging_nan_inf_filter`) and train on. `pipeline.runs.checkpoints.Checkpointed`
looks at every step of every stage, and says with these words why it ended.
"""

import math
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether every value is finite; of a sharded tensor, this process's part."""
    local = (x.to_local() if isinstance(x, DTensor) else x for x in map(Tensor.detach, tensors))
    return all(bool(x.isfinite().all()) for x in local)


def check_finite(model: nn.Module, name: str) -> None:
    """Check that the weights of a pretrained model are numbers. Those in 4 bits are codes, and always are.

    Raises:
        ValueError: one is NaN or infinite, and so would be all that is computed with it.
    """
    for key, weight in model.named_parameters():
        if weight.is_floating_point() and not all_finite([weight]):
            raise ValueError(
                f"{name}: {key} holds values that are not finite (NaN or infinity), so the model can neither be trained "
                f"nor sampled from. Download or save the model anew."
            )


def learns_from(inputs: object) -> bool:
    """Return whether a batch has a token to learn from. Where a text was cut before its completion, the mean of the loss
    over no tokens is NaN, with gradients of 0: that is no divergence."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    return labels is None or bool((labels != -100).any())


def first_problem(loss: float, norm: float) -> str | None:
    """Say what of a step is not finite: the loss of a batch, else the norm of all gradients."""
    for name, value in (("loss", loss), ("gradient's norm", norm)):
        if not math.isfinite(value):
            return f"The {name} is {value}"
    return None


def remedy(args: TrainingArguments) -> str:
    """Say what to change. A resumed run goes on with the learning rate that it had, so training is to start anew."""
    more = ["max_grad_norm: 1.0"] if not args.max_grad_norm else []
    if args.bf16 or args.fp16:
        more.append("bf16: false" if args.bf16 else "fp16: false")
    also = f" Where that is not enough, set {' and '.join(more)}." if more else ""
    return f"Start anew with a lower learning_rate (it was {args.learning_rate:g}).{also}"
