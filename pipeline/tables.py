"""Make tables of finished runs: several seeds of a recipe, PPO and its baselines, one setting changed.

    python -m pipeline.tables seeds runs/seeds
    python -m pipeline.tables judges runs/seeds runs/second-judge
    python -m pipeline.tables baselines runs/baselines runs/demo
    python -m pipeline.tables ablations runs/ablations value_init=auto value_init=policy
    python -m pipeline.tables value-study runs/value-study value_init=auto critic=head
    python -m pipeline.tables reward-losses runs/reward-losses bradley_terry regression
    python -m pipeline.tables lambda-sweep runs/lambda-sweep 0 0.2 2
    python -m pipeline.tables loop-study runs/loop-study one three

The targets of the same names in the Makefile make the runs; `make second-judge` makes those of judges. All but the first two
write table.md and table.json to the folder; lambda-sweep, loop-study and value-study draw plots there, too.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.json_files import read_json, write_json
from data.saving import check_saved, save
from data.schemas import (
    BEST_OF_N,
    JUDGED_REPORT,
    LOOP_REPORT,
    PPO_METRICS,
    REPORT,
    REWARD_METRICS,
    SEED_REPORT,
    SWEEP_REPORT,
    Kind,
)
from pipeline.reports.ablations import ABLATIONS_NOTE, ablation_row, ablations_table
from pipeline.reports.lambda_sweep import SWEEP_NOTE, sweep_row, sweep_table
from pipeline.reports.loss_table import LOSSES_NOTE, loss_row, losses_table
from pipeline.reports.markdown import markdown_table, number, with_interval
from pipeline.reports.plots import draw_trade_off
from pipeline.reports.report import read_report
from pipeline.reports.rounds import STUDY_NOTE, draw_study, study_rows, study_table
from pipeline.reports.seeds import judges_table, seeds_table
from pipeline.reports.value_plots import draw_value_curves, draw_value_study
from pipeline.reports.value_study import VALUE_NOTE, run_figures, value_rows, value_table
from pipeline.runs.errors import report_errors
from pipeline.runs.folders import check_ours, check_output_dir
from pipeline.runs.ownership import FILES, former_files


METHODS = {"rloo": "RLOO", "grpo": "GRPO", "dpo": "DPO"}
BASELINES_NOTE = (
    "Completions are those that a method learned from. Those of DPO were written and labelled by people. Best-of-n "
    "trains nothing: it samples and scores n completions for each answer. Its gain is over one sample, and its KL is "
    "the bound log n - (n - 1) / n. The judge is in -1 to 1, intervals are of 95%, seconds are those of training."
)


def read_result(path: Path, remedy: str, schema: Kind = REPORT) -> dict:
    """Read the JSON of a stage.

    Raises:
        FileNotFoundError: there is no such file. The message ends with `remedy`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. {remedy}")
    return read_report(path, schema)


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Raise a ValueError that names the report, if the code inside lacks a figure of it or of the metrics beside it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ArithmeticError, statistics.StatisticsError) as error:
        raise ValueError(
            f"{path}: this report, or the metrics of its run, lack a figure ({type(error).__name__}: {error}). Run "
            f"pipeline.evaluation again, or leave the run out."
        ) from error


def _found(folder: Path, remedy: str, name: str = "report.json") -> list[Path]:
    """Return the files <folder>/<seed>/report.json, or of another name, in the order of the seeds."""
    found = [path for path in folder.glob(f"*/{name}") if path.parent.name.isdigit()]
    if not found:
        raise FileNotFoundError(f"{folder}: the folder has no <seed>/{name}. {remedy}")
    return sorted(found, key=lambda path: int(path.parent.name))


Draw = Callable[[list[dict], Path], None]


def write(folder: Path, rows: list[dict], table: str, note: str, plots: Mapping[str, Draw] | None = None) -> None:
    """Write the rows to table.json and the table with its note to table.md, draw the plots, and print the table.

    Args:
        plots: of each file name, what draws the rows at a path.

    Raises the errors of `check_output_dir`, `check_ours` and `save`.
    """
    check_output_dir(str(folder))
    check_ours(str(folder), FILES["table"])

    def write_files(staged: Path) -> None:
        write_json(staged / "table.json", rows)
        (staged / "table.md").write_text(f"{table}\n\n{note}\n", encoding="utf-8")
        for name, draw in (plots or {}).items():
            draw(rows, staged / name)

    save(folder, "table", write_files, former=former_files(folder, "table"))
    print(table)


# ----------------------------------------------------------------------------------------------- several seeds


