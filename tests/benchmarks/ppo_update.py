"""Seconds and memory of one PPO update: TRL 1.12, the last release with PPO, and Spine, in turn (`make bench`).

Each contender is a process of its own, told when to make its next update, so that all meet the same machine. Each tries
float32 and bfloat16, and goes on in the faster. Writes a JSON file and prints a table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.benchmarks.cost import Floor, rate
from tests.benchmarks.work import Work, command


ROOT = Path(__file__).parents[2]
ROWS = ("trl_full", "trl_lora", "spine_joint", "spine_all", "spine_top")
PHASES = ("generation", "scoring", "training")
# Sequences in a forward pass that trains: what was fastest for each, by NOTES.md.
MICROBATCH = {"trl_full": 4, "trl_lora": 4, "spine_joint": 8, "spine_all": 8, "spine_top": 8}

# SmolLM2-135M at the sizes of `make smollm2`; a prompt is the first words of a snippet.
SMOLLM2 = Work(
    layers=30,
    hidden=576,
    heads=9,
    key_heads=3,
    inner=1536,
    vocabulary=49_152,
    batch=64,
    prompt=8,
    completion=24,
    epochs=2,
    minibatches=2,
    top=10,
)


class Contender:
    """A process that makes one update when it is told to.

    Raises:
        RuntimeError: it ended by itself; the message has the end of what it printed.
    """

    def __init__(self, row: str, dtype: str, work: Work, python: str, device: str = "cpu"):
        self.row, self.dtype = row, dtype
        self.folder = tempfile.TemporaryDirectory()
        self.log = Path(self.folder.name) / "log"
        options = {"row": row, "dtype": dtype, "folder": self.folder.name, "device": device}
        options["top"] = work.top if row == "spine_top" else None
        options["microbatch"] = min(MICROBATCH[row] * work.batch // 8, work.batch // work.minibatches)
        module = f"tests.benchmarks.{row.partition('_')[0]}_contender"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command(python, module, work, options),
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def update(self) -> dict:
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"{self.row} in {self.dtype} ended:\n{self.log.read_text()[-4000:]}")
        return json.loads(answer)

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *error) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()


def faster(row: str, dtypes: list[str], work: Work, python: str) -> Contender:
    """The contender in the dtype whose first update took less; that update is its warm-up."""
    best, seconds = None, float("inf")
    for dtype in dtypes:
        contender = Contender(row, dtype, work, python)
        try:
            took = contender.update()["seconds"]
        except BaseException:
            contender.__exit__()
            if best:
                best.__exit__()
            raise
        print(f"{row:11} {dtype}  first update {took:6.2f} s", flush=True)
        if took < seconds:
            best, contender, seconds = contender, best, took
        if contender:
            contender.__exit__()
    return best


def measure(work: Work, rounds: int, trl_python: str, rows: tuple[str, ...] = ROWS) -> dict:
    """The content of the JSON file."""
    batch_rows = work.batch * (work.prompt + work.completion)
    rates = {"fp32": rate(batch_rows, work, torch.float32), "bf16": rate(batch_rows, work, torch.bfloat16)}
    dtypes = ["fp32", "bf16"] if rates["bf16"] > rates["fp32"] else ["fp32"]
    print("multiplies at " + ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items()))
    contenders, taken = [], {row: [] for row in rows}
    try:
        for row in rows:
            contenders.append(faster(row, dtypes, work, trl_python if row.startswith("trl") else sys.executable))
        for number in range(rounds):
            for contender in contenders:
                taken[contender.row].append(contender.update())
            print(f"round {number + 1} of {rounds}: " + ", ".join(f"{taken[r][-1]['seconds']:.2f} s" for r in rows))
    finally:
        for contender in contenders:
            contender.__exit__()
    backbone = 4 * sum(p.numel() for p in _meta(work).parameters())
    table = {}
    for contender in contenders:
        updates = taken[contender.row]
        table[contender.row] = {
            **{key: statistics.median(update[key] for update in updates) for key in ("seconds", *PHASES)},
            "peak_rss_gb": max(update["peak_rss_gb"] for update in updates),
            "state_backbones": updates[-1]["state_bytes"] / backbone,
            "dtype": contender.dtype,
        }
    result = {"rows": table}
    if {"trl_full", "spine_top"} <= table.keys():
        ours, theirs = table["spine_top"], table["trl_full"]
        result["speedup"] = theirs["seconds"] / ours["seconds"]
        result["memory_ratio"] = ours["peak_rss_gb"] / theirs["peak_rss_gb"]
        result["floor_seconds"] = Floor(work, ours["dtype"]).seconds(work, "spine_top")
    return result


def _meta(work: Work) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(work.config("fp32"))


def markdown(result: dict) -> str:
    """The result as a table."""
    lines = [
        "| row | dtype | seconds | generation | scoring | training | peak RSS, GB | state, backbones in fp32 |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row, cells in result["rows"].items():
        numbers = " | ".join(f"{cells[key]:.2f}" for key in ("seconds", *PHASES, "peak_rss_gb", "state_backbones"))
        lines.append(f"| {row} | {cells['dtype']} | {numbers} |")
    if "speedup" not in result:
        return "\n".join(lines)
    lines.append("")
    lines.append(
        f"spine_top takes 1/{result['speedup']:.2f} of the seconds and {result['memory_ratio']:.2f} of the peak memory "
        f"of trl_full. Its floor, by the operations it must do at this machine's rate, is "
        f"{result['floor_seconds']:.2f} s."
    )
    return "\n".join(lines)


def demo_work(folder: str) -> Work:
    """The embedded backbone at the demo's sizes; a prompt is the first words of a snippet."""
    config = AutoConfig.from_pretrained(folder)
    shape = {"layers": config.n_layer, "hidden": config.n_embd, "heads": config.n_head}
    sizes = {"batch": 64, "prompt": 8, "completion": 24, "minibatches": 2, "top": 2}
    return Work(**shape, vocabulary=config.vocab_size, **sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl_python", help="Python with trl==1.12.0, for the rows of TRL")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="contenders")
    parser.add_argument("--rounds", type=int, default=3, help="updates that count, of each contender")
    parser.add_argument("--output_dir", default="runs/bench")
    args = parser.parse_args()
    if not args.trl_python and any(row.startswith("trl") for row in args.rows):
        parser.error("--trl_python: the rows of TRL need it; --rows spine_joint spine_all spine_top do without")
    works = {
        "ppo_update": (Work(), args.rounds),
        "ppo_update_demo": (demo_work("data/backbone"), 2 * args.rounds),
        "ppo_update_smollm2": (SMOLLM2, args.rounds),
    }
    for name, (work, rounds) in works.items():
        print(f"{name}: {work}", flush=True)
        result = measure(work, rounds, args.trl_python, tuple(args.rows))
        path = Path(args.output_dir) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"\n{markdown(result)}\n\n{path}\n", flush=True)


if __name__ == "__main__":
    main()
