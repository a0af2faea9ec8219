"""`spine`: each command by its name, and what it becomes."""

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
from accelerate.commands.launch import launch_command_parser

from data.files import load_rows
from pipeline import cli
from pipeline.runs.launcher import CONFIGS, OPTIONS, config_names, find_accelerate_config
from pipeline.runs.recipe_file import find_recipe, recipe_names


ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]


@pytest.fixture
def becomes(monkeypatch, tmp_path):
    """Return what `spine` with some words becomes, in a folder of the user's."""
    monkeypatch.chdir(tmp_path)
    found = []
    monkeypatch.setattr(os, "execv", lambda path, words: found.append(words))

    def becomes(line: str) -> list[str]:
        found.clear()
        cli.main(shlex.split(line))
        return found[0]

    return becomes


def config(name: str) -> str:
    return str(CONFIGS / f"{name}.yaml")


# ------------------------------------------------------------------------------------------ what a command becomes
@pytest.mark.parametrize(
    ("line", "launcher", "own"),
    [
        ("ppo --config demo/ppo", [], ["--config", "demo/ppo"]),
        (
            "ppo --seed 1 --accelerate_config ddp --beta 0",
            ["--config_file", config("ddp")],
            ["--seed", "1", "--beta", "0"],
        ),
        ("sft --accelerate-config=accelerate_configs/cpu.yaml", ["--config_file", config("cpu")], []),
        (
            "reward --accelerate_config cpu_ddp --num-processes 4 --main_process_port=0 --config a=b",
            ["--config_file", config("cpu_ddp"), "--num_processes", "4", "--main_process_port", "0"],
            ["--config", "a=b"],
        ),
    ],
)
def test_a_stage_becomes_accelerates_launcher(line, launcher, own, becomes, capfd):
    stage = line.split()[0]
    assert becomes(line) == [*LAUNCH, *launcher, "-m", f"pipeline.{stage}", *own]
    printed = capfd.readouterr()
    assert printed.out == "" and shlex.split(printed.err) == [
        *("accelerate", "launch", "--quiet"),
        *launcher,
        "-m",
        f"pipeline.{stage}",
        *own,
    ]


def test_a_tool_is_started_without_a_launcher(becomes):
    assert becomes("plan --config gpt2/ppo --processes 8") == [
        *(sys.executable, "-m", "pipeline.plan", "--config", "gpt2/ppo", "--processes", "8")
    ]
    assert becomes("inspect a.jsonl") == [sys.executable, "-m", "data.inspect", "a.jsonl"]


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeeds_config_is_found_from_any_folder(name, becomes, tmp_path):
    words = becomes(f"ppo --accelerate_config {name}")
    assert words[4:8] == ["--config_file", config(name), "--deepspeed_config_file", str(CONFIGS / f"{name}.json")]
    found = launch_command_parser().parse_args(words[3:])
    assert "deepspeed_config_file" in found.nondefault  # accelerate takes it instead of the config's
    (tmp_path / "accelerate_configs").mkdir()
    (tmp_path / "accelerate_configs" / f"{name}.json").write_text("{}")  # the user's own
    assert "--deepspeed_config_file" not in becomes(f"ppo --accelerate_config {name}")


