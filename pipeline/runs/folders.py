"""What must be true of the folders that a run names before anything of size is read from them or written to them.

Every stage begins with `check_folders`: a wrong path is said in a second, not after the model was loaded or trained.
"""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

from pipeline.backbone.gguf import SMOLLM2, is_gguf


ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Where peft keeps the head of a sequence-classification adapter (`modules_to_save=["score"]`).
HEAD = "base_model.model.score.weight"
# Fields of an adapter's config with which peft changes the base as it loads the adapter, and the values with which not.
LEAVES_BASE = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
}


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


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Restore the file, or the folder it is in.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object. Restore the file, or the folder it is in.")
    return found


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON, which every reader takes: a number that is not finite, and so nothing that was measured, is null."""
    Path(path).write_text(json.dumps(_strict(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_to_umask(folder: str | Path) -> None:
    """Give the safetensors of a folder the mode that the user's umask gives a new file: safetensors writes them through a
    temporary file, which is its owner's alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in Path(folder).rglob("*.safetensors"):
        path.chmod(0o666 & ~umask)


# ----------------------------------------------------------------------------------------------- what is read
def check_model_folder(name: str | None) -> None:
    """Check a model's folder or GGUF file, as far as it can be seen without loading the model; `smollm2` and a hub id are
    left to those who fetch them.

    Raises:
        FileNotFoundError: there is no such folder or file, or the folder holds no tokenizer, or no safetensors.
        ValueError: no model is named; or the folder is an adapter's; or the file does not begin as GGUF does.
    """
    if name is None:
        raise ValueError("model_name_or_path is not set; name a hub id or a folder, such as data/backbone.")
    folder = Path(name).expanduser()
    if is_gguf(name):
        if not folder.is_file():
            raise FileNotFoundError(f"model_name_or_path={name!r}: there is no such file. Correct the path.")
        with folder.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(
                    f"model_name_or_path={name!r}: not a GGUF file (it does not begin so). Download it anew."
                )
        return
    if name == SMOLLM2:
        return
    if not folder.is_dir():
        if name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"model_name_or_path={name!r}: there is no such folder.")
        return
    if (folder / ADAPTER_CONFIG).is_file():  # transformers would load its base and put the adapter on it
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise ValueError(
            f"model_name_or_path={name!r} is the folder of an adapter, not of a model. Name its base there ({base}), and "
            f"the adapter as sft_adapter, reward_adapter or policy_adapter."
        )
    kinds = (
        (read_json(folder / "config.json").get("architectures") or []) if (folder / "config.json").is_file() else []
    )
    if kinds and all("ForSequenceClassification" in str(kind) for kind in kinds):
        raise ValueError(
            f"{folder}: the model folder holds a classifier ({kinds[0]}), which has no head to write text with. Name the "
            f"language model that it was made from in model_name_or_path; its adapter goes into reward_adapter."
        )
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")):
        raise FileNotFoundError(
            f"{folder}: the model folder has no tokenizer (tokenizer.json). Save it there with "
            f"`tokenizer.save_pretrained({str(folder)!r})`."
        )
    if not any(folder.glob("*.safetensors")):
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        found = f"only {pickled.name}, a pickle, which is not read" if pickled else "no weights"
        raise FileNotFoundError(
            f"{folder}: the model folder has no model.safetensors ({found}). Save the model there with "
            f"`model.save_pretrained({str(folder)!r})`."
        )


def adapter_folder(name: str) -> Path:
    """The local folder of an adapter: itself, or what the hub gives for `owner/name` or `owner/name@revision`, where a
    revision is a branch, a tag or a commit. Only JSON and safetensors are fetched.

    Raises:
        FileNotFoundError: there is no such folder, and the hub does not give such an adapter.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.exists():
        raise FileNotFoundError(
            f"{path / ADAPTER_CONFIG}: no such file. Name the folder that `trainer.save_model` wrote ({ADAPTER_CONFIG} "
            f"and {WEIGHTS}); an adapter on the hub is `owner/name`, or `owner/name@revision`."
        )
    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=["*.json", "*.safetensors"])
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(". ")
        raise FileNotFoundError(
            f"{name}: no such folder (looked for {path.absolute()}), and no such adapter on the hub ({reason}). Train the "
            f"adapter first, or correct the path; a private adapter needs `hf auth login`."
        ) from error


def check_adapter(name: str, *, needs_head: bool | None) -> Path:
    """Check that a name is that of a LoRA adapter, by its config and the header of its weights; returns the local
    folder. With `needs_head` it must have a score head (True) or must not (False); None is either.

    Raises:
        FileNotFoundError: the folder, its config or its safetensors file is missing.
        ValueError: a file is damaged; not a LoRA adapter, or one that changes its base too; its head is missing, or has
            no business here.
    """
    folder = adapter_folder(name)
    for file in (ADAPTER_CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            model = any(folder.glob("model*.safetensors"))
            hint = ""
            if model and needs_head:
                hint = " This is a whole model; a reward model is read as a LoRA adapter on the backbone alone."
            elif model:
                hint = " This is a whole model: a merged one goes into model_name_or_path."
            raise FileNotFoundError(
                f"{folder / file}: no such file. Name the folder that `trainer.save_model` wrote ({ADAPTER_CONFIG} "
                f"and {WEIGHTS}).{hint}"
            )
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{name}: the adapter is of type {config.get('peft_type')}, not LORA.")
    for field, harmless in LEAVES_BASE.items():
        value = config.get(field, harmless[0])
        if value not in harmless:
            raise ValueError(
                f"{name}: {ADAPTER_CONFIG} has {field}={value!r}, by which the adapter changes the backbone itself, and all "
                f"roles share it. Train one with {field}={harmless[0]!r}, or merge this one into a model of its own and name "
                f"that in model_name_or_path."
            )
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            head = file.get_slice(HEAD).get_shape() if HEAD in file.keys() else None  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise damaged(folder / WEIGHTS, error) from error
    if needs_head and head is None:
        raise ValueError(
            f"{name}: {WEIGHTS} holds no score head ({HEAD}), so it cannot score. Train the reward adapter with "
            f"modules_to_save=['score'] (pipeline.reward does)."
        )
    if needs_head and head[0] != 1:
        raise ValueError(f"{name}: the score head has {head[0]} outputs; a reward adapter has 1 (num_labels=1).")
    if head is not None and needs_head is False:
        raise ValueError(
            f"{name}: {WEIGHTS} holds a score head ({HEAD}): it is a reward or value adapter, and no policy starts from "
            f"one. Name the adapter of pipeline.sft, and this one as reward_adapter."
        )
    return folder


def damaged(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(
        f"{path}: damaged, as a copy or a download that was cut short leaves it ({error}). Copy or train it anew."
    )


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
