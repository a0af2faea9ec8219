"""Run any command of this project by its name, from any folder; `spine` is this module.

    spine ppo --config demo/ppo --accelerate_config ddp --num_processes 8 --seed 1
    spine recipes
    python -m pipeline.cli demo

A stage is started by accelerate's own launcher, and so is the same as with `accelerate launch -m pipeline.ppo`: this module
writes that command, prints it and becomes it. Options that say where processes run go to the launcher, all others to the
stage. Without `--accelerate_config` accelerate takes its default. A tool, which trains nothing, is started without a launcher,
as with `python -m pipeline.plan`.

`spine demo` and `spine smollm2` run what `make demo` and `make smollm2` do.
"""

import argparse
import ast
import difflib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from types import FrameType

from data.commands import run
from pipeline import ROOT, check_current_folder
from pipeline.runs.launcher import config_names, launch
from pipeline.runs.recipe_file import PROTOCOLS, RECIPES, find_recipe, recipe_names


STAGES = ("sft", "reward", "ppo", "evaluation", "reward_eval", "best_of_n", "rloo", "grpo", "dpo", "pairs", "pretrain")
OF_DATA = ("convert", "inspect", "tasks")
WIDTH = len("overoptimization") + 1  # of the names in the help
HERE = {
    "recipes": "List the recipes; with a name, print that recipe, to copy it.",
    "demo": "Run SFT, reward model, PPO and evaluation on the embedded model, in four minutes on 2 CPU cores.",
    "smollm2": "Run the same four stages on SmolLM2-135M, in less than half an hour.",
}
# As in the Makefile: glibc keeps memory, which saves a quarter of a training step on a CPU, and DeepSpeed looks for no GPU.
ON_CPUS = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_THRESHOLD_": "4294967296", "DS_ACCELERATOR": "cpu"}
# The first two lines of a recipe: its command, and what it takes.
HEADER = re.compile(
    r"^# (?:accelerate launch --config_file accelerate_configs/(\w+)\.yaml|python) -m pipeline\.(\w+) --config \S+\n# (.+)$",
    re.MULTILINE,
)


def modules() -> dict[str, str]:
    """Return the module of each command."""
    names = sorted(path.stem for path in (ROOT / "pipeline").glob("*.py"))
    found = {name: f"pipeline.{name}" for name in (*STAGES, *names) if name not in ("__init__", "cli")}
    return found | {name: f"data.{name}" for name in OF_DATA}


def overview() -> str:
    """Return what `spine --help` says: each command, with the first line of its docstring."""
    lines: dict[bool, list[str]] = {True: [], False: []}
    for name, module in modules().items():
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        title = (ast.get_docstring(tree) or "").partition("\n")[0]
        lines[name in STAGES].append(f"  {name:<{WIDTH}} {title}")
    return "\n".join(
        [
            "usage: spine <command> [options]",
            "",
            "Stages, started by accelerate's launcher:",
            *lines[True],
            "",
            f"  --config <recipe, such as demo/ppo> --accelerate_config <a file, or {', '.join(config_names())}>",
            "",
            "Tools:",
            *lines[False],
            "",
            "Here:",
            *(f"  {name:<{WIDTH}} {title}" for name, title in HERE.items()),
            "",
            "Options of a command: spine <command> --help",
        ]
    )


