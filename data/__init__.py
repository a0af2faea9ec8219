"""Rows of all stages, files that are saved all at once, and commands that inspect and convert preferences.

Every command imports this module first, also those of `pipeline`. So it tells what an import that fails means.
"""

import os
import sys
from types import TracebackType


def _hidden_module() -> tuple[str, str] | None:
    """Return the name of a module of Python's own that a file of the current folder hides, and the file; None if none is."""
    for name in sorted(sys.stdlib_module_names & sys.modules.keys()):
        file = getattr(sys.modules[name], "__file__", None)
        if file and os.path.dirname(os.path.abspath(file).removesuffix(f"{os.sep}__init__.py")) == os.getcwd():
            return name, file
    return None


def end_imports(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a command whose imports are interrupted, or fail because of a file of the user's, with one line.

    The exit code is 130 after Ctrl-C, and 1 else. `pipeline.runs.errors.report_errors` takes over later.
    """
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("SIGINT: the command ends now.\n")
        raise SystemExit(130)
    hidden = _hidden_module() if issubclass(kind, (ImportError, AttributeError)) else None
    if hidden is None:
        sys.__excepthook__(kind, error, trace)
        return
    name, file = hidden
    sys.stderr.write(
        f"{file} is imported instead of Python's own module {name!r}, and so the command cannot start. Rename it, or start "
        f"from another folder, or set PYTHONSAFEPATH=1, so that Python ignores the current folder.\n"
    )


if sys.argv[:1] == ["-m"]:  # Python looks for `data.<command>` or `pipeline.<command>`, to start it
    sys.excepthook = end_imports
