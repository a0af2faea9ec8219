"""What surrounds a run: folders with files of the user's, a second run, odd machines, and the tools beside the stages."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.deaths import SLOWLY, undisturbed
from tests.faults.runner import ROOT, Ended
from tests.faults.verdicts import CLEAR, LOST, RIGHT, UNCLEAR, Verdict, judge
from tests.faults.world import PAIRS, Case, as_recipe, good_options, unsound


# ------------------------------------------------------------------------------------ files that are not ours
THEIRS = (
    "README.md", "tokenizer.json", "tokenizer_config.json", "metrics.json", "samples.jsonl", "value/thesis.txt", "report.json",
    "value/adapter_model.safetensors", "checkpoint-2/thesis.txt", "checkpoint-2/manifest.json", "checkpoint-99/a.txt",
    "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "backbone.json", "notes.txt",
    "score_normalization.json", "report.md", "best_of_n.json", "ppo_curves.png", "runs/a.txt", "checkpoint-1/model.safetensors",
    "special_tokens_map.json", "training_args.bin", "checkpoint-3", "value", "manifest.json", "completions/a.parquet",
    ".previous/a.txt", ".old/a.txt", "checkpoint-2/checkpoint-3/a.txt", "checkpoint-best/a.txt", "README.md/a.txt",
)  # fmt: skip


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
        {name: content for name, content in before.items() if name in planted or not name.startswith(f"{base}/")}
    )
    if ended.code:
        lost += case.changed(before)
    return judge(
        ended, names=[*planted, f"{base}", "output_dir"], lost=lost, wrong=lambda: unsound(stage, case.folder / base)
    )


# ------------------------------------------------------------------------------------ two runs
SLOW = "import time\ndef reward(completions, **kwargs):\n    time.sleep({})\n    return [float(len(text)) for text in completions]\n"


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


# ------------------------------------------------------------------------------------ machines
def _limit(kind: str, value: int) -> Callable[[], None]:
    def setup() -> None:
        import resource

        resource.setrlimit(getattr(resource, kind), (value, value))

    return setup


def _as_nobody() -> None:
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
    os.environ.pop("HOME", None)
    os.environ.pop("USER", None)


def _encoded(encoding: str, errors: str = "strict") -> Callable[[], None]:
    def setup() -> None:
        sys.stdout.reconfigure(encoding=encoding, errors=errors)
        sys.stderr.reconfigure(encoding=encoding)

    return setup


def _to(device: str) -> Callable[[], None]:
    def setup() -> None:
        _print_to(os.open(device, os.O_WRONLY))

    return setup


def _print_to(descriptor: int) -> None:
    os.dup2(descriptor, 1)
    sys.stdout.detach()
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)


def _gone() -> None:
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir("../gone")


def _broken_pipe() -> None:
    reader, writer = os.pipe()
    _print_to(writer)
    os.close(reader)


MACHINES: dict[str, tuple[Callable[[], None], bool | None]] = {  # the setup, and whether the run must end well
    "umask 077": (lambda: os.umask(0o077) and None, True),
    "umask 000": (lambda: os.umask(0) and None, True),
    "umask 777": (lambda: os.umask(0o777) and None, None),
    "64 descriptors": (_limit("RLIMIT_NOFILE", 64), None),
    "20 descriptors": (_limit("RLIMIT_NOFILE", 20), None),
    "files of 4 KB": (_limit("RLIMIT_FSIZE", 4096), None),
    "files of 64 KB": (_limit("RLIMIT_FSIZE", 65536), None),
    "ASCII": (_encoded("ascii"), True),
    "latin-1": (_encoded("latin-1"), True),
    "nobody": (_as_nobody, None),
    "stdout full": (_to("/dev/full"), None),
    "stdout null": (_to("/dev/null"), True),
    "stdout a broken pipe": (_broken_pipe, None),
    "stdin closed": (lambda: os.close(0), True),
    "the folder gone": (_gone, None),
    "the clock an hour back": (lambda: setattr(time, "time", lambda now=time.time: now() - 3600), True),
    "SIGPIPE as by default": (lambda: signal.signal(signal.SIGPIPE, signal.SIG_DFL) and None, True),
    "nohup": (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN) and None, True),
    "no TMPDIR": (lambda: os.environ.__setitem__("TMPDIR", "/nowhere"), True),
    "no HOME": (lambda: os.environ.pop("HOME", None) and None, True),
    "a HOME that is not": (lambda: os.environ.__setitem__("HOME", "/nowhere/home"), True),
}
OUTPUTS = (
    "out", "out", "out", "deep/er/out", "é ü", "a b", "x" * 300, "a\nb", "-out", "~nobody/out", "./out/", "out/../out", "loop/out",
    "texts.jsonl/out", "base", "sft", "/dev/null", "/proc/x", "\udcff", "%s{0}", "link", ".", "..", "'", "a:b", "CON", "*",
    "out/checkpoint-1", "//out", "x/" * 100 + "x", "/sys/x",
)  # fmt: skip


def machine(case: Case) -> Verdict:
    """A stage runs on an odd machine, or into a folder of an odd name."""
    stage = case.draw.choice(("sft", "reward", "ppo", "evaluation"))
    name = case.draw.choice(sorted(MACHINES))
    output = case.draw.choice(OUTPUTS) if case.draw.random() < 0.4 else "out"
    (case.folder / "loop").symlink_to("loop")
    (case.folder / "target").mkdir()
    (case.folder / "link").symlink_to("target")
    setup, fine = MACHINES[name]
    if output != "out":
        name, setup, fine = "as usual", None, None
    if name == "nobody":
        if os.getuid():
            return Verdict(RIGHT, "only root can become another user")
        _open_to_all(case.folder, case.draw.random() < 0.5)
    case.note(f"{stage}, {name}" + (f", output_dir {ascii(output[:30])}" if output != "out" else ""))
    before = case.files()
    words = [f"--output_dir={output}"]
    ended = case.start(stage, *words, setup=setup, without=("output_dir",)).wait()
    lost = case.changed(before, but=() if ended.code else (os.path.normpath(output), "target", "out"))
    names = [
        output.rstrip("/"),
        "output_dir",
        "Errno",
        "umask",
        "descriptor",
        "stdout",
        "No space",
        "current folder",
        "large",
        "recipe-0",
    ]

    def wrong() -> str | None:
        return unsound(stage, case.folder / Path(output).expanduser()) if name != "the folder gone" else None

    verdict = judge(ended, names=names, lost=lost, wrong=wrong)
    return Verdict(UNCLEAR, f"refused, and it can work: {verdict.why}") if fine and verdict.name == CLEAR else verdict


def _open_to_all(folder: Path, writable: bool) -> None:
    """Let another user read a case's folder, and write there if `writable`."""
    for path in (folder, *folder.rglob("*"), *folder.parents):
        if path.is_relative_to(folder.parents[1]) and not path.is_symlink():
            path.chmod(
                path.stat().st_mode
                | (0o777 if writable and path.is_relative_to(folder) else 0o755 if path.is_dir() else 0o444)
            )


