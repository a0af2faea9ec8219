"""Check the folders that a run names, before it reads or writes anything large.

Every stage begins with `check_folders`: it reports a wrong path within a second, not after the model is loaded or trained.
"""

import os
import tempfile
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from data.boundaries import real_path
from data.json_files import read_json
from data.saving import SAVED, SAVING, complete
from data.schemas import MODEL_CONFIG
from pipeline.backbone.adapter_config import ADAPTER_CONFIG
from pipeline.backbone.adapters import check_adapter
from pipeline.backbone.loading import check_model_folder
from pipeline.backbone.members import MANIFEST, members_of
from pipeline.runs.manifest import STAGING
from pipeline.runs.ownership import foreign_checkpoints, not_ours


ROOM = 120  # characters of the longest path beneath an output folder


def check_folders(
    output_dir: str,
    model_name_or_path: str | None,
    *,
    policies: tuple[str | None, ...] = (),
    rewards: tuple[str, ...] | list[str] = (),
    leaves_reward: bool | None = None,
    whole: bool = False,
    data: tuple[str | None, ...] = (),
    writes: tuple[str, ...] = (),
    needs_model: bool = True,
) -> None:
    """Check the folders of a run: those of its model and adapters, and the output folder.

    Args:
        policies, rewards: adapters that the run reads; None is an option that is not set.
        leaves_reward: whether the run saves a reward adapter in `output_dir` (True), a policy (False) or none (None).
        whole: whether the reward model that it saves is a whole model, not an adapter.
        data: datasets and reports that the run reads.
        writes: names of the files that the run writes in `output_dir`.
        needs_model: whether the run cannot do without a model.

    Raises the errors of `check_path`, `check_model_folder`, `members_of`, `check_adapter`, `check_output_dir` and
    `check_ours`.
    """
    check_path(output_dir)
    if needs_model or model_name_or_path:
        check_model_folder(model_name_or_path, classifies=bool(leaves_reward))
    rewards = [member for name in rewards if name for member in members_of(name)]
    adapters = [name for name in (*policies, *rewards) if name]
    for number, name in enumerate(adapters):
        check_adapter(name, needs_head=number >= len(adapters) - len(rewards))
    check_output_dir(output_dir, (model_name_or_path, *adapters), leaves_reward, whole=whole)
    check_ours(output_dir, writes, data)


def check_path(output_dir: str) -> None:
    """Check that an output folder can have this path.

    Raises:
        ValueError: the path is not UTF-8, which the writers of weights and tokenizers need, or has a null character.
        OSError: the path is too long, leads round in links, or beneath a folder that this user may not read.
    """
    remedy = "Name another folder."
    try:
        folder = Path(output_dir).expanduser()
        str(folder).encode()
        there = next(path for path in (folder, *folder.absolute().parents) if _is_there(path))
        if folder.is_symlink() and not folder.exists():
            raise FileNotFoundError(f"output_dir={output_dir!r} is a link to nothing ({folder.readlink()}). {remedy}")
        longest = max((len(os.fsencode(part)) for part in folder.parts), default=0)
        limits = os.pathconf(there, "PC_NAME_MAX"), os.pathconf(there, "PC_PATH_MAX")
        if longest > limits[0] or len(os.fsencode(folder.absolute())) + ROOM > limits[1]:
            raise OSError(f"output_dir={output_dir!r}: the path is longer than a path of files may be here. {remedy}")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"output_dir={output_dir!r}: the path is not UTF-8, and files cannot be saved there. {remedy}"
        ) from error
    except ValueError as error:
        raise ValueError(f"output_dir={output_dir!r}: {error}. {remedy}") from error
    except RuntimeError as error:  # of `expanduser`
        raise ValueError(f"output_dir={output_dir!r}: this user has no home folder. {remedy}") from error
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(f"output_dir={output_dir!r}: the path cannot be used ({error.strerror}). {remedy}") from error