def kl_held(history: Sequence[dict]) -> float:
    """Return the mean KL of the rollouts, in nats a sequence, over the second half of PPO's updates.

    `history` comes from the metrics file of PPO.
    """
    kl = [row["kl"] for row in history if row.get("kl") is not None]
    return statistics.fmean(kl[len(kl) // 2 :])


def ppo_history(run: Path) -> list[dict]:
    """Return PPO's log of a run, from its metrics file.

    Raises the errors of `check_saved`, and:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no log.
    """
    check_saved(run / "ppo", "adapter")
    return read_json(run / "ppo" / "metrics.json", PPO_METRICS, remedy="Run PPO again.")["history"]


def seeds(folder: Path) -> None:
    """Print the table of the runs in <folder>/<seed>."""
    reports = []
    for path in _found(folder, "Run `make seeds`."):
        with whole(path):
            report = {**read_report(path, SEED_REPORT), "kl_held": kl_held(ppo_history(path.parent))}
            seeds_table([report])  # has every figure
        reports.append(report)
    print(seeds_table(reports))


def judges(folder: Path, second: str) -> None:
    """Print what two judges say of the runs in <folder>/<seed>, of which <second>/<seed> has the report of another judge."""
    reports = {}
    for path in _found(Path(second), "Run `make second-judge`."):
        seed = int(path.parent.name)
        first = folder / path.parent.name / path.name
        reports[seed] = (read_result(first, "Run `make seeds`.", JUDGED_REPORT), read_report(path, JUDGED_REPORT))
    print(judges_table(reports))


# ----------------------------------------------------------------------------------------------- baselines


def comparison_table(rows: list[dict]) -> str:
    """Return a markdown table that compares methods, with 95% intervals and a dash for each missing value.

    `rows` have `method`, `completions` (that it learned from), `judge_gain` and `win_rate` (intervals, against SFT), `kl`
    (nats a sequence), `distinct_2`, `score` and `seconds` (of training).
    """
    header = ["method", "completions", "judge gain", "beats SFT", "KL, nats", "distinct-2", "score", "seconds"]
    cells = [
        [
            row["method"],
            number(row.get("completions"), ","),
            with_interval(row["judge_gain"], "+.3f") if row.get("judge_gain") else "–",
            with_interval(row["win_rate"], ".1%") if row.get("win_rate") else "–",
            number(row.get("kl"), ".2f"),
            number(row.get("distinct_2"), ".3f"),
            number(row.get("score"), "+.2f"),
            number(row.get("seconds"), ",.0f"),
        ]
        for row in rows
    ]
    return markdown_table(header, cells, numbers=range(1, len(header)))


def baselines_row(method: str, report: dict) -> dict:
    """Return a row of the table from a report of the evaluation stage."""
    policy = {key: report["policy"][key] for key in ("kl", "distinct_2", "score")}
    gains = {key: report.get(key) for key in ("judge_gain", "win_rate")}
    seconds = report.get("seconds", {}).get("policy")
    return {"method": method, "completions": report.get("completions"), **gains, **policy, "seconds": seconds}


def baselines(folder: Path, demo: str) -> None:
    """Compare the baselines in `folder` with the PPO run in `demo`."""
    path = Path(demo) / "report.json"
    report = read_result(path, "Run `make demo` first.")
    with whole(path):
        start = {key: report["sft"][key] for key in ("kl", "distinct_2", "score")}
        rows = [{"method": "SFT", **start}, baselines_row("PPO", report)]
    for name, method in METHODS.items():
        path = folder / name / "evaluation" / "report.json"
        found = read_result(path, "Run `make baselines`.")
        with whole(path):
            rows.append(baselines_row(method, found))
    path = folder / "best_of_n" / "best_of_n.json"
    sampled = read_json(path, BEST_OF_N, remedy="Run `make baselines`.")
    with whole(path):
        best = [row for row in sampled["rows"] if row["n"] > 1]
        rows += [{"method": f"best of {row['n']}", "completions": 0, **row} for row in best]
        comparison_table(rows)
    write(folder, rows, comparison_table(rows), BASELINES_NOTE)


# ----------------------------------------------------------------------------------------------- settings
def _runs_of_settings(
    folder: Path, settings: Sequence[str], remedy: str, figures: Callable[[dict, list[dict]], dict]
) -> dict[str, list[dict]]:
    """Return the figures of the runs in <folder>/<setting>/<seed>, each from its report and PPO's log, by setting."""
    runs: dict[str, list[dict]] = {}
    for setting in settings:
        runs[setting] = []
        for path in _found(folder / setting, remedy):
            with whole(path):
                row = figures(read_report(path, JUDGED_REPORT), ppo_history(path.parent))
            runs[setting].append({"seed": int(path.parent.name), **row})
    return runs


def ablations(folder: Path, *settings: str) -> None:
    """Compare the runs in <folder>/<setting>/<seed>, with the settings in this order."""
    runs = _runs_of_settings(folder, settings, "Run `make ablations`.", ablation_row)
    rows = [{"setting": setting, "runs": of_seeds} for setting, of_seeds in runs.items()]
    write(folder, rows, ablations_table(runs), ABLATIONS_NOTE)


def value_study(folder: Path, *settings: str) -> None:
    """Compare the runs in <folder>/<setting>/<seed>; the first setting is the recipe, to which the others are compared."""
    rows = value_rows(_runs_of_settings(folder, settings, "Run `make value-study`.", run_figures))
    plots = {"value_study.png": draw_value_study, "value_curves.png": draw_value_curves}
    write(folder, rows, value_table(rows), VALUE_NOTE, plots)


# ----------------------------------------------------------------------------------------------- reward losses
def reward_losses(folder: Path, *losses: str) -> None:
    """Compare the reward models in <folder>/<loss>/<seed>, with the losses in this order."""
    runs: dict[str, list[dict]] = {}
    for loss in losses:
        runs[loss] = []
        for path in _found(folder / loss, "Run `make reward-losses`.", "metrics.json"):
            metrics = read_json(path, REWARD_METRICS, remedy="Train the reward model again, with held-out rows.")
            runs[loss].append({"seed": int(path.parent.name), **loss_row(metrics)})
    rows = [{"loss": loss, "runs": of_seeds} for loss, of_seeds in runs.items()]
    write(folder, rows, losses_table(runs), LOSSES_NOTE)


# ----------------------------------------------------------------------------------------------- lambda
def lambda_sweep(folder: Path, *coefficients: str) -> None:
    """Compare the runs in <folder>/<ptx_coef>, and draw what reward costs in language-model loss."""
    rows = []
    for coefficient in coefficients:
        path = folder / coefficient / "report.json"
        read_result(path, "Run `make lambda-sweep`.")
        with whole(path):
            row = sweep_row(float(coefficient), read_report(path, SWEEP_REPORT), ppo_history(path.parent))
        rows.append(row)
    rows.sort(key=lambda row: -row["ptx_coef"])  # from the smallest lambda
    write(folder, rows, sweep_table(rows), SWEEP_NOTE, {"trade_off.png": draw_trade_off})


# ----------------------------------------------------------------------------------------------- rounds of labels
def loop_study(folder: Path, *arms: str) -> None:
    """Compare the loops in <folder>/<arm>/<seed>, with the arms in this order."""
    found: dict[str, dict[int, dict]] = {}
    for arm in arms:
        paths = _found(folder / arm, "Run `make loop-study`.")
        found[arm] = {int(path.parent.name): read_json(path, LOOP_REPORT) for path in paths}
        rounds = [len(loop["rounds"]) for loop in found[arm].values()]
        for path, finished in zip(paths, rounds, strict=True):
            if finished < max(rounds):
                raise ValueError(
                    f"{path}: {finished} of {max(rounds)} rounds have finished. Run `make loop-study` to its end, or move "
                    f"the seed away."
                )
    rows = study_rows(found)
    write(folder, rows, study_table(rows), STUDY_NOTE, {"loop_study.png": draw_study})


# Each table, and how many words follow its name (None: two or more).
TABLES: dict[str, tuple[Callable[..., None], int | None]] = {
    "seeds": (seeds, 1),
    "judges": (judges, 2),
    "baselines": (baselines, 2),
    "ablations": (ablations, None),
    "value-study": (value_study, None),
    "reward-losses": (reward_losses, None),
    "lambda-sweep": (lambda_sweep, None),
    "loop-study": (loop_study, None),
}


def main(words: list[str]) -> None:
    name, *others = words or [""]
    if name not in TABLES:
        sys.exit(f"pipeline.tables: {name!r} is not one of {', '.join(TABLES)}.")
    make, number = TABLES[name]
    if not others or len(others) != (number or max(len(others), 2)):
        sys.exit(f"pipeline.tables: {name} cannot be called so. See the examples at the top of pipeline/tables.py.")
    if "" in others:
        sys.exit(
            f"pipeline.tables: {name} got an empty word ('') where a folder or a setting is named. Write its name."
        )
    folder = Path(others[0])
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. Name the folder of the runs.")
    make(folder, *others[1:])


if __name__ == "__main__":
    report_errors()
    main(sys.argv[1:])
