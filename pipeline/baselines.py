"""PPO beside what one would try instead: one table of runs that are done.

    python -m pipeline.baselines --demo runs/demo --baselines runs/baselines

Reads the demo's report.json, best_of_n/best_of_n.json and <method>/evaluation/report.json; `make baselines` leaves them
all there. Writes table.md and table.json beside them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.configs import parse
from pipeline.report import comparison_table


METHODS = {"rloo": "RLOO", "grpo": "GRPO", "dpo": "DPO"}
NOTE = (
    "Completions are those that a method learned from; DPO's are people's, with their labels. Best-of-n trains "
    "nothing: it samples and scores n completions for each answer, its gain is over one sample, its KL the bound "
    "log n - (n - 1) / n. The judge is in -1 to 1, intervals are of 95%, seconds are those of training."
)


@dataclass
class TableArguments:
    """The folders that are compared."""

    demo: str = field(default="runs/demo", metadata={"help": "Folder of the demo's report.json."})
    baselines: str = field(default="runs/baselines", metadata={"help": "Folder of the baselines, and of the table."})


def read_result(path: Path, remedy: str) -> dict:
    """A stage's JSON.

    Raises:
        FileNotFoundError: there is none; the message says what makes it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. {remedy}")
    return json.loads(path.read_text())


def row(method: str, report: dict) -> dict:
    """A row of the table from a report of the evaluation stage."""
    policy = {key: report["ppo"][key] for key in ("judge", "kl", "distinct_2", "score")}
    gains = {key: report[key] for key in ("judge_gain", "win_rate")}
    seconds = report["seconds"].get("ppo")
    return {"method": method, "completions": report.get("completions"), **gains, **policy, "seconds": seconds}


def main(args: TableArguments) -> None:
    demo = read_result(Path(args.demo) / "report.json", "Run `make demo` first.")
    folder = Path(args.baselines)
    start = {key: demo["sft"][key] for key in ("judge", "kl", "distinct_2", "score")}
    rows = [{"method": "SFT", **start}, row("PPO", demo)]
    for name, method in METHODS.items():
        rows.append(row(method, read_result(folder / name / "evaluation" / "report.json", "Run `make baselines`.")))
    sampled = read_result(folder / "best_of_n" / "best_of_n.json", "Run `make baselines`.")
    rows += [{"method": f"best of {best['n']}", "completions": 0, **best} for best in sampled["rows"] if best["n"] > 1]
    table = comparison_table(rows)
    (folder / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    (folder / "table.md").write_text(f"{table}\n\n{NOTE}\n")
    print(table)


if __name__ == "__main__":
    main(*parse(TableArguments))
