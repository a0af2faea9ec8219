"""Runs that die: killed at any moment or at the n-th change of a file, a full disk; and resuming them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import recipes
from tests.faults.verdicts import CLEAR, LOST, RIGHT, SILENT, Verdict, judge, judge_error
from tests.faults.world import DATA, READS, Case, Raw, unsound


NEXT = {"sft": "reward", "reward": "ppo", "ppo": "evaluation", "evaluation": "best_of_n"}
SAVES = {"save_strategy": "steps", "save_steps": 1}
# What a stage leaves for the next one, besides its checkpoints.
KEPT = ("adapter_model.safetensors", "adapter_config.json", "backbone.json", "metrics.json", "README.md", "report.md",
        "score_normalization.json", "report.json", "value/adapter_model.safetensors", "value/adapter_config.json",
        "value/backbone.json", "best_of_n.json", "best_of_n.md")  # fmt: skip
# The audit events of changes to files: https://docs.python.org/3/library/audit_events.html
CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "os.chmod",
    "shutil.move",
}


def at_change(number: int, folder: Path, act: Callable[[], None], *, after: bool = False) -> Callable[[], None]:
    """Return what makes a process call `act` as it is about to make its n-th change below a folder (counted from 1).

    With `after`, also at every later change.
    """

    def setup() -> None:
        count, acting = 0, False

        def hook(event: str, args: tuple) -> None:
            nonlocal count, acting
            if acting or not (event == "open" or event in CHANGES):
                return
            if event == "open":
                mode, flags = args[1], args[2]
                if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and "w" not in (
                    mode or ""
                ):
                    return
            for path in args[:2]:
                if isinstance(path, (str, bytes, os.PathLike)) and os.path.abspath(os.fsdecode(path)).startswith(
                    str(folder)
                ):
                    count += 1
                    if count == number or (after and count > number):
                        acting = True
                        try:
                            act()
                        finally:
                            acting = False
                    return

        sys.addaudithook(hook)

    return setup


def die(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def no_space() -> None:
    raise OSError(28, "No space left on device")


# ------------------------------------------------------------------------------------ what a death leaves
def normal(name: str, content: bytes) -> bytes:
    """Return a file's content without what differs between runs: the seconds that it took, and the folder of the case."""
    content = re.sub(rb'/[^\s"]*/(?:template|cases/[\w-]+/\.alone|cases/[\w-]+)/', b"", content)
    if name.endswith(".json"):
        return json.dumps(_timeless(json.loads(content)), sort_keys=True).encode()
    if name.endswith(".md"):
        return re.sub(rb"(?m)^\| \w+ \| [\d.]+ \|$", b"", content)
    return content


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: _timeless(entry) for key, entry in value.items()
            if not re.search("second|runtime|per_second|time|written", key)
        }  # fmt: skip
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value


def left(folder: Path) -> dict[str, bytes]:
    """Return the artifacts of a stage that are in its folder."""
    found = {name: (folder / name).read_bytes() for name in KEPT if (folder / name).is_file()}
    return {name: normal(name, content) for name, content in found.items() if content or not name.endswith(".json")}


def mixture(folder: Path, old: dict[str, bytes], new: dict[str, bytes]) -> str | None:
    """Say whether artifacts of two runs lie side by side, or one that is of neither."""
    now = {name: left_now for name in KEPT if (left_now := _read(folder / name)) is not None}
    of_old = [name for name in now if old.get(name) == now[name] != new.get(name)]
    of_new = [name for name in now if new.get(name) == now[name] != old.get(name)]
    of_none = [name for name in now if now[name] not in (old.get(name), new.get(name))]
    if of_none:
        return f"{of_none[0]} is neither the earlier run's nor the new one's"
    if of_old and of_new:
        return f"{of_new[0]} is new, and {of_old[0]} is the earlier run's"
    gone = [name for name in old if name not in now and name in new]
    if gone and (of_old or len(gone) < len(old)):
        return f"{gone[0]} is gone, and {next(iter(now))} is not"
    return None


