"""Seconds of one PPO update of ours against completion length, batch, epochs and adapted layers (`make bench-scaling`).

One of the four is varied at a time, the others are those of the benchmark. Over what was measured is drawn what must
be: the operations by the shapes at this machine's own rate (cost.py), with nothing fitted.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.reports.plots import DASHES, PPO, SFT, STYLE
from tests.benchmarks.cost import Floor
from tests.benchmarks.ppo_update import Contender
from tests.benchmarks.work import Work


AXES = {
    "completion": ("completion, tokens", (16, 32, 64, 128)),
    "batch": ("batch, sequences", (2, 4, 8, 16)),
    "epochs": ("PPO epochs", (1, 2, 4, 8)),
    "top": ("adapted layers", (1, 2, 4, 8, 12)),
}


def measure(base: Work, axes: dict[str, tuple[str, tuple[int, ...]]], dtype: str, rounds: int) -> dict:
    """For each axis its rows: `value`, `measured` and `predicted`, in seconds."""
    known = {}  # the benchmark's own work lies on every axis

    def seconds(work: Work) -> tuple[float, float]:
        if work not in known:
            with Contender("spine_top", dtype, work, sys.executable) as contender:
                contender.update()
                measured = statistics.median(contender.update()["seconds"] for _ in range(rounds))
            known[work] = measured, Floor(work, dtype).seconds(work, "spine_top")
        return known[work]

    result = {}
    for name, (_, values) in axes.items():
        result[name] = []
        for value in values:
            measured, predicted = seconds(replace(base, **{name: value}))
            print(f"{name} {value}: {measured:.2f} s, predicted {predicted:.2f} s", flush=True)
            result[name].append({"value": value, "measured": measured, "predicted": predicted})
    return result


def draw(result: dict, axes: dict, path: Path) -> None:
    """One panel an axis, as a PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 5.6), layout="constrained")
        FigureCanvasAgg(figure)
        for axis, (name, rows) in zip(figure.subplots(2, -(-len(result) // 2)).flat, result.items(), strict=False):
            values = [row["value"] for row in rows]
            axis.plot(values, [row["measured"] for row in rows], color=PPO, marker="o", label="measured")
            predicted = [row["predicted"] for row in rows]
            axis.plot(values, predicted, color=SFT, linestyle=DASHES, label="predicted")
            axis.set_xlabel(axes[name][0])
            axis.set_ylabel("seconds an update")
            axis.set_ylim(bottom=0)
            axis.legend(loc="upper left")
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=2, help="updates that count, at each point")
    parser.add_argument("--output_dir", default="runs/bench")
    args = parser.parse_args()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    result = measure(Work(), AXES, args.dtype, args.rounds)
    (folder / "scaling.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, AXES, folder / "scaling.png")
    print(folder / "scaling.png")


if __name__ == "__main__":
    main()
