"""Start `spine`, where no module of the user's can take the place of this project's packages.

`data`, `pipeline` and `reward_models` are common names. This module has a name of its own, and imports `pipeline` from the
folder in which it lies. `pipeline` then checks the other two.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> None:
    """Run the command line; print the message of an error that asks the user to change something."""
    ours = Path(__file__).resolve().with_name("pipeline") / "__init__.py"
    spec = spec_from_file_location("pipeline", ours, submodule_search_locations=[str(ours.parent)])
    assert spec is not None and spec.loader is not None  # its name ends in .py
    sys.modules["pipeline"] = module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules["pipeline"])
    except ImportError as error:
        if error.name != "pipeline":
            raise
        sys.exit(str(error))
    from data.commands import run
    from pipeline.cli import main

    run(main)