def versions() -> str:
    """Return the versions of this project and of what it stands on, on one line."""
    found = [f"Python {python_version()}"]
    for name in ("spine-rlhf", "torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # in a clone that is not installed
            found.append(f"{name} not installed")
    return ", ".join(found)


def recipes(words: list[str]) -> str:
    """Return a table of the recipes, or of those in a folder; or one recipe as it is.

    Raises:
        ValueError: there is no such recipe or folder.
    """
    names = recipe_names()
    if len(words) > 1:
        raise ValueError(f"spine recipes: {shlex.join(words)}: name one recipe or folder.")
    if words and (found := find_recipe(words[0])) in map(str, names.values()):
        return Path(found).read_text(encoding="utf-8").rstrip("\n")
    within = f"{words[0].rstrip('/')}/" if words else ""
    chosen = {name: path for name, path in names.items() if name.startswith(within)}
    if not chosen:
        hint = _nearest(words[0], names)
        raise ValueError(f"spine recipes: {words[0]} is neither a recipe of this project nor a folder of them.{hint}")
    rows = [("command", "recipe", "config", "takes")]
    for name, path in chosen.items():
        header = HEADER.search(path.read_text(encoding="utf-8"))
        config, command, takes = header.groups() if header else ("", "", "")
        rows.append((command, name, config or "-", takes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", "Run one: spine <command> --config <recipe> --accelerate_config <config>"]
    papers = sorted({path.parent.name for name in PROTOCOLS for path in RECIPES.glob(f"papers/*/{name}")})
    return "\n".join([*lines, f"Reproduce a paper: spine reproduce <{', '.join(papers)}>"])


def _nearest(name: str, names: Iterable[str]) -> str:
    """Return a hint at the nearest name, or nothing."""
    near = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def demo_stages(name: str, seed: str, output_dir: str) -> list[tuple[str, list[str]]]:
    """Return the stages of `make demo` or `make smollm2`, and the options of each."""
    sft, reward, policy = (f"{output_dir}/{stage}" for stage in ("sft", "reward", "ppo"))
    adapters = ["--sft_adapter", sft, "--reward_adapter", reward]
    given = {
        "sft": ["--output_dir", sft],
        "reward": ["--output_dir", reward, "--sft_adapter", sft],
        "ppo": ["--output_dir", policy, *adapters],
        "evaluation": ["--output_dir", output_dir, *adapters, "--policy_adapter", policy],
    }
    return [
        (stage, ["--config", f"pipeline/recipes/{name}/{stage}.yaml", "--seed", seed, *words])
        for stage, words in given.items()
    ]


def demo(name: str, words: list[str]) -> None:
    """Run the four stages of a demo, each by accelerate's launcher; end with the code of one that fails."""
    parser = argparse.ArgumentParser(f"spine {name}", description=HERE[name], allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="Seed of every stage.")
    parser.add_argument("--output_dir", default=f"runs/{name}", help="Folder of the adapters and report.md.")
    given = parser.parse_args(words)
    for stage, options in demo_stages(name, str(given.seed), given.output_dir):
        command = launch(f"pipeline.{stage}", ["--accelerate_config", "cpu", *options])
        _show(command)
        code = _wait(subprocess.Popen(command, env={**ON_CPUS, **os.environ}))
        if code:
            sys.stderr.write(f"spine {name}: {stage} ended with exit code {code}. Its message stands above.\n")
            raise SystemExit(code if code > 0 else 128 - code)


def _wait(child: subprocess.Popen) -> int:
    """Wait for a stage and return its exit code. A signal is passed on, so that it ends as under `accelerate launch`."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    return child.wait()


def _show(command: list[str]) -> None:
    """Print the command of accelerate that a stage is started by, as it can be typed."""
    words = ["accelerate", "launch", *command[command.index("accelerate.commands.launch") + 1 :]]
    print(shlex.join(words), file=sys.stderr, flush=True)


def _become(command: list[str]) -> None:
    """Replace this process by a command."""
    sys.stdout.flush()
    os.execv(command[0], command)


def main(args: list[str]) -> None:
    name, words = (args[0], args[1:]) if args else ("--help", [])
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(versions())
    elif name == "recipes":
        print(recipes(words))
    elif name not in modules() and name not in HERE:
        raise ValueError(
            f"spine: no command {name!r}.{_nearest(name, [*modules(), *HERE])} `spine --help` lists them."
        )
    else:
        try:
            check_current_folder()
        except ImportError as error:
            raise ValueError(str(error)) from error
        if name in HERE:
            demo(name, words)
        elif name in STAGES:
            command = launch(modules()[name], words)
            _show(command)
            _become(command)
        else:
            _become([sys.executable, "-m", modules()[name], *words])


if __name__ == "__main__":
    run(main)
