"""The wheel: built, installed into a virtual environment of its own, and used from a folder that has nothing of this project.

The environment finds the packages that this one has, so that nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow


ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "pipeline", "reward_models")
SOURCE = (*PACKAGES, "accelerate_configs", "spine_rlhf.py", "pyproject.toml", "README.md", "LICENSE")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*words: str | Path, folder: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a command in a folder, without this repository in Python's path."""
    env = {**{key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}, **env}
    env["OMP_NUM_THREADS"] = "1"
    return subprocess.run([*map(str, words)], cwd=folder, env=env, capture_output=True, text=True)


def succeeded(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy of the source: a build leaves folders in it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check", "--wheel-dir", out)
    succeeded(run(sys.executable, "-m", "pip", "wheel", *options, source, folder=out))
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Install the wheel; return the Python of its environment."""
    folder = tmp_path_factory.mktemp("installed")
    succeeded(run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder))
    python = folder / "bin" / "python"
    options = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    succeeded(run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, folder=folder))
    (packages,) = folder.glob("lib/python3.*/site-packages")
    (packages / "present.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture
def spine(python, tmp_path):
    """Run `spine` in a folder of the user's."""
    return lambda *words, **env: run(python.with_name("spine"), *words, folder=tmp_path, **env)


def files_of(package: str) -> set[str]:
    found = set()
    for folder, folders, names in os.walk(ROOT / package, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {(Path(folder) / name).relative_to(ROOT).as_posix() for name in names}
    return found


def test_the_wheel_holds_the_packages_whole_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        stated = archive.read(metadata).decode()
    expected = set().union(*map(files_of, PACKAGES), {"spine_rlhf.py"})
    assert {"pipeline/accelerate_configs/zero2.json", "pipeline/recipes/hello_world/prompts.jsonl"} <= expected
    assert {name for name in names if not name.startswith(metadata.split("/")[0])} == expected
    assert f"\nVersion: {PROJECT['version']}\n" in stated and "\nLicense-Expression: Apache-2.0\n" in stated


def test_recipes_and_versions(spine):
    said = succeeded(spine("recipes")).stdout
    assert {"sft", "demo/sft"} <= set(said.split()) and "2 CPU cores, about 1 minute" in said
    recipe = ROOT / "pipeline" / "recipes" / "demo" / "sft.yaml"
    assert succeeded(spine("recipes", "demo/sft")).stdout == recipe.read_text(encoding="utf-8")
    assert succeeded(spine("--version")).stdout.split(", ")[1] == f"spine-rlhf {PROJECT['version']}"


def test_a_stage_by_its_name(spine, tmp_path):
    """The recipe, its prompts, the backbone and the accelerate config are those of the wheel."""
    shape = ("--per_device_train_batch_size", "4", "--max_steps", "1", "--max_completion_length", "4")
    done = succeeded(spine("ppo", "--config", "hello_world/ppo", "--accelerate_config", "cpu", *shape))
    assert "Runs as 1 process on cpu: no wrapper." in done.stdout
    assert (tmp_path / "runs" / "hello_world" / "ppo" / "adapter_model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_stage_by_accelerate(python, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "A fine film."}\n' * 4)
    (tmp_path / "data").mkdir()  # hides no package of ours
    options = ("--dataset_name", "texts.jsonl", "--eval_dataset_name", "", "--max_steps", "1")
    stage = ("-m", "pipeline.sft", "--config", "pipeline/recipes/demo/sft.yaml", *options)
    config = next(python.parents[1].glob("lib/*/site-packages/pipeline/accelerate_configs/cpu.yaml"))
    launch = (python, "-m", "accelerate.commands.launch", "--config_file", config)
    succeeded(run(*launch, *stage, folder=tmp_path))
    assert (tmp_path / "runs" / "demo" / "sft" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["pipeline.py", "pipeline/__init__.py", "data.py", "reward_models/__init__.py"])
@pytest.mark.parametrize("where", ["the current folder", "PYTHONPATH"])
def test_a_module_of_the_users_that_hides_one_of_ours_is_named(name, where, spine, tmp_path):
    folder = tmp_path if where == "the current folder" else tmp_path / "code"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("raise AssertionError('imported')\n")
    done = spine("ppo", **({} if where == "the current folder" else {"PYTHONPATH": str(folder)}))
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    package = name.removesuffix(".py").split("/")[0]
    assert line.startswith(f"{path} is imported instead of this project's package {package!r}")


def test_without_docstrings_is_one_error(spine):
    done = spine("recipes", PYTHONOPTIMIZE="2")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Unset PYTHONOPTIMIZE" in done.stderr
