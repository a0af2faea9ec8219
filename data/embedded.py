"""Find what comes with this project wherever a command is started."""

from pathlib import Path


# The backbone that comes with this project, by its path there: recipes name it so.
BACKBONE = "data/backbone"


def find_embedded(name: str) -> str:
    """Return where a model is: the embedded backbone's own folder if the name is its path and the current folder has none."""
    if name.rstrip("/") == BACKBONE and not Path(BACKBONE).is_dir():
        return str(Path(__file__).parent / "backbone")
    return name
