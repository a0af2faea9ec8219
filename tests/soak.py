"""PPO on the embedded demo for a long time: undisturbed, where memory is watched, then killed and resumed again and again.

    python -m tests.soak --minutes 30

The undisturbed run takes a quarter of the time and ends after some step. Two other runs go to that step too, and are ended by
SIGKILL and SIGTERM at random moments. The first of them must leave the same bytes. The second goes on in two processes where
one was ended, and in one where two were: what it samples then differs, but it must read the prompts that the undisturbed run
reads, update by update, and log the same figures at the same steps, without a jump where the processes change.

Prints a table; exits with 1 where memory, descriptors or threads grew or one of these does not hold. Takes the adapters of
`make demo` if they are there, and makes short ones otherwise, which is not counted.
"""

import argparse
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from safetensors.numpy import load_file


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "pipeline" / "recipes" / "demo"
CONFIG = ROOT / "accelerate_configs" / "cpu_ddp.yaml"
# A constant rate, so that the run does not depend on how many steps it was going to take.
PPO = ["--lr_scheduler_type", "constant", "--save_strategy", "steps", "--save_total_limit", "2"]
PPO += ["--sample_updates", "4", "--resume_from_checkpoint", "auto", "--disable_tqdm", "true"]
# The batches of the recipe, in pieces that two processes can share: `gradient_accumulation_steps` is then adapted.
PPO += ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "2", "--steps_per_generation", "4"]
PPO += ["--reward_funcs", "tests.soak.record"]
WITHIN, AT_THE_END = ["--save_steps", "3"], ["--save_steps", "4"]  # of an update, which has 4 steps
UPDATE = 4
# glibc keeps what a process has freed, the more of it the longer the process runs. Told to return every tensor at once, it
# leaves resident what is held: a leak shows, and the few MiB of a hoard do not.
HELD = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
ENDLESS = 1_000_000  # steps
UNDISTURBED, KILLED = 0.25, 0.3  # of the time; the run that changes its processes has the rest
WARM_UP = 0.25  # of the undisturbed run
WINDOW = 0.2  # of what follows: its beginning is compared with its end
GROWTH = 2.0  # %, of resident memory
JUMP = 1.5  # times the largest change of a figure from one update to the next in the undisturbed run
ATTEMPTS = itertools.count()


def record(prompts: list[str], trainer_state, **kwargs) -> list[float]:
    """Write down which prompts a rollout has, in a reward of 0 (PPO's runs name it in `reward_funcs`)."""
    if trainer_state.max_steps:  # the table of samples has a state of no steps
        row = {"attempt": int(os.environ["SOAK_ATTEMPT"]), "step": trainer_state.global_step, "prompts": prompts}
        with open(os.environ["SOAK_PROMPTS"], "a") as file:
            file.write(json.dumps(row) + "\n")
    return [0.0] * len(prompts)


def start(stage: str, folder: Path, *words: str, processes: int = 1) -> psutil.Popen:
    """A stage in processes of its own; what it says goes to a file beside its folder."""
    python = [sys.executable, "-m"]
    launch = ["accelerate.commands.launch", "--config_file", str(CONFIG), "--num_processes", str(processes), "-m"]
    command = [*python, *(launch if processes > 1 else []), f"pipeline.{stage}"]
    command += ["--config", str(RECIPES / f"{stage}.yaml"), "--output_dir", str(folder), *words]
    env = (
        os.environ | HELD | {"SOAK_ATTEMPT": str(next(ATTEMPTS)), "SOAK_PROMPTS": str(folder.with_suffix(".prompts"))}
    )
    with folder.with_suffix(".log").open("a") as log:
        return psutil.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def kill(process: psutil.Popen, number: int) -> None:
    """End a stage: SIGKILL to all its processes, as a machine that fails; SIGTERM to each worker, once."""
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
        return
    for worker in process.children() or [process]:
        worker.send_signal(number)


def end(process: psutil.Popen, folder: Path, *codes: int) -> int:
    """Wait for the process to end with one of these codes, and exit with what it said if it ends otherwise."""
    code = process.wait(2 * 60 * 60)  # the last stretch of the killed run may be all of it
    if code not in codes:
        log = folder.with_suffix(".log")
        sys.exit(f"{folder} ended with {code} and not with {' or '.join(map(str, codes))}; {log}:\n{tail(log)}")
    return code


def tail(log: Path) -> str:
    return log.read_text()[-3000:]


