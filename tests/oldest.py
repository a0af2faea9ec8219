"""Print the oldest releases that pyproject.toml allows, as constraints for pip.

`make test-oldest` installs them. A requirement on the command line takes the place of the one with its name, as in
`python tests/oldest.py torch==2.13.0`.
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement


EXTRAS = ("deepspeed", "pages", "quantization", "translation", "test")  # what the tests install


def oldest(project: dict, instead: list[str]) -> dict[str, str]:
    """Return the lower bound of each package that the tests install, as `name==version`.

    Raises:
        ValueError: a package has no lower bound, so nothing says what its oldest release is.
    """
    extras = [line for name in EXTRAS for line in project["optional-dependencies"][name]]
    given = [Requirement(line) for line in (*project["dependencies"], *extras)]
    bounds = {}
    for requirement in given:
        if requirement.name == project["name"]:  # an extra that names other extras
            continue
        versions = [each.version for each in requirement.specifier if each.operator in (">=", "==")]
        if not versions:
            raise ValueError(f"pyproject.toml: {requirement} has no lower bound. Write one, such as >=1.2.")
        bounds[requirement.name] = f"{requirement.name}=={versions[0]}"
    return bounds | {Requirement(line).name: line for line in instead}


if __name__ == "__main__":
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    print("\n".join(oldest(tomllib.loads(text)["project"], sys.argv[1:]).values()))
