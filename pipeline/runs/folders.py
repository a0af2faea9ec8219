"""Check the folders that a run names, before it reads or writes anything large.

Every stage begins with `check_folders`: it reports a wrong path within a second, not after the model is loaded or trained.
"""

import os
import tempfile
from pathlib import Path

from data.json_files import read_json
from pipeline.backbone.adapters import ADAPTER_CONFIG, check_adapter
from pipeline.backbone.loading import check_model_folder


def check_folders(
    output_dir: str,
    model_name_or_path: str | None,
    *,
    policies: tuple[str | None, ...] = (),
    rewards: tuple[str, ...] | list[str] = (),
    leaves_reward: bool | None = None,
) -> None:
    """Check the folders of a run: those of its model and adapters, and the output folder.

    Args:
        policies, rewards: adapters that the run reads; None is an option that is not set.
        leaves_reward: whether the run saves a reward adapter in `output_dir` (True), a policy (False) or none (None).

    Raises the errors of `check_model_folder`, `check_adapter` and `check_output_dir`.
    """
    check_model_folder(model_name_or_path)
    adapters = [name for name in (*policies, *rewards) if name]
    for number, name in enumerate(adapters):
        check_adapter(name, needs_head=number >= len(adapters) - len(rewards))
    check_output_dir(output_dir, (model_name_or_path, *adapters), leaves_reward)


def open_to_umask(folder: str | Path) -> None:
    """Give the safetensors of a folder the permissions that the user's umask gives a new file.

    safetensors writes through a temporary file, which only its owner can read.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for path in Path(folder).rglob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def check_output_dir(output_dir: str, inputs: tuple[str | None, ...] = (), leaves_reward: bool | None = None) -> None:
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
    if leaves_reward is None:
        return
    remedy = "Name another folder in output_dir."
    for name in inputs:
        path = Path(name).expanduser().resolve() if name else None
        if path == folder.resolve():
            raise ValueError(f"output_dir={output_dir!r}: the run reads this folder and would overwrite it. {remedy}")
        if path and path.is_relative_to(folder.resolve()):
            below = path.relative_to(folder.resolve()).parts[0]
            if below == "value" or below.startswith("checkpoint-"):
                raise ValueError(
                    f"output_dir={output_dir!r}: the run reads {name} beneath this folder, and would overwrite or remove "
                    f"it. {remedy}"
                )
    if (folder / "config.json").is_file():
        raise ValueError(f"output_dir={output_dir!r} holds a model, and an adapter must not be beside it. {remedy}")
    if (folder / ADAPTER_CONFIG).is_file():
        reward = read_json(folder / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
        if reward != leaves_reward:
            kinds = ("a policy", "a reward or value")
            raise ValueError(
                f"output_dir={output_dir!r} holds {kinds[reward]} adapter, and this run saves {kinds[leaves_reward]} "
                f"adapter. {remedy}"
            )
