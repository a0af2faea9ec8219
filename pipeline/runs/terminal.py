"""Show a training run on a terminal: a line for each entry of the log, and a bar with the time left.

A line holds the few figures that a person follows. All of them stay in the log (`log_history`), which checkpoints,
`metrics.json` and the trackers hold. `disable_tqdm` leaves out the bars, and `log_level: error` the lines too.
"""

import sys
import time
from collections.abc import Mapping
from numbers import Real
from typing import Any

import datasets
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.utils import logging

from pipeline.runs.live_files import duration


# The figures of a line: name in the log, name in the line, format. Of each group the line has the first that is in the log.
SHOWN = (
    (("score", "score", "+7.3f"), ("reward", "reward", "+7.3f"), ("loss", "loss", "7.4f")),
    (
        ("kl", "KL", "6.2f"),
        ("accuracy", "accuracy", ".3f"),
        ("rewards/accuracies", "accuracy", ".3f"),
        ("mean_token_accuracy", "token accuracy", ".3f"),
    ),
    (
        ("completions/mean_length", "length", "6.1f"),
        ("margin", "margin", "+7.3f"),
        ("rewards/margins", "margin", "+7.3f"),
    ),
)


def figures(logs: Mapping[str, Any], kl_target: float | None = None) -> list[str]:
    """Return the figures of a line, each with its name; none if the log has none of `SHOWN`."""
    found = []
    for group in SHOWN:
        for key, name, form in group:
            if isinstance(logs.get(key), Real):
                of_target = f" of {kl_target:g}" if key == "kl" and kl_target else ""
                found.append(f"{name} {logs[key]:{form}}{of_target}")
                break
    return found


def line(
    logs: Mapping[str, Any], step: int, steps: int, left: float | None = None, kl_target: float | None = None
) -> str | None:
    """Return the line for an entry of the log, or None for one without a figure to show.

    Args:
        step: optimizer steps so far, of `steps`.
        left: seconds until the last step, if they can be told.
        kl_target: the KL that an adaptive KL coefficient holds.
    """
    at = f"step {step:>{len(str(steps))}}/{steps}"
    if "train_runtime" in logs:
        return f"{at}: trained in {duration(logs['train_runtime'])}"
    held_out = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
    shown = figures(held_out or logs, kl_target)
    if not shown:
        return None
    if held_out:
        return "  ".join([f"{at}  held out:", *shown])
    return "  ".join([at, *shown, *([] if left is None else [f"{duration(left)} left"])])


class Lines(ProgressCallback):
    """Write `line` for each entry of the log, in the place of the whole entry, under a bar of the steps.

    The bar counts from the step that a resumed run goes on from. Both tell the time left by the mean time of a step since
    then: steps of an online trainer differ, as only the first of an update samples.
    """

    def __init__(self, *, bars: bool, lines: bool):
        super().__init__()
        self.bars, self.lines = bars, lines

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = self.first = state.global_step
        self.began = time.monotonic()
        if state.is_world_process_zero:
            options = {"initial": self.first, "unit": "step", "dynamic_ncols": True, "smoothing": 0}
            self.training_bar = tqdm(total=state.max_steps, disable=not self.bars, **options)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.bars:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not self.lines:
            return
        left = None
        if self.training_bar is not None and state.global_step > self.first:
            seconds = (time.monotonic() - self.began) / (state.global_step - self.first)
            left = seconds * (state.max_steps - state.global_step)
        text = line(logs or {}, state.global_step, state.max_steps, left, getattr(args, "kl_target", None))
        if text is not None:
            tqdm.write(text)
            sys.stdout.flush()


def write_lines(trainer: Trainer) -> None:
    """Have a trainer write lines from now on, in the place of Trainer's dictionaries; in a notebook it keeps its table."""
    if any([trainer.pop_callback(kind) for kind in (Lines, ProgressCallback, PrinterCallback)]):
        loud = logging.get_verbosity() <= logging.WARNING  # Trainer has set it to `log_level`
        trainer.add_callback(Lines(bars=loud and not trainer.args.disable_tqdm, lines=loud))


def leave_out_bars() -> None:
    """Have this process draw no bars: those of transformers, which ours are too, of datasets and of the hub's client."""
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
