"""`docs/ppo-details.md`: the functions, tests and defaults that it names are there."""

import ast
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import yaml

from pipeline.rl.config import PPOConfig
from reward_models.functions import RewardArguments


ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docs" / "ppo-details.md").read_text().splitlines()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if re.match(r"\| \d", line)]
CODE = re.compile(r"`([\w/]+\.py):(\w[\w.]*)`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


@cache
def names_in(path: str) -> set[str]:
    """Functions and classes of a file, and `Class.method`."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_rows_are_numbered():
    assert [int(row[0]) for row in ROWS] == list(range(1, len(ROWS) + 1)) and len(ROWS) > 40
    assert all(len(row) == 6 and row[1] and row[2] for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_what_a_row_names_is_there(row):
    *_, code, test = row
    (code,), (test,) = CODE.findall(code), TEST.findall(test)
    for path, name in (code, test):
        assert name in names_in(path), f"{path}: no {name}"


def test_defaults_are_these():
    defaults = {field.name: field.default for field in fields(RewardArguments)}
    defaults |= vars(PPOConfig(output_dir="out", use_cpu=True))
    options = [row[3] for row in ROWS if row[3]]
    assert len(options) > 20
    for option in options:
        ((name, value),) = yaml.safe_load(option.strip("`")).items()
        assert defaults[name] == (float(value) if isinstance(defaults[name], float) else value), name


def test_every_option_that_we_added_has_a_row():
    """Those of the table of samples and of evaluation aside, which only say how many."""
    inherited = {field.name for base in PPOConfig.__mro__[1:-1] for field in fields(base)}
    ours = (
        {field.name for field in fields(PPOConfig)}
        - inherited
        - {"judge", "sample_prompts", "eval_prompts", "kl_horizon"}
    )
    named = {row[3].strip("`").split(":")[0] for row in ROWS}
    assert ours <= named, ours - named
