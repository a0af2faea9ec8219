"""Write the log of a run line by line while it trains, so that `pipeline.dashboard` and others can look at it.

`training_log.jsonl` in the output folder holds one JSON object a line, each with `step` and `time` (seconds since 1970):

- `started`: the stage, its steps, a few options and the preflight; always the first line. A resumed run writes another one.
- figures: an entry of Trainer's log, as `metrics.json` has it in the end.
- `warning`: what PPO says of an unhealthy run.
- `ended`: how training ended.

A resumed run first brings the file in line with its checkpoint: entries that the checkpoint does not know are left out.
Nothing here draws a random number or changes what is trained.
"""

import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from data.json_files import parse_json
from data.quoting import escaped
from data.schemas import LOG_LINE
from pipeline.runs.live_files import FINISHED, LOG, whole_lines
from pipeline.runs.manifest import STAGING


logger = logging.getLogger(__name__)

# The options that a reader of curves needs, as far as a stage has them.
OPTIONS = (
    "beta", "kl_target", "epsilon", "learning_rate", "num_iterations", "num_generations", "max_completion_length",
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
)  # fmt: skip


def write_anew(path: Path, lines: list[bytes]) -> None:
    """Replace a file by one of these lines, all at once."""
    fresh = path.parent / STAGING / path.name
    fresh.parent.mkdir(parents=True, exist_ok=True)
    fresh.write_bytes(b"".join(line + b"\n" for line in lines))
    fresh.replace(path)
    fresh.parent.rmdir()


def finite(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry without the values that are not finite, such as a mean over no completions: strict JSON has none."""
    return {name: value for name, value in entry.items() if not isinstance(value, float) or math.isfinite(value)}


class TrainingLog(TrainerCallback):
    """Write the lines that this module describes.

    Args:
        folder: output folder of the run.
        started: what the first line says.
    """

    def __init__(self, folder: str | Path, started: dict[str, Any]):
        self.path, self.started = Path(folder) / LOG, started
        self._writes = False  # whether this process writes, from the beginning of training on

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        started = {
            "step": state.global_step,
            "time": _now(),
            "started": {**self.started, "max_steps": state.max_steps},
        }
        kept = self._kept(state)
        rows = [*kept, started] if any("started" in row for row in kept) else [started, *kept]
        try:
            write_anew(self.path, [_line(row) for row in rows])
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be written ({error.strerror}). Free some space, or change its permissions."
            ) from error
        self._writes = True

    def on_log(self, args, state, control, **kwargs):
        self.add(finite(state.log_history[-1]))

    def warn(self, step: int, message: str) -> None:
        """Write a warning. `step` is the optimizer step that is under way."""
        self.add({"step": step, "warning": message})

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, whole or not at all. A disk that is full ends the file, and not the training: that is said once."""
        if not self._writes:
            return
        text = _line({**row, "time": _now()}) + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    if file.write(text) != len(text):
                        raise OSError(None, "only a part could be written")
                except OSError:
                    with suppress(OSError):
                        file.truncate(before)
                    raise
        except OSError as error:
            self._writes = False
            logger.warning(
                f"{self.path} could not be written ({error.strerror}). It ends here. Training goes on, and metrics.json "
                f"has the whole log in the end."
            )

    def _kept(self, state: TrainerState) -> list[dict[str, Any]]:
        """Return the rows before the step from which a run goes on; none for a new run."""
        if not state.global_step:
            return []
        remedy = f"Delete the line, or the whole file: a resumed run writes the log of its checkpoint to {LOG} again."
        found, times = [], {}
        for number, line in enumerate(whole_lines(self.path), 1):
            where = f"{self.path} line {number}"
            row = parse_json(line, where, LOG_LINE, remedy=remedy)
            try:
                times[_line(_without(row, "time"))] = row.get("time")
            except ValueError:
                raise ValueError(f"{where}: a number is not finite. {remedy}") from None
            found.append(row)
        rows = []
        for entry in map(finite, state.log_history):
            when = times.get(_line(entry))
            rows.append(entry if when is None else {**entry, "time": when})
        step = state.global_step
        rows += [row for row in found if "warning" in row and row["step"] <= step]
        rows += [row for row in found if "started" in row and row["step"] < step]
        return sorted(rows, key=lambda row: (row["step"], "started" not in row))


def _now() -> float:
    return round(time.time(), 3)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode()


def _without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


class KeepsLog:
    """Mixin for one of TRL's trainers: keep the log in a file while it trains."""

    training_log: TrainingLog | None = None

    @contextmanager
    def keeping_log(self, preflight: list[dict[str, Any]] | None = None) -> Iterator[None]:
        """Write the log of the training inside, and how it ends."""
        options = {name: getattr(self.args, name) for name in OPTIONS if hasattr(self.args, name)}
        started: dict[str, Any] = {"stage": self._name.lower(), "options": options}
        if preflight:
            started["preflight"] = preflight
        self.pop_callback(TrainingLog)
        self.training_log = TrainingLog(self.args.output_dir, started)
        self.add_callback(self.training_log)
        ended = FINISHED
        try:
            yield
        except SystemExit:  # `exit_stopped`, or a reward function of the user's
            by = signal.Signals(self._stopped_by).name if self._stopped_by else "a call of sys.exit"
            ended = f"stopped by {by} after step {self.state.global_step}"
            raise
        except BaseException as error:
            ended = escaped(f"{type(error).__name__}: {error}", 1000)
            raise
        finally:
            self.training_log.add({"step": self.state.global_step, "ended": ended})

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Override `log`: leave values that are not finite out of the history (JSON)."""
        super().log(logs, *args, **kwargs)
        self.state.log_history[-1] = finite(self.state.log_history[-1])
