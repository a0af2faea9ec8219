"""How errors reach the screen: an expected one as its message alone, a bug with its traceback, of several processes once."""

import gc
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from pipeline.runs import errors
from pipeline.runs.agreement import check_rendezvous
from pipeline.runs.arguments import DataArguments
from pipeline.runs.command_line import parse
from pipeline.runs.errors import report
from reward_models.composite import Composite
from reward_models.functions import RewardArguments, load_function


ROOT = Path(__file__).parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file"]
# Run from a folder of the user's, where Python and our code are to find what is ours.
PPO = ["-m", "pipeline.ppo", "--config", "pipeline/recipes/demo/ppo.yaml"]


def run(folder: Path, *words: str | Path) -> subprocess.CompletedProcess:
    """Run Python in a folder, with this project's packages in its path."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True)


# ------------------------------------------------------------------------------------ in this process
def caught(call) -> tuple:
    try:
        call()
    except BaseException as error:  # noqa: BLE001 (what the interpreter would hand on)
        return type(error), error, error.__traceback__
    raise AssertionError("nothing was raised")


def options(*words: str):
    """Parse the options of a run, as a stage does."""
    return lambda: parse(DataArguments, RewardArguments, args=["--reward_funcs", "a.b", *words])


EXPECTED = {
    "an option": (options("--min_kept", "2"), "min_kept=2.0 must be from 0 to 1."),
    "an option that a dataclass refuses": (options("--normalize_scores", "true"), "normalize_scores scales"),
    "a recipe": (options("--config", "nowhere.yaml"), "--config nowhere.yaml: no such file."),
}


@pytest.mark.parametrize(("call", "message"), EXPECTED.values(), ids=EXPECTED)
def test_an_expected_error_is_its_message(call, message, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    report(*caught(call))
    said = capsys.readouterr().err
    assert said.startswith(message) and said.endswith("\n") and said.count("\n") == 1


def test_debugging_shows_the_traceback_of_an_expected_error_too(capsys, monkeypatch):
    """`accelerate launch --debug` sets the variable."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_DEBUG_MODE", "true")
    report(*caught(options("--min_kept", "2")))
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("\nValueError: min_kept=2.0 must be from 0 to 1.\n")


def broken(completions, **kwargs):
    return [len(text) / 0 for text in completions]


def scored():
    composite = Composite([broken])
    composite.functions[0](prompts=["A"], completions=["b"], completion_ids=[[0]])
    composite.total(torch.zeros(1, 1), ["A"], ["b"])


