"""Report the error that ends a command: one message for a wrong input, a traceback for a bug.

An error that Spine's own code raises says everything in its message, and a traceback would hide the message. Any other error
may be a bug, and keeps its traceback. `accelerate launch --debug` shows the traceback of every error.
"""

import gc
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from pipeline import GARBAGE
from pipeline.backbone.sharding import is_set
from pipeline.runs.launch import launch_command


# Types of the errors that ask a user to change something.
EXPECTED = (ValueError, OSError, ImportError, FloatingPointError)
INTERRUPTED = "SIGINT: the command ends now.\n"
ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / package) + os.sep for package in ("pipeline", "data", "reward_models"))
OPTIONS = str(ROOT / "pipeline" / "runs" / "command_line.py")


def report_errors() -> None:
    """Make this process report the error that ends it with `report`; the exit code stays 1, or 130 after Ctrl-C.

    A command calls this when its imports are done. So garbage is looked for as usual from here on, and not among them.
    """
    sys.excepthook = report
    if gc.get_threshold() != GARBAGE:
        gc.freeze()
        gc.set_threshold(*GARBAGE)


def is_expected(error: BaseException, trace: TracebackType | None) -> bool:
    """Return whether a `raise` statement of Spine, or of a library that checks its options in `parse`, made the error."""
    frames = traceback.extract_tb(trace)
    if not frames or not isinstance(error, EXPECTED):
        return False
    ours = frames[-1].filename.startswith(OURS)
    options = any(frame.filename == OPTIONS and frame.name == "parse" for frame in frames)
    return (ours or options) and (frames[-1].line or "").startswith("raise ")


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error: the message and its notes if it is expected, else the traceback. Ctrl-C is a line and exit code 130.

    If several processes have the same error, one of them prints it. torch's launcher ends with a table of the processes, and
    gets the message for that table. Bars that the error has cut short are left first, so that the message begins a line.
    """
    for bar in list(tqdm._instances):
        bar.close()
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")
    if issubclass(kind, KeyboardInterrupt):
        if not several or _tell_launcher(INTERRUPTED):
            sys.stderr.write(INTERRUPTED)
        raise SystemExit(128 + signal.SIGINT)  # the interpreter takes it from here
    expected = is_expected(error, trace) and not is_set("ACCELERATE_DEBUG_MODE")
    notes = [note for one in (error, error.__cause__) for note in getattr(one, "__notes__", [])]
    text = (
        " ".join([str(error), *notes]) + "\n" if expected else "".join(traceback.format_exception(kind, error, trace))
    )
    if several and not _tell_launcher(str(error) if expected else f"{kind.__name__}: {error}"):
        return
    sys.stderr.write(f"[rank {os.environ.get('RANK', 0)}] {text}" if several else text)
    # torch's launcher, which starts several processes, has its table. accelerate's own, which starts one, has a traceback.
    launcher = None if "TORCHELASTIC_ERROR_FILE" in os.environ else launch_command()
    if launcher is not None and not launcher.quiet:
        sys.stderr.write(
            "(accelerate adds its own traceback. It says nothing more, and `accelerate launch --quiet` leaves it out.)\n"
        )


def _tell_launcher(message: str) -> bool:
    """Write this process's error to the file that torch's launcher reads.

    Return whether this is the first process of this machine with this error.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return True
    first = True
    try:
        # The launcher gives each process a folder, all in one parent folder.
        told = Path(path).parents[1] / f"told-{hashlib.sha256(message.encode()).hexdigest()[:16]}"
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
