"""Run stages one after another, each in processes of its own, and go on where an earlier run was cut off.

`finished.json`, in the folder of all stages, keeps for each finished stage a digest of what it was.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from data.json_files import read_json, write_json
from data.listing import LISTING
from data.schemas import NUMBER, TEXT, mapping, record
from pipeline.runs.launcher import find_accelerate_config


TRAIN = ("sft", "reward", "ppo", "rloo", "grpo", "dpo")  # stages that leave checkpoints, and resume from them
FINISHED = "finished.json"
OF_FINISHED = mapping(record({"sha256": TEXT, "seconds": NUMBER}))


def finished_in(root: Path) -> dict[str, dict]:
    """Return what `finished.json` says of each finished stage: `sha256`, its digest, and `seconds`. Raises as `read_json`."""
    return read_json(root / FINISHED, OF_FINISHED) if (root / FINISHED).is_file() else {}


def run_stage(root: Path, at: str, module: str, words: list[str], *, digest: str, launch: str) -> None:
    """Run a stage with `accelerate launch`, unless it has finished; one that was cut off goes on from its last checkpoint.

    Args:
        root: folder of all stages.
        at: folder of this stage beneath `root`, its output_dir.
        module: name of the stage, such as ppo.
        words: its command line, without output_dir.
        digest: digest of all that determines what the stage leaves; with another one it runs again.
        launch: an accelerate config: a file, or the name of one of ours.

    Raises:
        ChildProcessError: the stage ended with an error.
    """
    finished = finished_in(root)
    if finished.get(at, {}).get("sha256") == digest and (root / at / LISTING).is_file():
        print(f"{at}: finished before.")
        return
    whole = ["-m", f"pipeline.{module}", *words, "--output_dir", str(root / at)]
    whole += ["--resume_from_checkpoint", "auto"] if module in TRAIN else []
    print(f"{at}: {shlex.join(whole)}", flush=True)
    began, config = time.monotonic(), find_accelerate_config(launch)
    ended = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, *whole])
    if ended.returncode:
        raise ChildProcessError(
            f"{at} ended with exit code {ended.returncode}; its message stands above. The same command goes on from here."
        )
    entry = {"sha256": digest, "seconds": round(time.monotonic() - began, 1)}
    write_json(root / f"{FINISHED}.new", {**finished, at: entry})
    os.replace(root / f"{FINISHED}.new", root / FINISHED)
