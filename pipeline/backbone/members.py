"""Find the members of an ensemble of reward adapters, and write the manifest by which its folder is known.

`pipeline.reward` with `num_members` leaves each member as a standard peft folder (`member_0`, `member_1`, ...), and beside
them `ensemble.json`, which names them with the SHA-256 of their weights. It is written last. So a folder whose members are
not those of its manifest is one that a run has begun to write anew.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.json_files import read_json, write_json
from data.listing import known_digest
from data.saving import check_saved
from data.schemas import ENSEMBLE
from pipeline.backbone.adapter_tensors import WEIGHTS
from pipeline.backbone.adapters import adapter_folder
from reward_models.functions import ENSEMBLE as COMBINED
from reward_models.functions import RewardArguments


MANIFEST = "ensemble.json"
MEMBER = "member_"  # and a number: the folders of the members


@dataclass(frozen=True)
class Reward:
    """A learned reward of a recipe: its name in the log, its adapters, and how the scores of several become one."""

    name: str
    adapters: list[str]
    combination: str | None


def digest_of(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights."""
    path = folder / WEIGHTS
    at = path.stat()
    return known_digest(path, at.st_size, at.st_mtime_ns, at.st_ino)


def write_members(folder: Path, seeds: dict[str, int], members_in: Path) -> None:
    """Write the manifest of an ensemble to `folder`.

    Args:
        seeds: seed of each member, by the name of its folder.
        members_in: where the members' folders are.
    """
    members = [{"folder": name, "seed": seed, "sha256": digest_of(members_in / name)} for name, seed in seeds.items()]
    write_json(folder / MANIFEST, {"members": members})


def members_of(name: str) -> list[str]:
    """Return the folders of an ensemble's members, or `name` alone if it is not an ensemble's.

    Raises the errors of `adapter_folder` and `check_saved`, and:
        ValueError: the manifest is damaged, or a member is not the one that it names.
        FileNotFoundError: a member is missing.
    """
    folder = adapter_folder(name)
    if not (folder / MANIFEST).is_file():
        return [name]
    check_saved(folder, "ensemble")
    found = []
    for entry in _entries(folder):
        member = folder / entry["folder"]
        if not (member / WEIGHTS).is_file():
            raise FileNotFoundError(
                f"{member / WEIGHTS}: no such file, and {folder / MANIFEST} names this member. Copy the whole folder again, "
                f"or train the ensemble anew."
            )
        if digest_of(member) != entry["sha256"]:
            raise ValueError(
                f"{member}: not the member that {folder / MANIFEST} names. A run with num_members has begun to train the "
                f"ensemble anew. Let it come to its end (--resume_from_checkpoint auto), or name the members' folders."
            )
        found.append(str(member))
    return found


def planned_members(name: str) -> int:
    """Count the adapters that a reward of a plan stands for: one, unless its folder is already there and an ensemble's."""
    folder = Path(name).expanduser()
    return len(_entries(folder)) if (folder / MANIFEST).is_file() else 1


def _entries(folder: Path) -> list[dict[str, Any]]:
    remedy = "Restore the file, or train the ensemble anew with pipeline.reward."
    return read_json(folder / MANIFEST, ENSEMBLE, remedy=remedy)["members"]


def learned_of(rewards: RewardArguments) -> list[Reward]:
    """Return the learned rewards that a recipe names: one for each entry, or with `reward_combination` one of them all.

    Raises the errors of `members_of`, and:
        ValueError: there is one adapter alone to combine.
    """
    adapters = {name: members_of(name) for name in rewards.reward_adapter}
    if not rewards.reward_combination:
        return [
            Reward(Path(name).absolute().name, found, "mean" if len(found) > 1 else None)
            for name, found in ((name, adapters[name]) for name in rewards.reward_adapter)
        ]
    members = [member for name in rewards.reward_adapter for member in adapters[name]]
    if len(members) < 2:
        raise ValueError(
            f"reward_combination={rewards.reward_combination!r} combines two or more adapters, and reward_adapter names "
            f"{members[0]} alone. Name the others, or an ensemble's folder (num_members of pipeline.reward), or leave "
            f"reward_combination unset."
        )
    return [Reward(COMBINED, members, rewards.reward_combination)]


def check_rewards(rewards: RewardArguments, weights: list[float] | None) -> None:
    """Check that a recipe's adapters can be combined as it says, and that each reward has one weight.

    Raises the errors of `learned_of` and `RewardArguments.check_weights`.
    """
    learned_of(rewards)
    rewards.check_weights(weights)
