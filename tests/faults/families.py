"""The kinds of cases, in the order in which they take turns."""

from collections.abc import Callable
from typing import NamedTuple

from tests.faults import deaths, files, folders, machines, recipes, rewards, rows, tools
from tests.faults.verdicts import Verdict
from tests.faults.world import Case


class Family(NamedTuple):
    """A kind of case, and in how many rounds it comes once."""

    run: Callable[[Case], Verdict]
    every: int = 1


KINDS = {
    "recipe": Family(recipes.recipe),
    "command": Family(recipes.command_line),
    "yaml": Family(recipes.yaml),
    "rows": Family(rows.rows),
    "folders": Family(rows.folders),
    "json": Family(files.damaged_json),
    "weights": Family(files.damaged_weights),
    "rewards": Family(rewards.rewards),
    "kill": Family(deaths.kill),
    "disk": Family(deaths.disk),
    "resume": Family(deaths.resume, 2),
    "changed": Family(deaths.changed),
    "theirs": Family(folders.theirs),
    "two": Family(folders.two, 3),
    "machine": Family(machines.machine),
    "tools": Family(tools.tools),
    "launch": Family(machines.launch, 8),
}
