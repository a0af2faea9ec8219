"""Find the checkpoint to resume from, and check that it is whole and fits the launch.

`manifest.json` lists a checkpoint's files with their SHA-256, and the options that its position among the batches depends on.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from data.json_files import read_json
from data.listing import file_digest, json_digest
from data.schemas import MANIFEST as MANIFEST_SCHEMA
from data.schemas import TRAINER_STATE
from pipeline.runs.worlds import check_world, fit_batch, recipe_batch, this_world, told


MANIFEST = "manifest.json"
STAGING = ".staging"
NAME = re.compile(PREFIX_CHECKPOINT_DIR + r"-\d+")
# A position among the batches is valid only if these options are unchanged.
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
    """Check and return the checkpoint that `resume_from_checkpoint` asks for, or None to start a new run.

    `auto` is the newest checkpoint in `output_dir`. If it is damaged, this is an error: the user must choose the checkpoint
    to go back to.

    Raises:
        FileNotFoundError: there is no such folder, or one of its files is missing.
        ValueError: the checkpoint is damaged, or was written by a launch or a recipe that this run cannot continue.
    """
    asked = args.resume_from_checkpoint
    if not asked:
        return None
    if asked == "auto":
        found = checkpoints_in(args.output_dir)
        if not found:
            PartialState().print(f"{args.output_dir} holds no checkpoint: training starts from the beginning.")
            return None
        asked = str(found[-1])
    fit_batch(read_manifest(Path(asked)), args)
    manifest = check_checkpoint(asked, args)
    PartialState().print(f"Training resumes from {asked}{told(manifest, args)}.")
    return asked


def launch_entries(args: TrainingArguments) -> dict:
    """Return a manifest's entries about the launch, and about the options that the order of the batches depends on."""
    processes, kind = this_world(args)
    order = {name: getattr(args, name) for name in ORDER if hasattr(args, name)}
    return {"world_size": processes, "kind": kind, "order": order, **recipe_batch(args)}


def check_checkpoint(folder: str | Path, args: TrainingArguments) -> dict:
    """Check that a checkpoint is complete and fits this launch, and return its manifest.

    Raises the errors of `find_checkpoint`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint={str(folder)!r}: no such folder. Name a {PREFIX_CHECKPOINT_DIR}-<step> folder, or "
            f"auto for the newest checkpoint in output_dir."
        )
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(
            f"{folder / MANIFEST}: missing or damaged. The checkpoint cannot be trusted. {other_checkpoint(folder)}"
        )
    names = {name_in(path, folder) for path in files_in(folder)} - {MANIFEST}
    for name, expected in manifest["files"].items():
        path = folder / name
        if name not in names:
            raise FileNotFoundError(
                f"{path}: the file is missing, and the checkpoint's manifest lists it. {other_checkpoint(folder)}"
            )
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes, and the manifest says {expected['bytes']}. The file is cut off or was "
                f"changed. {other_checkpoint(folder)}"
            )
        if file_digest(path) != expected["sha256"]:
            raise ValueError(
                f"{path}: its SHA-256 is not the manifest's. The file is damaged. {other_checkpoint(folder)}"
            )
    unlisted = sorted(names - manifest["files"].keys())
    if unlisted:
        raise ValueError(
            f"{folder / unlisted[0]}: not a file of this checkpoint: its manifest does not list it. Remove it."
        )
    if "optimizer" not in manifest["holds"]:
        raise ValueError(
            f"{folder}: written with save_only_model, and so it holds no state to resume from. {other_checkpoint(folder)}"
        )
    read_json(folder / TRAINER_STATE_NAME, TRAINER_STATE, remedy=other_checkpoint(folder))
    others = {path: found for path in checkpoints_in(folder.parent) if (found := read_manifest(path))}
    checked = check_world(folder, manifest, args, others)
    for name, then in manifest["order"].items():
        now = getattr(args, name, None)
        if name not in checked and now != then:
            raise ValueError(
                f"{folder}: written with {name}={then!r}, and this run has {name}={now!r}, which changes the order of the "
                f"batches. Set {name} as it was, or start a new run."
            )
    return manifest


def other_checkpoint(folder: Path) -> str:
    """Return the remedy for a checkpoint that cannot be used: a sentence with the newest of the others."""
    others = [path for path in checkpoints_in(folder.parent) if path.name != folder.name and read_manifest(path)]
    if not others:
        return "There is no other checkpoint. Start a new run."
    return f"Resume from another checkpoint: --resume_from_checkpoint {others[-1]}"


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders, the newest last: the highest step of the last run.

    The runs of a folder are numbered. A folder without a manifest counts as one of the last run, so that it is noticed.
    """
    folders = [path for path in Path(output_dir).glob("*") if NAME.fullmatch(path.name) and path.is_dir()]
    runs = {path: run_of(path) for path in folders if read_manifest(path)}
    last = max(runs.values(), default=0)
    return sorted(folders, key=lambda path: (runs.get(path, last), int(path.name.rpartition("-")[2]), path.name))


def run_of(folder: Path) -> int:
    """Return the number of the run that wrote a checkpoint; 0 if it does not say, as those of older releases."""
    return (read_manifest(folder) or {}).get("run", 0)


def read_manifest(folder: Path) -> dict | None:
    """Return a checkpoint's manifest, or None if it is missing or damaged."""
    try:
        manifest = read_json(folder / MANIFEST, MANIFEST_SCHEMA)
        return manifest if manifest["sha256"] == manifest_digest(manifest) else None
    except (OSError, ValueError):
        return None


def manifest_digest(manifest: dict) -> str:
    """Return the SHA-256 of the manifest without its own `sha256` field."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return json_digest(rest)


def files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def name_in(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