def adapters(folder: Path) -> list[str]:
    """The words that name an SFT and a reward adapter."""
    demo = ROOT / "runs" / "demo"
    if not all((demo / name / "metrics.json").is_file() for name in ("sft", "reward")):
        demo = folder
        end(start("sft", demo / "sft", "--max_steps", "20"), demo / "sft", 0)
        words = ["--sft_adapter", str(demo / "sft"), "--max_steps", "60", "--sft_completions", "64"]
        end(start("reward", demo / "reward", *words), demo / "reward", 0)
    return ["--sft_adapter", str(demo / "sft"), "--reward_adapter", str(demo / "reward")]


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


class Pace(NamedTuple):
    """Seconds until the first checkpoint, and of a step."""

    start: float
    step: float


def watch(folder: Path, words: list[str], seconds: float) -> tuple[list[tuple], int, Pace]:
    """An undisturbed run of so many seconds: samples of (resident bytes, descriptors, threads) while it trained, the step
    that it ended at, and its pace."""
    process, began, samples = start("ppo", folder, *words, "--max_steps", str(ENDLESS)), time.time(), []
    while not newest(folder) and process.poll() is None:
        time.sleep(0.1)
    training = time.time()
    while time.time() < began + seconds and process.poll() is None:
        samples.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
        time.sleep(0.25)
    trained = time.time() - training
    process.terminate()
    end(process, folder, 128 + signal.SIGTERM)
    return samples, newest(folder), Pace(training - began, trained / newest(folder))


def disturb(
    folder: Path,
    words: list[str],
    step: int,
    pace: Pace,
    until: float,
    draw: random.Random,
    worlds: tuple[int, ...] = (1,),
) -> list[int]:
    """A run to a step that is ended at random moments, once at least in each of the `worlds` (numbers of processes, in
    turn) and until what is left of it takes up the time that is left; the signals."""
    sent, turns = [], itertools.cycle(worlds)
    while True:
        processes, before = next(turns), newest(folder)
        process, began = start("ppo", folder, *words, "--max_steps", str(step), processes=processes), time.time()
        if len(worlds) > 1:  # the next world is to go on from a checkpoint of this one
            while newest(folder) == before and process.poll() is None:
                time.sleep(0.05)
        most = min(3 * pace.start, pace.start + 0.8 * step * pace.step) if len(worlds) == 1 else 4 * UPDATE * pace.step
        wait = time.time() - began + draw.uniform(0, most)
        left = wait + pace.start + (step - newest(folder)) * pace.step
        while time.time() < began + wait and process.poll() is None:
            time.sleep(0.05)
        enough = len(sent) > len(worlds) or (sent and len(worlds) == 1)
        if process.poll() is not None or (enough and began + left > until):
            end(process, folder, 0)
            return sent
        number = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        kill(process, number)
        # SIGTERM before training begins ends a process as it does any. A launcher has a code of its own.
        if end(process, folder, 0, -number, 128 + number, *((1,) if processes > 1 else ())) == 0:
            return sent
        sent.append(number)


def weights(folder: Path) -> list[bytes]:
    return [(folder / name / "adapter_model.safetensors").read_bytes() for name in (".", "value")]


def finite(folder: Path) -> bool:
    files = [load_file(folder / name / "adapter_model.safetensors") for name in (".", "value")]
    return all(np.isfinite(tensor).all() for tensors in files for tensor in tensors.values())


def prompts_read(folder: Path) -> dict[int, list[str]]:
    """The prompts of each update by the step that it began at, over all processes, of the last attempt at it."""
    found: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for line in folder.with_suffix(".prompts").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut by a SIGKILL
            continue
        found[row["step"]][row["attempt"]] += row["prompts"]
    return {step: sorted(attempts[max(attempts)]) for step, attempts in found.items()}


def logged(folder: Path) -> list[dict]:
    """Return what a run has logged of its updates."""
    metrics, states = folder / "metrics.json", folder / f"checkpoint-{newest(folder)}" / "trainer_state.json"
    rows = (
        json.loads(metrics.read_text())["history"]
        if metrics.exists()
        else json.loads(states.read_text())["log_history"]
    )
    return [row for row in rows if "score" in row]


def changes(rows: list[dict], name: str) -> dict[int, float]:
    """By how much a figure changed from one update to the next, by the step that the later one was logged at."""
    return {row["step"]: abs(row[name] - before[name]) for before, row in itertools.pairwise(rows)}


