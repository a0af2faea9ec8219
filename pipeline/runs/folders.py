"""What must be true of the folders that a run names before anything of size is read from them or written to them.

Every stage begins with `check_folders`: a wrong path is said in a second, not after the model was loaded or trained.
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
    """Check the folders of a run: those of its model and adapters, and the one that it writes.

    Args:
        policies, rewards: adapters that the run reads; None is one that is not set.
        leaves_reward: whether it leaves a reward adapter in `output_dir` (True), a policy (False) or none (None).

    Raises what `check_model_folder`, `check_adapter` and `check_output_dir` raise.
    """
    check_model_folder(model_name_or_path)
    adapters = [name for name in (*policies, *rewards) if name]
    for number, name in enumerate(adapters):
        check_adapter(name, needs_head=number >= len(adapters) - len(rewards))
    check_output_dir(output_dir, (model_name_or_path, *adapters), leaves_reward)


def open_to_umask(folder: str | Path) -> None:
    """Give the safetensors of a folder the mode that the user's umask gives a new file: safetensors writes them through a
    temporary file, which is its owner's alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in Path(folder).rglob("*.safetensors"):
        path.chmod(0o666 & ~umask)


# ----------------------------------------------------------------------------------------------- what is read


# ----------------------------------------------------------------------------------------------- what is written
def check_output_dir(output_dir: str, inputs: tuple[str | None, ...] = (), leaves_reward: bool | None = None) -> None:
    """Check that a folder can be written, and that what is there is not lost by it.

    As with Trainer, an earlier run of the same kind is written over, and checkpoints make room for later ones. `inputs`
    are what the run reads.

    Raises:
        NotADirectoryError: it is a file, or beneath one.
        OSError: nothing can be written there.
        ValueError: the run would write over what it reads, a model, or an adapter of another kind.
    """
    folder = Path(output_dir).expanduser()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"output_dir={output_dir!r}: {there} is a file. Name a folder, or a new one.")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        raise OSError(
            f"output_dir={output_dir!r}: nothing can be written in {there} ({error.strerror}). Name another folder, or "
            f"change its permissions or the disk's."
        ) from error
    if leaves_reward is None:
        return
    remedy = "Name another folder in output_dir."
    for name in inputs:
        path = Path(name).expanduser().resolve() if name else None
        if path == folder.resolve():
            raise ValueError(f"output_dir={output_dir!r}: the run reads this folder and would write over it. {remedy}")
        if path and path.is_relative_to(folder.resolve()):
            below = path.relative_to(folder.resolve()).parts[0]
            if below == "value" or below.startswith("checkpoint-"):
                raise ValueError(
                    f"output_dir={output_dir!r}: the run reads {name} beneath it, and would write over it or remove it. "
                    f"{remedy}"
                )
    if (folder / "config.json").is_file():
        raise ValueError(f"output_dir={output_dir!r} holds a model, which an adapter must not lie beside. {remedy}")
    if (folder / ADAPTER_CONFIG).is_file():
        reward = read_json(folder / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
        if reward != leaves_reward:
            kinds = ("a policy", "a reward or value")
            raise ValueError(
                f"output_dir={output_dir!r} holds {kinds[reward]} adapter, and this run leaves {kinds[leaves_reward]} "
                f"adapter. {remedy}"
            )
