"""What surrounds a run: an odd machine, an odd environment, folders of odd names, and the launcher that users take."""

import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.runner import ROOT, Ended
from tests.faults.verdicts import CLEAR, RIGHT, UNCLEAR, Verdict, judge
from tests.faults.world import Case, as_recipe, good_options, unsound


def _limit(kind: str, value: int) -> Callable[[], None]:
    def setup() -> None:
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
SHUT = ("stdout full", "stdout a broken pipe")
OUTPUTS = (
    "out", "out", "out", "deep/er/out", "é ü", "a b", "x" * 300, "a\nb", "-out", "~nobody/out", "./out/", "out/../out",
    "loop/out",
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
        if not all(folder.stat().st_mode & stat.S_IXOTH for folder in Path(os.__file__).parents):
            return Verdict(RIGHT, "another user cannot read this Python")
        _open_to_all(case.folder, case.draw.random() < 0.5)
    case.note(f"{stage}, {name}" + (f", output_dir {ascii(output[:30])}" if output != "out" else ""))
    before = case.files()
    words = [f"--output_dir={output}"]
    ended = case.start(stage, *words, setup=setup, without=("output_dir",)).wait()
    lost = case.changed(before, but=() if ended.code else (os.path.normpath(output), "target", "out"))
    names = [
        output.rstrip("/"),
        "output_dir",
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
    if name in SHUT and ended.code and any(reason in ended.err for reason in ("No space left", "Broken pipe")):
        return Verdict(CLEAR, "Python's own error: nothing can be printed") if not lost else verdict
    return Verdict(UNCLEAR, f"refused, and it can work: {verdict.why}") if fine and verdict.name == CLEAR else verdict


def _open_to_all(folder: Path, writable: bool) -> None:
    """Let another user read a case's folder, and write there if `writable`."""
    for path in (folder, *folder.rglob("*"), *folder.parents):
        if path.is_relative_to(folder.parents[1]) and not path.is_symlink():
            path.chmod(
                path.stat().st_mode
                | (0o777 if writable and path.is_relative_to(folder) else 0o755 if path.is_dir() else 0o444)
            )


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
        # With `python -m accelerate.commands.launch`, accelerate itself would import what lies here.
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
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
    for line in err.splitlines():
        # Python's own line, with the error of our package; or our line, as the imports fail.
        if "Error while finding module specification" in line or "is imported instead of Python's own" in line:
            return line
    told, mark, _ = err.partition("(accelerate adds its own traceback.")
    return told if mark else err
