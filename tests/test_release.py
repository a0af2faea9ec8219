"""What a release states: one version, licences that fit, and what was tested where. `make release-check` runs this too."""

import re
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {
    name: lines for name, lines in PROJECT["optional-dependencies"].items() if name not in ("test", "lint", "docs")
}
REQUIRED = [Requirement(line) for line in (*PROJECT["dependencies"], *sum(EXTRAS.values(), []))]
NAMES = sorted({requirement.name for requirement in REQUIRED})
# How the metadata of packages name the licences that we accept, with the name that CONTRIBUTING's table has.
LICENCES = {
    "Apache-2.0": r"Apache",
    "BSD-3-Clause": r"BSD-3|BSD License",
    "MIT": r"MIT",
    "PSF": r"Python Software Foundation",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def stated(package: Distribution) -> str:
    """Return the licence that a package states, in the newest of the fields of its metadata that it has."""
    metadata = package.metadata
    classifiers = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")]
    return metadata.get("License-Expression") or " ".join(classifiers) or metadata.get("License") or ""


# ------------------------------------------------------------------------------------------ versions
def test_one_version_stands_everywhere():
    version = PROJECT["version"]
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version
    assert re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[0] == version
    assert distribution(PROJECT["name"]).version == version, "install the project anew"


def test_the_citation_has_what_the_format_requires():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("requirement", REQUIRED, ids=str)
def test_what_is_installed_fits_what_is_required(requirement):
    package = installed(requirement.name)
    if package is not None:  # extras may be missing
        assert requirement.specifier.contains(package.version, prereleases=True)


FORMS = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_for_issues_is_one(path):
    """GitHub leaves out a form that it cannot read, and says so nowhere."""
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in form["body"])
    assert {field["type"] for field in form["body"]} <= {"input", "textarea"}


def test_what_was_tested_fits_what_is_allowed():
    """The table of docs/limits.md names releases that pyproject.toml allows, and what `make test` runs on."""
    (table,) = re.findall(
        r"^## What is tested where\n(.*?)^\|---.*?\n(.*?)\n\n", read("docs/limits.md"), re.DOTALL | re.M
    )
    rows = {row.split("|")[1].strip(): row for row in table[1].splitlines()}
    assert len(rows) > 5
    bounds = {requirement.name: requirement.specifier for requirement in map(Requirement, PROJECT["dependencies"])}
    named = [
        (name, version)
        for row in rows.values()
        for name, version in re.findall(r"(torch|transformers|TRL|peft|accelerate|datasets) (\d+(?:\.\d+)+)", row)
    ]
    assert {name for name, _ in named} == {"torch", "transformers", "TRL", "peft", "accelerate", "datasets"}
    for name, version in named:
        specifier = bounds[name.lower()]
        assert specifier.contains(version if version.count(".") > 1 else f"{version}.0"), f"{name} {version}"
    whole = rows["`make test`"]
    (python,) = re.findall(r"^PYTHON \?= python(\S+)", read("Makefile"), re.MULTILINE)
    assert f"Python {python}" in whole and PROJECT["requires-python"] == f">={python}"
    lowest = rows["`make test-oldest`"]
    for name in ("transformers", "trl", "peft", "accelerate", "datasets"):
        (floor,) = (each.version for each in bounds[name] if each.operator == ">=")
        assert re.search(rf"{name} {re.escape(floor)}", lowest, re.IGNORECASE), f"{name} {floor}"


# ------------------------------------------------------------------------------------------ licences
@pytest.mark.parametrize("name", NAMES)
def test_a_direct_dependency_has_the_licence_that_contributing_states(name):
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", read("CONTRIBUTING.md"), re.MULTILINE)
    found = [
        licence for licence, packages in rows if re.search(rf"(?<![\w-]){name}(?![\w-])", packages, re.IGNORECASE)
    ]
    found = [licence for licence in found if licence.startswith(tuple(LICENCES))]
    assert len(found) == 1, f"CONTRIBUTING.md, licences: {name} is to stand in one row"
    package = installed(name)
    if package is not None:
        (kind,) = (kind for kind in LICENCES if found[0].startswith(kind))
        assert re.search(LICENCES[kind], stated(package)), f"{name} states {stated(package)!r}"


def closure() -> dict[str, Distribution]:
    """Return what is installed of the dependencies and of theirs, without extras."""
    found: dict[str, Distribution] = {}
    waiting = list(NAMES)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        package = None if name in found else installed(name)
        if package is None:
            continue
        found[name] = package
        for line in package.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def test_no_dependency_is_under_a_licence_that_would_bind_this_project():
    packages = closure()
    assert len(packages) > 40
    for name, package in packages.items():
        bound = re.search(r"(?<!L)(?<!Lesser )\b(A?GPL|General Public License)", stated(package))
        assert not bound, f"{name} states {stated(package)!r}"
