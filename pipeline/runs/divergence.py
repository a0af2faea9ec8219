"""End training that has diverged: a loss, a gradient or a weight is not finite.

Trainer itself would log such a loss as 0.0 (`logging_nan_inf_filter`) and train on. With this module every trainer of
`pipeline.runs.checkpoints.Checkpointed` checks each step, and its error says why training ended.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pipeline.backbone.architecture import LARGEST_WEIGHT, all_finite


def learns_from(inputs: object) -> bool:
    """Return whether a batch has a token to learn from.

    If all its texts were cut before the completion, the loss is a mean over no tokens: NaN, with gradients of 0. This is
    not divergence.
    """
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    return labels is None or bool((labels != -100).any())


def first_problem(loss: float, norm: float) -> str | None:
    """Return a sentence on what is not finite in a step, the loss or else the norm of all gradients, or None."""
    for name, value in (("loss", loss), ("gradient's norm", norm)):
        if not math.isfinite(value):
            return f"The {name} is {value}"
    return None


def remedy(args: TrainingArguments) -> str:
    """Return a sentence on what to change."""
    more = ["max_grad_norm: 1.0"] if not args.max_grad_norm else []
    if args.bf16 or args.fp16:
        more.append("bf16: false" if args.bf16 else "fp16: false")
    also = f" If that is not enough, set {' and '.join(more)}." if more else ""
    rate = f"it was {args.learning_rate:g}"
    if (of_value := getattr(args, "value_learning_rate", None)) is not None:
        rate += f", and value_learning_rate {of_value:g}"
    lower = f"Start a new run with a lower learning_rate ({rate}) or lora_alpha"
    return f"{lower}, or resume with a lower learning_rate from a checkpoint that is good.{also}"


class EndsAtDivergence:
    """Mixin for one of TRL's trainers: a loss, a gradient or a weight that is not finite ends training with an error.

    The optimizer does not take the step. A checkpoint of the step before is saved, and the adapter of an earlier run is not
    overwritten.
    """

    diverged: str | None = None  # a sentence on what is not finite
    _loss = 0.0  # of the current optimizer step, if it is not finite
    _within_step = False  # whether a part of an optimizer step is done
    _written = 0  # the step of the last checkpoint that this run wrote
    _left_out = False  # whether a step was not taken and the weights before it are still to be saved

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Override `training_step`: record a loss that is not finite; Trainer would log the mean of the losses before it."""
        learns = learns_from(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._within_step = True
        if learns and not loss.isfinite():
            self._loss = loss.item()
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Override `_get_grad_norm`: end training without the step if a loss or a gradient is not finite on any process.

        Trainer calls this just before the optimizer's step. DeepSpeed takes the step together with the backward pass. With
        float16, a gradient that is not finite lowers the loss scale; this is divergence only if the scale falls below 1.

        Raises:
            FloatingPointError: only under DeepSpeed. Otherwise `_finalize_training` raises it, after a checkpoint is written.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = self.accelerator.scaler
        ignored = norm is None or (scaler is not None and scaler.get_scale() >= 1)
        step = torch.tensor([[self._loss, 0.0 if ignored else float(norm)]], device=self.args.device)
        problems = [first_problem(*row) for row in self.accelerator.gather(step).tolist()]
        problem = next(filter(None, problems), None)
        if problem is None:
            return norm
        self.diverged = f"{problem} at step {self.state.global_step + 1}"
        if self.is_deepspeed_enabled:
            if not self.accelerator.optimizer_step_was_skipped:
                self.diverged += ", which DeepSpeed has taken"
            raise self.divergence()
        model.zero_grad(set_to_none=True)  # so that the optimizer changes neither weights nor its own state
        self._tr_loss.nan_to_num_(0.0)  # this sum and the metrics since the last log go into the checkpoint
        self._metrics["train"].clear()
        self._left_out = self.control.should_training_stop = True
        return 0.0

    def _look_at_weights(self) -> None:
        """Refuse weights that are not finite, before Trainer saves or evaluates, or that the next stage would refuse.

        If a step was not taken, save the weights before it once, and log nothing of the step.
        """
        control = self.control
        if not self.diverged and not (control.should_save or control.should_evaluate or control.should_training_stop):
            return
        trained = (p for p in self.model.parameters() if p.requires_grad)
        mine = torch.tensor([int(all_finite(trained, LARGEST_WEIGHT))])
        finite = bool(self.accelerator.gather(mine.to(self.args.device)).all())
        if not self.diverged and not finite:
            self.diverged = f"A trained weight is not finite, or above 1e8, after step {self.state.global_step}"
        if self.diverged:
            control.should_training_stop = True
            control.should_log = control.should_evaluate = False
            control.should_save, self._left_out = self._left_out and finite, False

    def _look_at_outputs(self) -> None:
        """Refuse, after the last step, finite weights that give a token logits which are not finite."""
        model, ids = self.model_wrapped, torch.ones(1, 1, dtype=torch.long, device=self.args.device)
        training = model.training  # TRL's logs depend on it
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(input_ids=ids, attention_mask=ids).logits
        model.train(training)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the best checkpoint may be loaded next, into the shards
        if not self.accelerator.gather(logits.isfinite().all().int().view(1)).all():
            self.diverged = f"An output of the model is not finite after step {self.state.global_step}"

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Override `evaluate`: raise a FloatingPointError if no batch has a finite loss."""
        metrics = super().evaluate(*args, **kwargs)
        losses = [value for name, value in metrics.items() if name.endswith("_loss") and not math.isfinite(value)]
        if losses:
            self.diverged = f"The loss on held-out rows is {losses[0]} after step {self.state.global_step}"
            raise self.divergence()
        return metrics

    def divergence(self) -> FloatingPointError:
        """Return the error: what is not finite, what is kept, and what to do."""
        folder = Path(self.args.output_dir)
        kept = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        left = f"{kept} has the weights before that step. " if self._written == self.state.global_step > 0 else ""
        return FloatingPointError(
            f"{self.diverged}: training has diverged and ends. {left}No adapter is saved: {folder} keeps the adapter of an "
            f"earlier run, if there is one. {remedy(self.args)}"
        )