# ------------------------------------------------------------------------------------ tools
WORDS = (
    "",
    "0",
    "-1",
    "1e9",
    "nan",
    "a",
    "--",
    "-h",
    "é",
    "/dev/null",
    "..",
    "out",
    "seeds",
    "x=1",
    "[",
    "{",
    "1",
    "2",
    "ddp",
)


def plan_words(case: Case) -> list[str]:
    case.write("plan.yaml", as_recipe(good_options("ppo")))
    names = (
        "processes",
        "layouts",
        "gb",
        "model_name_or_path",
        "lora_r",
        "max_completion_length",
        "per_device_train_batch_size",
    )
    words = ["--config", "plan.yaml"]
    for _ in range(case.draw.choice((0, 1, 1, 2))):
        words += [f"--{case.draw.choice(names)}", case.draw.choice(WORDS)]
    return words


MIGRATE = {"batch_size": 64, "mini_batch_size": 32, "ppo_epochs": 3, "learning_rate": 1e-4, "steps": 1000, "model_name": "m",
           "per_device_train_batch_size": 4, "num_mini_batches": 2, "total_episodes": 100, "gradient_accumulation_steps": 2,
           "num_sample_generations": 1, "local_rollout_forward_batch_size": 8, "num_ppo_epochs": 4, "kl_coef": 0.05,
           "reward_model_path": "r", "response_length": 53, "stop_token": "eos", "cliprange": 0.2, "init_kl_coef": 0.1, "world_size": 1}  # fmt: skip
