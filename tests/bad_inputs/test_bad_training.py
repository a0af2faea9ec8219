"""Training that diverges: it ends in an error, what an earlier run left is kept, and the message has a remedy."""

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.folders import WEIGHTS


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
    """Bytes of what a run leaves beside its checkpoints."""
    files = (path for path in folder.rglob("*") if path.is_file() and "checkpoint-" not in str(path))
    return {path: path.read_bytes() for path in files}


def finite(folder: Path) -> bool:
    return all(x.isfinite().all() for file in folder.rglob(WEIGHTS) for x in load_file(file).values())


@pytest.fixture
def diverges(world, caplog):
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
        assert "Start anew with a lower learning_rate" in said
        assert left(out) == before
        assert all(finite(folder) for folder in out.glob("checkpoint-*"))
        return out

    return run


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rate", [1e18, 1e30])
def test_a_learning_rate_that_is_far_too_high(stage, rate, diverges):
    diverges(stage, r"not finite|is (nan|inf)", learning_rate=rate, max_grad_norm=0)
