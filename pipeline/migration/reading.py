"""Read the options of another project's config: a YAML or JSON file, a command line, or the shell script that has one."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data.cells import shorten
from pipeline.runs.recipe_file import LONGEST, read_recipe


def number_of(value: Any) -> Any:
    """Return a number for text such as 1e-5, which YAML 1.1 reads as text because it has no dot; also inside of lists."""
    if isinstance(value, list):
        return [number_of(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): number_of(entry) for key, entry in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+\.?\d*[eE][-+]?\d+", value):
        return float(value)
    return value


def read_file(path: str) -> dict[str, Any]:
    """Read the keys and values of a YAML or JSON file. Raises the errors of `read_recipe`."""
    return number_of(read_recipe(path, option=""))


def flattened(given: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested mappings as keys with dots."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        found |= flattened(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def read_command_line(words: Sequence[str]) -> dict[str, Any]:
    """Read the keys and values of `--key value`, `--key=value`, `--key a b` (a list), `--flag` and `--no_flag`.

    Raises:
        ValueError: there is a word before the first option.
    """
    given: dict[str, list[str]] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            key = key.replace("-", "_")
            given[key] = [value] if value else []
        elif key is None:
            raise ValueError(
                f"{word!r} stands before any --key. Give only the options, as in -- --learning_rate 1e-5."
            )
        else:
            given[key].append(word)
    options: dict[str, Any] = {}
    for key, found in given.items():
        values = [number_of(yaml.safe_load(value)) for value in found]
        if not values and key.startswith("no_") and key != "no_cuda":
            options[key.removeprefix("no_")] = False
        else:
            options[key] = True if not values else values[0] if len(values) == 1 else values
    return options


def read_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Read the keys and values of Hydra's `a.b=value`, `+a.b=value` and `++a.b=value`; `--options` of Hydra are left out.

    Raises:
        ValueError: a word has another form.
    """
    options = {}
    for word in words:
        if word.startswith("--"):
            continue
        key, sign, value = word.lstrip("+").partition("=")
        if not sign or not re.fullmatch(r"[\w.@/]+", key):
            raise ValueError(f"{shorten(word)} is not of the form key=value. Give only the overrides.")
        options[key] = number_of(yaml.safe_load(value)) if value else None
    return options


def read_script(path: str, modules: Sequence[str]) -> tuple[str, list[str]]:
    """Find the command that starts one of these modules in a shell script, and return the module and its options.

    Variables that the script sets, and those of the environment, are filled in. Nothing is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no command starts one of the modules, or several do; or an option reads a variable that is not set.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file. Name the script that starts the run.")
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        text = file.read(LONGEST + 1)
    if len(text) > LONGEST:
        raise ValueError(f"{path}: larger than {LONGEST:,} characters. Name the script that starts the run.")
    text = re.sub(r"(?m)^\s*#.*\n", "", text)  # also between the lines of a command
    variables, found = dict(os.environ), []
    for line in re.sub(r"[ \t]*\\\r?\n", " ", text).splitlines():
        if assigned := re.fullmatch(r"\s*(?:export\s+)?(\w+)=([^\s;&|]*|\"[^\"]*\"|'[^']*')\s*(?:#.*)?", line):
            value = assigned[2]
            bare = value[1:-1] if value[:1] in "'\"" else value
            variables[assigned[1]] = bare if value.startswith("'") else _filled(bare, variables)[0]
            continue
        if named := [module for module in modules if re.search(rf"(?<![\w.]){re.escape(module)}(?![\w.])", line)]:
            found.append((named[0], line[line.rindex(named[0]) + len(named[0]) :]))
    if len(found) != 1:
        number = "no command starts" if not found else f"{len(found)} commands start"
        raise ValueError(f"{path}: {number} {' or '.join(modules)}. Give the options of one run after --.")
    module, options = found[0]
    options, unset = _filled(options, variables)
    if unset:
        raise ValueError(f"{path}: the variable {unset[0]!r} is not set. Set it in the environment, or in the script.")
    try:
        words = shlex.split(options, comments=True)
    except ValueError as error:
        raise ValueError(f"{path}: the options of {module} cannot be read ({error}). Correct the quotes.") from error
    return module, words


def _filled(text: str, variables: dict[str, str]) -> tuple[str, list[str]]:
    """Return a text with the shell's variables filled in, and the names of those that are not set.

    The script's own arguments ($@, $1) are left out. `${name:-value}` takes the value where the variable is not set.
    """
    unset = []

    def fill(match: re.Match) -> str:
        name, default = match[1] or match[2], match[3]
        if name in variables:
            return variables[name]
        if default is None:
            unset.append(name)
        return default or ""

    text = re.sub(r"\"?\$(?:@|\*|[0-9])\"?", "", text)
    return re.sub(r"\$(?:(\w+)|\{(\w+)(?::?-([^}]*))?\})", fill, text), unset
