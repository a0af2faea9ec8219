"""Find the model that comes with this project, from any working directory."""

from pathlib import Path


# Path of the embedded backbone inside this project. Recipes name the backbone by it.
BACKBONE = "data/backbone"


def find_embedded(name: str) -> str:
    """Return the path of a model.

    `data/backbone` is the embedded backbone, unless the current folder has a folder of this name. Any other name is
    returned as it is.
    """
    if name.rstrip("/") == BACKBONE and not Path(BACKBONE).is_dir():
        return str(Path(__file__).parent / "backbone")
    return name
