"""End a run on a signal without loss: finish the update under way, write a checkpoint, exit with 128 + signal."""

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
    """Put before a `Checkpointed` trainer: SIGTERM, SIGINT and SIGUSR1 end training after the update under way."""

    _signal = 0  # the last one that asked to stop, on this process
    _stopped_by = 0  # the one that this run stops for, on all processes

    @property
    def between_updates(self) -> bool:
        """Whether a signal may end training after this step."""
        return True

    def _ask_to_stop(self, number, frame) -> None:
        self._signal = number

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of the signals while the code inside trains; other threads than the main one cannot."""
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
        """Between updates, end training with a checkpoint if any process was asked to stop."""
        if not self._stopped_by and (self.between_updates or self.control.should_training_stop):
            asked = torch.tensor([self._signal], device=self.args.device)
            self._stopped_by = int(self.accelerator.gather(asked).max())
            if self._stopped_by:
                self.control.should_training_stop = self.control.should_save = True

    def exit_stopped(self) -> NoReturn:
        """Say what is kept, and leave with 128 + signal."""
        PartialState().print(
            f"{signal.Signals(self._stopped_by).name}: stopped after step {self.state.global_step}; "
            f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step} is in {self.args.output_dir}. Go on with the same "
            f"command and --resume_from_checkpoint auto."
        )
        self.end()
        raise SystemExit(128 + self._stopped_by)
