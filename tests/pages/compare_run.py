"""The folder of a run on the tiny model, for the tests of `pipeline.compare`: SFT, reward, PPO with a value."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.pages.compare_models import Comparison, load
from pipeline.pages.compare_runs import bare, find_runs


OPTIONS = {
    **{
        "beta": 0.2,
        "kl_estimator": "k1",
        "gamma": 1.0,
        "lam": 0.9,
        "missing_eos_penalty": 0.5,
        "reward_weights": None,
    },
    **{"reward_clip_range": [-3.0, 3.0], "whiten_rewards": False, "temperature": 0.8, "max_completion_length": 6},
    "normalize_scores": True,
}


def other(source: str, folder: Path, seed: int) -> Path:
    """Copy an adapter and draw its weights anew."""
    shutil.copytree(source, folder)
    torch.manual_seed(seed)
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: torch.randn_like(x) * x.std() for name, x in weights.items()}, path, metadata={"format": "pt"})
    return folder


def make_run(folder: Path, sft: str, reward: str) -> Path:
    """Make `sft`, `reward`, `ppo` with `value` and options, and `ppo/checkpoint-4` of an earlier release without options."""
    shutil.copytree(sft, folder / "sft")
    shutil.copytree(reward, folder / "reward")
    other(sft, folder / "ppo", 7)
    other(reward, folder / "ppo" / "value", 8)
    other(sft, folder / "ppo" / "checkpoint-4", 9)
    metrics = {"options": OPTIONS, "history": [{"step": 1, "beta": 0.2}, {"step": 2, "beta": 0.3}, {"step": 2}]}
    (folder / "ppo" / "metrics.json").write_text(json.dumps(metrics))
    return folder


def comparison_of(*folders: Path, model) -> Comparison:
    """Load runs as `pipeline.compare` does."""
    runs = find_runs([str(folder) for folder in folders])
    policies = [policy for run in runs for policy in run.policies]
    return load(runs, [*policies, bare(runs)], model, None, [])
