"""Read a recipe's YAML, from a file of any content, in bounded time and memory.

YAML 1.1 has surprises: `1:30` is 90, `010` is 8, `2024-01-01` is a date. Here these stay text, and the option's annotation
says what they are (`pipeline.runs.recipe`).
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml


RECIPES = Path(__file__).parents[1] / "recipes"
PROTOCOLS = ("mini.yaml", "full.yaml")  # of papers: `pipeline.reproduce` reads them
LONGEST = 100_000  # bytes of a recipe; the longest of ours has 3,000
MOST_VALUES = 10_000  # values of a recipe, with its aliases written out


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which reads only plain decimal numbers as numbers, and refuses a key that comes twice.

    The rest (`010`, `1:30`, `1e-5`, dates) stays text, and the option's annotation says what it is.
    """

    yaml_implicit_resolvers = {
        first: [
            (tag, pattern) for tag, pattern in resolvers if tag.split(":")[-1] not in ("int", "float", "timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} comes twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), [*"-+0123456789"])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    [*"-+.0123456789"],
)


def recipe_names() -> dict[str, Path]:
    """Return the recipes that come with this project, by name (`demo/ppo`)."""
    paths = sorted(RECIPES.rglob("*.yaml"))
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in paths if path.name not in PROTOCOLS}


def find_recipe(path: str) -> str:
    """Return the path of a recipe: a file, or a recipe of this project from any folder.

    `demo/ppo` and `pipeline/recipes/demo/ppo.yaml` name the same one. A file of the user's own comes first.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        return path
    return str(recipe_names().get(_name(path), path))


def _name(path: str) -> str:
    """Return the name that a path would have as a recipe of this project."""
    return path.removeprefix("pipeline/recipes/").removesuffix(".yaml")


def read_recipe(path: str, option: str = "--config ") -> dict[str, Any]:
    """Read the keys and values of a recipe.

    Args:
        option: the option that named the file, for errors.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read, or is a pipe: each process of a run reads the recipe.
        ValueError: the file is not YAML, is not a mapping, has a key twice, or is too large.
    """
    source = Path(path)
    if not os.path.exists(path) or source.is_dir():  # pathlib raises an error for a name of 300 characters
        near = difflib.get_close_matches(_name(path), recipe_names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(
            f"{option}{path}: no such file. Name a recipe, such as those that `spine recipes` lists.{hint}"
        )
    if not source.is_file():
        raise OSError(
            f"{option}{path}: not a regular file, such as a pipe. Each process of a run reads the recipe. Save it to a file."
        )
    try:
        with source.open("rb") as file:
            content = file.read(LONGEST + 1)
    except OSError as error:
        raise OSError(
            f"{option}{path}: the file cannot be read ({error.strerror}). Correct its permissions."
        ) from error
    if len(content) > LONGEST:
        raise ValueError(f"{path}: larger than {LONGEST:,} bytes, so it is no recipe. Name a recipe.")
    try:
        recipe = _load(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(
            f"{path}: not a YAML recipe (its brackets are nested too deeply). Correct the file."
        ) from None
    # A tag such as `!!int abc` ends in another type of error.
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        problem = (problem or getattr(error, "reason", None)) if isinstance(error, yaml.YAMLError) else error
        if problem == "but found another document":
            problem = "a second document begins with ---; one recipe is one document"
        line = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: not a YAML recipe ({problem}). Correct the file.") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: not a YAML mapping. Write a recipe as lines of `key: value`.")
    return recipe


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, counted: dict[int, int | None]) -> int:
    """Count the values beneath a node, with its aliases written out.

    Raises:
        yaml.MarkedYAMLError: there are more than `MOST_VALUES`, or an alias stands inside of what it names.
    """
    if id(node) not in counted:
        counted[id(node)] = None  # until it is known: an alias inside of it would never end
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inside = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        counted[id(node)] = 1 + sum(_count(part, counted) for part in inside)
    number = counted[id(node)]
    if number is None or number > MOST_VALUES:
        problem = "an alias stands inside of what it names" if number is None else f"more than {MOST_VALUES:,} values"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return number