def _is_there(path: Path) -> bool:
    """Return `path.exists()`, but raise the errors of a path that can never exist."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_output_dir(
    output_dir: str,
    inputs: tuple[str | None, ...] = (),
    leaves_reward: bool | None = None,
    *,
    whole: bool = False,
) -> None:
    """Check that the run can write into a folder, and that this destroys nothing that must be kept.

    As with Trainer, a run overwrites an earlier run of the same kind, and old checkpoints make room for new ones. `inputs`
    are the folders that the run reads.

    Raises:
        NotADirectoryError: it is a file, or beneath a file.
        OSError: nothing can be written there.
        ValueError: the run would overwrite a folder that it reads, a model, or an adapter of another kind.
    """
    folder = Path(output_dir).expanduser()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"output_dir={output_dir!r}: {there} is a file. Name a folder or a new path.")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        raise OSError(
            f"output_dir={output_dir!r}: nothing can be written in {there} ({error.strerror}). Name another folder, or "
            f"change the permissions of the folder or the disk."
        ) from error
    complete(folder)  # a save that was cut short
    if leaves_reward is None:
        return
    remedy = "Name another folder in output_dir."
    for name in inputs:
        path = real_path(Path(name).expanduser()) if name else None
        if path == real_path(folder):
            raise ValueError(f"output_dir={output_dir!r}: the run reads this folder and would overwrite it. {remedy}")
        if path and path.is_relative_to(real_path(folder)):
            below = path.relative_to(real_path(folder)).parts[0]
            if below == "value" or below.startswith("checkpoint-"):
                raise ValueError(
                    f"output_dir={output_dir!r}: the run reads {name} beneath this folder, and would overwrite or remove "
                    f"it. {remedy}"
                )
    if (folder / "config.json").is_file() and not whole:
        raise ValueError(f"output_dir={output_dir!r} holds a model, and an adapter must not be beside it. {remedy}")
    if whole and (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"output_dir={output_dir!r} holds an adapter, and a model must not be beside it. {remedy}")
    if whole and (folder / "config.json").is_file():
        kinds = read_json(folder / "config.json", MODEL_CONFIG).get("architectures") or []
        if not any("SequenceClassification" in kind for kind in kinds):
            raise ValueError(
                f"output_dir={output_dir!r} holds a model that is no classifier, and this run saves a reward model. {remedy}"
            )
    if (folder / MANIFEST).is_file():
        raise ValueError(
            f"output_dir={output_dir!r} holds an ensemble of reward adapters, and one adapter must not be beside it. {remedy}"
        )
    if (folder / ADAPTER_CONFIG).is_file():
        reward = read_json(folder / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
        if reward != leaves_reward:
            kinds = ("a policy", "a reward or value")
            raise ValueError(
                f"output_dir={output_dir!r} holds {kinds[reward]} adapter, and this run saves {kinds[leaves_reward]} "
                f"adapter. {remedy}"
            )


def check_ours(output_dir: str, writes: tuple[str, ...], reads: tuple[str | None, ...] = ()) -> None:
    """Check that the files which a run writes in its output folder are not there yet, or were written by a run of Spine.

    Args:
        writes: their names.
        reads: datasets and reports that the run reads.

    Raises:
        ValueError: a file of somebody else has one of the names, or the run would write over what it reads.
    """
    folder = Path(output_dir).expanduser()
    remedy = "Name another folder in output_dir"
    for name in reads:
        path = Path(name).expanduser() if name and name != "human_ratings" else None
        if path is None or not path.exists() or not real_path(path).is_relative_to(real_path(folder)):
            continue
        beneath = real_path(path).relative_to(real_path(folder))
        if not beneath.parts:
            raise ValueError(
                f"output_dir={output_dir!r}: the run reads this folder and would write into it. {remedy}."
            )
        first = beneath.parts[0]
        within = first in (STAGING, SAVING, SAVED, "completions") or first.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        if within or beneath.as_posix() in writes:
            raise ValueError(
                f"output_dir={output_dir!r}: the run reads {name} beneath this folder, and would overwrite or remove it. "
                f"{remedy}."
            )
    if folder.is_dir():
        _refuse(output_dir, not_ours(folder, writes), "overwrite")


def check_checkpoints(output_dir: str) -> None:
    """Check that what is called like a checkpoint in the output folder of a new run is one of Spine's.

    Raises:
        ValueError: there is one without a manifest of Spine, or with a damaged one.
    """
    _refuse(output_dir, foreign_checkpoints(Path(output_dir)), "write over")


def _refuse(output_dir: str, names: list[str], does: str) -> None:
    if names:
        named = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ValueError(
            f"output_dir={output_dir!r} holds {named}, which no run of Spine has written in this form, and this run would "
            f"{does}. Name another folder in output_dir, or move what is yours to another place."
        )
