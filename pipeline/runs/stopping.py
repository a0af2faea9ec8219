"""End a run on a signal without loss: finish the current update, write a checkpoint, exit with 128 + signal.

The first signal asks for that, and the second ends the run at once (`pipeline.runs.listening`).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from accelerate import PartialState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from data.waiting import waiting_for
from pipeline.runs.listening import Listening


class StopsOnSignals:
    """Mixin for a `Checkpointed` trainer: SIGTERM, SIGINT and SIGUSR1 end training after the current update."""

    _listener: Listening | None = None
    _stopped_by = 0  # the signal for which all processes stop

    @property
    def between_updates(self) -> bool:
        """Return whether a signal may end training after this step."""
        return True

    @property
    def end_of_update(self) -> int:
        """Return the step after which a signal would end training."""
        return self.state.global_step + 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record the signals while the code inside trains. Only the main thread can."""
        self._stopped_by = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._listener = Listening("the run ends after its first update")
        try:
            yield
        finally:
            self._listener.close()
            self._listener = None

    def _tell_plan(self) -> None:
        if self._listener:
            self._listener.tell(f"the run ends after this update (step {self.end_of_update})")

    def _stop_if_asked(self) -> None:
        """End training with a checkpoint if a process was asked to stop and no update is in progress."""
        if not self._stopped_by and (self.between_updates or self.control.should_training_stop):
            asked = torch.tensor([self._listener.signal if self._listener else 0], device=self.args.device)
            with waiting_for(f"all processes to end step {self.state.global_step}"):
                self._stopped_by = int(self.accelerator.gather(asked).max())
            if self._stopped_by:
                self.control.should_training_stop = self.control.should_save = True
        self._tell_plan()

    def exit_stopped(self) -> NoReturn:
        """Print what is kept, and exit with 128 + signal."""
        PartialState().print(
            f"{signal.Signals(self._stopped_by).name}: stopped after step {self.state.global_step}. "
            f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step} is in {self.args.output_dir}. To continue, run the same "
            f"command with --resume_from_checkpoint auto."
        )
        self.end()
        raise SystemExit(128 + self._stopped_by)
