"""Find the model and the data files that come with this project, from any working directory."""

import os
from pathlib import Path


# Path of the embedded backbone inside this project. Recipes name the backbone by it.
BACKBONE = "data/backbone"
RECIPES = "pipeline/recipes/"  # as recipes name the files beside them


def find_embedded(name: str) -> str:
    """Return the path of a model.

    `data/backbone` is the embedded backbone, unless the current folder has a folder of this name. Any other name is
    returned as it is.
    """
    if name.rstrip("/") == BACKBONE and not Path(BACKBONE).is_dir():
        return str(Path(__file__).parent / "backbone")
    return name


def find_file(name: str) -> str:
    """Return the path of a data file.

    `pipeline/recipes/...` is a file beside the recipes, unless the current folder has one of this name. Any other name is
    returned as it is.
    """
    ours = Path(__file__).parents[1] / name
    return str(ours) if name.startswith(RECIPES) and not os.path.exists(name) and os.path.isfile(ours) else name