ODD = (0, -1, None, "", "a", [], {}, True, 1e30, -0.5, 7, 10**12, float("nan"), "0", "1e-5", [1, 2])


def migrate_words(case: Case) -> list[str]:
    old = dict(case.draw.sample(sorted(MIGRATE.items()), case.draw.randrange(1, 8)))
    for key in case.draw.sample(sorted(old), min(len(old), case.draw.choice((0, 1, 1, 2)))):
        old[key] = case.draw.choice(ODD)
    case.note(json.dumps(old)[:150])
    kind = case.draw.choice(("yaml", "json", "words", "words", "odd"))
    if kind == "words":
        return ["--", *(word for key, value in old.items() for word in (f"--{key}", str(value)))]
    text = (
        json.dumps(old)
        if kind != "odd"
        else case.draw.choice(("", "- a", "a: b: c", "{", "\0", "a: &x [*x]", "? [a]\n: 1\n", "1: 2"))
    )
    case.write(f"old.{kind}", text)
    return [case.draw.choice((f"old.{kind}",) * 5 + ("nowhere.yaml", "base"))]


def tables_words(case: Case) -> list[str]:
    (case.folder / "runs" / "seeds").mkdir(parents=True)
    for seed in ("0", "1"):
        for folder in (f"runs/seeds/{seed}", f"runs/ablations/x=1/{seed}"):
            shutil.copytree(case.folder / "evaluation", case.folder / folder)
            shutil.copytree(case.folder / "ppo", case.folder / folder / "ppo")
            shutil.copytree(case.folder / "reward", case.folder / folder / "reward")
    for path in case.draw.sample(sorted((case.folder / "runs").rglob("*.json")), case.draw.choice((0, 0, 1, 2))):
        path.write_text(case.draw.choice(("{}", "[]", "{", '{"judge_gain": 5}', "null", "")))
        case.note(f"spoiled {path.relative_to(case.folder)}")
    if case.draw.random() < 0.3:
        (case.folder / "runs/seeds/notes").mkdir()
    words = case.draw.choice(
        (["seeds", "runs/seeds"], ["ablations", "runs/ablations", "x=1"], ["baselines", "runs", "evaluation"])
    )
    for _ in range(case.draw.choice((0, 0, 1, 2))):
        words = words[: case.draw.randrange(len(words) + 1)] + case.draw.choice(([], [case.draw.choice(WORDS)]))
    return words


def hh_words(case: Case) -> list[str]:
    rows = [
        {side: f"\n\nHuman: {row['prompt']}?\n\nAssistant:{row[side]}" for side in ("chosen", "rejected")}
        for row in PAIRS
    ]
    if case.draw.random() < 0.5:
        row = case.draw.choice(rows)
        row[case.draw.choice(("chosen", "rejected", "x"))] = case.draw.choice(
            ("", "Human: a", None, 5, "\n\nAssistant: a", "\ud800", [], "\n\nHuman: ")
        )
    name = case.draw.choice(("hh.jsonl", "hh.jsonl", "hh.jsonl", "hh.json", "hh.jsonl.gz"))
    case.write(name, rows)
    words = [name, "converted"]
    for _ in range(case.draw.choice((0, 1, 1, 2))):
        option = case.draw.choice(("held_out", "max_pairs", "max_tokens", "tokenizer", "data_dir"))
        words += [f"--{option}", case.draw.choice((*WORDS, "0.5", "0.3", "base", "4", "64"))]
    if case.draw.random() < 0.15:
        words = words[: case.draw.randrange(len(words) + 1)]
    return words


TOOLS = {"plan": plan_words, "migrate": migrate_words, "tables": tables_words, "convert_hh": hh_words}


