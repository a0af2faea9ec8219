"""What ends a training that has diverged: a loss, a gradient or a weight that is not finite.

Trainer itself would log such a loss as 0.0 (`logging_nan_inf_filter`) and train on. `pipeline.runs.checkpoints.Checkpointed`
looks at every step of every stage, and says with these words why it ended.
"""

import math
from collections.abc import Mapping

from transformers import TrainingArguments


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
