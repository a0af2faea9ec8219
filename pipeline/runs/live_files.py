"""Name the files that a run writes while it trains, and read the whole lines of those that are written line by line.

A line is written with its end in one call. So what follows the last end of a line is not finished, and no reader takes it
for a row. This module imports nothing large, for readers that only look at a run.
"""

from pathlib import Path


SAMPLES = "samples.jsonl"  # `pipeline.rl.sample_table`
LOG = "training_log.jsonl"  # `pipeline.runs.training_log`
LOCK = "_run.lock"  # `pipeline.runs.output_lock`: while a run writes in the folder
FINISHED = "finished"  # in the log: training ended by itself


def whole_lines(path: Path) -> list[bytes]:
    """Return the finished lines of a file, without their ends; none if there is no such file."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def duration(seconds: float) -> str:
    """Return a duration in words, to the second below an hour and to the minute above it."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
