"""The oldest releases that `make test-oldest` installs are the lower bounds of pyproject.toml."""

import tomllib
from pathlib import Path

import pytest
from oldest import oldest
from packaging.requirements import Requirement


PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_package_is_there_at_its_lower_bound():
    bounds = oldest(PROJECT, ["torch==2.13.0"])
    required = {Requirement(line).name: Requirement(line).specifier for line in PROJECT["dependencies"]}
    assert bounds.keys() == required.keys() | {
        *("beartype", "bitsandbytes", "deepspeed", "gradio", "ipykernel", "nbclient", "pytest", "pytest-cov"),
        *("pytest-xdist", "sacrebleu", "selenium", "setuptools"),
    }
    assert bounds["transformers"] == "transformers==5.10.4" and bounds["vaderSentiment"] == "vaderSentiment==3.3.2"
    assert bounds["torch"] == "torch==2.13.0"
    for name, specifier in required.items():
        assert bounds[name].partition("==")[2] in specifier


def test_a_package_without_a_lower_bound_is_refused():
    with pytest.raises(ValueError, match=r"pyproject\.toml: numpy<3 has no lower bound\. Write one"):
        oldest(PROJECT | {"dependencies": ["numpy<3"]}, [])
