"""Run random faults against the pipeline, and say what became of each.

    python -m tests.faults --minutes 60 --seed 0       # `make faults MINUTES=60`
    python -m tests.faults --only rows --minutes 2     # one kind of fault
    python -m tests.faults --case rows-17 --seed 0     # one case again; its folder is kept

Each case is drawn from its name and the seed. It prints one line: its verdict, its name, what was drawn, and the reason.
Verdicts: right; clear error (one message of ours that names what was wrong, nothing written over); unclear; traceback; hang;
lost (a file of the user's or of an earlier run damaged, or a mixture of two runs); silent (exit code 0 and a wrong result).
Exits with 1 if a case ended with one of the last five. Such a case leaves its inputs and its output in a folder.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path


def prepare(root: Path) -> None:
    """Set the environment of all cases. It must be set before torch and the others are imported."""
    home = root / "home"
    (root / "tmp").mkdir(parents=True)
    home.mkdir()
    os.environ |= {"HOME": str(home), "HF_HOME": str(home / "hf"), "TMPDIR": str(root / "tmp")}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {
        "MPLCONFIGDIR": str(home / "matplotlib"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "COLUMNS": "120",
    }
    for name in ("HF_DATASETS_CACHE", "XDG_CACHE_HOME", "WORLD_SIZE", "RANK"):
        os.environ.pop(name, None)
    tempfile.tempdir = None


def names(only: str | None, kinds: dict, minutes: float | None, cases: int | None, began: float):
    """Yield the names of the cases, each kind in turn, until the time or the number is used up."""
    count = number = 0
    while True:
        for kind, family in kinds.items():
            if (only and kind != only) or (not only and number % family.every):
                continue
            if (cases is not None and count >= cases) or (minutes and time.time() > began + 60 * minutes):
                return
            yield f"{kind}-{number}"
            count += 1
        number += 1


def run_case(name: str, seed: int, root: Path, kinds: dict):
    """Run one case in a folder of its own; return the case, its verdict and its seconds."""
    from tests.faults.verdicts import Verdict
    from tests.faults.world import Case

    folder, began = root / "cases" / name, time.time()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "template", folder, symlinks=True)
    case = Case(name, folder, random.Random(f"{seed} {name}"))
    try:
        verdict = kinds[name.rpartition("-")[0]].run(case)
    except Exception:  # of the harness itself
        traceback.print_exc()
        verdict = Verdict("broken case", traceback.format_exc().strip().splitlines()[-1])
    return case, verdict, time.time() - began


def table(counts: Counter, kinds: dict) -> str:
    """Return the counts by kind and verdict as a markdown table."""
    from tests.faults.verdicts import VERDICTS

    used = [*VERDICTS, *sorted({verdict for _, verdict in counts} - set(VERDICTS))]
    rows = [["kind", *used], ["---", *["---:"] * len(used)]]
    for kind in [kind for kind in kinds if any(kind == one for one, _ in counts)]:
        rows.append([kind, *(str(counts[kind, verdict]) for verdict in used)])
    totals = [sum(n for (_, one), n in counts.items() if one == verdict) for verdict in used]
    rows.append([f"**all {sum(totals)}**", *map(str, totals)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="Minutes to draw cases for.")
    parser.add_argument("--cases", type=int, help="Number of cases, instead of minutes.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="Only this kind of fault.")
    parser.add_argument("--case", help="Only this case, such as rows-17.")
    parser.add_argument("--folder", type=Path, help="Folder of the cases that fail; unset: a new one in the system's.")
    given = parser.parse_args(words)
    root = (given.folder or Path(tempfile.mkdtemp(prefix="faults-"))).absolute()
    prepare(root / f"run-{os.getpid()}")
    root = root / f"run-{os.getpid()}"

    from tests.faults import families, runner, world
    from tests.faults.verdicts import GOOD, shown

    kinds = families.KINDS
    asked = given.case.rpartition("-")[0] if given.case else given.only
    if asked and asked not in kinds:
        parser.error(f"{asked} is not one of {', '.join(kinds)}.")
    runner.import_all()
    world.make_template(root / "template")
    began, counts, failed = time.time(), Counter(), 0
    minutes = given.minutes if given.minutes or given.cases else 2.0
    chosen = [given.case] if given.case else names(given.only, kinds, minutes, given.cases, began)
    for name in chosen:
        case, verdict, seconds = run_case(name, given.seed, root, kinds)
        counts[name.rpartition("-")[0], verdict.name] += 1
        drawn = shown("; ".join(case.notes), 200)
        print(f"{verdict.name:<11} {name} ({seconds:.1f} s) [{drawn}] {verdict.why}", flush=True)
        if verdict.name not in GOOD:
            failed += 1
            print(f"            {case.folder}", flush=True)
        elif not given.case:
            shutil.rmtree(case.folder, ignore_errors=True)
    print(f"\nseed {given.seed}, {(time.time() - began) / 60:.1f} minutes\n\n{table(counts, kinds)}", flush=True)
    if not failed and not given.case and not given.folder:
        shutil.rmtree(root.parent, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
