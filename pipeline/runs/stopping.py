"""End a run on a signal without loss: finish the current update, write a checkpoint, exit with 128 + signal."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from accelerate import PartialState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopsOnSignals:
    """Mixin for a `Checkpointed` trainer: SIGTERM, SIGINT and SIGUSR1 end training after the current update."""

    _signal = 0  # the last signal that asked this process to stop
    _stopped_by = 0  # the signal for which all processes stop

    @property
    def between_updates(self) -> bool:
        """Return whether a signal may end training after this step."""
        return True

    def _ask_to_stop(self, number, frame) -> None:
        self._signal = number

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record the signals while the code inside trains. Only the main thread can."""
        self._signal = self._stopped_by = 0
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.signal(number, self._ask_to_stop) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop_if_asked(self) -> None:
        """End training with a checkpoint if a process was asked to stop and no update is in progress."""
        if not self._stopped_by and (self.between_updates or self.control.should_training_stop):
            asked = torch.tensor([self._signal], device=self.args.device)
            self._stopped_by = int(self.accelerator.gather(asked).max())
            if self._stopped_by:
                self.control.should_training_stop = self.control.should_save = True

    def exit_stopped(self) -> NoReturn:
        """Print what is kept, and exit with 128 + signal."""
        PartialState().print(
            f"{signal.Signals(self._stopped_by).name}: stopped after step {self.state.global_step}. "
            f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step} is in {self.args.output_dir}. To continue, run the same "
            f"command with --resume_from_checkpoint auto."
        )
        self.end()
        raise SystemExit(128 + self._stopped_by)