def jumps(alone: Path, folder: Path, seams: list[int]) -> list[str]:
    """The figures that change more where the processes changed than ever in a run left alone."""
    found = []
    for name in ("score", "kl", "entropy", "value"):
        usual, here = max(changes(logged(alone), name).values()), changes(logged(folder), name)
        found += [
            f"{name} at step {step}" for step, change in here.items()
            if any(seam < step <= seam + UPDATE for seam in seams) and change > JUMP * usual
        ]  # fmt: skip
    return found


def main(minutes: float, seed: int) -> None:
    out = ROOT / "runs" / "soak" / time.strftime("%Y-%m-%d_%H-%M-%S")
    out.mkdir(parents=True)
    words, draw = [*adapters(out), *PPO, "--seed", str(seed)], random.Random(seed)
    began, seconds = time.time(), 60 * minutes
    alone, killed, moved = out / "undisturbed", out / "killed", out / "moved"
    samples, step, pace = watch(alone, [*words, *WITHIN], UNDISTURBED * seconds)
    times = [time.time()]
    sent = disturb(killed, [*words, *WITHIN], step, pace, times[0] + KILLED * seconds, draw)
    times.append(time.time())
    sent_moved = disturb(moved, [*words, *AT_THE_END], step, pace, began + seconds, draw, worlds=(1, 2))
    times.append(time.time())
    same = weights(alone / f"checkpoint-{step}") == weights(killed)
    resumes = [run.with_suffix(".log").read_text().count("Training resumes from") for run in (killed, moved)]
    handed = re.compile(r"resumes from \S*checkpoint-(\d+), which (\d+) process.* wrote; (\d+)")
    told = handed.findall(moved.with_suffix(".log").read_text())
    grew, shrank = ([int(at) for at, *world in told if world == list(pair)] for pair in (("1", "2"), ("2", "1")))
    read, read_moved = (dict(sorted(prompts_read(run).items())) for run in (alone, moved))
    read = {at: prompts for at, prompts in read.items() if at < step}

    warm = samples[int(WARM_UP * len(samples)) :]
    window = max(int(WINDOW * len(warm)), 1)
    first, last = (map(statistics.median, zip(*part, strict=True)) for part in (warm[:window], warm[-window:]))
    (rss, descriptors, threads), (rss_end, descriptors_end, threads_end) = first, last
    growth = 100 * (rss_end / rss - 1)
    minutes_of = [f"{(after - before) / 60:.1f}" for before, after in itertools.pairwise([began, *times])]
    kills = [f"{one.count(signal.SIGKILL)} SIGKILL, {one.count(signal.SIGTERM)} SIGTERM" for one in (sent, sent_moved)]
    rows = [
        ("", "undisturbed", "killed", "killed, other processes"),
        ("---", "---", "---", "---"),
        ("minutes", *minutes_of),
        ("steps", step, step, step),
        ("ended by", "1 SIGTERM", *kills),
        ("resumes", 0, *resumes),
        ("from 1 process to 2, from 2 to 1", "", "", f"{len(grew)}, {len(shrank)}"),
        ("resident memory, warm → end", f"{rss / 2**20:.0f} → {rss_end / 2**20:.0f} MiB ({growth:+.2f}%)", "", ""),
        ("descriptors, warm → end", f"{descriptors:g} → {descriptors_end:g}", "", ""),
        ("threads, warm → end", f"{threads:g} → {threads_end:g}", "", ""),
    ]
    print(*(f"| {' | '.join(map(str, row))} |" for row in rows), "", sep="\n")
    repeated = [at for at in read if read_moved.get(at) != read[at]]
    steps = [row["step"] for row in logged(moved)]
    jumped = jumps(alone, moved, grew + shrank)
    checks = {
        f"resident memory grew by no more than {GROWTH:g}%": growth <= GROWTH,
        "descriptors did not grow": descriptors_end <= descriptors,
        "threads did not grow": threads_end <= threads,
        "it was killed and resumed": min(resumes) > 0,
        "the adapters are the same to the byte": same,
        "two processes went on from one, and one from two": bool(grew and shrank),
        f"no prompt was repeated or skipped in {len(read)} updates, whatever the processes {repeated or ''}": not repeated,
        "every update was logged once, with every figure": steps == [row["step"] for row in logged(alone)]
        and {frozenset(row) for row in logged(alone)} >= {frozenset(row) for row in logged(moved)},
        f"no figure jumps where the processes change {jumped or ''}": not jumped,
        "the adapters are finite": finite(moved),
    }
    print(*(f"{'pass' if passed else 'FAIL'}: {check}" for check, passed in checks.items()), sep="\n")
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