def tools(case: Case) -> Verdict:
    """A tool gets random arguments and files."""
    tool = case.draw.choice(sorted(TOOLS))
    words = TOOLS[tool](case)
    case.note(f"{tool} {' '.join(map(ascii, words))}"[:150])
    before = case.files()
    ended = case.tool(tool, *words)
    names = [
        *words,
        *(word.lstrip("-") for word in words),
        *case.notes[0].split(),
        "usage",
        "arguments",
        "one file",
        "source",
        "folder",
        "held_out",
    ]
    if tool == "migrate":
        names += [*MIGRATE, "old."]
    if tool == "tables":
        names += ["seeds", "baselines", "ablations", "runs/"]

    def wrong() -> str | None:
        if not ended.out.strip():
            return "exit code 0, and it printed nothing"
        return "exit code 0, and nan in what it printed" if "nan" in ended.out.lower().split() else None

    writes = ("runs/ablations", "runs/table.md", "runs/table.json")
    lost = case.changed(before, but=() if ended.code else writes)
    return judge(ended, names=[name for name in names if len(name) > 1], lost=lost, wrong=wrong)


# ------------------------------------------------------------------------------------ the real launcher
def _environments(case: Case) -> dict[str, dict[str, str]]:
    home = str(case.folder / "home")
    locked = case.write("locked/a", "").parent
    file = str(case.write("a-file", ""))
    return {
        "C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        "POSIX locale": {"LANG": "POSIX", "LC_ALL": "POSIX"},
        "a locale that is not": {"LC_ALL": "xx_XX.UTF-8"},
        "latin-1": {"PYTHONIOENCODING": "latin-1"},
        "HOME is a file": {"HOME": file, "HF_HOME": f"{file}/hf"},
        "no HF_HOME": {"HF_HOME": "/proc/nowhere"},
        "TMPDIR is not": {"TMPDIR": "/nowhere"},
        "datasets' cache is a file": {"HF_DATASETS_CACHE": file},
        "matplotlib's folder is a file": {"MPLCONFIGDIR": file, "HOME": home},
        "warnings as errors": {"PYTHONWARNINGS": "error"},
        "optimised": {"PYTHONOPTIMIZE": "2"},
        "no bytecode": {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "7"},
        "threads 0": {"OMP_NUM_THREADS": "0"},
        "display": {"DISPLAY": ":99", "MPLBACKEND": "TkAgg"},
        "a rank alone": {"RANK": "1"},
        "a world of 2": {"WORLD_SIZE": "2"},
        "columns 0": {"COLUMNS": "0", "LINES": "0", "TERM": "dumb"},
        "a locked folder": {"HF_HOME": str(locked)},
    }


def launch(case: Case) -> Verdict:
    """A stage is started as users start it, `accelerate launch`, in an odd environment or in a folder with odd names."""
    stage = case.draw.choice(("sft", "ppo", "evaluation"))
    kinds = _environments(case)
    name = case.draw.choice(sorted(kinds))
    case.note(f"{stage}, {name}")
    odd = case.draw.random() < 0.4
    if odd:
        here = case.draw.choice(
            ("data/a.txt", "pipeline.py", "data/__init__.py", "random.py", "trl/a.txt", "reward_models/a.txt")
        )
        case.write(here, "x = 1\n")
        case.note(here)
    case.write("recipe-0.yaml", as_recipe(good_options(stage)))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_configs" / "cpu.yaml"),
    ]
    command += ["-m", f"pipeline.{stage}", "--config", "recipe-0.yaml"]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | kinds[name]
    before, began = case.files(), time.time()
    done = subprocess.run(
        command, cwd=case.folder, env=env, capture_output=True, timeout=300, stdin=subprocess.DEVNULL
    )
    out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    case.write(".logs/launch.out", out)
    case.write(".logs/launch.err", err)
    ended = Ended(done.returncode, out, _of_the_stage(err), time.time() - began, "")
    names = [*kinds[name], *kinds[name].values(), "output_dir", "data", "pipeline", "random.py", "trl"]
    lost = case.changed(before, but=() if ended.code else ("out",))
    return judge(ended, names=names, lost=lost, wrong=lambda: unsound(stage, case.folder / "out"))


def _of_the_stage(err: str) -> str:
    """Return what a stage told, without the traceback that accelerate adds."""
    told, mark, rest = err.partition("(accelerate adds its own traceback.")
    return told if mark else err
