"""Reproduce a paper's claim: run its stages under several seeds, and compute the verdict from a criterion set before.

    python -m pipeline.reproduce bai2022
    python -m pipeline.reproduce bai2022 --report_only

The protocols are in pipeline/recipes/papers; docs/papers.md explains them and has the verdicts. A stage that has finished is
not run again, also not for another paper that has the same stage; one that was cut off goes on from its last checkpoint, if
its recipe leaves any. Writes report.md, figure.png and metrics.json. `--report_only` runs nothing: it computes the verdict
again from the measurements that the repository has.
"""

import argparse
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.json_files import write_json
from data.listing import json_digest
from data.saving import save
from pipeline.reports.reproduction import (
    PAPERS,
    SCALES_OF_RUNS,
    draw,
    measured,
    papers,
    read_measured,
    read_protocol,
    report,
)
from pipeline.runs.errors import report_errors
from pipeline.runs.folders import check_ours, check_output_dir
from pipeline.runs.launcher import find_accelerate_config
from pipeline.runs.ownership import FILES
from pipeline.runs.recipe_file import find_recipe
from pipeline.runs.stages import TRAIN, finished_in, run_stage


STAGES = (*TRAIN, "evaluation", "best_of_n")
PLACE = re.compile(r"\{(\w+)\}")


def arguments(args: list[str]) -> argparse.Namespace:
    """Parse the command line; exit with a message if an option is invalid."""
    parser = argparse.ArgumentParser("python -m pipeline.reproduce", allow_abbrev=False)
    parser.add_argument("paper", help=f"One of {', '.join(papers())}.")
    parser.add_argument("--scale", choices=SCALES_OF_RUNS, default="mini", help="mini: 2 CPU cores. full: GPUs.")
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds, from 0 on.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/papers"), help="Folder of all papers' runs.")
    parser.add_argument(
        "--report_only", "--report-only", action="store_true", help="Run nothing; read the repository's measurements."
    )
    found = parser.parse_args(args)
    if found.seeds < 1:
        parser.error(f"--seeds {found.seeds} must be 1 or more.")
    return found


def folder_of(stage: str, command: str, seed: int) -> str:
    """Return the folder of a stage: one for each seed if its command names the seed or a stage that does."""
    return f"{stage}/{seed}" if "{seed}" in command else stage


def places_of(stages: dict[str, str], root: Path, seed: int) -> dict[str, str]:
    """Return the folder of each stage for a seed."""
    return {stage: str(root / folder_of(stage, command, seed)) for stage, command in stages.items()}


def check_stages(stages: dict[str, str], launch: str) -> None:
    """Check that each stage is one of Spine's, and names only stages before it.

    Raises:
        ValueError: one does not.
        FileNotFoundError: there is no such accelerate config.
    """
    known = {"seed"}
    for stage, command in stages.items():
        module, *words = shlex.split(command)
        if module not in STAGES:
            raise ValueError(f"stages: {stage}: {module!r} is not one of {', '.join(STAGES)}. Correct the protocol.")
        if "--output_dir" in words or "--config" not in words:
            raise ValueError(f"stages: {stage}: name a --config, and no --output_dir. Correct the protocol.")
        names = set(PLACE.findall(command))
        if unknown := names - known:
            raise ValueError(f"stages: {stage}: {{{min(unknown)}}} is no stage before it. Correct the protocol.")
        if "{seed}" not in command and any("{seed}" in stages[name] for name in names):
            raise ValueError(f"stages: {stage} reads a stage of each seed, so it needs --seed {{seed}} itself.")
        known.add(stage)
    find_accelerate_config(launch, "launch: ")


def run(stages: dict[str, str], launch: str, root: Path, seed: int) -> None:
    """Run the stages of one seed that have not finished.

    A stage is known by a digest of its command, its recipe and the stages that it read.

    Raises the errors of `run_stage`.
    """
    places = places_of(stages, root, seed)
    digests: dict[str, str] = {}
    for stage, command in stages.items():
        module, *words = shlex.split(command.format(seed=seed, **places))
        recipe = Path(find_recipe(words[words.index("--config") + 1])).read_text(encoding="utf-8")
        read = [digests[name] for name in PLACE.findall(command) if name != "seed"]
        digests[stage] = json_digest([module, words, recipe, read, launch])
        at = folder_of(stage, command, seed)
        run_stage(root, at, module, words, digest=digests[stage], launch=launch)


def gathered(protocol: dict[str, Any], paper: str, scale: str, root: Path, seeds: int) -> dict[str, Any]:
    """Return what the runs measured, as it is saved.

    Raises the errors of `measured`.
    """
    series = {
        name: [measured(one, "", places_of(protocol["stages"], root, seed), seed) for seed in range(seeds)]
        for name, one in protocol["series"].items()
    }
    finished = finished_in(root)
    ran = dict.fromkeys(
        folder_of(stage, command, seed) for stage, command in protocol["stages"].items() for seed in range(seeds)
    )
    return {
        "paper": paper,
        "scale": scale,
        "seeds": list(range(seeds)),
        "seconds": round(sum(finished[at]["seconds"] for at in ran), 1),
        "versions": {name: version(name) for name in ("spine-rlhf", "torch", "transformers", "trl", "peft")},
        "criterion": protocol["criterion"],
        "series": series,
    }


def main(args: list[str]) -> None:
    given = arguments(args)
    protocol = read_protocol(given.paper, given.scale)
    root = given.output_dir / given.scale
    folder = root / "reports" / given.paper
    check_output_dir(str(folder))
    check_ours(str(folder), FILES["reproduction"])
    if given.report_only:
        saved = read_measured(PAPERS / given.paper / f"{given.scale}.json")
    else:
        check_stages(protocol["stages"], protocol["launch"])
        for seed in range(given.seeds):
            run(protocol["stages"], protocol["launch"], root, seed)
        saved = gathered(protocol, given.paper, given.scale, root, given.seeds)
    text, verdict = report(protocol, saved)

    def write(staged: Path) -> None:
        (staged / "report.md").write_text(text, encoding="utf-8")
        draw(protocol, saved, staged / "figure.png")
        write_json(staged / "metrics.json", saved)

    save(folder, "reproduction", write)
    print(f"{protocol['claim']}\n{verdict}: {folder / 'report.md'}")


if __name__ == "__main__":
    report_errors()
    main(sys.argv[1:])
