"""The pipeline's commands.

First this module makes sure that `data` and `reward_models` are the packages of this project: Python looks for packages in the
folder in which a command is started, and a user may have their own `data` there. It also refuses to run without docstrings,
before transformers ends in an error of its own.
"""

import gc
import os
import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
GARBAGE = gc.get_threshold()  # how often Python looks for it


def check_current_folder() -> None:
    """Check that a command that is started in the current folder with `python -m` finds the packages of this project.

    Raises:
        ImportError: another module there, or in a folder of PYTHONPATH, has the name of one.
    """
    path = sys.path if sys.flags.safe_path else [os.getcwd(), *sys.path]
    for name in ("pipeline", "data", "reward_models"):
        found = PathFinder.find_spec(name, path)
        if found is None or (name != "pipeline" and not found.origin):  # `_claim` takes care of a folder of data files
            continue
        _check(name, found)


def _check(name: str, found: ModuleSpec) -> None:
    """Raise an ImportError if what Python found under a name is not this project's package."""
    where = found.origin or next(iter(found.submodule_search_locations or []), name)
    if Path(where).resolve() != ROOT / name / "__init__.py":
        raise ImportError(
            f"{where} is imported instead of this project's package {name!r}, and so a stage cannot run. Rename it, or "
            f"start from another folder, or set PYTHONSAFEPATH=1, so that Python ignores the current folder.",
            name=__name__,  # `python -m` then prints only this message
        )


def _claim(name: str) -> None:
    """Make `name` mean the package of this project.

    A folder of the same name without Python code, such as one of data files, hides the package of an editable installation.
    So the package is imported here.

    Raises:
        ImportError: another module has this name.
    """
    found = find_spec(name)
    if found is not None and found.origin:
        _check(name, found)
        return
    ours = ROOT / name / "__init__.py"
    spec = spec_from_file_location(name, ours, submodule_search_locations=[str(ours.parent)])
    assert spec is not None and spec.loader is not None  # its name ends in .py
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


if sys.flags.optimize > 1:
    raise ImportError(
        "Python runs without docstrings (PYTHONOPTIMIZE=2, or python -OO), and transformers builds its classes from "
        "docstrings. Unset PYTHONOPTIMIZE, or leave out -OO.",
        name=__name__,
    )
for _name in ("data", "reward_models"):
    _claim(_name)
if sys.argv[:1] == ["-m"]:  # Python looks for `pipeline.<command>`, to start it
    import_module("data")  # which ends a command whose imports fail
    # What a command imports is half a million objects that stay. Looking for garbage among them took a third of its start.
    gc.set_threshold(1_000_000)  # until `report_errors`
    # The oldest transformers that we allow has these names alone, and later ones warn of them in every run.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated")
    if not sys.stderr.isatty():  # a file keeps every state of a progress bar: write one every half minute
        for _name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):  # tqdm reads them as it is imported
            os.environ.setdefault(_name, "30")
