"""The house: packages and rooms import downwards only, nothing imports in a circle, and no module grows without a reason."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# Each imports from those before it and from itself; `pipeline`'s own modules, the commands, import from all of them.
ORDER = (
    "data",
    "reward_models",
    "pipeline.backbone",
    "pipeline.runs",
    "pipeline.rl",
    "pipeline.migration",
    "pipeline.reports",
    "pipeline.pages",
)
LONGEST = 350  # lines of a module, unless its docstring says why it is longer


@cache
def modules() -> dict[str, Path]:
    paths = [path for package in ("data", "reward_models", "pipeline") for path in (ROOT / package).rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    assert len(names) > 60
    return names


@cache
def imported(module: str) -> frozenset[str]:
    """Modules of ours that a module imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found.update(name for name in names if name in modules())
    # `from pipeline.rl import kl` names a room only to reach the module in it.
    return frozenset(name for name in found if not any(other.startswith(f"{name}.") for other in found))


def floor(module: str) -> int:
    """The place of a module's room in `ORDER`; commands stand above all rooms."""
    return next((at for at, room in enumerate(ORDER) if f"{module}.".startswith(f"{room}.")), len(ORDER))


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_downwards(module):
    above = {name for name in imported(module) if floor(name) > floor(module)}
    assert not above
    if floor(module) == len(ORDER):  # a command is not a library
        assert not {name for name in imported(module) if floor(name) == len(ORDER)} - {"pipeline"}


def test_nothing_imports_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in imported(module):
                visit(name, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_long_module_says_why(module):
    text = modules()[module].read_text(encoding="utf-8")
    if len(text.splitlines()) > LONGEST:
        assert "longer than" in (ast.get_docstring(ast.parse(text)) or "").lower()


def test_everything_at_the_top_of_pipeline_can_be_launched():
    for path in (ROOT / "pipeline").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "__init__.py":
            assert '\nif __name__ == "__main__":\n' in text, path
            docstring = ast.get_docstring(ast.parse(text))
            assert f"-m pipeline.{path.stem}" in docstring, f"{path}: its docstring has no command to paste"


def test_an_update_of_ppo_reads_in_short_pieces():
    """A reader follows it from top to bottom: the trainer's docstring numbers the steps, and no method is long."""
    (trainer,) = (
        n for n in ast.parse(modules()["pipeline.rl.trainer"].read_text()).body if isinstance(n, ast.ClassDef)
    )
    steps = [int(line.split(".")[0]) for line in ast.get_docstring(trainer).splitlines() if line[:1].isdigit()]
    assert steps == list(range(1, 8))
    for method in trainer.body:
        if isinstance(method, ast.FunctionDef):
            assert method.end_lineno - method.lineno < 40, method.name


# Titles that are a clause or a headless possessive: a docstring begins with a verb, or names a thing.
CLAUSES = ("What", "Where", "Whether", "Of", "How")
POSSESSIVES = ("Trainer's", "peft's", "TRL's", "transformers'")


def docstrings(module: str) -> list[str]:
    """Docstrings of a module, its classes and its functions."""
    nodes = ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8")))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [found for node in nodes if isinstance(node, kinds) and (found := ast.get_docstring(node))]


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_docstring_begins_with_a_verb_or_names_a_thing(module):
    titles = [docstring.splitlines()[0] for docstring in docstrings(module)]
    assert not [title for title in titles if re.split(r"[\s:,;.]", title)[0] in CLAUSES]
    assert not [title for title in titles if title.startswith(POSSESSIVES)]


def test_each_test_file_has_a_name_of_its_own():
    """pytest imports test files by their name alone, for they are in no package."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
