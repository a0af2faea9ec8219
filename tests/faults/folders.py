"""The output folder: files in it that are not ours, and a second run in it."""

import time
from pathlib import Path

from tests.faults.deaths import SLOWLY, undisturbed
from tests.faults.verdicts import LOST, Verdict, judge
from tests.faults.world import Case, unsound


THEIRS = (
    "README.md", "tokenizer.json", "tokenizer_config.json", "metrics.json", "samples.jsonl", "value/thesis.txt", "report.json",
    "value/adapter_model.safetensors", "checkpoint-2/thesis.txt", "checkpoint-2/manifest.json", "checkpoint-99/a.txt",
    "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "backbone.json", "notes.txt",
    "score_normalization.json", "report.md", "best_of_n.json", "ppo_curves.png", "runs/a.txt",
    "checkpoint-1/model.safetensors",
    "special_tokens_map.json", "training_args.bin", "checkpoint-3", "value", "manifest.json", "completions/a.parquet",
    ".previous/a.txt", ".old/a.txt", "checkpoint-2/checkpoint-3/a.txt", "checkpoint-best/a.txt", "README.md/a.txt",
)  # fmt: skip


def kept_aside(folder: Path, content: bytes) -> bool:
    """Return whether a file with this content was renamed and kept, as the run then says."""
    kept = (path for path in folder.rglob("*") if ".kept-" in path.relative_to(folder).as_posix())
    return any(path.is_file() and path.read_bytes() == content for path in kept)


def theirs(case: Case) -> Verdict:
    """The output folder holds files of the user's: the run leaves them, or is refused."""
    stage = case.draw.choice(("sft", "reward", "ppo", "evaluation", "best_of_n", "dpo"))
    base = case.draw.choice(("out", "out", stage if (case.folder / stage).is_dir() else "out"))
    planted = []
    for name in case.draw.sample(THEIRS, case.draw.choice((1, 1, 2, 4))):
        path = case.folder / base / name
        if not path.exists() and all(parent.is_dir() or not parent.exists() for parent in path.parents):
            link = case.draw.random() < 0.15
            path.parent.mkdir(parents=True, exist_ok=True)
            if link:
                case.write(f"elsewhere/{name}", "my thesis\n")
                path.symlink_to(case.folder / "elsewhere" / name)
            else:
                path.write_text(case.draw.choice(("my thesis\n", "{}", '{"accuracy": 0.9}', "")))
            planted.append(f"{base}/{name}")
            case.note(f"{'link ' if link else ''}{base}/{name}")
    case.note(stage)
    options = {"output_dir": base, "save_total_limit": 1}
    if stage not in ("evaluation", "best_of_n"):
        options |= {"save_strategy": "steps", "save_steps": 1}
    else:
        options.pop("save_total_limit")
    if case.draw.random() < 0.15 and stage == "ppo":
        options |= {"dataset_name": f"{base}/samples.jsonl", "sample_updates": 1}
        case.write(f"{base}/samples.jsonl", (case.folder / "prompts.jsonl").read_bytes())
        planted.append(f"{base}/samples.jsonl")
    before = case.files()
    ended = case.run(stage, **options)
    lost = case.changed(
        {
            name: content
            for name, content in before.items()
            if (name in planted and not kept_aside(case.folder / base, content)) or not name.startswith(f"{base}/")
        }
    )
    if ended.code:
        lost += case.changed(before)
    return judge(
        ended, names=[*planted, f"{base}", "output_dir"], lost=lost, wrong=lambda: unsound(stage, case.folder / base)
    )


# ------------------------------------------------------------------------------------ two runs
SLOW = """
import time

def reward(completions, **kwargs):
    time.sleep({})
    return [float(len(text)) for text in completions]
"""


def two(case: Case) -> Verdict:
    """A second run is started in the folder of one that trains: it is refused, and the first leaves the bytes of one alone."""
    stage = case.draw.choice(("ppo", "ppo", "sft", "reward"))
    options = {**SLOWLY, "output_dir": "out", "max_steps": 8 if stage == "ppo" else 30}
    if stage == "ppo":
        case.write("slow_reward.py", SLOW.format(0.4))
        options |= {"reward_adapter": [], "reward_funcs": ["slow_reward.reward"]}
    wait = case.draw.uniform(0, 1.2)
    second = dict(options)
    if case.draw.random() < 0.5:
        second |= {"seed": 5, "resume_from_checkpoint": None}
        second.pop("resume_from_checkpoint")
    case.note(f"{stage}, the second after {wait:.2f} s{', another seed' if second.get('seed') else ''}")
    first = case.start(stage, **options)
    time.sleep(wait)
    if first.poll() is not None:
        return judge(first.wait(), wrong=lambda: unsound(stage, case.folder / "out"))
    other, began = case.run(stage, **second), time.time()
    ended = first.wait()
    if ended.hung or other.hung:
        return judge(ended if ended.hung else other)
    if ended.code and not other.code:  # the second was faster to take the folder
        ended, other, options = other, ended, second
    if ended.code:
        return Verdict(LOST, f"the second run has ended the first: {ended.message}")
    if other.code == 0 and time.time() > began + 0.1:
        return Verdict(LOST, "both runs trained in one folder, and ended with exit code 0")
    if "'loss'" in other.out and other.code:
        return Verdict(LOST, f"the second run trained beside the first, until: {other.message}")
    new = undisturbed(case, f"two {stage} {sorted(options)} {options['max_steps']}", stage, options)
    different = [
        name for name in new if name.endswith(".safetensors") and _bytes(case.folder / "out" / name) != new[name]
    ]
    if different and other.code:
        return Verdict(LOST, f"{different[0]} of the first run is not that of a run left alone")
    return judge(other, names=["out"], wrong=lambda: unsound(stage, case.folder / "out"))


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
