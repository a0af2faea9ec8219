"""Read what a run has written so far: its log, samples, metrics and lock. Nothing is written, and no model is loaded.

A stage writes `training_log.jsonl` while it trains and `metrics.json` in the end. Earlier releases wrote only the latter.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from data.json_files import parse_json, read_json
from data.quoting import escaped
from data.schemas import LOG_LINE, METRICS, SAMPLE_ROW
from pipeline.reports.healthy import HELD_OUT, is_figure
from pipeline.reports.metric_table import STAGES
from pipeline.runs.live_files import FINISHED, LOCK, LOG, SAMPLES, whole_lines


METRICS_FILE = "metrics.json"
DEEPEST = 3  # levels of folders beneath the one that is named: runs, a recipe, a stage, a member of an ensemble
PASSED_OVER = ("checkpoint-", ".", "value", "completions")  # begin the names of folders that hold no run of their own
# A figure that only this stage logs, to know runs whose log does not say their stage. RLOO and GRPO log the same.
MARKS = (
    ("loss/value", "PPO"), ("frac_reward_zero_std", "RLOO"), ("rewards/margins", "DPO"), ("margin", "reward"),
    ("mean_token_accuracy", "SFT"),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of a stage, as far as it has come.

    Attributes:
        folder: its output folder.
        stage: one of `STAGES`, if it is known.
        history: entries of the log, in order. Figures of held-out rows have `eval_` before their names.
        max_steps: optimizer steps of the whole run; None if the log does not say.
        options: options that its log names.
        began: seconds since 1970 at which it began or was resumed, and the step at which it did.
        resumed: the steps from which it went on.
        preflight: the checks before PPO, as `Check` has them.
        warnings: step and text of each.
        ended: how training ended; None while it goes on, or if nobody wrote it down.
        holder: what the lock of the folder says: process, host and time; empty without one.
        samples: rows of the table of samples.
        metrics: what the run has left in the end.
    """

    folder: Path
    stage: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    max_steps: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    began: tuple[float, int] | None = None
    resumed: list[int] = field(default_factory=list)
    preflight: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)
    ended: str | None = None
    holder: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Return the step of the last entry."""
        return max((row["step"] for row in self.history), default=0)

    @property
    def state(self) -> str:
        """Return `running`, `starting`, `finished`, `ended` (and the log says why) or `broken off` (and nobody says why).

        `starting` is a run that has locked the folder and does not train yet; the log is that of the run before it.
        """
        if self.began and is_alive(self.holder) and _since(self.holder) > self.began[0] + 1:
            return "starting"
        if self.ended is not None:
            return "finished" if self.ended == FINISHED else "ended"
        if is_alive(self.holder):
            return "running" if self.began else "starting"
        return "broken off" if self.began else "finished" if self.metrics else "starting"

    @property
    def seconds_left(self) -> float | None:
        """Return the seconds until the last step at the mean speed since the run began or went on."""
        times = [row["time"] for row in self.history if is_figure(row.get("time"))]
        if not self.began or not self.max_steps or not times or self.step <= self.began[1]:
            return None
        return (times[-1] - self.began[0]) / (self.step - self.began[1]) * (self.max_steps - self.step)

    def names(self) -> list[str]:
        """Return the names of the figures that were logged, each once, those of held-out rows without `eval_`."""
        found = [name.removeprefix(HELD_OUT) for row in self.history for name in row]
        return list(dict.fromkeys(name for name in found if name not in ("step", "time")))

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and values of a figure."""
        found = [(row["step"], row[name]) for row in self.history if is_figure(row.get(name))]
        return [step for step, _ in found], [value for _, value in found]