def test_a_config_of_the_users_own_comes_first(becomes, tmp_path):
    (tmp_path / "ddp").write_text("num_processes: 1\n")
    assert becomes("ppo --accelerate_config ddp")[4:6] == ["--config_file", "ddp"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("poo", "spine: no command 'poo'. Did you mean ppo?"),
        (
            "ppo --accelerate_config dpd",
            "--accelerate_config dpd: no such file, and none of cpu, .* Did you mean ddp?",
        ),
        ("ppo --num_processes", "command line: --num_processes needs a value after it"),
        ("ppo --accelerate_config --seed 1", "command line: --accelerate_config needs a value after it"),
        ("ppo --config_file a.yaml --accelerate_config ddp", "both name a config. Give one"),
        ("ppo --accelerate_config broken.yaml", "broken.yaml: not a YAML file"),
        ("recipes demo/poo", "spine recipes: demo/poo is neither .* Did you mean demo/ppo?"),
        ("recipes demo/ppo demo/sft", "name one recipe or folder"),
    ],
)
def test_a_wrong_command_line(line, message, becomes, tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises((ValueError, OSError), match=message.replace("?", r"\?")) as caught:
        becomes(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pipeline", "data", "reward_models"])
def test_a_stage_is_not_started_where_a_module_hides_ours(name, becomes, tmp_path):
    (tmp_path / f"{name}.py").write_text("raise AssertionError\n")
    with pytest.raises(ValueError, match=f"{name}.py is imported instead of this project's package '{name}'"):
        becomes("ppo")


def test_a_folder_of_data_files_hides_nothing(becomes, tmp_path):
    for name in ("data", "reward_models"):
        (tmp_path / name).mkdir()
    assert becomes("ppo") == [*LAUNCH, "-m", "pipeline.ppo"]


# ------------------------------------------------------------------------------------------ what there is
def test_every_command_has_a_name_and_those_that_accelerate_launches_are_stages():
    launched, overview = set(), cli.overview()
    for name, module in cli.modules().items():
        docstring = ast.get_docstring(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())) or ""
        assert f"-m {module}" in docstring, name
        launched |= {name} if "accelerate launch" in docstring.split(f"-m {module}")[0] else set()
        assert f"  {name} " in overview
    assert launched == set(cli.STAGES)
    commands = {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__", "cli"}
    assert commands <= set(cli.modules()) and len(cli.modules()) == len(commands) + len(cli.OF_DATA)


def test_the_launchers_options_are_accelerates_and_no_stages():
    parser = {action.dest: action for action in launch_command_parser()._actions}
    for name in set(OPTIONS) - {"accelerate_config"}:
        assert parser[name].nargs is None, f"accelerate launch --{name} no longer takes one value"
    for stage in cli.STAGES:
        hints = get_type_hints(import_module(f"pipeline.{stage}").main)
        options = {field.name for key, kind in hints.items() if key != "return" for field in fields(kind)}
        assert len(options) > 10 and not options & set(OPTIONS)


def test_configs_are_those_at_the_top_of_the_repository():
    assert config_names() == sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))
    assert os.path.samefile(find_accelerate_config("fsdp2"), ROOT / "accelerate_configs" / "fsdp2.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_has_a_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "pipeline" / "recipes" / f"{name}.yaml"
    assert {find_recipe(given) for given in (name, f"{name}.yaml", f"pipeline/recipes/{name}.yaml")} == {str(path)}
    (row,) = (row for row in cli.recipes([]).splitlines() if re.search(rf"  {re.escape(name)}( |$)", row))
    text = path.read_text()
    command, launched = row.split()[0], row.split()[2]
    launcher = f"accelerate launch --config_file accelerate_configs/{launched}.yaml" if launched != "-" else "python"
    assert f"# {launcher} -m pipeline.{command} --config pipeline/recipes/{name}.yaml\n" in text
    own = tmp_path / f"{name}.yaml"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("seed: 1\n")
    assert find_recipe(f"{name}.yaml") == f"{name}.yaml"  # the user's own


def test_recipes_of_a_folder():
    rows = cli.recipes(["gpt2"]).splitlines()
    assert [row.split()[1] for row in rows[1:5]] == ["gpt2/evaluation", "gpt2/ppo", "gpt2/reward", "gpt2/sft"]
    assert cli.recipes(["gpt2/ppo.yaml"]) == (ROOT / "pipeline/recipes/gpt2/ppo.yaml").read_text().rstrip("\n")


def test_a_data_file_beside_a_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
    name = "pipeline/recipes/hello_world/held_out.jsonl"
    rows = list(load_rows(str(ROOT / name), "train"))
    monkeypatch.chdir(tmp_path)
    assert list(load_rows(name, "train")) == rows and len(rows) == 99
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text('{"prompt": "Mine"}\n')
    assert list(load_rows(name, "train")) == [{"prompt": "Mine"}]


# ------------------------------------------------------------------------------------------ demo
@pytest.mark.parametrize("name", ["demo", "smollm2"])
def test_a_demo_is_what_make_does(name):
    make = subprocess.run(["make", "--dry-run", name, "SEED=3", "OUT=out"], cwd=ROOT, capture_output=True, text=True)
    told = re.findall(r"-m pipeline\.(\w+) (.*)$", make.stdout.replace("\\\n", " "), re.MULTILINE)
    stages = [(stage, shlex.split(words)) for stage, words in told]
    assert [stage for stage, _ in stages] == ["sft", "reward", "ppo", "evaluation"]

    def pairs(words: list[str]) -> dict[str, str]:
        return dict(zip(words[::2], words[1::2], strict=True))

    ours = cli.demo_stages(name, "3", "out")
    assert [(stage, pairs(words)) for stage, words in ours] == [(stage, pairs(words)) for stage, words in stages]
    exported = re.findall(r"^export (\w+) = (\w+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert cli.ON_CPUS == dict(exported)


class Stage:
    """Stand in for a process that a demo starts."""

    def __init__(self, code: int):
        self.code, self.signals = code, []

    def wait(self) -> int:
        os.kill(os.getpid(), signal.SIGTERM)  # reaches the stage, and does not end the demo before it
        return self.code

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


@pytest.mark.parametrize(("codes", "ended"), [([0, 0, 0, 0], None), ([0, 3], 3), ([-15], 143)])
def test_a_demo_ends_with_a_stage_that_fails(codes, ended, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    started = []

    def start(command, env):
        assert command[:6] == [*LAUNCH, "--config_file", config("cpu")] and cli.ON_CPUS.items() <= env.items()
        started.append(Stage(codes[len(started)]))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        if ended is None:
            cli.main(["demo", "--seed", "2"])
        else:
            with pytest.raises(SystemExit, match=str(ended)):
                cli.main(["demo", "--output_dir", "out"])
            assert f"exit code {codes[-1]}. Its message stands above" in capfd.readouterr().err
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    assert [stage.signals for stage in started] == [[signal.SIGTERM]] * len(codes)
