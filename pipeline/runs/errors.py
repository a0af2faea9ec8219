"""How a command ends with an error: in one message where the input is wrong, with a traceback where the code is.

An error that a `raise` of ours says in full needs no traceback; it would hide the message. What anything else raises may be
a bug, and keeps it.
"""

import hashlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

from pipeline.runs.launch import launch_command


# What our code raises where a user is to change something.
EXPECTED = (ValueError, OSError, ImportError, FloatingPointError)
ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / package) + os.sep for package in ("pipeline", "data", "reward_models"))
OPTIONS = str(ROOT / "pipeline" / "runs" / "command_line.py")


def report_errors() -> None:
    """Have this process tell the error that ends it as `report` does; its exit code is 1, as ever."""
    sys.excepthook = report


def is_expected(error: BaseException, trace: TracebackType | None) -> bool:
    """Tell whether a `raise` statement of ours made the error, or one of those who check their options in `parse`."""
    frames = traceback.extract_tb(trace)
    if not frames or not isinstance(error, EXPECTED):
        return False
    ours = frames[-1].filename.startswith(OURS)
    options = any(frame.filename == OPTIONS and frame.name == "parse" for frame in frames)
    return (ours or options) and (frames[-1].line or "").startswith("raise ")


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error: the message and its notes if it is expected, else the traceback. Of several processes that have the same
    error one prints it, and torch's launcher, which ends with a table of the processes, gets the message for it."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    expected = is_expected(error, trace)
    notes = [note for one in (error, error.__cause__) for note in getattr(one, "__notes__", [])]
    text = (
        " ".join([str(error), *notes]) + "\n" if expected else "".join(traceback.format_exception(kind, error, trace))
    )
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and not _tell_launcher(text, str(error) if expected else f"{kind.__name__}: {error}"):
        return
    sys.stderr.write(f"[rank {os.environ.get('RANK', 0)}] {text}" if several else text)
    launcher = None if several or not expected else launch_command()
    if launcher is not None and not launcher.quiet:
        sys.stderr.write("(accelerate adds a traceback of its own; `accelerate launch --quiet` leaves it out.)\n")


def _tell_launcher(text: str, message: str) -> bool:
    """Write the file that torch's launcher reads an error of this process from, and tell whether no other process of this
    machine had the same error before."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return True
    first = True
    try:
        # The launcher gives each process a folder, beside those of the others.
        told = Path(path).parents[1] / f"told-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        told.touch(exist_ok=False)
    except FileExistsError:
        first, message = False, "the same error as another process"
    except OSError:
        pass
    try:
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(path).write_text(json.dumps(content), encoding="utf-8")
    except OSError:
        pass
    return first
