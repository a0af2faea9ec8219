"""The pipeline's commands.

First this module makes sure that `data` and `reward_models` are the packages of this project: Python looks for packages in the
folder in which a command is started, and a user may have their own `data` there.
"""

import os
import sys
import warnings
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import TracebackType


def _claim(name: str, folder: Path) -> None:
    """Make `name` mean the package in `folder`.

    A folder of the same name without Python code, such as one of data files, hides the package of an editable installation.
    So the package is imported here.

    Raises:
        ImportError: another module has this name.
    """
    ours = folder / "__init__.py"
    found = find_spec(name)
    if found is not None and found.origin:
        if Path(found.origin).resolve() != ours:
            raise ImportError(
                f"{found.origin} is imported instead of this project's package {name!r}, and so a stage cannot run. Rename "
                f"it, or start from another folder, or set PYTHONSAFEPATH=1, so that Python ignores the current folder.",
                name=__name__,  # `python -m` then prints only this message
            )
        return
    spec = spec_from_file_location(name, ours, submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None  # its name ends in .py
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def _end_at_ctrl_c(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a command whose imports are interrupted with one line and exit code 130; `report_errors` takes over later."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    sys.stderr.write("SIGINT: the command ends now.\n")
    raise SystemExit(130)


for _name in ("data", "reward_models"):
    _claim(_name, Path(__file__).resolve().parents[1] / _name)
if sys.argv[:1] == ["-m"]:  # Python looks for `pipeline.<command>`, to start it
    sys.excepthook = _end_at_ctrl_c
    # The oldest transformers that we allow has these names alone, and later ones warn of them in every run.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated")
    if not sys.stderr.isatty():  # a file keeps every state of a progress bar: write one every half minute
        for _name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):  # tqdm reads them as it is imported
            os.environ.setdefault(_name, "30")
