"""The pipeline's commands. Its neighbours `data` and `reward_models` are made sure of first: Python looks for packages in the
folder that a command is started in, and a user has a `data` of their own."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path


def _claim(name: str, folder: Path) -> None:
    """Have `name` mean the package in `folder`.

    A folder of that name without Python, such as one of data files, hides the package of an editable installation, so ours
    is imported here.

    Raises:
        ImportError: another module has the name.
    """
    ours = folder / "__init__.py"
    found = find_spec(name)
    if found is not None and found.origin:
        if Path(found.origin).resolve() != ours:
            raise ImportError(
                f"{found.origin} is imported in the place of this project's package {name!r}, and so a stage cannot run. "
                f"Rename it, or start from another folder; with PYTHONSAFEPATH=1 Python does not look in the current one.",
                name=__name__,  # then `python -m` prints this alone
            )
        return
    spec = spec_from_file_location(name, ours, submodule_search_locations=[str(folder)])
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


for _name in ("data", "reward_models"):
    _claim(_name, Path(__file__).resolve().parents[1] / _name)