def is_alive(holder: dict[str, Any]) -> bool:
    """Tell whether the process that holds a lock still runs; of another machine its lock is believed."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1:
        return bool(holder)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is somebody else's
        return True
    return True


def _since(holder: dict[str, Any]) -> float:
    """Return when a lock was taken, in seconds since 1970; 0 if it does not say."""
    try:
        return datetime.strptime(holder.get("since", ""), "%Y-%m-%d %H:%M:%S %z").timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0


def find_runs(folder: str | Path) -> list[Path]:
    """Return the folders of the runs in a folder, itself included, in the order of the stages.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
        ValueError: it holds no run.
    """
    folder = Path(folder).expanduser()
    where = escaped(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{where}: a file. Name the output_dir of a stage, or a folder of several.")
    if not folder.is_dir():
        raise FileNotFoundError(f"{where}: no such folder. Name the output_dir of a stage, or a folder of several.")
    found = list(_runs_in(folder, DEEPEST))
    if not found:
        raise ValueError(
            f"{where}: no run is here. A stage writes {LOG} and {METRICS_FILE} in its output_dir. Name that folder, or one "
            f"above it."
        )
    names = [stage.lower() for stage in STAGES]
    order = {path: names.index(path.name) if path.name in names else len(names) for path in found}
    return sorted(found, key=lambda path: (path.parent, order[path], path.name))


def _runs_in(folder: Path, levels: int) -> Iterator[Path]:
    if (folder / LOG).is_file() or read_lock(folder) or _has_history(folder / METRICS_FILE):
        yield folder
    if levels:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith(PASSED_OVER):
                yield from _runs_in(path, levels - 1)


def _has_history(path: Path) -> bool:
    return path.is_file() and b'"history"' in path.read_bytes()


def read_run(folder: Path) -> Run:
    """Read a run.

    Raises:
        OSError: a file cannot be read.
        ValueError: a finished line or file is damaged. The message names it.
    """
    rows = _lines(folder / LOG, LOG_LINE)
    metrics: dict[str, Any] = {}
    if (folder / METRICS_FILE).is_file():
        metrics = read_json(folder / METRICS_FILE, METRICS)
    entries = [row for row in rows if not row.keys() & {"started", "warning", "ended"}]
    started = [row for row in rows if "started" in row]
    history = entries if started else [row for row in metrics.get("history", []) if type(row.get("step")) is int]
    about: dict[str, Any] = started[-1]["started"] if started else {}
    ended = [row["ended"] for row in rows if "ended" in row]
    last = [row["step"] for row in history]
    return Run(
        folder=folder,
        stage=_stage(about, history),
        history=history,
        max_steps=about.get("max_steps") or (max(last) if last and not started else None),
        options=about.get("options", {}),
        began=(started[-1]["time"], started[-1]["step"]) if started and "time" in started[-1] else None,
        resumed=[row["step"] for row in started if row["step"]],
        preflight=about.get("preflight") or metrics.get("preflight") or [],
        warnings=[(row["step"], row["warning"]) for row in rows if "warning" in row],
        ended=ended[-1] if ended else None,
        holder=read_lock(folder),
        samples=_lines(folder / SAMPLES, SAMPLE_ROW),
        # While a run trains, the metrics are those of an earlier one.
        metrics=metrics if not started or (ended and ended[-1] == FINISHED) else {},
    )


def _lines(path: Path, schema) -> list[dict[str, Any]]:
    remedy = "Delete the line, or look at another folder."
    return [
        parse_json(line, f"{escaped(path)} line {number}", schema, remedy=remedy)
        for number, line in enumerate(whole_lines(path), 1)
    ]


def read_lock(folder: Path) -> dict[str, Any]:
    """Return what the lock of an output folder says; an empty dict if there is none, or it is not written yet."""
    path = folder / LOCK
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except (OSError, ValueError):  # not written yet, or just removed
        return {}


def _stage(about: dict[str, Any], history: list[dict[str, Any]]) -> str | None:
    named = [stage for stage in STAGES if stage.lower() == about.get("stage")]
    logged = {name for row in history for name in row}
    return next(iter(named), None) or next((stage for name, stage in MARKS if name in logged), None)
