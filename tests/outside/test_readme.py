"""`tests/outside/README.md`: each test of ours that it names is there."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
ROWS = [
    line for line in (ROOT / "tests/outside/README.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "
]
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


@pytest.mark.parametrize("row", [row for row in ROWS if NAMED.search(row.split("|")[-2])], ids=lambda row: row[2:60])
def test_what_a_row_names_is_there(row):
    for path, name in NAMED.findall(row.split("|")[-2]):
        names = {
            node.name for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body if hasattr(node, "name")
        }
        assert not name or name in names, f"{path}: no {name}"
