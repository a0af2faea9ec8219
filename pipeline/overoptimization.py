"""Say where a run begins to over-optimise: proxy and gold score against the square root of the KL, and where to stop.

    python -m pipeline.overoptimization runs/gold/0 runs/gold/1 --gold reward_2

Give a run of PPO the gold reward beside its own, with weight 0: then each rollout is scored by both, and only its own trains.

    reward_funcs: [reward_models.rules.sentiment]
    reward_weights: [1, 0]

Reads metrics.json of each run, and best_of_n.json where its judge was the gold reward. Runs no model. Writes
overoptimization.md, .json and .png.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

from data.json_files import read_json, write_json
from data.saving import check_saved, save
from data.schemas import BEST_OF_N, PPO_METRICS
from pipeline.reports.overoptimization import Scores, draw_overoptimization, overoptimization_text, turning_point
from pipeline.runs.errors import report_errors
from pipeline.runs.folders import check_ours, check_output_dir
from pipeline.runs.ownership import FILES


LOGGED = re.compile(r"rewards/(.+)/mean")
FEWEST = 6  # rollouts: three coefficients are fitted


def arguments(args: list[str]) -> argparse.Namespace:
    """Parse the command line; exit with a message if an option is invalid."""
    parser = argparse.ArgumentParser("python -m pipeline.overoptimization", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of runs of PPO, such as runs/demo/ppo.")
    parser.add_argument("--gold", required=True, help="The gold reward, as the log names it: rewards/<gold>/mean.")
    parser.add_argument(
        "--best_of_n", type=Path, help="Folder of pipeline.best_of_n, with the gold reward as its judge."
    )
    parser.add_argument("--output_dir", default="runs/overoptimization", help="Folder of the report.")
    return parser.parse_args(args)


def read_run(folder: Path, gold: str) -> Scores:
    """Read the scores and KL of each rollout from the log of a run of PPO.

    Raises the errors of `check_saved` and `read_json`, and:
        ValueError: the run did not log such a reward, trained on it, or has too few rollouts.
    """
    check_saved(folder, "adapter")
    path = folder / "metrics.json"
    metrics = read_json(path, PPO_METRICS, remedy="Run PPO again.")
    key = f"rewards/{gold}/mean"
    rows = [row for row in metrics["history"] if row.get("kl") is not None and row.get("score") is not None]
    logged = [match[1] for name in (rows[0] if rows else {}) if (match := LOGGED.fullmatch(name))]
    if gold not in logged:
        raise ValueError(
            f"--gold {gold}: {path} logged {', '.join(logged) or 'no reward'}. Name one of these, or run PPO with the gold "
            f"reward in reward_funcs and a weight of 0 in reward_weights."
        )
    weights = metrics.get("options", {}).get("reward_weights") or [1.0] * len(logged)
    if len(weights) == len(logged) and weights[logged.index(gold)]:
        raise ValueError(
            f"--gold {gold}: in {folder} its weight was {weights[logged.index(gold)]:g}, so PPO raised it. Run PPO with a "
            f"weight of 0 for it in reward_weights."
        )
    rows = [row for row in rows if row.get(key) is not None]  # None: it said nothing of the rollout
    if len(rows) < FEWEST:
        raise ValueError(f"{path}: {len(rows)} rollouts have a gold score, and {FEWEST} are needed. Train longer.")
    kl, proxy, scores, step = (
        np.array([row[name] for row in rows], dtype=float) for name in ("kl", "score", key, "step")
    )
    return Scores(str(folder), kl, proxy, scores, step)


def read_best_of_n(folder: Path) -> Scores:
    """Read the scores of best-of-n for each n.

    Raises the errors of `check_saved` and `read_json`, and:
        ValueError: it had no judge.
    """
    check_saved(folder, "best_of_n")
    path = folder / "best_of_n.json"
    rows = read_json(path, BEST_OF_N, remedy="Run pipeline.best_of_n again.")["rows"]
    if not rows or any("judge" not in row for row in rows):
        raise ValueError(f"{path}: no judge scored it. Run pipeline.best_of_n with the gold reward as its judge.")
    kl, proxy, gold, n = (np.array([row[key] for row in rows], dtype=float) for key in ("kl", "score", "judge", "n"))
    return Scores(str(folder), kl, proxy, gold, n)


def main(args: list[str]) -> None:
    given = arguments(args)
    check_output_dir(given.output_dir)
    check_ours(given.output_dir, FILES["overoptimization"])
    runs = [read_run(folder, given.gold) for folder in given.runs]
    best_of_n = read_best_of_n(given.best_of_n) if given.best_of_n else None
    points = [turning_point(run) for run in runs]
    text = overoptimization_text(runs, points, given.gold)

    def write(staged: Path) -> None:
        (staged / "overoptimization.md").write_text(text, encoding="utf-8")
        draw_overoptimization(runs, points, best_of_n, staged / "overoptimization.png")
        found = [{"run": run.name, **point} for run, point in zip(runs, points, strict=True)]
        write_json(staged / "overoptimization.json", {"gold": given.gold, "runs": found})

    save(given.output_dir, "overoptimization", write)
    print(text.split("\n\n")[1])


if __name__ == "__main__":
    report_errors()
    main(sys.argv[1:])
