"""Runs PPO again and again in forked children, kills each with SIGKILL, and lets the last one finish.

    python kill_worker.py <kills> <seed> --config recipe.yaml ...

Prints one JSON line: the kills, how many of them fell into the writing of a checkpoint, and the steps resumed from.
"""

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import torch

from pipeline import ppo
from pipeline.runs.command_line import parse
from pipeline.runs.manifest import STAGING


def start(words: list[str], log: Path) -> int:
    """A child that runs the stage; its process id."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        ppo.main(*parse(*ppo.OPTIONS, args=words))
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def written_since(begun: float, staging: Path) -> bool:
    """Whether a checkpoint is being written, and not one that an earlier kill left."""
    try:
        return any(path.stat().st_mtime >= begun for path in staging.glob("checkpoint-*"))
    except FileNotFoundError:
        return False


def see_writing_begin(times: int, begun: float, until: float, staging: Path) -> None:
    """Wait for a number of checkpoints to be begun, but not beyond a moment."""
    for _ in range(times):
        for writing in (True, False):  # the end of one, the beginning of the next
            while written_since(begun, staging) is writing and time.time() < until:
                time.sleep(0.0005)


def main(kills: int, seed: int, words: list[str]) -> None:
    folder, draw = Path(words[words.index("--output_dir") + 1]), random.Random(seed)
    log, staging = folder.with_suffix(".log"), folder / STAGING
    log.write_text("")
    inside = 0
    for number in range(kills):
        pid, begun = start(words, log), time.time()
        # Few steps at a time: some must be left for the last kill.
        if number % 3 == 0:  # while it sets up, most often
            see_writing_begin(1, begun, begun + draw.uniform(0, 2), staging)
        else:
            see_writing_begin(draw.choice((1, 2)), begun, begun + 60, staging)
            if number % 3 == 1:  # while it writes
                time.sleep(draw.uniform(0, 0.05))
            else:  # at any moment
                see_writing_begin(2, begun, time.time() + draw.uniform(0, 0.8), staging)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(f"run {number} ended before it was killed, status {status}:\n{log.read_text()[-3000:]}")
        inside += written_since(begun, staging)
    _, status = os.waitpid(start(words, log), 0)
    if status:
        sys.exit(log.read_text()[-3000:])
    steps = [int(step) for step in re.findall(r"resumes from .*checkpoint-(\d+)", log.read_text())]
    print(json.dumps({"kills": kills, "inside": inside, "steps": steps}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
