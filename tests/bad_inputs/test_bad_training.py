"""Training that diverges: it ends in an error, what an earlier run left is kept, and the message has a remedy."""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from trl import ModelConfig

from data.preferences import check_preferences
from pipeline.backbone.adapters import HEAD, WEIGHTS
from pipeline.backbone.loading import load_pretrained
from pipeline.runs.divergence import learns_from
from pipeline.runs.live_files import LOCK, LOG


pytestmark = pytest.mark.slow


STAGES = ("sft", "reward", "dpo", "ppo", "rloo", "grpo")
ONLINE = {"per_device_train_batch_size": 4, "reward_adapter": "", "reward_funcs": "reward_models.rules.sentiment"}
SMALL = {
    "sft": {"per_device_train_batch_size": 4},
    "reward": {"per_device_train_batch_size": 4},
    "dpo": {"per_device_train_batch_size": 4},
    "ppo": {**ONLINE, "steps_per_generation": 1, "num_iterations": 2},
    "rloo": {**ONLINE, "num_generations": 2},
    "grpo": {**ONLINE, "num_generations": 2},
}


def left(folder: Path) -> dict:
    """Bytes of what a run leaves beside its checkpoints, without the lock that this process holds until it ends and the log,
    which says how it has ended."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (LOCK, LOG))
    files = (path for path in files if "checkpoint-" not in str(path))
    return {path: path.read_bytes() for path in files}


def finite(folder: Path) -> bool:
    return all(x.isfinite().all() for file in folder.rglob(WEIGHTS) for x in load_file(file).values())


@pytest.fixture
def diverges(world):
    """Run a stage over the adapter of an earlier run, and assert that it ends with an error and keeps that adapter."""

    def run(stage: str, message: str, **options) -> Path:
        out = world.folder / "out"
        shutil.copytree(world.reward if stage == "reward" else world.sft, out)
        (out / "metrics.json").write_text('{"accuracy": 0.75}')
        before = left(out)
        with pytest.raises(FloatingPointError) as caught:
            world.run(stage, **{**SMALL[stage], "max_steps": 4, **options})
        said = str(caught.value)
        assert re.search(message, said), said
        assert "Start a new run with a lower learning_rate" in said
        assert left(out) == before
        assert all(finite(folder) for folder in out.glob("checkpoint-*"))
        return out

    return run


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rate", [1e18, 1e30])
def test_a_learning_rate_that_is_far_too_high(stage, rate, diverges):
    diverges(stage, r"not finite|is (nan|inf)", learning_rate=rate, max_grad_norm=0)


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["transformer.wte.weight", "transformer.h.1.mlp.c_proj.bias"])
def test_a_base_model_whose_weights_are_not_finite(number, key, world):
    def spoil(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        found[key].view(-1)[-1] = number
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    folder = world.copy(world.tiny, spoil)
    for head in (False, True):
        with pytest.raises(
            ValueError, match=f"{re.escape(key.removeprefix('transformer.'))} holds values that are not"
        ):
            load_pretrained(ModelConfig(folder), head=head)


@pytest.mark.parametrize("margin", [1e308, 3.5e38, -1e39])
def test_a_margin_that_float32_does_not_hold(margin):
    rows = Dataset.from_list([{"chosen": "a", "rejected": "b", "margin": margin}])
    with pytest.raises(
        ValueError, match=r"^pairs row 1 .*'margin' must be at most 3\.4e\+38, the largest number of float32"
    ):
        check_preferences(rows, "pairs")


def test_a_text_that_lost_its_completion_is_no_divergence():
    """Its loss is the mean over no tokens, NaN, and its gradients are 0."""
    assert not learns_from({"labels": torch.full((2, 3), -100)})
    assert learns_from({"labels": torch.tensor([[-100, -100, 5]])})
    assert learns_from({"input_ids": torch.tensor([[1]])}) and learns_from([{"prompt": "A"}])


def times(size: float, head: bool):
    """Multiply the LoRA tensors of an adapter, or its head."""

    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        found = {key: tensor * size if (key == HEAD) == head else tensor for key, tensor in found.items()}
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo", "dpo", "reward", "evaluation", "best_of_n"])
def test_a_policy_that_has_diverged_with_finite_weights(stage, refuses):
    """Its logits are not finite. The reward stage would find out after its training."""
    key = "policy_adapter" if stage == "evaluation" else "sft_adapter"
    spoiled = {key: lambda world: world.copy(world.sft, times(1e18, head=False))}
    refuses(stage, rf"{WEIGHTS}: .* has weights above 1e8: its training diverged\. Train", loads=True, **spoiled)


@pytest.mark.parametrize("head", [False, True])
def test_a_reward_that_has_diverged_with_finite_weights(head, refuses):
    spoiled = {"reward_adapter": lambda world: world.copy(world.reward, times(1e18, head))}
    refuses("evaluation", rf"{WEIGHTS}: .* has weights above 1e8", loads=True, **spoiled)


@pytest.mark.parametrize("head", [False, True])
def test_a_base_model_whose_weights_are_too_large(head, world):
    def spoil(folder: Path) -> None:
        found = {key: tensor * 1e30 for key, tensor in load_file(folder / "model.safetensors").items()}
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match="that are not finite, so its weights are too large or damaged"):
        load_pretrained(ModelConfig(world.copy(world.tiny, spoil)), head=head)


def test_training_that_ends_with_weights_too_large(diverges):
    """Finite ones, whose outputs on the token that is looked at are finite: the next stage would refuse the adapter."""
    diverges(
        "sft", r"A trained weight is not finite, or above 1e8, after step 4", learning_rate=1e8, max_grad_norm=1e-3
    )
