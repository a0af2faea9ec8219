"""README, docs and CONTRIBUTING: links, paths, commands and options that they name exist, and the README is short."""

import re
import shlex
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from pipeline import cli
from pipeline.migration.reading import read_command_line
from pipeline.migration.trl import migrate
from pipeline.runs.launcher import OPTIONS as LAUNCHER_OPTIONS
from pipeline.runs.launcher import launch
from pipeline.runs.recipe_file import recipe_names


ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
}
USER_PAGES = [name for name in PAGES if name != "CONTRIBUTING.md"]
# Commands whose `main` takes arguments that are parsed from a recipe and a command line.
PARSED = ("sft", "reward", "reward_eval", "ppo", "evaluation", "best_of_n", "rloo", "grpo", "dpo", "pretrain", "plan")
PARSED += ("label",)
PARSED += ("loop", "pairs")
# Options of what has a parser of its own: accelerate, pipeline.convert_hh, and the commands of `data`.
OTHER_OPTIONS = {"config_file", "config", "data_dir", "max_tokens", "pairs", "ties", "form", "between"}
# Of accelerate, pipeline.merge, rewardbench and llama.cpp.
OTHER_OPTIONS |= {"quiet", "debug", "license", "private", "model", "outfile", "outtype"}
OTHER_OPTIONS |= {"host", "port"}  # of pipeline.compare
OTHER_OPTIONS |= {"scale", "seeds", "report_only"}  # of pipeline.reproduce
OTHER_OPTIONS |= {"gold", "best_of_n"}  # of pipeline.overoptimization
OTHER_OPTIONS |= {*LAUNCHER_OPTIONS, "version", "help"}  # of `spine`
OTHER_OPTIONS |= {"host", "port", "write"}  # of pipeline.dashboard
OTHER_OPTIONS |= {"rows"}  # of tests.benchmarks.ppo_update


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def fences(text: str) -> str:
    return "\n".join(re.findall(r"^```bash$(.*?)^```$", text, re.DOTALL | re.MULTILINE))


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", without_fences(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def options_of(command: str) -> set[str]:
    kinds = get_type_hints(import_module(f"pipeline.{command}").main)
    return {field.name for argument, kind in kinds.items() if argument != "return" for field in fields(kind)}


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", PAGES["README.md"]))
    assert linked == {name for name in PAGES if name.startswith("docs/")}


def test_every_module_has_a_place_in_the_picture_of_the_house():
    (picture,) = re.findall(r"^```\npipeline/\n(.*?)^```$", PAGES["CONTRIBUTING.md"], re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"\w+\.py", picture))
    modules = {path.name for path in (ROOT / "pipeline").rglob("*.py")} - {"__init__.py"}
    assert modules <= named, f"CONTRIBUTING.md does not say what these are: {modules - named}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_fences(PAGES[name])):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        assert target.is_relative_to(ROOT), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{name}: {link}"


@pytest.mark.parametrize("name", PAGES)
def test_paths_in_backticks_exist(name):
    tops = "pipeline|data|reward_models|tests|docs|accelerate_configs"
    for path in re.findall(rf"`((?:{tops})/[^`:\s*<]*)[`:]", without_fences(PAGES[name])):
        assert (ROOT / path).exists(), f"{name}: {path}"


@pytest.mark.parametrize("name", PAGES)
def test_modules_and_targets_exist(name):
    for module in re.findall(r"(?<![\w/-])(?:pipeline|tests|data|reward_models)\.\w+(?:\.\w+)*", PAGES[name]):
        path, (parent, _, last) = ROOT / module.replace(".", "/"), module.rpartition(".")
        if not path.is_dir() and not path.with_suffix(".py").exists():  # a function of a module
            assert hasattr(import_module(parent), last), f"{name}: {module}"
    rules = set(" ".join(re.findall(r"^([\w ./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)).split())
    in_fences = re.findall(r"^(?:\w+=\S+ )*make (\S+)", fences(PAGES[name]), re.MULTILINE)
    in_prose = re.findall(r"`(?:\w+=\S+ )*make ([^`\s]+)[^`]*`", PAGES[name].replace("\n", " "))
    assert {*in_fences, *in_prose} <= rules, name
    if name == "README.md":
        assert {"demo", "smollm2", "test"} <= set(in_fences)


@pytest.mark.parametrize("name", USER_PAGES)
def test_options_exist(name):
    known = OTHER_OPTIONS.union(*map(options_of, PARSED))
    # The one takes the options of old TRL; those of the others are parsed below.
    text = re.sub(r"pipeline\.migrate -- .*|data\.(convert|inspect) .*", "", PAGES[name])
    named = set(re.findall(r"(?<![\w-])--([a-z]\w*)", text))
    assert named <= known, f"{name}: {named - known}"


def test_commands_that_python_starts():
    """Other tests run what accelerate launches. Recipes and accelerate configs of all commands exist."""
    text = "\n".join(map(fences, PAGES.values()))
    started = set(re.findall(r"^(?:\S*/)?python -m pipeline\.(\w+)", text, re.MULTILINE))
    assert started == {
        *("plan", "migrate", "convert_hh", "merge", "reproduce", "label", "compare", "dashboard", "loop"),
        "overoptimization",
    }
    recipes = re.findall(r"(?:pipeline/recipes|accelerate_configs)/\S+\.yaml", text)
    assert recipes and all((ROOT / path).exists() for path in recipes)
    (old,) = re.findall(r"^python -m pipeline\.migrate -- (.+) > new\.yaml$", text, re.MULTILINE)
    recipe = yaml.safe_load(migrate(read_command_line(old.split())))
    assert recipe["learning_rate"] == 1e-5 and recipe["num_iterations"] == 4


def test_commands_of_data():
    found = re.findall(r"^python -m data\.(\w+) (.+)$", "\n".join(map(fences, PAGES.values())), re.MULTILINE)
    assert {command for command, _ in found} == {"convert", "inspect"}
    for command, options in found:  # argparse would exit
        assert import_module(f"data.{command}").arguments(shlex.split(options, comments=True)).source


def test_commands_of_spine():
    """Each has a command, a recipe and an accelerate config that are there."""
    text = "\n".join(PAGES.values())
    found = re.findall(r"^spine ([^\n>|#]+)", "\n".join(map(fences, PAGES.values())), re.MULTILINE)
    found += re.findall(r"`spine ([^`<]+)`", text.replace("\n", " "))
    assert len(found) > 5
    for line in found:
        name, *words = shlex.split(line)
        assert name in {*cli.modules(), *cli.HERE, "--help", "--version"}, line
        launch(name, words)  # an accelerate config that is not there is an error
        named = words[words.index("--config") + 1] if "--config" in words else None
        assert named is None or named in recipe_names() or named == "mine.yaml", line
        if name == "recipes":
            assert cli.recipes(words)
