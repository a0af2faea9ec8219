"""Resume in the middle of an epoch: restore the order of its batches and Trainer's sums of the loss."""

from typing import Any

import torch
from accelerate.utils import compare_versions, send_to_device, set_seed
from torch import Tensor

from pipeline.runs.worlds import seed_of_process


# Trainer resets these in each call of `train`: sums of the loss since the last log and since the beginning.
LOOP = (
    "_tr_loss",
    "_total_loss_scalar",
    "_globalstep_last_logged",
    "_initial_num_input_tokens_seen",
    # Before 5.19 Trainer divided the loss of a run by the number of all its steps.
    *(["_initial_global_step"] if compare_versions("transformers", ">=", "5.19.0") else []),
)


class ResumesEpochs:
    """Mixin for one of TRL's trainers: resume in the middle of an epoch.

    `_resumed` is the state of the checkpoint from which the run resumes, or None. Trainer skips the batches that were
    trained on. But samplers draw an epoch's order when the epoch begins, and the random states of that moment are no longer
    there.
    """

    _sampler: Any = None

    def _take_up_loop(self) -> None:
        for name, value in self._resumed.pop("loop").items():
            setattr(self, name, send_to_device(value, self.args.device))

    def _get_train_sampler(self, *args):
        self._sampler = super()._get_train_sampler(*args)
        return self._sampler

    def _order_state(self) -> dict[str, Tensor | None]:
        """Return the random states that an epoch's order is drawn from.

        They are torch's state and that of the sampler's own generator, if it has one. Every epoch changes the latter.
        """
        generator = getattr(self._sampler, "generator", None)
        return {"torch": torch.get_rng_state(), "sampler": None if generator is None else generator.get_state()}

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Override `_load_rng_state`: seed the random states anew if other processes wrote the checkpoint."""
        if self._resumed and self._resumed.get("draws_anew"):
            set_seed(seed_of_process(self.args.seed, self.state.global_step, self.args.process_index))
        else:
            super()._load_rng_state(checkpoint)

    def _begin_epoch(
        self, *, resume_from_checkpoint, steps_trained_in_current_epoch, epoch, epochs_trained, **kwargs
    ) -> bool:
        """Restore the random states that the epoch's order is drawn from, and return whether a step is left to take."""
        checkpoint, skipped = resume_from_checkpoint, steps_trained_in_current_epoch
        sampler = None
        if checkpoint is not None and epoch == epochs_trained:
            self._take_up_loop()
            if skipped:
                torch.set_rng_state(self._resumed["epoch_start"]["torch"])
            sampler = self._resumed["epoch_start" if skipped else "now"]["sampler"]
            if not skipped:
                self._load_rng_state(checkpoint)
        if self.state.global_step >= self.state.max_steps:  # Trainer would take one more step before this check
            self.control.should_training_stop = True
            return False
        if sampler is not None:
            self._sampler.generator.set_state(sampler)
        self._epoch_start = self._order_state()
        return True