@pytest.mark.parametrize(
    ("call", "note"),
    [
        (scored, f"It was raised in {__file__}, line {broken.__code__.co_firstlineno + 1}."),
        (
            lambda: load_function("nowhere.a"),
            f"Python looks in the current folder ({Path.cwd()}) and in those of PYTHONPATH.",
        ),
    ],
    ids=["a reward function", "a module"],
)
def test_an_expected_error_says_where_to_look(call, note, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    report(*caught(call))
    said = capsys.readouterr().err
    assert said.endswith(f". {note}\n") and said.count("\n") == 1


def foreign():
    raise ValueError("not of our code")


BUGS = {
    "of another type": lambda: RewardArguments(reward_funcs=3 / 0),
    "of code that is not ours": foreign,
    "that ours makes by mistake": lambda: DataArguments(eval_dataset_name=None, dataset_name=None).eval_source,
    "that a built-in raises in ours": lambda: RewardArguments(["a"]).check_weights([1.0]) or report(1, 2),
}


@pytest.mark.parametrize("call", BUGS.values(), ids=BUGS)
def test_a_bug_keeps_its_traceback(call, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    kind, error, trace = caught(call)
    report(kind, error, trace)
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):\n")
    assert said.endswith(f"{kind.__name__}: {error}\n")


def test_the_causes_of_a_bug_are_kept(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")

    def call():
        try:
            foreign()
        except ValueError as error:
            raise KeyError("beside it") from error

    report(*caught(call))
    said = capsys.readouterr().err
    assert "ValueError: not of our code" in said and said.endswith("KeyError: 'beside it'\n")


def test_of_processes_with_one_error_one_tells_it(tmp_path, capsys, monkeypatch):
    """torch's launcher gives each a file to leave its error in, and makes a table of them."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    errors = [options("--min_kept", "2"), options("--min_kept", "2"), options("--min_kept", "-1")]
    for rank, call in enumerate(errors):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        report(*caught(call))
    first, third = "min_kept=2.0 must be from 0 to 1.", "min_kept=-1.0 must be from 0 to 1."
    assert capsys.readouterr().err == f"[rank 0] {first}\n[rank 2] {third}\n"
    left = [json.loads((tmp_path / str(rank) / "error.json").read_text())["message"]["message"] for rank in range(3)]
    assert left == [first, "the same error as another process", third]


def test_an_error_that_one_process_knows_more_of_is_told_once(tmp_path, capsys, monkeypatch):
    """The process in which a reward function failed has a note with its line; the others have the message alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        kind, error, trace = caught(options("--min_kept", "2"))
        if rank == 0:
            error.add_note("It was raised in mine.py, line 3.")
        report(kind, error, trace)
    said = capsys.readouterr().err
    assert said == "[rank 0] min_kept=2.0 must be from 0 to 1. It was raised in mine.py, line 3.\n"


def test_without_a_launcher_every_process_tells_its_error(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        report(*caught(foreign))
    assert capsys.readouterr().err.count("Traceback") == 2


@pytest.mark.parametrize("world", ["1", "2", "two"])  # of a shell, which the launcher of one process passes on
def test_the_launcher_of_one_process_is_said_to_add_its_traceback(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(errors, "launch_command", lambda: Namespace(quiet=False))
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", world)
    report(*caught(check_rendezvous if world == "two" else options("--min_kept", "2")))
    first, second = capsys.readouterr().err.splitlines()
    assert "WORLD_SIZE='two'" in first if world == "two" else "min_kept=2.0 must be from 0 to 1." in first
    assert second.startswith("(accelerate adds its own traceback.")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    report(*caught(options("--min_kept", "2")))
    assert "accelerate adds" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------ real commands, which end early
def told(done: subprocess.CompletedProcess) -> str:
    """Return what was printed to stderr, without what libraries print as they are imported."""
    lines = done.stderr.splitlines()
    start = next((n for n, line in enumerate(lines) if "min_kept" in line or "Traceback" in line), 0)
    return "\n".join(lines[start:])


@pytest.mark.slow
def test_a_bad_field_is_one_line_under_accelerate(tmp_path):
    """Started in another folder, with a recipe of the repository."""
    config = ROOT / "accelerate_configs/cpu.yaml"
    done = run(tmp_path, *LAUNCH, config, "--quiet", *PPO, "--min_kept", "2")
    assert done.returncode == 1
    assert told(done) == "min_kept=2.0 must be from 0 to 1."


@pytest.mark.slow
def test_accelerate_adds_its_traceback_where_it_is_not_told_not_to(tmp_path):
    done = run(tmp_path, *LAUNCH, ROOT / "accelerate_configs/cpu.yaml", *PPO, "--min_kept", "2")
    assert done.returncode == 1
    first, second, *rest = told(done).splitlines()
    assert first == "min_kept=2.0 must be from 0 to 1."
    assert "`accelerate launch --quiet` leaves it out" in second
    assert rest[0].startswith("Traceback") and rest[-1].startswith("subprocess.CalledProcessError")


@pytest.mark.slow
def test_two_processes_tell_a_bad_field_once_and_the_launcher_ends_with_it(tmp_path):
    config = ROOT / "accelerate_configs/cpu_ddp.yaml"
    done = run(tmp_path, *LAUNCH, config, "--num_processes", "2", *PPO, "--min_kept", "2")
    assert done.returncode == 1
    message = "min_kept=2.0 must be from 0 to 1."
    said = [line for line in done.stderr.splitlines() if message in line]
    assert re.fullmatch(rf"\[rank [01]\] {re.escape(message)}", said[0])
    assert [line.split(":", 1)[0].strip() for line in said[1:]] == ["traceback"], (
        done.stderr
    )  # of the launcher's table
    assert done.stderr.index("ChildFailedError") < done.stderr.rindex(message)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data.py", "reward_models/__init__.py"])
def test_a_module_of_the_users_that_hides_one_of_ours_is_named(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("print('imported')\n")
    done = run(tmp_path, *PPO)
    assert done.returncode == 1 and "imported\n" not in done.stdout
    package = name.removesuffix(".py").split("/")[0]
    (line,) = done.stderr.splitlines()
    assert f"{path} is imported instead of this project's package {package!r}" in line
    assert "Rename it, or start from another folder" in line


@pytest.mark.slow
@pytest.mark.parametrize("command", [PPO, ["-m", "data.inspect", "a.jsonl"]], ids=["pipeline", "data"])
@pytest.mark.parametrize("name", ["random.py", "queue.py", "calendar/__init__.py"])
def test_a_file_of_the_users_that_hides_a_module_of_pythons_is_named(name, command, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x = 1\n")
    done = run(tmp_path, *command)
    module = name.removesuffix(".py").split("/")[0]
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"{path} is imported instead of Python's own module {module!r}, and so the command cannot start."
    )
    assert run(tmp_path, "-P", "-c", "import random; random.Random(0)").returncode == 0  # as PYTHONSAFEPATH does


@pytest.mark.parametrize("command", ["ppo", "plan"])
def test_python_without_docstrings_is_one_error(command, tmp_path):
    """Transformers cannot be imported so, and would end in a traceback."""
    done = run(tmp_path, "-OO", "-m", f"pipeline.{command}")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.endswith("Unset PYTHONOPTIMIZE, or leave out -OO.)")


EDITABLE = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("pipeline", sys.argv[1], submodule_search_locations=[sys.argv[1].removesuffix("__init__.py")])
sys.modules["pipeline"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["pipeline"])
import data.rows
print(data.rows.__file__)
"""


def test_a_folder_of_data_files_hides_nothing(tmp_path):
    """An editable installation finds packages after all other ways to find them, folders without Python too."""
    for name in ("data", "reward_models"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("")
    where = str(ROOT / "pipeline" / "__init__.py")
    done = subprocess.run([sys.executable, "-c", EDITABLE, where], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / "data" / "rows.py"), done.stderr


def test_the_embedded_backbone_is_found_from_any_folder(tmp_path, monkeypatch):
    from pipeline.backbone.gguf import model_source

    monkeypatch.chdir(tmp_path)
    assert model_source("data/backbone") == model_source("data/backbone/") == str(ROOT / "data" / "backbone")
    assert model_source("./data/backbone") == "./data/backbone"
    (tmp_path / "data" / "backbone").mkdir(parents=True)
    assert model_source("data/backbone") == "data/backbone"  # the user's own


def test_a_recipe_of_ours_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--config", "pipeline/recipes/demo/sft.yaml", "--dataset_name", "other"]
    from trl import ModelConfig, SFTConfig

    from pipeline.backbone.lora import LoraArguments

    data, _, model, _ = parse(DataArguments, LoraArguments, ModelConfig, SFTConfig, args=words)
    assert model.model_name_or_path == "data/backbone" and data.dataset_name == "other"


# ------------------------------------------------------------------------------------ garbage
START = """
import gc, sys
own = gc.get_threshold()
sys.argv = ["-m"]  # as Python has it while it looks for `pipeline.<command>`
import pipeline
assert gc.get_threshold()[0] > 100 * own[0]
from pipeline.runs.errors import report_errors
report_errors()
assert gc.get_threshold() == own and gc.get_freeze_count() > 0
"""


@pytest.mark.slow
def test_garbage_is_looked_for_once_a_command_has_its_imports(tmp_path):
    done = run(tmp_path, "-c", START)
    assert done.returncode == 0, done.stderr


def test_a_program_that_imports_the_pipeline_keeps_its_own_thresholds():
    own, frozen, hook = gc.get_threshold(), gc.get_freeze_count(), sys.excepthook
    try:
        errors.report_errors()
    finally:
        sys.excepthook = hook
    assert gc.get_threshold() == own and gc.get_freeze_count() == frozen
