"""PPO on the embedded demo for a long time: undisturbed, where memory is watched, then killed and resumed again and again.

    python -m tests.soak --minutes 30

The undisturbed run takes two fifths of the time and ends after some step. The other run goes to that step too, is ended
by SIGKILL and SIGTERM at random moments, and must leave the same bytes. Prints a table; exits with 1 where memory,
descriptors or threads grew or the bytes differ. Takes the adapters of `make demo` if they are there, and makes short ones
otherwise, which is not counted.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "pipeline" / "recipes" / "demo"
# A constant rate, so that the run does not depend on how many steps it was going to take.
PPO = ["--lr_scheduler_type", "constant", "--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "2"]
PPO += ["--sample_updates", "4", "--resume_from_checkpoint", "auto", "--disable_tqdm", "true"]
# glibc keeps what a process has freed, the more of it the longer the process runs. Told to return every tensor at once, it
# leaves resident what is held: a leak shows, and the few MiB of a hoard do not.
HELD = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
ENDLESS = 1_000_000  # steps
UNDISTURBED = 0.4  # of the time
WARM_UP = 0.25  # of the undisturbed run
WINDOW = 0.2  # of what follows: its beginning is compared with its end
GROWTH = 2.0  # %, of resident memory


def start(stage: str, folder: Path, *words: str) -> psutil.Popen:
    """A stage in a process of its own; what it says goes to a file beside its folder."""
    command = [sys.executable, "-m", f"pipeline.{stage}", "--config", str(RECIPES / f"{stage}.yaml")]
    with folder.with_suffix(".log").open("a") as log:
        options = {"cwd": ROOT, "env": os.environ | HELD, "stdout": log, "stderr": subprocess.STDOUT}
        return psutil.Popen([*command, "--output_dir", str(folder), *words], start_new_session=True, **options)


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


def disturb(folder: Path, words: list[str], step: int, pace: Pace, until: float, draw: random.Random) -> list[int]:
    """A run to a step that is ended at random moments, once at least and until what is left of it takes up the time that
    is left; the signals."""
    sent = []
    while True:
        process, began = start("ppo", folder, *words, "--max_steps", str(step)), time.time()
        wait = draw.uniform(0, 3 * pace.start)
        left = wait + pace.start + (step - newest(folder)) * pace.step
        while time.time() < began + wait and process.poll() is None:
            time.sleep(0.05)
        if process.poll() is not None or (sent and began + left > until):
            end(process, folder, 0)
            return sent
        number = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        process.send_signal(number)
        # SIGTERM before training begins ends a process as it does any.
        if end(process, folder, 0, -number, 128 + number) == 0:
            return sent
        sent.append(number)


def weights(folder: Path) -> list[bytes]:
    return [(folder / name / "adapter_model.safetensors").read_bytes() for name in (".", "value")]


def main(minutes: float, seed: int) -> None:
    out = ROOT / "runs" / "soak" / time.strftime("%Y-%m-%d_%H-%M-%S")
    out.mkdir(parents=True)
    words, draw = [*adapters(out), *PPO, "--seed", str(seed)], random.Random(seed)
    began, seconds = time.time(), 60 * minutes
    samples, step, pace = watch(out / "undisturbed", words, UNDISTURBED * seconds)
    undisturbed = time.time() - began
    sent = disturb(out / "killed", words, step, pace, began + seconds, draw)
    same = weights(out / "undisturbed" / f"checkpoint-{step}") == weights(out / "killed")
    resumes = (out / "killed.log").read_text().count("Training resumes from")

    warm = samples[int(WARM_UP * len(samples)) :]
    window = max(int(WINDOW * len(warm)), 1)
    first, last = (map(statistics.median, zip(*part, strict=True)) for part in (warm[:window], warm[-window:]))
    (rss, descriptors, threads), (rss_end, descriptors_end, threads_end) = first, last
    growth = 100 * (rss_end / rss - 1)
    kills = f"{sent.count(signal.SIGKILL)} SIGKILL, {sent.count(signal.SIGTERM)} SIGTERM"
    rows = [
        ("", "undisturbed", "killed"),
        ("---", "---", "---"),
        ("minutes", f"{undisturbed / 60:.1f}", f"{(time.time() - began - undisturbed) / 60:.1f}"),
        ("steps", step, step),
        ("ended by", "1 SIGTERM", kills),
        ("resumes", 0, resumes),
        ("resident memory, warm → end", f"{rss / 2**20:.0f} → {rss_end / 2**20:.0f} MiB ({growth:+.2f}%)", ""),
        ("descriptors, warm → end", f"{descriptors:g} → {descriptors_end:g}", ""),
        ("threads, warm → end", f"{threads:g} → {threads_end:g}", ""),
    ]
    print(*(f"| {a} | {b} | {c} |" for a, b, c in rows), "", sep="\n")
    checks = {
        f"resident memory grew by no more than {GROWTH:g}%": growth <= GROWTH,
        "descriptors did not grow": descriptors_end <= descriptors,
        "threads did not grow": threads_end <= threads,
        "it was killed and resumed": resumes > 0,
        "the adapters are the same to the byte": same,
    }
    print(*(f"{'pass' if passed else 'FAIL'}: {check}" for check, passed in checks.items()), sep="\n")
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
