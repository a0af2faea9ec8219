"""Find the checkpoint to resume from, and check that it is whole and fits the launch.

`manifest.json` lists a checkpoint's files with their SHA-256, and what the step's place among the batches depends on.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pipeline.backbone.sharding import kind_of


MANIFEST = "manifest.json"
STAGING = ".staging"
NAME = re.compile(PREFIX_CHECKPOINT_DIR + r"-\d+")
# A place among the batches means something only while these stay as they were.
ORDER = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "train_sampling_strategy",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
)


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint that `resume_from_checkpoint` asks for, checked, or None to start anew.

    `auto` is the newest in `output_dir`. A damaged one is an error, never passed over: which other one to go back to
    is the user's choice.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: it is damaged, or of a launch or a recipe that this one cannot go on from.
    """
    asked = args.resume_from_checkpoint
    if not asked:
        return None
    if asked == "auto":
        found = checkpoints_in(args.output_dir)
        if not found:
            PartialState().print(f"{args.output_dir} holds no checkpoint: training starts anew.")
            return None
        asked = str(found[-1])
    check_checkpoint(asked, args)
    PartialState().print(f"Training resumes from {asked}.")
    return asked


def check_checkpoint(folder: str | Path, args: TrainingArguments) -> None:
    """Read a checkpoint through, and see that it fits this launch; raises what `find_checkpoint` does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint={str(folder)!r}: no such folder. Name a {PREFIX_CHECKPOINT_DIR}-<step> folder, or "
            f"auto for the newest of output_dir."
        )
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(
            f"{folder / MANIFEST}: missing or damaged, so the checkpoint cannot be trusted. {other_checkpoint(folder)}"
        )
    names = {name_in(path, folder) for path in files_in(folder)} - {MANIFEST}
    for name, expected in manifest["files"].items():
        path = folder / name
        if name not in names:
            raise FileNotFoundError(
                f"{path}: the checkpoint's manifest lists it and it is missing. {other_checkpoint(folder)}"
            )
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes, written with {expected['bytes']}: it is cut off or was changed. "
                f"{other_checkpoint(folder)}"
            )
        if file_digest(path) != expected["sha256"]:
            raise ValueError(
                f"{path}: its SHA-256 is not the manifest's: the file is damaged. {other_checkpoint(folder)}"
            )
    unlisted = sorted(names - manifest["files"].keys())
    if unlisted:
        raise ValueError(f"{folder / unlisted[0]}: not a file of this checkpoint (its manifest has none). Remove it.")
    if "optimizer" not in manifest["holds"]:
        raise ValueError(
            f"{folder}: written with save_only_model, so it holds no state to resume from. {other_checkpoint(folder)}"
        )
    if manifest["world_size"] != args.world_size:
        raise ValueError(
            f"{folder}: written by {manifest['world_size']} processes, and this launch has {args.world_size}. Random "
            f"states, rollouts and the order of prompts belong to a process each: launch with --num_processes "
            f"{manifest['world_size']}."
        )
    kind = kind_of(args.distributed_state)
    if manifest.get("kind", kind) != kind:
        raise ValueError(
            f"{folder}: written under {manifest['kind']}, and this launch runs as {kind}. The optimizer's state lies "
            f"otherwise there: launch as then, or start anew."
        )
    for name, then in manifest["order"].items():
        now = getattr(args, name, None)
        if now != then:
            raise ValueError(
                f"{folder}: written with {name}={then!r}, and {name}={now!r} would put its step elsewhere among the "
                f"batches. Set {name} as it was, or start anew."
            )


def other_checkpoint(folder: Path) -> str:
    """The remedy for a checkpoint of no use: the newest of the others."""
    others = [path for path in checkpoints_in(folder.parent) if path.name != folder.name and read_manifest(path)]
    return f"Go on from another: --resume_from_checkpoint {others[-1]}" if others else "There is no other: start anew."


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders in the order they were written; those that do not say when come last, so that they are
    noticed."""
    folders = [path for path in Path(output_dir).glob("*") if NAME.fullmatch(path.name) and path.is_dir()]
    written = {path: (read_manifest(path) or {}).get("written", float("inf")) for path in folders}
    return sorted(folders, key=lambda path: (written[path], len(path.name), path.name))


def read_manifest(folder: Path) -> dict | None:
    """A checkpoint's manifest, None if there is none or it is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest["sha256"] == manifest_digest(manifest) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def manifest_digest(manifest: dict) -> str:
    """Of all that a manifest says, but for this itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def name_in(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
