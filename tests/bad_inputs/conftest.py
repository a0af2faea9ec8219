"""Stages in this process, given what users get wrong: one clear error, before the long work, and nothing is lost."""

import json
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import datasets
import pytest

from pipeline.backbone import loading
from pipeline.runs.command_line import parse
from pipeline.runs.live_files import LOCK, LOG


PAIRS = [{"prompt": "A", "chosen": " fine film.", "rejected": " poor film."}] * 8
DATA = {
    "texts.jsonl": [{"text": "A fine film."}] * 8,
    "pairs.jsonl": PAIRS,
    "prompts.jsonl": [{"prompt": text} for text in ("The film", "A", "It's a", "Not")],
}
READS = {"sft": "texts.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl"}  # the others read prompts
TRAINS = ("sft", "reward", "ppo", "rloo", "grpo", "dpo")
RECIPE = "report_to: none\nuse_cpu: true\nbf16: false\nsave_strategy: 'no'\nmax_steps: 2\nmax_length: 128\n"


def write(path: Path, content: list | str | bytes) -> str:
    """A file of JSON lines, of text or of bytes."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def state(*folders: Path, trained: bool = False) -> dict:
    """Bytes and modification time of every file, without the lock that this process holds until it ends; and without the
    log, which says how a run has ended that had begun to train, if it `trained`."""
    live = (LOCK, LOG) if trained else (LOCK,)
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name not in live)
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


class World:
    """A folder with a recipe's worth of good inputs, each of which a case may spoil."""

    def __init__(self, folder: Path, tiny: str, sft: str, reward: str):
        self.folder = folder
        self.tiny, self.sft, self.reward = tiny, sft, reward
        for name, rows in DATA.items():
            write(folder / name, rows)

    def write(self, name: str, content: list | str | bytes) -> str:
        return write(self.folder / name, content)

    def copy(self, source: str, spoil=None) -> str:
        """A copy of a folder, spoiled by a function of its path."""
        folder = Path(shutil.copytree(source, self.folder / f"copy-of-{Path(source).name}"))
        if spoil:
            spoil(folder)
        return str(folder)

    def options(self, stage: str) -> dict:
        options = {"model_name_or_path": self.tiny, "output_dir": str(self.folder / "out")}
        options["dataset_name"] = str(self.folder / READS.get(stage, "prompts.jsonl"))
        if stage not in READS:
            options |= {"reward_adapter": self.reward, "max_completion_length": 4}
        if stage == "evaluation":
            options["policy_adapter"] = self.sft
        if stage != "sft":
            options["sft_adapter"] = self.sft
        return options

    def run(self, stage: str, recipe: str = "", **options) -> None:
        """A stage by a recipe of good values, to which `recipe` adds, and options of the command line."""
        main = import_module(f"pipeline.{stage}").main
        kinds = [kind for name, kind in get_type_hints(main).items() if name != "return"]
        lines = RECIPE if stage in TRAINS else ""
        if stage not in ("sft", "reward", "dpo"):
            lines = lines.replace("max_length: 128\n", "")
        lines = "".join(line + "\n" for line in lines.splitlines() if f"\n{line.split(':')[0]}:" not in f"\n{recipe}")
        path = write(self.folder / "recipe.yaml", f"seed: 0\n{lines}{recipe}")
        given = {**self.options(stage), **options}
        # A key that the recipe spoils is not set right by the command line.
        given = {key: value for key, value in given.items() if not re.search(rf"^{key}:", recipe, re.MULTILINE)}
        flags = []
        for key, value in given.items():
            flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        main(*parse(*kinds, args=["--config", path, *flags]))


@pytest.fixture
def world(tmp_path, tiny, sft_adapter, reward_adapter, monkeypatch) -> World:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return World(tmp_path, tiny, sft_adapter, reward_adapter)


@pytest.fixture
def refuses(world, monkeypatch):
    """Asserts that a stage ends with an error of this message, and that before it nothing was trained, sampled or
    written, nor, unless it `loads`, the model loaded."""
    done = []

    def note(target, name, work, *, goes_on=False):
        original = getattr(target, name)

        def noted(*args, **kwargs):
            done.append(work)
            if goes_on:
                return original(*args, **kwargs)
            raise AssertionError(f"{work} began")

        monkeypatch.setattr(target, name, noted)

    def refuses(stage: str, message: str, *, loads: bool = False, trains: bool = False, **options) -> None:
        done.clear()
        for kind in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
            note(getattr(loading, kind), "from_pretrained", "loading the model", goes_on=True)
        note(import_module("accelerate.optimizer").AcceleratedOptimizer, "step", "a training step")
        if not trains:
            note(import_module("transformers").Trainer, "train", "training")
            for name in ("evaluation", "best_of_n"):
                note(import_module(f"pipeline.{name}"), "sample", "sampling")
        options = {key: value(world) if callable(value) else value for key, value in options.items()}
        out = world.folder / "out"
        if not out.exists():  # an earlier run of the same stage
            shutil.copytree(world.reward if stage == "reward" else world.sft, out)
            write(out / "metrics.json", '{"accuracy": 0.75}')
            write(out / "report.json", '{"sft": {}, "seconds": {}}')
        folders = (out, Path(world.sft), Path(world.reward), Path(world.tiny))
        before = state(*folders, trained=trains)
        with pytest.raises((ValueError, OSError, ImportError)) as caught:
            world.run(stage, **options)
        said = str(caught.value)
        assert re.search(message, said), f"{type(caught.value).__name__}: {said}"
        assert "\n" not in said
        assert state(*folders, trained=trains) == before
        assert not {"training", "sampling", "a training step"} & set(done)
        assert loads or not done

    return refuses