def _read(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    try:
        return normal(path.as_posix(), path.read_bytes())
    except ValueError:  # cut JSON
        return b"damaged"


UNDISTURBED: dict[str, dict[str, bytes]] = {}


def undisturbed(case: Case, key: str, stage: str, options: dict) -> dict[str, bytes]:
    """Return the artifacts of a run that nothing disturbs, from the same inputs; it is made once for all cases."""
    if key not in UNDISTURBED:
        alone = Case(f"{key}-alone", case.folder / ".alone", case.draw)
        shutil.copytree(case.folder.parents[1] / "template", alone.folder)
        for module in case.folder.glob("*.py"):
            shutil.copy(module, alone.folder)
        ended = alone.run(stage, **options)
        if ended.code:
            raise RuntimeError(f"{stage} fails undisturbed: {ended.message}")
        UNDISTURBED[key] = left(alone.folder / options["output_dir"])
        shutil.rmtree(alone.folder)
    return UNDISTURBED[key]


CHANGED = {"sft": {"seed": 1}, "reward": {"seed": 1}, "ppo": {"seed": 1}, "evaluation": {"seed": 1}}


def verdict_on_what_is_left(case: Case, stage: str, old: dict, new: dict, death: str) -> Verdict:
    """A folder that a death left is wholly old, wholly new, or refused by the next stage with a clear error."""
    after = NEXT[stage]
    ended = case.run(
        after, output_dir="after", **({"report": "evaluation/report.json"} if stage == "evaluation" else {})
    )
    mixed = mixture(case.folder / stage, old, new)  # as the next stage found it: it ends a save that was cut short
    if ended.code:
        return judge_error(ended, [stage, "output_dir", "adapter"])
    if mixed:
        return Verdict(LOST, f"{death}, and {after} takes it: {mixed}")
    problem = unsound(after, case.folder / "after")
    return Verdict(SILENT, problem) if problem else Verdict(RIGHT, death)


def kill(case: Case) -> Verdict:
    """A stage is run anew over its earlier folder, and killed at a change of a file; then comes the next stage."""
    stage = case.draw.choice(("sft", "reward", "ppo", "evaluation"))
    options = {"output_dir": stage, **CHANGED[stage]}
    if case.draw.random() < 0.3 and stage in ("sft", "ppo"):
        options |= SAVES
    key = f"{stage} {sorted(options)}"
    old, new = left(case.folder / stage), undisturbed(case, key, stage, options)
    number = case.draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
    at = case.draw.randrange(1, 40)
    case.note(
        f"{stage}, {signal.Signals(number).name} at change {at}{' with checkpoints' if 'save_steps' in options else ''}"
    )
    ended = case.start(stage, setup=at_change(at, case.folder / stage, die(number)), **options).wait()
    if ended.hung:
        return judge(ended)
    if ended.code == 0 and (problem := unsound(stage, case.folder / stage)):
        return Verdict(SILENT, problem)
    return verdict_on_what_is_left(case, stage, old, new, f"ended with {ended.code}")


def disk(case: Case) -> Verdict:
    """The disk is full from the n-th change of a file on, or after so many bytes."""
    stage = case.draw.choice(("sft", "reward", "ppo", "evaluation"))
    options = {"output_dir": stage, **CHANGED[stage]}
    if case.draw.random() < 0.3 and stage in ("sft", "ppo"):
        options |= SAVES
    old, new = left(case.folder / stage), undisturbed(case, f"{stage} {sorted(options)}", stage, options)
    at, spare = case.draw.randrange(1, 36), case.draw.choice((0, 4, 8, 16, 32, 64, 128, 256))
    if case.draw.random() < 0.5 and (mounted := small_disk(case, stage, spare)):
        case.note(f"{stage}, {spare} KiB left")
        try:
            ended = case.run(stage, **{**options, "output_dir": f"disk/{stage}"})
            shutil.rmtree(case.folder / stage)
            shutil.copytree(mounted / stage, case.folder / stage)
        finally:
            subprocess.run(["umount", str(mounted)], check=True)
    else:
        case.note(f"{stage}, full at change {at}")
        ended = case.run(stage, setup=at_change(at, case.folder / stage, no_space, after=True), **options)
    if ended.code == 0:
        problem = unsound(stage, case.folder / stage) or mixture(case.folder / stage, old, new)
        return Verdict(SILENT, problem) if problem else Verdict(RIGHT)
    verdict = judge(ended, names=[f"{stage}/", f"'{stage}'", f"{stage} could not be saved", "disk/"])
    after = verdict_on_what_is_left(case, stage, old, new, "the disk was full")
    return after if verdict.name == CLEAR and after.name not in (RIGHT, CLEAR) or after.name == LOST else verdict


def small_disk(case: Case, stage: str, spare: int) -> Path | None:
    """Mount a disk with a copy of a stage's folder and so many KiB left; None if this user cannot mount."""
    disk = case.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return None
    shutil.copytree(case.folder / stage, disk / stage)
    free = os.statvfs(disk)
    (disk / "full").write_bytes(b"x" * max(free.f_bavail * free.f_bsize - spare * 1024, 0))
    return disk


# ------------------------------------------------------------------------------------ resuming
LONGER = {"sft": {"max_steps": 6}, "reward": {"max_steps": 6}, "dpo": {"max_steps": 6}, "ppo": {"max_steps": 8}}
SLOWLY = {**SAVES, "save_total_limit": 3, "resume_from_checkpoint": "auto", "learning_rate": 1e-2}


def resume(case: Case) -> Verdict:
    """A run is killed a few times in training, and resumed: it leaves the bytes of a run left alone."""
    stage = case.draw.choice(("sft", "reward", "ppo", "ppo", "dpo"))
    options = {"output_dir": "out", **SLOWLY, **LONGER[stage]}
    if case.draw.random() < 0.3:
        options |= {"save_steps": 2}
    new = undisturbed(case, f"resumed {stage} {options}", stage, options)
    deaths = []
    for _ in range(case.draw.choice((1, 1, 2, 3))):
        number = case.draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        if case.draw.random() < 0.5:
            at = case.draw.randrange(1, 90)
            deaths.append(f"{signal.Signals(number).name} at change {at}")
            ended = case.start(stage, setup=at_change(at, case.folder / "out", die(number)), **options).wait()
        else:
            seconds = case.draw.uniform(0, 1.5)
            deaths.append(f"{signal.Signals(number).name} after {seconds:.2f} s")
            running = case.start(stage, **options)
            time.sleep(seconds)
            running.kill(number)
            ended = running.wait()
        case.note(f"{stage}, {deaths[-1]}, exit {ended.code}")
        if ended.hung:
            return judge(ended)
        if ended.code not in (0, -number, 128 + number):
            return judge(ended, names=["checkpoint", "resume_from_checkpoint"])
    ended = case.run(stage, **options)
    if ended.code:
        verdict = judge(ended, names=["checkpoint"])
        return Verdict(LOST, f"cannot be resumed: {verdict.why}") if verdict.name == CLEAR else verdict
    now = left(case.folder / "out")
    different = [name for name in new if name.endswith(".safetensors") and now.get(name) != new[name]]
    problem = unsound(stage, case.folder / "out") or (
        f"{different[0]} is not that of a run left alone" if different else None
    )
    return judge(ended, wrong=lambda: problem)


# Options that change nothing that is learned: where results go, and what is told.
INERT = re.compile(
    r"output_dir|logging_.*|log_.*|save_.*|eval_.*|disable_tqdm|resume_from_checkpoint|load_best_model_at_end|metric_for_best.*|"
    r"greater_is_better|hub_.*|push_to_hub|report_to|run_name|sample_.*|per_device_eval_batch_size|dataset_eval_split|"
    r"restore_callback_.*|include_.*|debug|skip_memory_metrics|do_.*|prediction_loss_only|num_completions_to_print|"
    r"model_revision|trust_remote_code|min_reward_accuracy|ignore_data_skip|torch_empty_cache_steps|batch_eval_metrics|"
    r"min_kept|label_names|past_index|length_column_name|full_determinism|neftune.*|average_tokens.*|jit_.*|auto_find.*|"
    r"project|trackio.*|gradient_checkpointing.*|use_cache|activation_offloading|optim_target.*|optim_args|tf32|"
    r"num_train_epochs|max_steps|config|env|bf16_full_eval|fp16_full_eval|train_on_.*|remove_unused_columns|ddp.*|tpu.*|local_rank"
)
OTHER = ("0", "1", "2", "3", "5", "16", "0.5", "0.01", "0.1", "1.0e-3", "true", "false", "cosine", "constant", "rmsprop",
         "sgd", "adafactor", "adamw_torch", "head", "policy", "k3", "bfloat16", "eager", "sequence", "left", "right",
         "all-linear", "c_attn", "c_fc", "[c_attn]", "[1.0]", "[-1.0]", "[-1, 1]", "'<|end|>'", "text",
         "'more.jsonl'", "group_by_length",
         "random", "sequential", "{}", "{temperature: 1}", "'other'", "keep_end", "ipo", "sigmoid")  # fmt: skip


def changed(case: Case) -> Verdict:
    """A run that was stopped is resumed with one option changed: the change is applied and told, or refused by name."""
    stage = case.draw.choice(("sft", "reward", "ppo", "ppo", "dpo"))
    hints = recipes.options_of(stage)
    name = case.draw.choice(sorted(name for name in hints if not INERT.fullmatch(name)))
    value = case.draw.choice(OTHER)
    if recipes.NUMBER.search(hints[name]):
        value = case.draw.choice(OTHER[:10])
    elif "bool" in hints[name]:
        value = case.draw.choice(("true", "false"))
    case.note(f"{stage}, {name}: {value}")
    options = {"output_dir": "out", **SLOWLY, **LONGER[stage], "lr_scheduler_type": "constant"}
    if value == json.dumps(options.get(name, recipes.default_of(stage, name)), default=str).replace('"', ""):
        return Verdict(RIGHT, "as it was")
    case.write("more.jsonl", _other_rows(stage))
    whole = undisturbed(case, f"resumed {stage} {options}", stage, options)
    ended = case.run(stage, **{**options, "output_dir": "fresh", name: Raw(value)})
    fresh = left(case.folder / "fresh") if ended.code == 0 else {}
    first = case.run(stage, **{**options, "max_steps": options["max_steps"] // 2})
    if first.code:
        return judge(first)
    before = case.files()
    ended = case.run(stage, **{**options, name: Raw(value)})

    def wrong() -> str | None:
        now = left(case.folder / "out")
        ignored, matters = _same(now, whole), not _same(fresh, whole)
        if "Training resumes" not in ended.out:
            return "it did not resume"
        if problem := unsound(stage, case.folder / "out"):
            return problem
        if (ignored and not matters) or re.search(rf"\b{name}\b", ended.said):
            return None
        return f"{name} is {'ignored' if ignored else 'applied'}, and the run does not say so"

    return judge(
        ended,
        names=[name, value.strip("'")],
        lost=case.changed(before, but=() if ended.code else ("out",)),
        wrong=wrong,
    )


def _same(one: dict[str, bytes], other: dict[str, bytes]) -> bool:
    """Return whether two runs have left the same weights."""
    return all(one.get(name) == other[name] for name in other if name.endswith(".safetensors"))


def _other_rows(stage: str) -> list[dict]:
    rows = DATA[READS.get(stage, "prompts.jsonl")]
    return [{key: f"{cell} now" if key != "prompt" else f"Now {cell}" for key, cell in row.items()} for row in rows]
