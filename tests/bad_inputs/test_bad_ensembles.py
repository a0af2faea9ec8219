"""Ensembles that cannot be trained or used: one clear error before the long work."""

import shutil

import pytest


pytestmark = pytest.mark.slow
REWARD = {
    "an upload": ({"push_to_hub": True}, r"push_to_hub=True is not supported with num_members=3: a repository"),
    "one checkpoint": (
        {"resume_from_checkpoint": "out/member_0/checkpoint-1"},
        r"resume_from_checkpoint='out/member_0/checkpoint-1' names one checkpoint, and each of num_members=3.*Set auto",
    ),
    "a seed too high": ({"seed": 2**32 - 1}, r"seed=4294967295: the last of num_members=3 would have seed 4294967297"),
    "beside an adapter": (
        {},
        r"^output_dir=\S+ holds one adapter, and an ensemble \(num_members=\d\) must not be beside it\. Name another",
    ),
    "none": ({"num_members": 0}, r"num_members=0 must be 1 or more"),
}


@pytest.mark.parametrize(("options", "message"), REWARD.values(), ids=REWARD)
def test_members_that_cannot_be_trained(options, message, refuses):
    refuses("reward", message, **{"num_members": 3, **options})


def test_a_folder_of_somebody_else_is_seen_before_the_first_member_trains(refuses, world):
    out = world.folder / "out"
    (out / "member_2").mkdir(parents=True)
    world.write("out/member_2/metrics.json", "{}")
    refuses("reward", r"^output_dir=\S+member_2' holds metrics\.json, which no run of Spine", num_members=3)


def test_an_adapter_beside_an_ensemble(refuses, world):
    out = shutil.copytree(world.reward, world.folder / "out")
    (out / "adapter_config.json").unlink()
    world.write("out/ensemble.json", '{"members": []}')
    refuses("reward", r"^output_dir=\S+ holds an ensemble of reward adapters, and one adapter must not be beside it")


@pytest.mark.parametrize("stage", ["ppo", "evaluation", "best_of_n", "grpo"])
def test_one_adapter_is_not_combined(stage, refuses):
    refuses(stage, r"reward_combination='mean' combines two or more adapters", reward_combination="mean")
